"""Small pieces that the live page is built of, as components."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html
from dash.development.base_component import Component

from crossmost_ray.dashboard.accuracy import Accuracy, Gain
from crossmost_ray.dashboard.address import Address
from crossmost_ray.dashboard.chart import BLUE, template
from crossmost_ray.dashboard.table import Column, Value, cell_text

PAGE_ROWS = 50
"""Rows of a list that are shown at a time."""

GRAPH_CONFIG: Any = {"displaylogo": False, "responsive": True, "displayModeBar": "hover"}


def aria(**values: str) -> dict[str, Any]:
    """Gives attributes for those who don't see the page, such as `aria(label="Pages")`."""
    return {f"aria-{key}": value for key, value in values.items()}


def leads(key: str, *, top: bool = False) -> dict[str, Any]:
    """Gives the attributes of a link that changes the address only.

    Args:
        key: Tells it from other links: it keeps the focus when it is drawn anew.
        top: Whether the page is then shown from its top.
    """
    return {"data-go": "top" if top else "stay", "data-key": key}


def pick(words: Any, href: str, key: str, *, current: bool = False, title: str = "") -> Component:
    """Builds a link of a row of choices."""
    marked = aria(current="true") if current else {}
    return html.A(words, href=href, className="pick", title=title, **marked, **leads(key))


def chip(status: str, count: int | None = None) -> Component:
    """Shows a status, as a word and in its colour, and how many have it."""
    words: list[Any] = [status] if count is None else [html.B(f"{count:,}"), f" {status}"]
    return html.Span(words, className=f"chip chip-{status}")


def empty(why: str) -> Component:
    """Says why there is nothing to draw."""
    return html.P(why, className="empty")


def loading() -> Component:
    """Stands where something is still being read or drawn."""
    return html.P("Reading …", className="muted")


def dress(figure: go.Figure, *, dark: bool, state: str) -> None:
    """Gives a figure the page's colours.

    Args:
        figure: Gets them.
        dark: Which ones.
        state: As long as it stays, so do the reader's zoom and turn.
    """
    clear, muted = "rgba(0,0,0,0)", "#8b95a1"
    figure.update_layout(
        template=template(dark),
        uirevision=state,
        modebar={"bgcolor": clear, "color": muted, "activecolor": BLUE},
    )


def page_of(address: Address, rows: int) -> tuple[int, int]:
    """Gives the first row of the page that is shown, and the row after its last."""
    first = (min(address.page, _pages(rows)) - 1) * PAGE_ROWS
    return first, min(first + PAGE_ROWS, rows)


def pager(address: Address, rows: int, *, noun: str) -> Component:
    """Counts the rows of a list, and links to its other pages."""
    pages = _pages(rows)
    if pages == 1:
        return html.P(
            f"{rows:,} {noun if rows != 1 else noun.removesuffix('s')}", className="count"
        )
    page = min(address.page, pages)
    first, end = page_of(address, rows)
    steps = (("First", 1), ("Previous", page - 1), ("Next", page + 1), ("Last", pages))
    return html.Nav(
        [
            html.Span(f"{first + 1:,} to {end:,} of {rows:,} {noun}", className="count"),
            *(
                pick(name, address.link(page=to), f"page-{name}")
                if 1 <= to <= pages and to != page
                else html.Span(name, className="pick off", **aria(disabled="true"))
                for name, to in steps
            ),
        ],
        className="pager",
        **aria(label=f"Pages of {noun}"),
    )


def sort_head(
    address: Address,
    key: str,
    title: str,
    *,
    number: bool,
    first_down: bool,
    active: bool,
    help_text: str = "",
) -> Component:
    """Builds the head of a column that sorts by it, and the other way once it does.

    Args:
        address: Of the page.
        key: What the address calls the column.
        title: Its name.
        number: Whether it holds numbers.
        first_down: Whether the largest come first at the first click.
        active: Whether the list is sorted by it now.
        help_text: What the title means.
    """
    order = ("descending" if address.down else "ascending") if active else "none"
    mark = {"descending": " ↓", "ascending": " ↑", "none": ""}[order]
    down = not address.down if active else first_down
    return html.Th(
        html.A(
            [title, html.Span(mark, **aria(hidden="true"))],
            href=address.link(sort=key, down=down, page=1),
            title=help_text,
            **leads(f"sort-{key}"),
        ),
        scope="col",
        className="number" if number else "",
        **aria(sort=order),
    )


def search_box(address: Address, says: str) -> Component:
    """Builds the box that narrows a list; the address follows what is typed."""
    return html.Label(
        [
            html.Span(says, className="visually-hidden"),
            dcc.Input(type="search", value=address.find, placeholder=says, className="search"),
        ]
    )


def cell(value: Value, column: Column) -> Any:
    """Shows a value of a table: a status as a chip, an interval smaller than its number."""
    words = cell_text(value, column)
    if column.kind == "status" and isinstance(value, str):
        return chip(value)
    if isinstance(value, Accuracy | Gain):
        number, _, interval = words.partition(" ")
        tone = ""
        if isinstance(value, Gain):
            # Coloured only where the interval leaves no doubt about the sign.
            tone = "up" if value.low > 0 else "down" if value.high < 0 else ""
        return [
            html.Span(number, className=tone),
            html.Span(f" {interval}", className="range"),
        ]
    return words


def duration(seconds: float) -> str:
    """Writes a time as people say it, such as 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _pages(rows: int) -> int:
    return max(1, math.ceil(rows / PAGE_ROWS))
