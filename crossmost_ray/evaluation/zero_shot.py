"""Model folders and labelled shards in, their accuracies out; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crossmost_ray.config import ConfigError, EvaluateConfig, resolve_path
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.adaptation import METRICS_NAME, PREDICTIONS_NAME
from crossmost_ray.evaluation.cluster import predict, write_predictions
from crossmost_ray.evaluation.report import summarize
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.training.worker import write_whole


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
    classes = class_names(config.classes, next(iter(config.splits.values())))
    table = predict(
        config.models,
        config.splits,
        classes=classes,
        templates=config.templates,
        num_points=config.num_points,
        config=config.evaluation,
        use_gpu=config.use_gpu,
    )
    summary = summarize(table, classes, confident=config.evaluation.confident)
    folder = resolve_path(config.output) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(table, folder / PREDICTIONS_NAME)
        write_whole(folder / METRICS_NAME, json.dumps(summary, indent=1) + "\n")
    except OSError as refused:
        raise ConfigError(
            f"the folder {folder} can't be written ({refused.strerror}); mend `output`"
        ) from None
    return folder, summary
