"""Settings and scores of many runs in, what the settings do to the score out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from crossmost_ray.dashboard.chart import BLUE, ROW_HEIGHT, SCORES, finish, plain, shortened
from crossmost_ray.dashboard.panels.overview import differing_settings, setting_of
from crossmost_ray.dashboard.runs import Results, Run

FEW_TRIALS = 8
"""Below this many, importance is a guess, and says so."""

MOST_BINS = 5
"""Bins that a number is cut into where it takes more values than this."""

MOST_SETTINGS = 12

NOT_TUNED = ("data.shards", "data.test_shards", "data.open_set_shards")
"""What runs are about is not what they are tuned by."""

LOG_RANGE = 30.0
"""Positive numbers whose largest is so many times the smallest are shown by their logarithm."""

FAST_FROM = 300
"""From so many points on, a scatter is drawn by the graphics card."""


@dataclass(frozen=True)
class Setting:
    """One setting of n runs.

    Attributes:
        key: Dotted key.
        values: n values.
        place: (n,) where each lies on an axis: the number, its log10, or the number of its name.
        names: Names of the places 0, 1, ... of a setting that is no number; empty for numbers.
        log: Whether places are logarithms.
    """

    key: str
    values: tuple[Any, ...]
    place: npt.NDArray[np.float64]
    names: tuple[str, ...] = ()
    log: bool = False


def parallel(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws a line for each run through its settings, coloured by its label-free score."""
    scored, scores = _scored(runs)
    settings = _settings(scored)
    if len(scored) < 2 or not settings:
        return None
    metric = _metric(results, scored)
    low, high = float(scores.min()), float(scores.max())
    dimensions = [_dimension(setting) for setting in settings]
    dimensions.append({"label": metric, "values": scores, "tickformat": ".3~g"})
    figure = go.Figure()
    figure.add_parcoords(
        dimensions=dimensions,
        line={
            "color": scores,
            "colorscale": SCORES,
            "cmin": low,
            "cmax": high,
            "showscale": True,
            "colorbar": {
                "title": {"text": metric, "side": "right", "font": {"size": 12}},
                "tickfont": {"size": 11},
                "outlinewidth": 0,
                "thickness": 10,
            },
        },
        labelangle=-12 if len(dimensions) > 5 else 0,
        unselected={"line": {"opacity": 0.06}},
    )
    figure.update_layout(margin={"l": 72, "r": 40, "t": 84 if len(dimensions) > 5 else 56, "b": 28})
    best = scored[int(scores.argmax())]
    return finish(
        figure,
        summary=f"{len(scored):,} runs as lines through {len(settings)} settings, coloured by "
        f"{metric} from {low:.4g} to {high:.4g}; the best is {best.title}.",
        height=400,
    )


def slices(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws the label-free score of every run against each setting that differs."""
    scored, scores = _scored(runs)
    settings = _settings(scored)
    if len(scored) < 2 or not settings:
        return None
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        subplot_titles=[plain(setting.key) for setting in settings],
        horizontal_spacing=0.04,
        vertical_spacing=0.34 / rows,
    )
    best = int(scores.argmax())
    titles = [plain(run.title) for run in scored]
    scatter = go.Scattergl if len(scored) >= FAST_FROM else go.Scatter
    for place, setting in enumerate(settings):
        row, column = divmod(place, columns)
        words = [plain(_written(value)) for value in setting.values]
        figure.add_trace(
            scatter(
                x=[shortened(_written(one)) for one in setting.values]
                if setting.names
                else setting.values,
                y=scores,
                mode="markers",
                name=setting.key,
                showlegend=False,
                text=titles,
                customdata=words,
                hovertemplate=f"<b>%{{text}}</b><br>{plain(setting.key)} %{{customdata}}<br>"
                "score %{y:.4f}<extra></extra>",
                marker={
                    "color": scores,
                    "colorscale": SCORES,
                    "size": [11 if run == best else 7 for run in range(len(scored))],
                    "opacity": 0.85,
                    "line": {"width": 0},
                },
            ),
            row=row + 1,
            col=column + 1,
        )
        axis = {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [shortened(name) for name in setting.names],
        }
        figure.update_xaxes(
            **(axis if setting.names else {"type": "log" if setting.log else "linear"}),
            row=row + 1,
            col=column + 1,
        )
        if setting.log:
            figure.update_xaxes(dtick=1, exponentformat="e", row=row + 1, col=column + 1)
    metric = _metric(results, scored)
    figure.update_yaxes(title_text=metric, col=1, nticks=5)
    figure.update_annotations(font_size=13)
    return finish(
        figure,
        summary=f"{metric} of {len(scored):,} runs against {len(settings)} settings, one chart "
        f"each; the best is {scored[best].title} with {scores[best]:.4g}.",
        height=(ROW_HEIGHT + 20) * rows + 60,
    )


def importance(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws the share of the score's variance that each setting explains by itself."""
    scored, scores = _scored(runs)
    settings = _settings(scored)
    if len(scored) < 3 or not settings:
        return None
    shares = sorted(((explained_share(one, scores), one.key) for one in settings), reverse=True)
    guess = len(scored) < FEW_TRIALS
    figure = go.Figure()
    figure.add_bar(
        x=[share for share, _ in shares],
        y=[plain(key) for _, key in shares],
        orientation="h",
        marker={"color": BLUE, "opacity": 0.5 if guess else 0.9, "cornerradius": 3},
        text=[f"{share:.0%}" for share, _ in shares],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="<b>%{y}</b> explains %{x:.1%} of the score's variance<extra></extra>",
    )
    figure.update_xaxes(range=[0, 1.06], tickformat=".0%", title_text="share of variance explained")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(bargap=0.35, margin={"t": 34 if guess else 12})
    if guess:
        figure.add_annotation(
            text=f"From {len(scored)} runs: a guess. Trust it from {FEW_TRIALS} on.",
            x=0,
            y=1,
            xref="paper",
            yref="paper",
            yanchor="bottom",
            showarrow=False,
        )
    first, key = shares[0]
    return finish(
        figure,
        summary=f"Of {len(shares)} settings, {key} explains the most of the score's variance: "
        f"{first:.0%}" + ("; from so few runs that is a guess." if guess else "."),
        height=34 * len(shares) + 96,
    )


def explained_share(setting: Setting, scores: npt.NDArray[np.float64]) -> float:
    """Gives the share of the variance of scores that a setting explains by itself.

    With k groups of equal settings (numbers of more than `MOST_BINS` values: bins of about equally
    many runs) among n scores, eta^2 = SS_between / SS_total. By chance alone it is on average
    (k - 1) / (n - 1), so that a setting of many values would look important; corrected for that,

        epsilon^2 = 1 - (1 - eta^2) (n - 1) / (n - k),

    which is 0 on average where the setting does nothing. What two settings do only together, it
    does not see.

    Args:
        setting: Of n runs.
        scores: (n,).

    Returns:
        0 to 1; 0 where scores don't differ, or no group has two runs.

    Source:
        Kelley (1935), An unbiased correlation ratio measure.
    """
    groups = _groups(setting)
    n, k = len(scores), int(groups.max()) + 1
    total = float(((scores - scores.mean()) ** 2).sum())
    if k < 2 or n <= k or total <= 0:
        return 0.0
    counts = np.bincount(groups)
    means = np.bincount(groups, scores) / counts
    between = float((counts * (means - scores.mean()) ** 2).sum())
    return min(1.0, max(0.0, 1 - (1 - between / total) * (n - 1) / (n - k)))


def _groups(setting: Setting) -> npt.NDArray[np.int64]:
    """Numbers the runs by their value, or by the bin that it falls into: 0, 1, ... without gaps."""
    values, group = np.unique(setting.place, return_inverse=True)
    if not setting.names and len(values) > MOST_BINS:
        # Fewer bins for fewer runs, so that each has some to average.
        bins = min(MOST_BINS, max(2, len(setting.place) // 4))
        edges = np.quantile(setting.place, np.linspace(0, 1, bins + 1)[1:-1])
        _, group = np.unique(np.searchsorted(edges, setting.place), return_inverse=True)
    return group.astype(np.int64)


def _scored(runs: Sequence[Run]) -> tuple[list[Run], npt.NDArray[np.float64]]:
    scored = [(run, run.score) for run in runs]
    known = [(run, score) for run, score in scored if score is not None]
    return [run for run, _ in known], np.array([score for _, score in known], np.float64)


def _settings(runs: Sequence[Run]) -> list[Setting]:
    return [
        read_setting(key, [setting_of(run, key) for run in runs])
        for key in [key for key in differing_settings(runs) if key not in NOT_TUNED][:MOST_SETTINGS]
    ]


def read_setting(key: str, values: Sequence[Any]) -> Setting:
    """Finds out whether a setting is a number, and on which scale it is best shown."""
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        numbers = np.array(values, np.float64)
        log = bool((numbers > 0).all()) and float(numbers.max() / numbers.min()) >= LOG_RANGE
        place = np.log10(numbers) if log else numbers
        return Setting(key, tuple(values), place, log=log)
    written = [_written(value) for value in values]
    names = sorted(set(written))
    place = np.array([names.index(word) for word in written], np.float64)
    return Setting(key, tuple(values), place, names=tuple(names))


def _dimension(setting: Setting) -> dict[str, Any]:
    axis: dict[str, Any] = {"label": plain(setting.key), "values": setting.place}
    if setting.names:
        axis |= {
            "tickvals": list(range(len(setting.names))),
            "ticktext": [shortened(name) for name in setting.names],
        }
    elif setting.log:
        low, high = float(setting.place.min()), float(setting.place.max())
        ticks = [low, (low + high) / 2, high]
        whole = [float(tick) for tick in range(math.ceil(low), math.floor(high) + 1)]
        ticks = whole if len(whole) > 1 else ticks
        axis |= {"tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    elif len(few := sorted(set(setting.place.tolist()))) <= 8:
        axis |= {"tickvals": few, "ticktext": [f"{value:g}" for value in few]}
    return axis


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, default=str)


def _metric(results: Results, runs: Sequence[Run]) -> str:
    """Names the score that the runs' sweeps rank by."""
    used = {run.sweep for run in runs}
    metrics = {sweep.metric for sweep in results.sweeps if sweep.name in used}
    return plain(next(iter(metrics))) if len(metrics) == 1 else "label-free score"
