"""The pieces that a page is made of, as HTML: what comes from files is escaped here, once."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from crossmost_ray.dashboard.accuracy import Accuracy, Gain
from crossmost_ray.dashboard.table import DASH, Column, Table, Text, Value, cell_text

escape = html.escape


def style() -> str:
    """Gives the style sheet that the page and the report share."""
    place = resources.files("crossmost_ray") / "dashboard" / "assets" / "style.css"
    return place.read_text(encoding="utf-8")


def chip(status: str) -> str:
    """Writes a status as a coloured word."""
    return f'<span class="chip chip-{escape(status)}">{escape(status)}</span>'


def stat(label: str, value: str, note: str = "") -> str:
    """Writes one number of the summary strip.

    Args:
        label: What it is.
        value: HTML.
        note: HTML; a line below it.
    """
    below = f'<div class="stat-note">{note}</div>' if note else ""
    return (
        f'<div class="stat"><div class="stat-label">{escape(label)}</div>'
        f'<div class="stat-value">{value}</div>{below}</div>'
    )


def strip(stats: list[str]) -> str:
    """Sets the numbers of the summary strip beside each other."""
    return f'<div class="strip">{"".join(stats)}</div>' if stats else ""


def change(gain: Gain) -> str:
    """Writes a gain with its interval, coloured where the interval leaves 0 out."""
    sure = "up" if gain.low > 0 else "down" if gain.high < 0 else ""
    return (
        f'<span class="{sure}">{gain.difference:+.1f} points</span> '
        f"[{gain.low:+.1f}, {gain.high:+.1f}]"
    )


def card(key: str, title: str, question: str, content: str) -> str:
    """Writes a part of the page under its heading.

    Args:
        key: Becomes part of ids; letters, digits and dashes.
        title: Of the part.
        question: What it answers.
        content: HTML.
    """
    return (
        f'<section class="card" id="{key}" aria-labelledby="{key}-title">'
        f'<h3 id="{key}-title">{escape(title)}</h3>'
        f'<p class="card-question">{escape(question)}</p>{content}</section>'
    )


def empty(why: str) -> str:
    """Says why a part shows nothing."""
    return f'<p class="empty">{escape(why)}</p>'


def note(title: str, lines: list[str], kind: str = "") -> str:
    """Writes a note that opens to a list."""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<details class="note {kind}"><summary>{escape(title)}</summary>'
        f"<ul>{listed}</ul></details>"
    )


def table(content: Table) -> str:
    """Writes a table; the first cell of a row is its heading."""
    head = "".join(
        f'<th scope="col"{_class(column)}{_title(column.help)}>{_breakable(column.title)}</th>'
        for column in content.columns
    )
    rows = []
    for row in content.rows:
        first, *rest = zip(row, content.columns, strict=True)
        cells = [f'<th scope="row">{cell(*first)}</th>']
        cells += [
            f"<td{_class(column, value)}>{cell(value, column)}</td>" for value, column in rest
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(content.caption)}">'
        f'<table class="data"><caption>{escape(content.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def cell(value: Value, column: Column) -> str:
    """Writes a cell; intervals stand back behind what they are about."""
    if column.kind == "status" and isinstance(value, str):
        return chip(value)
    text = escape(cell_text(value, column))
    if isinstance(value, Accuracy | Gain):
        number, _, interval = text.partition(" ")
        return f'{number} <span class="range">{interval}</span>'
    return text


def text(content: Text) -> str:
    """Writes blocks of text to copy."""
    blocks = "".join(
        f'<h4 class="muted">{escape(heading)}</h4>'
        f'<pre class="block" tabindex="0">{escape(one)}</pre>'
        for heading, one in content.blocks
    )
    return f'<p class="muted">{escape(content.caption)}</p>{blocks}'


def json_script(identity: str, value: Any) -> str:
    """Writes data for a script to read, such that no text in it can end the element."""
    data = value if isinstance(value, str) else json.dumps(value)
    safe = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{identity}">{safe}</script>'


def _class(column: Column, value: Value = None) -> str:
    if column.kind == "number":
        return ' class="number"'
    # Sentences wrap; names and numbers don't.
    long = isinstance(value, str) and len(value) > 40 and value != DASH
    return ' class="words"' if long else ""


def _breakable(title: str) -> str:
    """Lets a dotted key break where its parts meet: a column need not be as wide as its title."""
    return escape(title).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _title(help_text: str) -> str:
    return f' title="{escape(help_text)}"' if help_text else ""
