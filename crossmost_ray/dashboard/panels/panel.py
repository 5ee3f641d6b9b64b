"""What a panel is, and which of several runs it is about where it can show but one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import plotly.graph_objects as go

from crossmost_ray.dashboard.chart import MOST_LINES, by_score
from crossmost_ray.dashboard.runs import Results, Run
from crossmost_ray.dashboard.table import Table, Text

Group = Literal["overview", "settings", "training", "health", "accuracy", "system"]

Content: TypeAlias = go.Figure | Table | Text | None
"""What a panel shows; None where there is nothing to show."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Panel:
    """One part of the page."""

    key: str
    title: str
    question: str
    """What it answers, in one sentence."""
    group: Group
    empty: str
    """Why it shows nothing, where it does, in one sentence."""
    figure: Callable[[Results, Sequence[Run]], Content]
    """Draws it for the chosen runs."""


def best_with(runs: Sequence[Run], find: Callable[[Run], Found | None]) -> tuple[Run, Found] | None:
    """Gives the best run by label-free score that has something, and what it has.

    Only the first `MOST_LINES` are asked: looking takes reading.
    """
    for run in by_score(runs)[:MOST_LINES]:
        found = find(run)
        if found is not None:
            return run, found
    return None


def whose(run: Run, runs: Sequence[Run]) -> str:
    """Names the run that is shown, and why this one, for the top of a chart."""
    chosen = f", the best of {len(runs):,} by its label-free score" if len(runs) > 1 else ""
    return f"{run.title}{chosen}"
