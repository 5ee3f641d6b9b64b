"""Model folders and folders of shards in, one table of predictions out, over the cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from crossmost_ray.cluster import connect
from crossmost_ray.config import ConfigError, EvaluationConfig
from crossmost_ray.data.shards import list_shards
from crossmost_ray.data.stream import read_rows
from crossmost_ray.evaluation.predictor import Predictor

EVALUATION_COLUMNS = ("object_id", "label", "points", "views")


def predict(
    models: Mapping[str, str],
    splits: Mapping[str, str],
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    num_points: int,
    config: EvaluationConfig,
    use_gpu: bool = False,
) -> pa.Table:
    """Asks every model about every object.

    Args:
        models: Model folders by the name that the report gives them.
        splits: Folders of shards by the name of the split.
        classes: C names.
        templates: Prompts of the zero-shot classifiers.
        num_points: Points of a cloud that the models see.
        config: Views, samples, actors.
        use_gpu: Whether each actor takes a GPU.

    Returns:
        One row per object and model, sorted by split, model and object: `split`, `object_id`,
        `label`, `model`, and for each opinion the ranked classes and the confidence.

    Raises:
        ConfigError: If a folder of shards or a model can't be read.
    """
    files = {
        str(file): split
        for split, shards in splits.items()
        for file in list_shards(shards, EVALUATION_COLUMNS)
    }
    connect()
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if config.num_actors + 1 > cpus:
        raise ConfigError(
            f"evaluation.num_actors {config.num_actors} takes {config.num_actors} of the cluster's "
            f"{cpus:g} CPUs, and 1 must be left to read the shards"
        )
    rows = read_rows([Path(file) for file in files], EVALUATION_COLUMNS, include_paths=True)
    blocks = rows.map_batches(
        Predictor,
        fn_constructor_kwargs={
            "models": dict(models),
            "classes": list(classes),
            "templates": list(templates),
            "num_points": num_points,
            "config": config,
        },
        batch_format="pyarrow",
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
        zero_copy_batch=True,
    )
    table = pa.concat_tables(list(blocks.iter_batches(batch_format="pyarrow", batch_size=None)))
    known = [files[path if path in files else f"/{path}"] for path in table["path"].to_pylist()]
    table = table.drop_columns(["path"]).add_column(0, "split", pa.array(known, pa.string()))
    return table.sort_by([(name, "ascending") for name in ("split", "model", "object_id")])


def write_predictions(table: pa.Table, path: Path) -> None:
    """Writes predictions as Parquet, whole or not at all."""
    fresh = path.with_name(f".{path.name}")
    pq.write_table(table, fresh)
    os.replace(fresh, path)
