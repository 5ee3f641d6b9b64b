"""Files of predictions in, one after the other, and their counts out, which add up: what is in
memory does not grow with the number of objects."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossmost_ray.config import ConfigError
from crossmost_ray.evaluation.actor import SUMS_KEY
from crossmost_ray.evaluation.plan import Plan, Unit
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.storage import Store
from crossmost_ray.tally import Calibration, Census, Pair, Tally, calibrate, compare, tally

Key = TypeVar("Key")
Value = TypeVar("Value", int, Pair, "OpinionCounts")


MOST_COMPARED = 12
"""Models up to which any two of them are compared."""


@dataclass(frozen=True)
class OpinionCounts:
    """How one opinion of one model fares."""

    tally: Tally
    calibration: Calibration
    census: Census

    def __add__(self, other: OpinionCounts) -> OpinionCounts:
        """Counts the objects of both."""
        return OpinionCounts(
            self.tally + other.tally,
            self.calibration + other.calibration,
            self.census + other.census,
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is counted of the objects of one split, or of a part of it."""

    objects: int = 0
    """Objects that were asked about."""
    labelled: int = 0
    """Those of them whose label is one of the classes."""
    other_labels: int = 0
    """Those whose label is none of the classes."""
    left_out: int = 0
    """Rows that could not be used; they are not among the objects."""
    opinions: dict[tuple[str, str], OpinionCounts] = field(default_factory=dict)
    """By model and opinion."""
    agreement: dict[str, int] = field(default_factory=dict)
    """By model: objects of which both towers say the same."""
    pairs: dict[tuple[str, str, str], Pair] = field(default_factory=dict)
    """By model, a later model, and opinion."""

    def __add__(self, other: Counts) -> Counts:
        """Counts the objects of both."""
        return Counts(
            objects=self.objects + other.objects,
            labelled=self.labelled + other.labelled,
            other_labels=self.other_labels + other.other_labels,
            left_out=self.left_out + other.left_out,
            opinions=_add(self.opinions, other.opinions),
            agreement=_add(self.agreement, other.agreement),
            pairs=_add(self.pairs, other.pairs),
        )


def _add(left: Mapping[Key, Value], right: Mapping[Key, Value]) -> dict[Key, Value]:
    total = dict(left)
    for key, value in right.items():
        total[key] = total[key] + value if key in total else value
    return total


def count_units(
    units: Iterable[Unit], plan: Plan, results: Store, *, confident: float
) -> dict[str, Counts]:
    """Counts the predictions for every split and every variant of it.

    Raises:
        ConfigError: If a file of predictions is damaged.
    """
    total: dict[str, Counts] = {}
    for unit in units:
        classes = plan.splits[unit.split].classes
        try:
            with pq.ParquetFile(results.open_input(unit.path)) as file:
                read = count_file(file, list(plan.models), classes, confident=confident)
        except (pa.ArrowException, OSError, KeyError, ValueError) as broken:
            reason = str(broken).partition("\n")[0]
            raise ConfigError(
                f"{results}/{unit.path} is damaged ({reason}); remove it, and the same command "
                "will ask about its shard anew"
            ) from None
        total[unit.variant] = total.get(unit.variant, Counts()) + read
    return total


def count_file(
    file: pq.ParquetFile, models: Sequence[str], classes: Sequence[str], *, confident: float
) -> Counts:
    """Counts what one file of predictions holds.

    Raises:
        ValueError: If its rows are not one for each object and model.
    """
    columns = ["object_id", "label", "model"]
    for opinion in OPINIONS:
        columns += [f"{kind}_{opinion}" for kind in ("ranked", "confidence", "entropy")]
    stored = json.loads(file.metadata.metadata[SUMS_KEY.encode()])
    counted = count_table(
        file.read(columns=columns),
        models,
        classes,
        probability=stored["probability"],
        confident=confident,
    )
    return counted + Counts(left_out=len(stored["left_out"]))


def count_table(
    table: pa.Table,
    models: Sequence[str],
    classes: Sequence[str],
    *,
    probability: Mapping[str, Mapping[str, Sequence[float]]],
    confident: float,
) -> Counts:
    """Counts predictions.

    Args:
        table: One row per object and model.
        models: M names.
        classes: C names.
        probability: By model and opinion: (C,) sum of the objects' probabilities; may lack what
            has no objects.
        confident: A confidence above this counts as confident.

    Raises:
        ValueError: If the rows are not one for each object and model.
    """
    names = pa.array(classes, pa.string())
    rows = {model: table.filter(pc.field("model") == model) for model in models}
    ids = rows[models[0]]["object_id"].to_pylist()
    if any(part["object_id"].to_pylist() != ids for part in rows.values()):
        raise ValueError("the models were not asked about the same objects")
    labels = rows[models[0]]["label"]
    label = _places(labels, names)
    known = label >= 0
    ranked = {
        (model, opinion): _ranked(part, opinion, names)
        for model, part in rows.items()
        for opinion in OPINIONS
    }
    right = {key: order[known, 0] == label[known] for key, order in ranked.items()}
    opinions = {}
    for (model, opinion), order in ranked.items():
        confidence = rows[model][f"confidence_{opinion}"].to_numpy()
        opinions[model, opinion] = OpinionCounts(
            tally(label, order, len(classes)),
            calibrate(confidence[known], right[model, opinion]),
            Census(
                objects=len(ids),
                confidence=float(confidence.sum(dtype=np.float64)),
                entropy=float(rows[model][f"entropy_{opinion}"].to_numpy().sum(dtype=np.float64)),
                confident=int((confidence > confident).sum()),
                predicted=np.bincount(order[:, 0], minlength=len(classes)).astype(np.int64),
                probability=np.array(
                    probability.get(model, {}).get(opinion, np.zeros(len(classes))), np.float64
                ),
            ),
        )
    return Counts(
        objects=len(ids),
        labelled=int(known.sum()),
        other_labels=len(ids) - int(known.sum()) - labels.null_count,
        opinions=opinions,
        agreement={
            model: int((ranked[model, "image"][:, 0] == ranked[model, "point"][:, 0]).sum())
            for model in models
        },
        pairs={
            (before, after, opinion): compare(right[before, opinion], right[after, opinion])
            for before, after in compared(models)
            for opinion in OPINIONS
        },
    )


def compared(models: Sequence[str]) -> list[tuple[str, str]]:
    """Lists which models are compared, an earlier with a later: any two, or, where there are many,
    each with the first. The trials of a large sweep would make half a million pairs."""
    if len(models) <= MOST_COMPARED:
        return list(itertools.combinations(models, 2))
    return [(models[0], model) for model in models[1:]]


def _places(values: pa.ChunkedArray, names: pa.Array) -> npt.NDArray[np.int64]:
    """Gives the places of names among the classes; -1 for none of them."""
    place: Any = pc.fill_null(pc.index_in(values, value_set=names, skip_nulls=True), -1)
    return place.to_numpy().astype(np.int64)


def _ranked(rows: pa.Table, opinion: str, names: pa.Array) -> npt.NDArray[np.int64]:
    """Gives (B, K) places of the ranked classes.

    Raises:
        ValueError: If a class is unknown.
    """
    flat = _places(pc.list_flatten(rows[f"ranked_{opinion}"]), names)
    if (flat < 0).any():
        raise ValueError("it ranks classes that were not asked for")
    return flat.reshape(rows.num_rows, -1) if rows.num_rows else flat.reshape(0, 1)
