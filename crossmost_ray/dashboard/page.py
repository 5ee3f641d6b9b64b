"""Results and the page's address in, the frame of the live page and its tables out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from crossmost_ray.dashboard.address import TABS, Address
from crossmost_ray.dashboard.panels import GROUPS, Panel
from crossmost_ray.dashboard.parts import (
    GRAPH_CONFIG,
    aria,
    cell,
    chip,
    duration,
    leads,
    loading,
    page_of,
    pager,
    pick,
    search_box,
    sort_head,
)
from crossmost_ray.dashboard.runs import Results, Run, Sweep
from crossmost_ray.dashboard.table import Table, Text, cell_text, sort_value

LEADERBOARD = "leaderboard"
"""Key of the panel whose rows choose runs; it always shows all of them."""

STATUSES = ("running", "interrupted", "pending", "done", "stopped", "failed")
"""In the order of the chips."""

TITLES: Mapping[str, str] = {"objects": "Objects"} | {str(key): GROUPS[key] for key in GROUPS}
"""Of the tabs."""

CLEAR = "rgba(0,0,0,0)"
BLANK: Any = {
    "data": [],
    "layout": {
        "xaxis": {"visible": False},
        "yaxis": {"visible": False},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
    },
}
"""Stands in a chart's place until it is drawn: Plotly's own would flash white on a dark page."""

MAX_NOTICES = 4
"""Notices of one kind that are spelled out; the others are counted."""

MAX_CHOSEN = 12
"""Chosen runs that are listed one by one."""

MAX_ROWS = 200
"""Rows of a table that has no pages."""

MAX_PROBLEMS = 200


def shell(root: str, busy_ms: int) -> Component:
    """Lays out what every view has; callbacks fill it.

    Args:
        root: Where the results are.
        busy_ms: How often the page asks what is new, at first.
    """
    return html.Div(
        [
            html.A("Skip to the results", href="#content", className="skip-link"),
            dcc.Location(id="address", refresh=False),
            dcc.Interval(id="tick", interval=busy_ms),
            *(dcc.Store(id=key) for key in ("version", "shown", "dark")),
            html.Header(
                [
                    html.Div(
                        [html.H1("Results"), html.P(root, className="where")], className="name"
                    ),
                    html.Div(id="status", className="chips", role="status", **aria(live="polite")),
                    html.Button("Dark", id="theme", type="button", className="button"),
                ],
                className="header",
            ),
            html.Nav(id="choice", className="choice", **aria(label="Which runs")),
            html.Nav(id="tabs", className="tabs", **aria(label="Sections")),
            html.Div(id="notices", className="notices"),
            html.Main(id="content", className="grid", tabIndex="-1"),
            html.Footer(id="problems", className="footer"),
        ],
        className="page live",
    )


def scope_runs(results: Results, address: Address) -> list[Run]:
    """Gives the runs of the sweep that the address names; all runs if it names none."""
    if address.of not in {sweep.name for sweep in results.sweeps}:
        return list(results.runs)
    return [run for run in results.runs if run.sweep == address.of]


def chosen_runs(results: Results, address: Address) -> list[Run]:
    """Gives the runs that were chosen one by one; all that are in view if none was."""
    runs = scope_runs(results, address)
    return [run for run in runs if run.name in address.run] or runs


def status_chips(results: Results) -> list[Component]:
    """Counts runs by their status. Read aloud when it changes, so it says nothing more."""
    counts = Counter(run.status for run in results.runs)
    known = [status for status in STATUSES if counts[status]]
    return [chip(status, counts[status]) for status in [*known, *sorted(set(counts) - set(known))]]


def tabs(address: Address) -> list[Component]:
    """Lists the sections, of which one is shown."""
    return [
        html.A(
            TITLES[tab],
            href=address.link(tab=tab),
            **(aria(current="true") if tab == address.tab else {}),
            **leads(f"tab-{tab}", top=True),
        )
        for tab in TABS
    ]


def choice(results: Results, address: Address) -> list[Component]:
    """Lets one sweep be picked, and shows which runs were."""
    parts: list[Component] = []
    if results.sweeps:
        names = [sweep.name for sweep in results.sweeps]
        shown = address.of if address.of in names else ""
        titles = {"": f"All runs ({len(results.runs):,})"}
        titles |= {one.name: f"{one.name} ({len(one.runs):,})" for one in results.sweeps}
        parts += [
            pick(
                title,
                address.link(of=name, run=(), page=1, object=""),
                f"of-{name}",
                current=name == shown,
            )
            for name, title in titles.items()
        ]
    runs = [run for run in scope_runs(results, address) if run.name in address.run]
    if runs:
        parts.append(html.Span("chosen:", className="muted"))
        parts += [
            pick(
                [run.title, html.Span(" ×", **aria(hidden="true"))],
                address.link(run=_without(address.run, run.name)),
                f"out-{run.name}",
                current=True,
                title=f"leave {run.title} out",
            )
            for run in runs[:MAX_CHOSEN]
        ]
        if len(runs) > MAX_CHOSEN:
            parts.append(html.Span(f"and {len(runs) - MAX_CHOSEN:,} more", className="muted"))
        parts.append(pick("show all", address.link(run=()), "out"))
    return parts


def notices(results: Results, address: Address) -> list[Component]:
    """Says what is going on, what went wrong and what to do.

    Where runs were chosen it speaks of those, else of all in view; what went wrong in any of them
    is told in the overview only.
    """
    if not results.runs:
        return [_nothing(results)]
    runs = chosen_runs(results, address)
    chosen = any(run.name in address.run for run in runs)
    running = [run for run in runs if run.status == "running"]
    parts = [_running(run) for run in running[:MAX_NOTICES]]
    if len(running) > MAX_NOTICES:
        parts.append(html.P(f"and {len(running) - MAX_NOTICES:,} more running", className="muted"))
    if not chosen and address.tab != "overview":
        return parts
    for sweep in results.sweeps:
        if not chosen and address.of in ("", sweep.name):
            parts += _sweep_notices(sweep)
    ended = [
        run
        for status in ("interrupted", "failed")
        for run in runs
        if run.status == status and (chosen or run.sweep is None)
    ]
    parts += [_notice(run) for run in ended[:MAX_NOTICES]]
    if len(ended) > MAX_NOTICES:
        parts.append(html.P(f"and {len(ended) - MAX_NOTICES:,} more", className="muted"))
    return parts


def problems(results: Results) -> list[Component]:
    """Lists files that could not be read, folded away."""
    said = results.problems
    if not said:
        return []
    noun = "file" if len(said) == 1 else "files"
    return [
        html.Details(
            [
                html.Summary(f"{len(said):,} {noun} could not be read; the rest is shown"),
                html.Ul([html.Li(line) for line in said[:MAX_PROBLEMS]]),
            ],
            className="note warn",
        )
    ]


def card(panel: Panel, address: Address) -> Component:
    """Lays out a panel's place: heading, question, and room for a chart or a table."""
    title = f"title-{panel.key}"
    parts: list[Component] = [
        html.H3(panel.title, id=title),
        html.P(panel.question, className="card-question"),
    ]
    if panel.key == LEADERBOARD:
        parts.append(search_box(address, "Search runs and settings"))
    parts += [
        html.Div(
            dcc.Graph(id={"kind": "graph", "panel": panel.key}, figure=BLANK, config=GRAPH_CONFIG),
            id={"kind": "frame", "panel": panel.key},
            hidden=True,
            role="figure",
            **aria(labelledby=title),
        ),
        html.Div(loading(), id={"kind": "rest", "panel": panel.key}),
        dcc.Store(id={"kind": "seen", "panel": panel.key}),
    ]
    return html.Section(parts, className=f"card card-{panel.key}", **aria(labelledby=title))


def table(content: Table, address: Address, *, choosing: bool) -> list[Component]:
    """Builds a panel's table.

    Args:
        content: What it holds.
        address: Of the page.
        choosing: Whether it is the leaderboard: its rows choose runs, its heads sort it, what is
            searched narrows it, and it has pages.
    """
    order = _ordered(content, address) if choosing else list(range(len(content.rows)))
    first, end = page_of(address, len(order)) if choosing else (0, min(len(order), MAX_ROWS))
    heads = [
        sort_head(
            address,
            column.title,
            column.title,
            number=column.kind == "number",
            first_down=column.kind == "number",
            help_text=column.help,
            active=address.sort == column.title,
        )
        if choosing
        else html.Th(
            column.title,
            scope="col",
            title=column.help,
            className="number" if column.kind == "number" else "",
        )
        for column in content.columns
    ]
    rows = [_row(content, place, address, choosing=choosing) for place in order[first:end]]
    shown = html.Table(
        [
            html.Caption(content.caption),
            html.Thead(html.Tr(heads)),
            html.Tbody(rows),
        ],
        className="data",
    )
    parts: list[Component] = [
        html.Div(
            shown, className="scroll", tabIndex="0", role="region", **aria(label=content.caption)
        )
    ]
    if choosing:
        parts.append(pager(address, len(order), noun="runs"))
    elif len(order) > end:
        parts.append(html.P(f"and {len(order) - end:,} more", className="count"))
    return parts


def blocks(content: Text) -> list[Component]:
    """Builds text to copy."""
    parts: list[Component] = [html.P(content.caption, className="muted")]
    for heading, words in content.blocks:
        parts += [html.H4(heading), html.Pre(words, className="block", tabIndex="0")]
    return parts


def _ordered(content: Table, address: Address) -> list[int]:
    """Gives the places of the rows that are searched for, in the order that is asked for."""
    texts = content.texts()
    wanted = address.find.strip().lower()
    order = [place for place, row in enumerate(texts) if wanted in " ".join(row).lower()]
    titles = [column.title for column in content.columns]
    if address.sort not in titles:
        return order
    column = titles.index(address.sort)
    values = {place: sort_value(content.rows[place][column]) for place in order}
    known = [place for place in order if values[place] is not None]
    # Words after numbers, should a column hold both.
    known.sort(
        key=lambda place: (isinstance(values[place], str), values[place]), reverse=address.down
    )
    return known + [place for place in order if values[place] is None]


def _row(content: Table, place: int, address: Address, *, choosing: bool) -> Component:
    cells: list[Component] = []
    name = content.keys[place] if choosing else ""
    chosen = name in address.run
    for number, (value, column) in enumerate(
        zip(content.rows[place], content.columns, strict=True)
    ):
        words = cell(value, column)
        if number:
            text = words if isinstance(words, str) else None
            cells.append(html.Td(words, className=column.kind, title=text))
        elif choosing:
            cells.append(html.Th(_chooser(name, cell_text(value, column), address), scope="row"))
        else:
            cells.append(html.Th(words, scope="row"))
    return html.Tr(cells, **(aria(selected="true") if chosen else {}))


def _chooser(name: str, title: str, address: Address) -> list[Component]:
    """A box that adds the run to those chosen, and its name, which shows it alone."""
    chosen = name in address.run
    rest = _without(address.run, name)
    return [
        html.A(
            "☑" if chosen else "☐",
            href=address.link(run=rest if chosen else (*rest, name)),
            role="checkbox",
            className="box",
            **aria(checked="true" if chosen else "false", label=f"choose {title}"),
            **leads(f"box-{name}"),
        ),
        html.A(
            title,
            href=address.link(tab="training", run=(name,)),
            title=name,
            **leads(f"run-{name}", top=True),
        ),
    ]


def _nothing(results: Results) -> Component:
    return html.Section(
        [
            html.H3("Nothing here yet"),
            html.P(f"No run and no sweep lies below {results.root}."),
            html.P("This page fills by itself as soon as one begins, for instance:"),
            html.Pre("python jobs/adapt.py configs/adapt/furniture.yaml", className="block"),
        ],
        className="card nothing",
    )


def _notice(run: Run) -> Component:
    if run.status == "failed":
        tone, title = "bad", f"{run.title} failed"
        words = run.error or "It left no reason; the end of its output has one."
    else:
        tone, title = "warn", f"{run.title} was interrupted"
        words = (
            "Its process has fallen silent: it, or its machine, was ended. What is done is kept."
        )
    if run.sweep is not None:
        return _note(tone, title, words, "Started again with --resume, its sweep goes on.")
    if not run.command:
        return _note(tone, title, words, "Go on with --resume.")
    again = run.command if "--resume" in run.command else f"{run.command} --resume"
    return _note(tone, title, words, "Go on with:", html.Code(again))


def _sweep_notices(sweep: Sweep) -> list[Component]:
    """Sums up what went wrong in a sweep: of a thousand trials, many may fail alike."""
    parts: list[Component] = []
    if sweep.status == "interrupted":
        words = "Its process has fallen silent. What is done is kept: go on with --resume."
        parts.append(_note("warn", f"{sweep.title} was interrupted", words))
    elif sweep.status == "failed":
        parts.append(_note("bad", f"{sweep.title} failed", sweep.error or "It left no reason."))
    failed = [run for run in sweep.runs if run.status == "failed"]
    if failed:
        why = Counter(run.error or "no reason given" for run in failed).most_common(1)[0][0]
        title = f"{len(failed):,} of {len(sweep.runs):,} trials of {sweep.title} failed"
        words = f"{'the commonest reason: ' if len(failed) > 1 else ''}{why}"
        parts.append(_note("bad", title, words))
    return parts


def _note(tone: str, title: str, *words: Any) -> Component:
    return html.Section(
        [html.B(title), *(html.Span(one) if isinstance(one, str) else one for one in words)],
        className=f"note {tone}",
    )


def _running(run: Run) -> Component:
    progress = run.progress or {}
    step, steps = progress.get("step"), progress.get("num_steps")
    said = ["evaluating" if run.stage == "evaluating" else f"epoch {run.epochs + 1}"]
    bar: dict[str, Any] = {}
    if isinstance(step, int | float) and isinstance(steps, int | float) and steps > 0:
        bar["value"] = f"{min(1.0, step / steps):.4f}"
        said.append(f"step {step:,.0f} of {steps:,.0f}")
    if isinstance(speed := progress.get("pairs_per_s"), int | float):
        said.append(f"{speed:,.1f} pairs/s")
    if isinstance(left := progress.get("eta_s"), int | float):
        said.append(f"{duration(left)} left")
    return html.Section(
        [
            html.B(run.title),
            html.Progress(max="1", **bar, **aria(label=f"progress of {run.title}")),
            html.Span(", ".join(said), className="muted"),
        ],
        className="note going",
    )


def _without(names: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(one for one in names if one != name)
