"""Model folders and labelled shards in, their accuracies out; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmost_ray.config import ConfigError, EvaluateConfig, EvaluationConfig, resolve_path
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.cluster import predict, write_predictions
from crossmost_ray.evaluation.report import summarize
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.training.worker import write_whole

METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.parquet"


def measure(
    models: Mapping[str, str],
    splits: Mapping[str, str],
    folder: Path,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    num_points: int,
    config: EvaluationConfig,
    use_gpu: bool,
) -> dict[str, Any]:
    """Asks every model about every split, and writes predictions and metrics into a folder.

    The arguments but `folder` are those of `predict`.

    Returns:
        The metrics, as `metrics.json` holds them.
    """
    table = predict(
        models,
        splits,
        classes=classes,
        templates=templates,
        num_points=num_points,
        config=config,
        use_gpu=use_gpu,
    )
    summary = summarize(table, classes, confident=config.confident)
    write_predictions(table, folder / PREDICTIONS_NAME)
    write_whole(folder / METRICS_NAME, json.dumps(summary, indent=1) + "\n")
    return summary


def evaluate(config: EvaluateConfig) -> tuple[Path, dict[str, Any]]:
    """Measures every model on every split.

    Args:
        config: Models, shards, classes and prompts.

    Returns:
        The folder of the results and the metrics, as `metrics.json` holds them.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    for path in config.models.values():
        load_model(path)  # a damaged folder is refused here, not in an actor
    folder = resolve_path(config.output) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        raise ConfigError(
            f"the folder {folder} can't be written ({refused.strerror}); mend `output`"
        ) from None
    summary = measure(
        config.models,
        config.splits,
        folder,
        classes=class_names(config.classes, next(iter(config.splits.values()))),
        templates=config.templates,
        num_points=config.num_points,
        config=config.evaluation,
        use_gpu=config.use_gpu,
    )
    return folder, summary
