"""Runs in, the table that ranks them out: by the label-free score, never by accuracy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from crossmost_ray.dashboard.accuracy import OPINIONS, TEACHER, accuracy, gain, report_split
from crossmost_ray.dashboard.chart import by_score
from crossmost_ray.dashboard.configs import flatten, lookup
from crossmost_ray.dashboard.runs import Results, Run
from crossmost_ray.dashboard.table import Column, Table, Value

MOST_SETTINGS = 8
"""Columns of settings in the leaderboard."""

MOST_LETTERS = 32
"""Of a setting in a cell: of a longer one, such as a path, the end is shown."""

NOT_A_SETTING = ("name", "output", "cluster.env", "data.templates", "data.classes")
"""Keys that differ between runs without making a difference, or whose values fill a page."""


def leaderboard(results: Results, runs: Sequence[Run]) -> Table | None:
    """Lists runs by their label-free score, the best first; those without one come last."""
    if not runs:
        return None
    keys = differing_settings(runs)
    splits = {run.name: report_split(run.metrics) for run in runs}
    measured = sorted({split for split in splits.values() if split is not None})
    opinions = OPINIONS if measured else ()
    on = " or ".join(measured)
    columns = [
        Column("run"),
        Column("status", kind="status"),
        Column("score", ".4f", "Label-free, of the run's result: runs are ranked by it", "number"),
        *(
            Column(
                f"top-1 {opinion}, %",
                help=f"Accuracy of the adapted teacher on {on}, with its 95 % interval. For the "
                "report only: nothing is ranked by it",
                kind="number",
            )
            for opinion in opinions
        ),
        *(
            Column(
                f"gain {opinion}",
                help=f"Points above zero-shot on {on}, with the 95 % interval of paired objects",
                kind="number",
            )
            for opinion in opinions[:1]
        ),
        Column("epochs", "g", "Epochs that are finished", "number"),
        Column("cost", ".1f", "Minutes times workers", "number"),
        # Last, for a sweep may have many: what came of them is seen without scrolling.
        *(
            Column(key, kind=kind, format="g")
            for key in keys[:MOST_SETTINGS]
            for kind in ["number" if _is_number(runs, key) else "words"]
        ),
    ]
    order = by_score(runs)
    rows = []
    for run in order:
        split = splits[run.name]
        row: list[Value] = [run.title, run.status]
        row.append(run.score)
        row += [accuracy(run.metrics, split, TEACHER, opinion) for opinion in opinions]
        row += [gain(run.metrics, split, TEACHER, opinion) for opinion in opinions[:1]]
        row += [run.epochs, cost_of(run)]
        row += [_shown(setting_of(run, key)) for key in keys[:MOST_SETTINGS]]
        rows.append(tuple(row))
    caption = "Runs by their label-free score"
    if measured:
        caption += f"; accuracies on {on}, for the report only"
    if len(keys) > MOST_SETTINGS:
        caption += f"; {MOST_SETTINGS} of the {len(keys)} settings that differ"
    return Table(f"{caption}.", tuple(columns), tuple(rows), tuple(run.name for run in order))


def cost_of(run: Run) -> float | None:
    """Gives minutes times workers; None where nothing is known of either."""
    workers = run.workers
    return None if workers is None or not run.seconds else run.seconds * workers / 60


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Gives the dotted keys whose values are not the same in all runs.

    Trials are compared in what their sweep has set; runs that stand alone in all of their config.
    """
    keys: dict[str, None] = {}
    for run in runs:
        keys |= dict.fromkeys(run.settings)
    alone = [run for run in runs if run.sweep is None]
    if len(alone) > 1:
        keys |= dict.fromkeys(key for run in alone for key, _ in flatten(run.config))
    return [
        key
        for key in keys
        if not key.startswith(NOT_A_SETTING)
        and len({json.dumps(setting_of(run, key), default=str) for run in runs}) > 1
    ]


def setting_of(run: Run, key: str) -> Any:
    """Gives a run's value of a dotted key, of a trial without opening its files."""
    if run.sweep is None:
        return lookup(run.config, key)
    return run.settings[key] if key in run.settings else lookup(run.base, key)


def _is_number(runs: Sequence[Run], key: str) -> bool:
    values = [setting_of(run, key) for run in runs]
    return all(isinstance(value, int | float) or value is None for value in values) and not any(
        isinstance(value, bool) for value in values
    )


def _shown(value: Any) -> Value:
    """Turns a value of a config into a cell: numbers stay numbers, the rest is written out."""
    if value is None:
        return None
    if isinstance(value, str):
        return value if len(value) <= MOST_LETTERS else f"…{value[1 - MOST_LETTERS :]}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return json.dumps(value, default=str)
