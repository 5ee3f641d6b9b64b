"""One config in, the whole comparison out: both directions, several seeds, CrossMoST beside the
baseline, so that every labelled object is tested by a model that never saw it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossmost_ray.config import AdaptConfig, ConfigError, Mode
from crossmost_ray.evaluation.adaptation import adapt_and_evaluate
from crossmost_ray.evaluation.measure import METRICS_NAME
from crossmost_ray.evaluation.plan import PREDICTIONS_FOLDER
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.report import gain_text
from crossmost_ray.evaluation.summary import TEACHER, ZERO_SHOT
from crossmost_ray.storage import Store
from crossmost_ray.tally import Interval, paired_bootstrap

TEST = "test"


def variants(
    config: AdaptConfig, *, modes: Sequence[Mode], seeds: Sequence[int]
) -> list[AdaptConfig]:
    """Gives the runs of the comparison: each mode, direction and seed.

    Raises:
        ConfigError: If the config names no second half to test on.
    """
    if config.data.test_shards is None:
        raise ConfigError("data.test_shards is needed: the comparison tests on unseen objects")
    # The comparison is about accuracy: the open set would only cost time.
    forth = dataclasses.replace(config.data, open_set_shards=None)
    back = dataclasses.replace(
        forth, shards=config.data.test_shards, test_shards=config.data.shards
    )
    return [
        dataclasses.replace(
            config, name=f"{config.name}-{mode}-{way}-{seed}", mode=mode, seed=seed, data=data
        )
        for mode, seed, (way, data) in itertools.product(
            modes, seeds, (("forth", forth), ("back", back))
        )
    ]


def reproduce(
    config: AdaptConfig, *, modes: Sequence[Mode], seeds: Sequence[int]
) -> dict[str, Any]:
    """Runs what has not been run yet, and compares.

    Returns:
        By mode: accuracies on unseen objects by opinion, gains over zero-shot with their 95 %
        intervals, and how far the first mode is ahead of each other one. Plain values.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    tables: dict[str, list[pa.Table]] = {mode: [] for mode in modes}
    for run in variants(config, modes=modes, seeds=seeds):
        folder = Store(run.output).child(run.name)
        # The metrics are written last: without them, predictions may be missing.
        if not folder.has_file(METRICS_NAME):
            adapt_and_evaluate(run, resume=folder.is_folder())
        tables[run.mode].append(read_test_predictions(folder))
    return compare({mode: pa.concat_tables(parts) for mode, parts in tables.items()})


def read_test_predictions(folder: Store) -> pa.Table:
    """Reads a run's predictions on unseen objects, in the order of the shards."""
    names = ["object_id", "label", "model", *(f"ranked_{opinion}" for opinion in OPINIONS)]
    tables = []
    for name in folder.names(f"{PREDICTIONS_FOLDER}/{TEST}"):
        with pq.ParquetFile(folder.open_input(f"{PREDICTIONS_FOLDER}/{TEST}/{name}")) as file:
            tables.append(file.read(columns=names))
    return pa.concat_tables(tables)


def is_right(table: pa.Table, opinion: str) -> npt.NDArray[np.bool_]:
    """Tells for each labelled row whether the best class is the label."""
    labelled = table.filter(pc.is_valid(pc.field("label")))
    best = pc.list_element(labelled[f"ranked_{opinion}"], 0)
    right: npt.NDArray[np.bool_] = pc.equal(best, labelled["label"]).to_numpy()
    return right.astype(bool)


def labelled_ids(table: pa.Table) -> list[str]:
    """Gives the ids of the labelled rows, in order."""
    ids: list[str] = table.filter(pc.is_valid(pc.field("label")))["object_id"].to_pylist()
    return ids


def compare(tables: dict[str, pa.Table]) -> dict[str, Any]:
    """Compares modes whose tables hold the same objects in the same order."""
    right = {
        (mode, model): _rights(table.filter(pa.compute.field("model") == model))
        for mode, table in tables.items()
        for model in (ZERO_SHOT, TEACHER)
    }
    first = next(iter(tables))
    rows = tables[first].filter(pa.compute.field("model") == ZERO_SHOT)
    ids = labelled_ids(rows)
    start = right[first, ZERO_SHOT]
    result: dict[str, Any] = {
        "objects": len(set(ids)),
        "opinions_per_object": len(ids) // max(len(set(ids)), 1),
        ZERO_SHOT: {name: 100 * float(hits.mean()) for name, hits in start.items()},
    }
    for mode in tables:
        ours = right[mode, TEACHER]
        result[mode] = {
            "top1": {name: 100 * float(hits.mean()) for name, hits in ours.items()},
            "gain": {name: vars(_interval(start[name], ours[name], ids)) for name in ours},
        }
        if mode != first:
            best = right[first, TEACHER]
            result[mode][f"{first}_ahead"] = {
                name: vars(_interval(ours[name], best[name], ids)) for name in ours
            }
    return result


def _rights(table: pa.Table) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    hits = {name: is_right(table, name).astype(np.float64) for name in OPINIONS}
    # A score of its own: half for each tower that is right.
    hits["towers"] = (hits["image"] + hits["point"]) / 2
    return hits


def _interval(
    before: np.ndarray[Any, np.dtype[np.float64]],
    after: np.ndarray[Any, np.dtype[np.float64]],
    ids: Sequence[str],
) -> Interval:
    return paired_bootstrap(before, after, clusters=ids)


def markdown(result: dict[str, Any], modes: Sequence[str]) -> str:
    """Lays the comparison out as README shows it."""
    columns = (*OPINIONS, "towers")
    lines = [
        "| teacher, unseen objects | image | points | fused | mean of towers |",
        "|---|---|---|---|---|",
        "| zero-shot | " + " | ".join(f"{result[ZERO_SHOT][name]:.1f}" for name in columns) + " |",
    ]
    for mode in modes:
        cells = [
            f"{result[mode]['top1'][name]:.1f} ({gain_text(result[mode]['gain'][name])})"
            for name in columns
        ]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    for mode in modes[1:]:
        ahead = result[mode][f"{modes[0]}_ahead"]
        cells = [gain_text(ahead[name]) for name in columns]
        lines.append(f"| {modes[0]} ahead of {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
