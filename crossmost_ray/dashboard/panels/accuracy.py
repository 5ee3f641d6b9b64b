"""Evaluations and labelled votes in, charts of accuracy out: for the report, never for a choice."""

from __future__ import annotations

import functools
import io
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from plotly.subplots import make_subplots

from crossmost_ray.dashboard.accuracy import TEACHER, ZERO_SHOT, labelled_splits, report_split
from crossmost_ray.dashboard.chart import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SEQUENTIAL,
    epochs_axis,
    finish,
    plain,
)
from crossmost_ray.dashboard.files import fingerprint, problem
from crossmost_ray.dashboard.panels.panel import best_with, whose
from crossmost_ray.dashboard.runs import Results, Run
from crossmost_ray.dashboard.votes import OracleAccuracy, oracle_accuracy
from crossmost_ray.storage import Store

MODELS = {ZERO_SHOT: ("zero-shot", GREY), TEACHER: ("adapted", BLUE)}

VOTE_LINES = {
    "selected": ("labels that count", GREEN),
    "label": ("all pseudo-labels", PURPLE),
    "image": ("image tower", BLUE),
    "point": ("point tower", ORANGE),
}

MOST_WRITTEN = 12
"""Classes of a confusion matrix whose cells are written out."""

MOST_TICKS = 60
"""Classes whose names fit beside a matrix."""


def votes(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws which share of the votes was right, epoch by epoch."""
    found = best_with(runs, _compared)
    if found is None:
        return None
    run, compared = found
    figure = go.Figure()
    said = []
    for key, (name, color) in VOTE_LINES.items():
        known = [(one.epoch, getattr(one, key)) for one in compared]
        known = [(epoch, value) for epoch, value in known if value is not None]
        if not known:
            continue
        figure.add_scatter(
            x=[epoch for epoch, _ in known],
            y=[value for _, value in known],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2.4},
            marker={"color": color, "size": 7},
            hovertemplate=f"<b>{name}</b><br>epoch %{{x}}: %{{y:.1f}} % right<extra></extra>",
        )
        said.append(f"{name} {known[-1][1]:.1f} %")
    epochs_axis(figure, compared[-1].epoch)
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="right, %")
    figure.update_layout(margin={"t": 52})
    return finish(
        figure,
        summary=f"Accuracy of the teacher's votes of {whose(run, runs)}, on "
        f"{compared[-1].objects} labelled objects. In epoch {compared[-1].epoch}: "
        f"{', '.join(said)}.",
        height=340,
    )


def confusion(
    results: Results,
    runs: Sequence[Run],
    split: str | None = None,
    opinion: str = "fused",
) -> go.Figure | None:
    """Draws which classes were taken for which: before, after, and what has changed.

    Args:
        results: All there is.
        runs: The best by score that was measured is shown.
        split: None takes the objects that were never adapted to, where they are labelled.
        opinion: image, point or fused.
    """
    found = best_with(runs, lambda run: _confusions(run, split, opinion))
    if found is None:
        return None
    run, (used, classes, counts) = found
    shares = {model: _row_percent(matrix) for model, matrix in counts.items()}
    before, after = shares[ZERO_SHOT], shares[TEACHER]
    largest = max(1.0, float(np.nanmax(np.abs(after - before), initial=0.0)))
    figure = make_subplots(
        rows=1,
        cols=3,
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=["zero-shot", "adapted", "adapted − zero-shot"],
    )
    names = [plain(name) for name in classes]
    panes: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], str, dict[str, Any]]] = [
        (before, counts[ZERO_SHOT], "%{z:.1f} % (%{customdata} objects)", _amounts()),
        (after, counts[TEACHER], "%{z:.1f} % (%{customdata} objects)", _amounts()),
        (
            after - before,
            counts[TEACHER] - counts[ZERO_SHOT],
            "%{z:+.1f} points (%{customdata:+d} objects)",
            {"colorscale": DIVERGING, "zmin": -largest, "zmax": largest},
        ),
    ]
    for place, (color, cells, hover, scale) in enumerate(panes):
        figure.add_trace(
            go.Heatmap(
                z=color,
                x=names,
                y=names,
                customdata=cells,
                text=_written(cells, signed=place == 2),
                texttemplate="%{text}" if len(names) <= MOST_WRITTEN else None,
                hovertemplate="<b>%{y}</b> taken for <b>%{x}</b><br>" + hover + "<extra></extra>",
                xgap=1,
                ygap=1,
                showscale=False,
                **scale,
            ),
            row=1,
            col=place + 1,
        )
    figure.update_xaxes(showgrid=False, tickangle=-45, tickmode="linear", dtick=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, tickmode="linear", dtick=1)
    if len(names) > MOST_TICKS:
        figure.update_xaxes(showticklabels=False)
        figure.update_yaxes(showticklabels=False)
    elif len(names) > MOST_WRITTEN:
        figure.update_xaxes(tickfont_size=9)
        figure.update_yaxes(tickfont_size=9)
    figure.update_yaxes(title_text="true class", col=1)
    figure.update_annotations(font_size=13)
    right = {model: 100 * np.trace(one) / max(1, one.sum()) for model, one in counts.items()}
    return finish(
        figure,
        summary=f"Confusion of {len(names)} classes on {used}, by {opinion}, of "
        f"{whose(run, runs)}: {right[ZERO_SHOT]:.1f} % right before, {right[TEACHER]:.1f} % after.",
        height=420 if len(names) <= 8 else 500,
    )


def per_class(
    results: Results,
    runs: Sequence[Run],
    split: str | None = None,
    opinion: str = "fused",
) -> go.Figure | None:
    """Draws how far each class's accuracy has moved, the largest gain first."""
    found = best_with(runs, lambda run: _both(run, split, opinion))
    if found is None:
        return None
    run, (used, both) = found
    before, after = (both[model]["per_class"] for model in (ZERO_SHOT, TEACHER))
    moved = [
        (after[name] - before[name], before[name], after[name], name)
        for name in before
        if before[name] is not None and after.get(name) is not None
    ]
    moved.sort(key=lambda one: (-one[0], one[3]))
    figure = go.Figure()
    figure.add_bar(
        x=[one[0] for one in moved],
        y=[plain(one[3]) for one in moved],
        orientation="h",
        marker={"color": [BLUE if one[0] >= 0 else ORANGE for one in moved], "cornerradius": 3},
        customdata=[one[1:3] for one in moved],
        text=[f"{one[1]:.0f} → {one[2]:.0f}" for one in moved],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="<b>%{y}</b><br>%{customdata[0]:.1f} % → %{customdata[1]:.1f} % "
        "(%{x:+.1f} points)<extra></extra>",
    )
    reach = max(10.0, *(abs(one[0]) for one in moved)) if moved else 10.0
    figure.update_xaxes(
        range=[min(0.0, *(one[0] for one in moved)) - 0.16 * reach, 1.16 * reach],
        title_text=f"points gained on {used}",
        tickformat="+.0f",
        zeroline=True,
        zerolinecolor=GREY,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, tickmode="linear", dtick=1)
    figure.update_layout(bargap=0.35, margin={"t": 16})
    up, down = sum(one[0] > 0 for one in moved), sum(one[0] < 0 for one in moved)
    return finish(
        figure,
        summary=f"Accuracy of each class on {used}, by {opinion}, of {whose(run, runs)}: {up} "
        f"classes gain, {down} lose, {len(moved) - up - down} stay.",
        height=max(200, 26 * len(moved) + 90),
    )


def reliability(
    results: Results,
    runs: Sequence[Run],
    split: str | None = None,
    opinion: str = "fused",
) -> go.Figure | None:
    """Draws accuracy against confidence: on the diagonal a model is as right as it is sure."""
    found = best_with(runs, lambda run: _both(run, split, opinion))
    if found is None:
        return None
    run, (used, both) = found
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 100],
        y=[0, 100],
        mode="lines",
        line={"color": GREY, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    said = []
    for model, (name, color) in MODELS.items():
        bins, ece = both[model]["calibration"], both[model]["ece"]
        objects = np.array(bins["objects"], np.float64)
        there = objects > 0
        confidence = 100 * np.array(bins["confidence"])[there] / objects[there]
        right = 100 * np.array(bins["right"])[there] / objects[there]
        figure.add_scatter(
            x=confidence,
            y=right,
            name=f"{name}: ECE {ece:.1f}",
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={
                "color": color,
                "size": 6 + 14 * np.sqrt(objects[there] / objects.max()),
                "opacity": 0.8,
                "line": {"width": 0},
            },
            customdata=objects[there],
            hovertemplate=f"<b>{name}</b><br>%{{customdata:.0f}} objects, sure to %{{x:.1f}} %<br>"
            "%{y:.1f} % right<extra></extra>",
        )
        said.append(f"{ece:.1f} {name}")
    figure.update_xaxes(range=[0, 104], title_text="confidence, %")
    figure.update_yaxes(range=[-2, 104], title_text="right, %")
    figure.update_layout(margin={"t": 52})
    return finish(
        figure,
        summary=f"Accuracy against confidence on {used}, by {opinion}, of {whose(run, runs)}: "
        f"expected calibration error {', '.join(said)}, in percentage points.",
        height=400,
    )


def _compared(run: Run) -> tuple[OracleAccuracy, ...] | None:
    return oracle_accuracy(run) or None


def _both(
    run: Run, split: str | None, opinion: str
) -> tuple[str, Mapping[str, Mapping[str, Any]]] | None:
    """Gives the accuracies of zero-shot and teacher on a split."""
    used = report_split(run.metrics) if split is None else split
    if run.metrics is None or used not in labelled_splits(run.metrics):
        return None
    models = run.metrics["splits"][used]
    if any(opinion not in models.get(model, {}) for model in MODELS):
        return None
    return used, {model: models[model][opinion] for model in MODELS}


def _confusions(
    run: Run, split: str | None, opinion: str
) -> tuple[str, tuple[str, ...], dict[str, npt.NDArray[np.int64]]] | None:
    """Gives split, classes and (C, C) counts of zero-shot and teacher."""
    both = _both(run, split, opinion)
    if both is None or run.metrics is None:
        return None
    used = both[0]
    classes = tuple(run.metrics["classes"].get(used, run.classes))
    models = {ZERO_SHOT: ZERO_SHOT, TEACHER: TEACHER}
    place = posixpath.join(run.folder, "confusion.parquet")
    if run.sweep is not None:
        models[TEACHER] = run.title
        sweep = posixpath.dirname(posixpath.dirname(run.folder))
        place = posixpath.join(sweep, "evaluation", "confusion.parquet")
    stamp = fingerprint(run.root, place, run.problems)
    if not stamp:
        return None
    try:
        cells = _read_cells(run.root, place, stamp)
    except (pa.ArrowException, KeyError) as broken:
        run.note_problem(problem(place, broken))
        return None
    counts = {
        model: _matrix(cells, (used, stored, opinion), classes) for model, stored in models.items()
    }
    return used, classes, counts


@functools.lru_cache(maxsize=4)
def _read_cells(root: Store, place: str, stamp: str) -> pa.Table:
    """Reads a file of confusions; `stamp` tells one version of it from another."""
    return pq.read_table(io.BytesIO(root.read(place) or b""))


def _matrix(
    cells: pa.Table, key: tuple[str, str, str], classes: Sequence[str]
) -> npt.NDArray[np.int64]:
    wanted: Any = True
    for name, value in zip(("split", "model", "opinion"), key, strict=True):
        wanted = pc.and_(pc.equal(cells[name], value), wanted)
    rows = cells.filter(wanted)
    names = pa.array(classes, pa.string())
    label, predicted = (
        pc.index_in(rows[column], value_set=names).to_numpy() for column in ("label", "predicted")
    )
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    matrix[label, predicted] = rows["objects"].to_numpy()
    return matrix


def _row_percent(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Gives each cell in percent of its row's objects; NaN in a row without objects."""
    total = matrix.sum(axis=1, keepdims=True)
    share = np.full(matrix.shape, np.nan)
    np.divide(100.0 * matrix, total, out=share, where=total > 0)
    return share


def _written(cells: npt.NDArray[np.int64], *, signed: bool) -> list[list[str]]:
    """Writes counts; zeros are left out, for they are most of a matrix."""
    form = "+d" if signed else "d"
    return [[format(int(cell), form) if cell else "" for cell in row] for row in cells]


def _amounts() -> dict[str, Any]:
    return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 100}
