"""Rows of metrics in, curves out: in TensorBoard always, in MLflow and Weights & Biases on wish."""
