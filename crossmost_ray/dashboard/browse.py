"""A run's objects and the page's address in, the object browser out, as components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from dash import dcc, html
from dash.development.base_component import Component

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard.address import Address
from crossmost_ray.dashboard.chart import by_score, summary_of
from crossmost_ray.dashboard.closeup import (
    Moment,
    Stored,
    best_classes,
    cloud_figure,
    follow,
    history_figure,
    read_stored,
    shards_of,
    view_address,
)
from crossmost_ray.dashboard.objects import (
    FILTERS,
    LEAST_SURE,
    Filter,
    Flags,
    Objects,
    Places,
    filter_objects,
    load_objects,
    oracle_wrong,
    order_objects,
    search_objects,
)
from crossmost_ray.dashboard.parts import (
    GRAPH_CONFIG,
    aria,
    dress,
    empty,
    leads,
    loading,
    page_of,
    pager,
    pick,
    search_box,
    sort_head,
)
from crossmost_ray.dashboard.runs import Run
from crossmost_ray.dashboard.table import DASH

KEY = "objects"

MAX_RUNS = 8
"""Runs that can be picked here; any other can be in the overview."""

HEADS = {"id": "object", "image": "image tower", "point": "point tower", LEAST_SURE: "label"}
"""Titles of the columns, by what a click on them sorts by: ids, or confidences."""

NO_VOTES = "No run in view has votes yet: they are written at the end of each epoch."


def frame(address: Address) -> list[Component]:
    """Lays out the browser: a list, and room for one object of it."""
    return [
        html.Div(
            [
                html.Section(
                    [
                        html.H3("Objects", id="title-objects"),
                        html.P(
                            "Which objects are worth a look? The least sure come first.",
                            className="card-question",
                        ),
                        search_box(address, "Search ids and classes"),
                        html.Div(loading(), id={"kind": "list", "panel": KEY}),
                        dcc.Store(id={"kind": "listed", "panel": KEY}),
                    ],
                    className="card",
                    **aria(labelledby="title-objects"),
                ),
                html.Section(
                    [
                        html.Div(loading(), id={"kind": "detail", "panel": KEY}),
                        dcc.Store(id={"kind": "detailed", "panel": KEY}),
                    ],
                    className="card closeup",
                    **aria(label="The chosen object"),
                ),
            ],
            className="objects",
        )
    ]


def shown_run(runs: Sequence[Run]) -> Run | None:
    """Picks the run whose objects are shown: of those with votes, the best by its score."""
    return next((run for run in by_score(runs) if run.epochs and run.epoch_files), None)


def listed(run: Run, objects: Objects, address: Address) -> Places:
    """Gives the places of the objects that the address asks for, in its order."""
    wrong = oracle_wrong(run, objects) if address.filter == "wrong" else None
    marks = filter_objects(objects, address.filter, wrong) & search_objects(objects, address.find)
    return order_objects(objects, marks, address.sort, down=address.down)


def listing(runs: Sequence[Run], run: Run | None, address: Address) -> list[Component]:
    """Builds the list of objects, its filters and its pages.

    Args:
        runs: Those in view, of which one can be picked.
        run: Whose objects are shown.
        address: Of the page.
    """
    objects = None if run is None else load_objects(run)
    if run is None or objects is None:
        return [empty(NO_VOTES)]
    wrong = oracle_wrong(run, objects)
    found = search_objects(objects, address.find)
    chosen = next((one for one in FILTERS if one.key == address.filter), FILTERS[0])
    places = listed(run, objects, address)
    first, end = page_of(address, len(places))
    shown = _first(objects, places, address)
    return [
        *_run_picker(runs, run, address),
        html.Nav(
            [
                _filter_link(one, chosen, objects, found, wrong, address)
                for one in FILTERS
                if one.key != "wrong" or wrong is not None
            ],
            className="choice",
            **aria(label="Filters"),
        ),
        html.P(chosen.question, className="muted"),
        html.Div(
            html.Table(
                [
                    html.Caption(
                        f"Votes after epoch {objects.votes.epoch} of {run.title}",
                        className="visually-hidden",
                    ),
                    html.Thead(html.Tr([_head(address, key) for key in HEADS])),
                    html.Tbody(
                        [
                            _row(objects, place, address, shown=shown)
                            for place in places[first:end].tolist()
                        ]
                    ),
                ],
                className="data",
            ),
            className="scroll",
            tabIndex="0",
            role="region",
            **aria(label="Objects"),
        )
        if len(places)
        else empty("No object is like that."),
        html.Div(
            [
                pager(address, len(places), noun="objects"),
                html.A(
                    "Review these first (CSV)",
                    href="review.csv" + address.link(run=(run.name,), page=1, object=""),
                    className="button",
                    title="All of the list in this order, as a file",
                ),
            ],
            className="below",
        ),
    ]


def object_id(run: Run | None, address: Address) -> str:
    """Gives the object to show whole: the one that is asked for, else the first of the list."""
    objects = None if run is None else load_objects(run)
    if run is None or objects is None:
        return ""
    if address.object:
        return address.object
    return _first(objects, listed(run, objects, address), address)


def _first(objects: Objects, places: Places, address: Address) -> str:
    if address.object or not len(places):
        return address.object
    return str(objects.votes.object_id[int(places[0])].as_py())


def detail(run: Run | None, shown: str, *, dark: bool) -> list[Component]:
    """Builds all that is known of one object.

    Args:
        run: Whose votes.
        shown: The object's id; empty for none.
        dark: Whether its charts are to be.
    """
    if run is None or not shown:
        return [empty("Choose an object: its cloud, its views and its votes are shown here.")]
    moments = follow(run, shown)
    stored, why = _stored(run, shown)
    if not moments and stored is None:
        return [html.H3(shown), empty("This run knows no such object.")]
    parts: list[Component] = [html.H3(shown, className="object-id")]
    facts = [] if stored is None else _facts(stored)
    if facts:
        parts.append(html.P(facts, className="card-question"))
    if why:
        parts.append(html.P(why, className="note warn"))
    if stored is not None:
        parts.append(_graph("cloud", cloud_figure(stored), shown, dark=dark))
        parts.append(
            html.Div(
                [
                    html.Img(
                        src=view_address(view),
                        alt=f"view {place + 1} of {len(stored.views)}",
                        title=f"view {place + 1} of {len(stored.views)}",
                    )
                    for place, view in enumerate(stored.views)
                ],
                className="views",
            )
        )
    if moments:
        parts += [html.H4("Votes over the epochs")]
        parts.append(_graph("history", history_figure(moments), f"{run.name} {shown}", dark=dark))
        parts += [html.H4(f"After epoch {moments[-1].epoch}"), _votes(moments[-1], stored)]
    best = {} if stored is None else best_classes(run, shown, stored.shard)
    if best:
        parts += [html.H4("Best classes of the adapted model"), _best(best, stored)]
    return parts


def _stored(run: Run, shown: str) -> tuple[Stored | None, str]:
    """Reads an object, or says why its cloud and views can't be shown."""
    shards = shards_of(run)
    if shards is None:
        return None, "The run's config names no shards: there is no cloud and no view to show."
    try:
        stored = read_stored(shards, shown)
    except ConfigError as unreadable:
        return None, f"No cloud and no view: {unreadable}"
    return stored, "" if stored else f"The shards '{shards}' hold no such object any more."


def _facts(stored: Stored) -> list[Any]:
    parts: list[Any] = []
    if stored.label is not None:
        parts += ["true label: ", html.B(stored.label)]
    if stored.captions:
        parts += [" · " if parts else "", ", ".join(stored.captions[:2])]
    return parts


def _graph(key: str, figure: go.Figure, state: str, *, dark: bool) -> Component:
    dress(figure, dark=dark, state=state)
    config = GRAPH_CONFIG | ({"displayModeBar": False} if key == "history" else {})
    return html.Div(
        dcc.Graph(id=key, figure=figure, config=config, style={"height": figure.layout.height}),
        role="figure",
        className=f"graph-{key}",
        **aria(label=summary_of(figure)),
    )


def _votes(moment: Moment, stored: Stored | None) -> Component:
    truth = None if stored is None else stored.label
    rows = []
    for tower in ("image", "point"):
        if tower not in moment.votes and tower not in moment.labels:
            continue
        name, sure = moment.votes.get(tower, ("", float("nan")))
        label, selected = moment.labels.get(tower, ("", False))
        rows.append(
            html.Tr(
                [
                    html.Th(f"{tower} tower", scope="row"),
                    html.Td(_said(name, truth)),
                    html.Td(_share(sure), className="number"),
                    html.Td(_said(label, truth)),
                    html.Td("yes" if selected else "no"),
                    html.Td(_said(moment.student.get(tower, ""), truth)),
                ]
            )
        )
    heads = ("", "teacher", "sure", "label", "learned from", "student")
    return _plain_table("Votes of both towers", heads, rows)


def _best(best: Mapping[str, Sequence[str]], stored: Stored | None) -> Component:
    truth = None if stored is None else stored.label
    most = max(len(names) for names in best.values())
    rows = [
        html.Tr([html.Th(opinion, scope="row"), *(html.Td(_said(n, truth)) for n in names)])
        for opinion, names in best.items()
    ]
    heads = ("", *(f"{place + 1}." for place in range(most)))
    return _plain_table("Best classes by opinion", heads, rows)


def _plain_table(caption: str, heads: Sequence[str], rows: Sequence[Component]) -> Component:
    return html.Div(
        html.Table(
            [
                html.Caption(caption, className="visually-hidden"),
                html.Thead(html.Tr([html.Th(head, scope="col") for head in heads])),
                html.Tbody(list(rows)),
            ],
            className="data",
        ),
        className="scroll",
    )


def _said(name: str, truth: str | None) -> Any:
    """Marks a class that is the true one."""
    if not name:
        return DASH
    return html.Span([name, " ✓"], className="up") if name == truth else name


def _share(value: float) -> str:
    return DASH if np.isnan(value) else f"{value:.2f}"


def _run_picker(runs: Sequence[Run], run: Run, address: Address) -> list[Component]:
    others = [one for one in by_score(runs) if one.epochs]
    if len(others) < 2:
        return []
    shown = list(dict.fromkeys([run.name, *(one.name for one in others[:MAX_RUNS])]))
    titles = {one.name: one.title for one in others}
    return [
        html.Nav(
            [
                html.Span("run:", className="muted"),
                *(
                    pick(
                        titles[name],
                        address.link(run=(name,), page=1, object=""),
                        f"of-run-{name}",
                        current=name == run.name,
                    )
                    for name in shown
                ),
            ],
            className="choice",
            **aria(label="Run"),
        )
    ]


def _filter_link(
    one: Filter,
    chosen: Filter,
    objects: Objects,
    found: Flags,
    wrong: Flags | None,
    address: Address,
) -> Component:
    count = int((filter_objects(objects, one.key, wrong) & found).sum())
    return pick(
        [one.title, html.Span(f" {count:,}", className="muted")],
        address.link(filter=one.key, page=1, object=""),
        f"filter-{one.key}",
        current=one == chosen,
        title=one.question,
    )


def _head(address: Address, key: str) -> Component:
    says = "Sort by id" if key == "id" else f"Sort by the confidence of the {HEADS[key]}"
    return sort_head(
        address,
        key,
        HEADS[key],
        number=False,
        # What is least sure is what one looks for.
        first_down=False,
        active=address.sort == key or (key == LEAST_SURE and not address.sort),
        help_text=says,
    )


def _row(objects: Objects, place: int, address: Address, *, shown: str) -> Component:
    votes = objects.votes
    name = str(votes.object_id[place].as_py())
    link = html.A(name, href=address.link(object=name), title=name, **leads(f"object-{name}"))
    differ = "differs" if votes.disagree[place] else ""
    cells: list[Component] = [html.Th(link, scope="row", className="object-name")]
    for classes, sure, tone in (
        (votes.image_class, votes.image_confidence, differ),
        (votes.point_class, votes.point_confidence, differ),
        (votes.label, votes.label_confidence, ""),
    ):
        said = objects.name(int(classes[place]))
        number = html.Span(f" {sure[place]:.2f}" if said else "", className="range")
        cells.append(html.Td([said or DASH, number], className=tone))
    return html.Tr(cells, **(aria(selected="true") if name == shown else {}))
