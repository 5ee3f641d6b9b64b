"""The look of every chart, said once: colours, fonts, margins, light and dark, small multiples."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from crossmost_ray.dashboard.runs import Run

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f80c2", "#d9702b", "#1e9e7f", "#b065ae", "#7f8790"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#c2527a")
"""Hues of Okabe and Ito (2008), which most colour-blind people tell apart, in tones that stand out
at least 3 : 1 from white and from the dark page alike: a figure need not know where it is shown."""

TOWER_COLORS = {"image": BLUE, "point": ORANGE, "fused": GREEN}
"""Of each opinion, wherever they are told apart; `fused` is also the joint label's."""

SEQUENTIAL = [[0.0, "rgba(47,128,194,0.04)"], [1.0, "rgba(47,128,194,0.78)"]]
"""For amounts. It fades into the page, light or dark, and words stay readable on all of it."""

DIVERGING = [
    [0.0, "rgba(217,112,43,0.85)"],
    [0.3, "rgba(217,112,43,0.4)"],
    [0.5, "rgba(127,135,144,0.06)"],
    [0.7, "rgba(47,128,194,0.4)"],
    [1.0, "rgba(47,128,194,0.85)"],
]
"""For differences: orange is less, blue is more."""

SCORES = [[0.0, ORANGE], [0.5, "#8d93a0"], [1.0, BLUE]]
"""For runs coloured by a score: blue is better. No part of it is lost on white or on black."""

MOST_LINES = 20
"""Lines in a chart: of more runs, those with the best label-free scores are drawn."""

MOST_NAMED = len(COLORS)
"""Lines that have colours and a legend; of more, the best alone stands out."""

MOST_LETTERS = 24
"""Of a name beside an axis."""

ROW_HEIGHT = 230
"""Height of a row of small multiples, in pixels."""


@functools.cache
def template(dark: bool) -> go.layout.Template:
    """Gives what light and dark differ in, and all that every figure shares."""
    text, muted = ("#e7eaee", "#a0a9b5") if dark else ("#1b2028", "#5b6572")
    grid, surface = ("#2b323c", "#1f242c") if dark else ("#e6e9ed", "#ffffff")
    axis = {
        "gridcolor": grid,
        "gridwidth": 1,
        "linecolor": grid,
        "zeroline": False,
        "ticks": "",
        "ticklabelstandoff": 4,
        "tickfont": {"color": muted, "size": 12},
        "title": {"font": {"color": muted, "size": 12}, "standoff": 8},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": text},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(COLORS),
            "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
            "margin": {"l": 56, "r": 24, "t": 36, "b": 44},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": surface,
                "bordercolor": grid,
                "font": {"family": FONT, "color": text, "size": 13},
                "align": "left",
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yref": "container",
                "yanchor": "top",
                "font": {"color": muted, "size": 12},
                "itemsizing": "constant",
            },
            "modebar": {
                "bgcolor": "rgba(0,0,0,0)",
                "color": muted,
                "activecolor": BLUE,
            },
            "title": {
                "font": {"color": muted, "size": 12},
                "x": 0,
                "xref": "paper",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 8},
            },
            "annotationdefaults": {"font": {"color": muted, "size": 12}},
            "coloraxis": {"colorbar": {"outlinewidth": 0, "thickness": 10}},
        },
        data={
            "heatmap": [
                {
                    "textfont": {"color": text, "size": 11},
                    "colorbar": {
                        "outlinewidth": 0,
                        "thickness": 10,
                        "tickfont": {"color": muted, "size": 11},
                    },
                }
            ],
            "bar": [{"textfont": {"color": muted}, "marker": {"line": {"width": 0}}}],
        },
    )


def plain(text: str) -> str:
    """Writes a name such that a chart shows it as it is: Plotly reads tags in every text."""
    return html.escape(text, quote=False)


def shortened(text: str) -> str:
    """Gives a name that fits beside an axis: of a long one, such as a path, its end."""
    return plain(text if len(text) <= MOST_LETTERS else f"…{text[1 - MOST_LETTERS :]}")


def finish(figure: go.Figure, *, summary: str, height: int) -> go.Figure:
    """Gives a figure its look and the sentence that is read to those who can't see it.

    Args:
        figure: Gets the light template; a page replaces it by `template(dark)`.
        summary: What it shows, in a sentence.
        height: In pixels; the width is the page's.
    """
    figure.update_layout(template=template(False), height=height, meta={"summary": summary})
    return figure


def summary_of(figure: go.Figure) -> str:
    """Gives the sentence that a figure was finished with."""
    return str(figure.layout.meta["summary"])


def by_score(runs: Sequence[Run]) -> list[Run]:
    """Orders runs by their label-free score, the best first; those without one come last."""
    scored = [(run.score, place) for place, run in enumerate(runs)]
    order = sorted(scored, key=lambda one: (one[0] is None, -(one[0] or 0.0), one[1]))
    return [runs[place] for _, place in order]


def drawn(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """Chooses the runs that get a line, and says so if not all do."""
    if len(runs) <= MOST_LINES:
        return by_score(runs), ""
    note = f"the {MOST_LINES} of {len(runs):,} runs with the best label-free scores"
    return by_score(runs)[:MOST_LINES], note


def small_multiples(
    runs: Sequence[Run], keys: Mapping[str, str], *, what: str, percent: Sequence[str] = ()
) -> go.Figure | None:
    """Draws a small chart over the epochs for each key, with a line for each run that has it.

    Args:
        runs: Of more than `MOST_LINES`, the best by score are drawn.
        keys: Titles by key of a row, in the order of the charts.
        what: What they show, for the summary.
        percent: Keys that are shares of 1, written in percent.

    Returns:
        None where no run has any of the keys.
    """
    lines, note = drawn(runs)
    shown = [key for key in keys if any(run.has(key) for run in lines)]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[keys[key] for key in shown],
        horizontal_spacing=0.07,
        vertical_spacing=0.3 / rows,
    )
    last = 0
    legend = 1 < len(lines) <= MOST_NAMED
    named: set[str] = set()
    for place, key in enumerate(shown):
        row, column = divmod(place, columns)
        # The best run is drawn last, above the others.
        for rank, run in reversed(list(enumerate(lines))):
            epochs, values = run.epochs_of(key), run.column(key)
            if not epochs:
                continue
            last = max(last, *epochs)
            figure.add_scatter(
                x=epochs,
                y=values,
                name=plain(run.title),
                legendgroup=run.name,
                legendrank=1000 + rank,
                showlegend=legend and run.name not in named,
                mode="lines+markers",
                hovertemplate="<b>%{fullData.name}</b><br>epoch %{x}: "
                f"%{{y:{_spec(key, percent)}}}<extra></extra>",
                row=row + 1,
                col=column + 1,
                **line_style(rank, len(lines)),
            )
            named.add(run.name)
        figure.update_yaxes(
            tickformat="~%" if key in percent else None, nticks=5, row=row + 1, col=column + 1
        )
    epochs_axis(figure, last)
    for column in range(columns):
        # The lowest chart of each column names the axis.
        lowest = rows if column < len(shown) - columns * (rows - 1) else rows - 1
        figure.update_xaxes(title_text="epoch", row=lowest, col=column + 1)
    figure.update_annotations(font_size=13)
    top = 64 if len(lines) > 1 else 40
    figure.update_layout(margin={"t": top})
    if len(lines) > MOST_NAMED:
        others = f"the others of {note}" if note else f"the other {len(lines) - 1}"
        figure.update_layout(title_text=f"Blue: {plain(lines[0].title)}, the best. Grey: {others}.")
    count = f"{len(lines)} run" + ("s" if len(lines) > 1 else "")
    return finish(
        figure,
        summary=f"{what} over the epochs of {note or count}: "
        + ", ".join(keys[key] for key in shown)
        + ".",
        height=ROW_HEIGHT * rows + top + 20,
    )


def epochs_axis(figure: go.Figure, last: int) -> None:
    """Sets ticks at whole epochs, and room beside the first and the last."""
    room = max(0.35, last * 0.04)
    figure.update_xaxes(range=[-room, last + room], nticks=6, tickformat="d")
    if last < 10:
        figure.update_xaxes(dtick=1)


def line_style(rank: int, count: int) -> dict[str, object]:
    """Gives line and markers of the run of a rank, 0 being the best of `count`."""
    if count <= MOST_NAMED:
        return {
            "line": {"color": COLORS[rank], "width": 2.2},
            "marker": {"color": COLORS[rank], "size": 6},
        }
    best = rank == 0
    return {
        "line": {"color": BLUE if best else GREY, "width": 2.6 if best else 1.1},
        "marker": {"color": BLUE if best else GREY, "size": 6 if best else 3},
        "opacity": 1.0 if best else 0.45,
    }


def _spec(key: str, percent: Sequence[str]) -> str:
    return ".1%" if key in percent else ".4~g"
