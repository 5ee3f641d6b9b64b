"""Rows and votes of runs in, how sound their pseudo-labels are out; no label is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from crossmost_ray.dashboard.chart import DIVERGING, SEQUENTIAL, finish, plain, small_multiples
from crossmost_ray.dashboard.panels.panel import best_with, whose
from crossmost_ray.dashboard.runs import Results, Run
from crossmost_ray.dashboard.table import Column, Table
from crossmost_ray.dashboard.votes import VoteCounts, count_votes

HEALTH = {
    "health/confident": "confident objects",
    "health/classes_used": "classes in use (effective number)",
    "health/flips": "labels that changed since the epoch before",
    "health/never_confident": "classes without a confident object",
    "pseudo/selected_image": "labels that count, image tower",
    "pseudo/selected_point": "labels that count, point tower",
    "teacher/agreement": "teacher's towers agree",
}
SHARES = (
    *("health/confident", "health/flips", "teacher/agreement"),
    *("pseudo/selected_image", "pseudo/selected_point"),
)

MOST_DOUBLINGS = 2.0
"""Colours end at four times, and at a quarter of, a class's even share."""


def health(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws over the epochs what warns of a collapse, or of labels running dry."""
    return small_multiples(runs, HEALTH, what="Health of the pseudo-labels", percent=SHARES)


def class_histogram(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws how many objects each class has as a pseudo-label, against an even share."""
    found = best_with(runs, _counted)
    if found is None:
        return None
    run, counted = found
    parts: dict[str, Part] = {}
    for tower in _towers(counted):
        objects = _by_epoch(counted, tower, selected=False)
        total = objects.sum(axis=0, keepdims=True).clip(min=1)
        even = total / len(run.classes)
        with np.errstate(divide="ignore"):
            doublings = np.asarray(np.log2(objects / even), np.float64)
        clipped = doublings.clip(-MOST_DOUBLINGS, MOST_DOUBLINGS)
        parts[tower] = (clipped, objects, 100 * objects / total)
    ticks = [-2, -1, 0, 1, 2]
    last = counted[-1]
    first_tower = next(iter(parts))
    largest = int(parts[first_tower][1][:, -1].argmax())
    return _heatmaps(
        run,
        runs,
        counted,
        parts,
        hover="%{customdata[0]} objects, %{customdata[1]:.1f} % of all",
        scale={
            "colorscale": DIVERGING,
            "zmin": -MOST_DOUBLINGS,
            "zmax": MOST_DOUBLINGS,
            "colorbar": {
                "tickvals": ticks,
                "ticktext": ["¼ ×", "½ ×", "even", "2 ×", "4 ×"],
                "len": 0.9,
            },
        },
        summary=f"Pseudo-labels of {run.title} by class and epoch, against an even share. In epoch "
        f"{last.epoch} the largest class is {run.classes[largest]} with "
        f"{parts[first_tower][1][largest, -1]} of {last.objects} objects.",
    )


def confident_by_class(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws which share of each class's pseudo-labels was sure enough to count."""
    found = best_with(runs, _counted)
    if found is None:
        return None
    run, counted = found
    parts: dict[str, Part] = {}
    for tower in _towers(counted):
        objects = _by_epoch(counted, tower, selected=False)
        sure = _by_epoch(counted, tower, selected=True)
        share = np.full(objects.shape, np.nan)
        np.divide(100.0 * sure, objects, out=share, where=objects > 0)
        parts[tower] = (share, sure, objects)
    last = counted[-1]
    sure_now = sum(int(part.sum()) for part in last.selected.values())
    all_now = max(1, sum(int(part.sum()) for part in last.labels.values()))
    return _heatmaps(
        run,
        runs,
        counted,
        parts,
        hover="%{customdata[0]} of %{customdata[1]} objects count",
        scale={
            "colorscale": SEQUENTIAL,
            "zmin": 0,
            "zmax": 100,
            "colorbar": {"ticksuffix": " %", "nticks": 5, "len": 0.9},
        },
        summary=f"Share of each class's pseudo-labels that count, for {run.title} by epoch: in "
        f"epoch {last.epoch} {sure_now / all_now:.0%} of all.",
    )


def never_confident(results: Results, runs: Sequence[Run]) -> Table | None:
    """Lists the classes that no confident object was labelled as in the last epoch."""
    found = best_with(runs, _counted)
    if found is None:
        return None
    run, counted = found
    sure = sum(_by_epoch(counted, tower, selected=True) for tower in _towers(counted))
    objects = sum(_by_epoch(counted, tower, selected=False) for tower in _towers(counted))
    assert isinstance(sure, np.ndarray)
    assert isinstance(objects, np.ndarray)
    rows = []
    for place in np.flatnonzero(sure[:, -1] == 0):
        # Epochs since the last one that had a confident object of this class.
        since = int((np.cumsum(sure[place, ::-1]) == 0).sum())
        rows.append((run.classes[place], float(objects[place, -1]), float(since)))
    rows.sort(key=lambda row: (-row[2], row[0]))
    caption = f"{whose(run, runs)}, after epoch {counted[-1].epoch}: " + (
        f"{len(rows)} of {len(run.classes)} classes have no label that counts."
        if rows
        else "every class has labels that count."
    )
    return Table(
        caption,
        (
            Column("class"),
            Column("labelled so", "g", "Objects whose pseudo-label it is, unsure ones", "number"),
            Column("epochs without", "g", "Epochs in a row without a label that counts", "number"),
        ),
        tuple(rows),
    )


def _counted(run: Run) -> tuple[VoteCounts, ...] | None:
    counted = tuple(one for one in count_votes(run) if one.labels)
    return counted if counted and run.classes else None


def _towers(counted: Sequence[VoteCounts]) -> list[str]:
    """Names the towers that learn; the first alone where both learn from the same labels."""
    towers = list(counted[-1].labels)
    same = len(towers) == 2 and all(
        (one.labels[towers[0]] == one.labels[towers[1]]).all()
        and (one.selected[towers[0]] == one.selected[towers[1]]).all()
        for one in counted
        if all(tower in one.labels for tower in towers)
    )
    return towers[:1] if same else towers


def _by_epoch(
    counted: Sequence[VoteCounts], tower: str, *, selected: bool
) -> npt.NDArray[np.int64]:
    """Sets the counts of all epochs side by side: (C, epochs)."""
    columns = [(one.selected if selected else one.labels).get(tower) for one in counted]
    C = max(len(column) for column in columns if column is not None)
    empty = np.zeros(C, np.int64)
    return np.stack([empty if column is None else column for column in columns], axis=1)


Part = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[Any]]
"""(C, epochs) each: the colour, and two numbers for the hover text."""


def _heatmaps(
    run: Run,
    runs: Sequence[Run],
    counted: Sequence[VoteCounts],
    parts: dict[str, Part],
    *,
    hover: str,
    scale: dict[str, object],
    summary: str,
) -> go.Figure:
    titles = [
        whose(run, runs) if len(parts) == 1 else f"{whose(run, runs)}: labels of the {tower} tower"
        for tower in parts
    ]
    figure = make_subplots(
        rows=1,
        cols=len(parts),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plain(title) for title in titles],
    )
    epochs = [one.epoch for one in counted]
    classes = [plain(name) for name in run.classes]
    for column, (color, first, second) in enumerate(parts.values()):
        figure.add_trace(
            go.Heatmap(
                z=color,
                x=epochs,
                y=classes,
                customdata=np.stack([first, second], axis=-1),
                hovertemplate=f"<b>%{{y}}</b>, epoch %{{x}}<br>{hover}<extra></extra>",
                xgap=1,
                ygap=1,
                showscale=column == 0,
                hoverongaps=False,
                **scale,
            ),
            row=1,
            col=column + 1,
        )
    figure.update_xaxes(title_text="epoch", showgrid=False, tickformat="d", nticks=12)
    if len(epochs) <= 12:
        figure.update_xaxes(tickvals=epochs)
    figure.update_yaxes(autorange="reversed", showgrid=False, tickmode="linear", dtick=1)
    if len(classes) > 80:
        figure.update_yaxes(tickmode="auto", dtick=None)
    figure.update_annotations(font_size=13)
    row = 22 if len(classes) <= 40 else 12
    return finish(figure, summary=summary, height=max(220, row * len(classes) + 100))
