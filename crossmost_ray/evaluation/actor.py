"""A shard in, a file of predictions out: the process that holds the models."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crossmost_ray.config import ConfigError
from crossmost_ray.data.shards import BadRow, read_batches
from crossmost_ray.evaluation.plan import EVALUATION_COLUMNS, Plan, Unit, variant_name
from crossmost_ray.evaluation.predictor import EvaluationBatch, Predictor
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.storage import Store

SUMS_KEY = "crossmost_ray"
"""Of the Parquet file's own key-value metadata: JSON of what no row holds."""

Result = TypeVar("Result")


def one_ahead(results: Iterator[Result]) -> Iterator[Result]:
    """Computes the next result in a thread while its reader works on this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, results, None)
        while (result := coming.result()) is not None:
            coming = thread.submit(next, results, None)
            yield result


class ShardPredictor:
    """Asks all models about one shard after the other, and writes each one's predictions.

    A file of predictions appears whole, once all objects of its shard are done. So a shard whose
    process died on the way is asked about anew, and no object has two rows, whatever happens.

    Args:
        plan: What is asked.
        results: Where predictions go.
        use_gpu: Whether the models go to this process's GPU.
    """

    def __init__(self, plan: Plan, results: Store, *, use_gpu: bool) -> None:
        self.plan = plan
        self.results = results
        self.use_gpu = use_gpu
        torch.set_num_threads(plan.config.threads_per_actor)
        self.folder = functools.cache(load_model)
        self.predictor = functools.cache(self._predictor)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Takes one unit, a row as `unit_row` writes it, and tells what became of it.

        What a user can cure is told in `refused`: raised here, it would reach them as the
        traceback of an actor, and Ray would try the same again.
        """
        (row,) = table.to_pylist()
        try:
            unit, objects, refused = self._unit(row), 0, ""
            objects = self.run(unit)
        except ConfigError as error:
            refused = str(error)
        return pa.Table.from_pylist([{"objects": objects, "refused": refused}])

    def run(self, unit: Unit) -> int:
        """Writes the predictions for one shard.

        Returns:
            Objects that were asked about.

        Raises:
            ConfigError: If the shard, a row of it or a model can't be read, or the results can't
                be written.
        """
        predictor = self.predictor(unit.split)
        schema = predictor.schema.insert(0, pa.field("split", pa.string()))
        sums: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
        left_out: list[BadRow] = []
        objects = 0
        stream = pa.BufferOutputStream()
        with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            for batch in one_ahead(self._batches(unit, predictor)):
                answers = predictor.ask(batch)
                split = pa.array([unit.variant] * answers.table.num_rows, pa.string())
                writer.write_table(answers.table.add_column(0, schema.field(0), split))
                for model, by_opinion in answers.probability.items():
                    total = sums.setdefault(model, {})
                    for opinion, probability in by_opinion.items():
                        total[opinion] = total.get(opinion, 0.0) + probability
                left_out += batch.left_out
                objects += len(batch.object_id)
            writer.add_key_value_metadata({SUMS_KEY: _encode(sums, left_out)})
        self.results.write(unit.path, stream.getvalue().to_pybytes())
        return objects

    def _batches(self, unit: Unit, predictor: Predictor) -> Iterator[EvaluationBatch]:
        shards, at_once = self.plan.splits[unit.split].shards, self.plan.config.batch_size
        for first, rows in read_batches(shards, unit.name, EVALUATION_COLUMNS, at_once=at_once):
            yield predictor.decode(
                pa.Table.from_batches([rows]),
                corruption=unit.corruption,
                shard=f"{unit.split}: {unit.name}",
                first=first,
            )

    def _predictor(self, split: str) -> Predictor:
        asked = self.plan.splits[split]
        return Predictor(
            {name: self.folder(path) for name, path in self.plan.folders(split).items()},
            asked.classes,
            asked.templates,
            asked.num_points,
            self.plan.config,
            use_gpu=self.use_gpu,
        )

    def _unit(self, row: dict[str, Any]) -> Unit:
        variants = {variant_name(*variant): variant for variant in self.plan.variants}
        split, corruption = variants[row["variant"]]
        return Unit(split, row["name"], corruption)


def unit_row(unit: Unit) -> dict[str, str]:
    """Writes a unit as plain values, for a Ray Dataset."""
    return {"variant": unit.variant, "name": unit.name}


def _encode(sums: dict[str, dict[str, npt.NDArray[np.float64]]], left_out: list[BadRow]) -> str:
    return json.dumps(
        {
            "probability": {
                model: {opinion: probability.tolist() for opinion, probability in total.items()}
                for model, total in sums.items()
            },
            "left_out": [str(bad) for bad in left_out],
        }
    )
