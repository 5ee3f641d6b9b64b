"""A config in, an adapted and measured model out: training, model folders, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crossmost_ray.config import AdaptConfig
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.measure import measure
from crossmost_ray.evaluation.oracle import evaluation_config, oracle_checkpoint
from crossmost_ray.evaluation.report import OPEN_SET, ZERO_SHOT
from crossmost_ray.training.export import export_adapted
from crossmost_ray.training.trainer import train


def adapt_and_evaluate(config: AdaptConfig, *, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Adapts a model, then measures zero-shot, teacher and student on every split.

    Args:
        config: The run.
        resume: Go on with the run of this name.

    Returns:
        The run's folder and its metrics, as `metrics.json` holds them.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    checkpoint = train(config, resume=resume)
    folder = checkpoint.parent
    if config.compat.select_on == "oracle_test_points":
        checkpoint = oracle_checkpoint(config, folder)
    models = export_adapted(config, checkpoint, folder)
    splits = {"transductive": config.data.shards}
    if config.data.test_shards is not None:
        splits["test"] = config.data.test_shards
    if config.data.open_set_shards is not None:
        splits[OPEN_SET] = config.data.open_set_shards
    summary = measure(
        {ZERO_SHOT: config.model, **{name: str(path) for name, path in models.items()}},
        splits,
        folder,
        classes=class_names(config.data.classes, config.data.shards),
        templates=config.data.templates,
        num_points=config.data.num_points,
        config=evaluation_config(config),
        use_gpu=config.cluster.use_gpu,
    )
    return folder, summary
