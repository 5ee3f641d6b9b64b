"""What the published code does with test labels: offered to reproduce its numbers, never a default.

Nothing that learns or chooses reads a label elsewhere in this package.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from crossmost_ray.config import AdaptConfig, EvaluationConfig
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.cluster import predict
from crossmost_ray.evaluation.report import summarize
from crossmost_ray.training.checkpoint import list_checkpoints
from crossmost_ray.training.export import export_adapted


def evaluation_config(config: AdaptConfig) -> EvaluationConfig:
    """Gives the evaluation of a run, as `compat.test_view` wants it."""
    random_view = config.evaluation.random_view or config.compat.test_view == "random"
    return replace(config.evaluation, random_view=random_view)


def oracle_checkpoint(config: AdaptConfig, folder: Path) -> Path:
    """Finds the checkpoint whose student names most objects of the test split by their points.

    It reads the labels of the split that the report is about: the number it leads to is no
    estimate of anything, and stands here because published numbers were chosen so.

    Args:
        config: The run's, with `data.test_shards`.
        folder: Of the run, with a checkpoint for each epoch.

    Returns:
        The first of the best checkpoints.

    Raises:
        ConfigError: If a checkpoint or the split can't be read.
    """
    assert config.data.test_shards is not None, "the config has seen to it"
    classes = class_names(config.data.classes, config.data.shards)
    accuracy = {}
    for checkpoint in list_checkpoints(folder):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".oracle-") as scratch:
            student = export_adapted(config, checkpoint, Path(scratch))["student"]
            table = predict(
                {"student": str(student)},
                {"test": config.data.test_shards},
                classes=classes,
                templates=config.data.templates,
                num_points=config.data.num_points,
                config=evaluation_config(config),
                use_gpu=config.cluster.use_gpu,
            )
        summary = summarize(table, classes, confident=config.evaluation.confident)
        accuracy[checkpoint] = summary["splits"]["test"]["student"]["point"]["top1"]
    return max(accuracy, key=accuracy.__getitem__)
