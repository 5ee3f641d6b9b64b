"""What a panel shows that is no chart: a table of values, or text to copy."""

from __future__ import annotations

from dataclasses import dataclass

from crossmost_ray.dashboard.accuracy import Accuracy, Gain

Value = str | float | Accuracy | Gain | None
"""What a cell holds; None is shown as a dash."""

DASH = "–"


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    format: str = ""
    """How numbers are written, such as `.1f`; empty for words."""
    help: str = ""
    """What the title means, in a sentence."""
    kind: str = "words"
    """words, number or status."""


@dataclass(frozen=True)
class Table:
    """Values in rows; numbers stay numbers until they are shown, so that they can be sorted."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    keys: tuple[str, ...] = ()
    """The run that each row is about, by its name; empty where rows are about no run."""

    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Writes every cell out."""
        return tuple(
            tuple(cell_text(value, column) for value, column in zip(row, self.columns, strict=True))
            for row in self.rows
        )


@dataclass(frozen=True)
class Text:
    """Blocks of text to copy."""

    caption: str
    blocks: tuple[tuple[str, str], ...]
    """Heading and text of each."""


def cell_text(value: Value, column: Column) -> str:
    """Writes a value as its column asks."""
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    if isinstance(value, Accuracy):
        return f"{value.top1:.1f} [{value.low:.1f}, {value.high:.1f}]"
    if isinstance(value, Gain):
        return f"{value.difference:+.1f} [{value.low:+.1f}, {value.high:+.1f}]"
    return format(value, column.format or "g")


def sort_value(value: Value) -> float | str | None:
    """Gives what a cell is sorted by; None goes last."""
    if isinstance(value, Accuracy):
        return value.top1
    return value.difference if isinstance(value, Gain) else value
