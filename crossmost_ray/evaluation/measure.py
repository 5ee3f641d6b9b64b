"""Model folders and shards in; predictions, metrics and the report out. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crossmost_ray.config import EvaluateConfig, EvaluationConfig
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.cluster import predict
from crossmost_ray.evaluation.counts import count_units
from crossmost_ray.evaluation.plan import Split, make_plan
from crossmost_ray.evaluation.report import markdown
from crossmost_ray.evaluation.summary import confusion_table, summarize
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.storage import Store

METRICS_NAME = "metrics.json"
REPORT_NAME = "report.md"
CONFUSION_NAME = "confusion.parquet"


def measure(
    models: Mapping[str, str],
    splits: Mapping[str, Split],
    results: Store,
    *,
    config: EvaluationConfig,
    use_gpu: bool = False,
    overwrite: bool = False,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Asks every model about every split, and writes predictions and metrics into a folder.

    Args:
        models: Model folders by the name that the report gives them.
        splits: Folders of shards, and what is asked about them, by the name of the split.
        results: The folder.
        config: Views, samples, corruptions, actors.
        use_gpu: Whether each actor takes a GPU.
        overwrite: Replaces another measurement's predictions.
        env: Environment variables of the actors.

    Returns:
        The metrics, as `metrics.json` holds them; see `summarize`.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    plan = make_plan(models, splits, config)
    for path in dict.fromkeys(path for name in splits for path in plan.folders(name).values()):
        load_model(path)  # a damaged folder is refused here, not in an actor
    units = predict(plan, results, use_gpu=use_gpu, overwrite=overwrite, env=env)
    counted = count_units(units, plan, results, confident=config.confident)
    classes = {name: split.classes for name, split in plan.splits.items()}
    summary = summarize(counted, classes, list(plan.models))
    stream = pa.BufferOutputStream()
    pq.write_table(confusion_table(counted, classes), stream)
    results.write(CONFUSION_NAME, stream.getvalue().to_pybytes())
    results.write(REPORT_NAME, markdown(summary))
    # Last: who finds it finds all of the rest.
    results.write(METRICS_NAME, json.dumps(summary, indent=1) + "\n")
    return summary


def evaluate(config: EvaluateConfig) -> tuple[Store, dict[str, Any]]:
    """Measures every model on every split.

    Args:
        config: Models, shards, classes and prompts.

    Returns:
        The folder of the results and the metrics, as `metrics.json` holds them.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    splits = {
        name: Split(
            shards=split.shards,
            classes=tuple(class_names(split.classes or config.classes, split.shards)),
            templates=tuple(split.templates or config.templates),
            num_points=split.num_points or config.num_points,
        )
        for name, split in config.splits.items()
    }
    results = Store(config.output).child(config.name)
    summary = measure(
        config.models,
        splits,
        results,
        config=config.evaluation,
        use_gpu=config.use_gpu,
        overwrite=config.overwrite,
        env=config.env,
    )
    return results, summary
