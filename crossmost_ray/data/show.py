"""An inspection in, tables and pictures of it in a terminal out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from crossmost_ray.data.decode import decode_view, ring_views
from crossmost_ray.data.inspect import Inspection, sample_rows
from crossmost_ray.schema import MANIFEST_NAME

NONE_SHOWN = {"label": "no label", "source": "no source"}

MAX_LINES = 20
"""Files, sizes of views and unusable rows that are printed; the rest is counted."""

PICTURE_SIDE = 24
"""Side of a view in the terminal: columns, and twice the lines."""

UNREADABLE = (255, 0, 255)
"""Fills the place of a view that cannot be decoded."""


def print_inspection(inspection: Inspection, console: Console, *, pictures: int) -> None:
    """Prints an inspection as tables.

    Args:
        inspection: What to print.
        console: Where to.
        pictures: Objects whose views are shown below, in half-block characters.

    Raises:
        ConfigError: If a shard has changed and cannot be read any more.
    """
    console.print(_plain_text(inspection.folder, style="bold"))
    console.print(_overview(inspection))
    console.print(_counts_table("class", inspection.classes, NONE_SHOWN["label"]))
    console.print(_counts_table("source", inspection.sources, NONE_SHOWN["source"]))
    console.print(_files_table(inspection))
    for name in inspection.missing:
        console.print(_plain_text(f"{name}: named by {MANIFEST_NAME}, but missing", style="red"))
    for row in inspection.bad[:MAX_LINES]:
        console.print(_plain_text(row, style="red"))
    if len(inspection.bad) > MAX_LINES:
        console.print(f"... and {len(inspection.bad) - MAX_LINES} more objects")
    if pictures:
        _print_pictures(inspection, console, pictures)


def half_blocks(pixels: npt.NDArray[np.uint8]) -> Text:
    """Draws a picture with characters whose upper and lower halves are a pixel each.

    Args:
        pixels: (H, W, 3) sRGB, H even.

    Returns:
        H / 2 lines of W characters.
    """
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Text()
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        lines.append(line)
    return Text("\n").join(lines)


def _plain_text(value: object, style: str = "") -> Text:
    """Text of a file, of which nothing reaches the terminal but what can be printed."""
    return Text("".join(c if c.isprintable() else "?" for c in str(value)), style=style)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place and name != "checksum" else "left")
    return table


def _overview(inspection: Inspection) -> Table:
    sizes = list(inspection.view_sizes.items())
    shown = [f"{count} of {width} x {height}" for (width, height), count in sizes[:MAX_LINES]]
    if len(sizes) > MAX_LINES:
        shown.append(f"and {len(sizes) - MAX_LINES} other sizes")
    table = Table(title="overview", title_justify="left", show_header=False)
    num_bytes = sum(file.num_bytes for file in inspection.files)
    for name, value in {
        "objects": inspection.num_objects,
        "files": f"{len(inspection.files)}, {num_bytes / 1e6:.1f} MB",
        "points of a cloud": inspection.points,
        "with colours": f"{inspection.num_colored} of {inspection.num_objects} objects",
        "views of an object": inspection.views,
        "pixels of the views": ", ".join(shown) or "no view",
        "columns": ", ".join(f"{column.name}: {column.type}" for column in inspection.schema),
        **inspection.facts,
        MANIFEST_NAME: _manifest_line(inspection),
    }.items():
        table.add_row(_plain_text(name), _plain_text(value))
    return table


def _manifest_line(inspection: Inspection) -> str:
    if inspection.intact:
        return "its checksums agree with the files"
    if all(file.checksum == "not stated" for file in inspection.files):
        return "states no checksum of these files"
    return "does not agree with the files"


def _counts_table(title: str, counts: Mapping[str | None, int], none: str) -> Table:
    table = _table("", title, "objects")
    for name, count in counts.items():
        table.add_row(_plain_text(none if name is None else name), str(count))
    return table


def _files_table(inspection: Inspection) -> Table:
    table = _table("", "file", "objects", "MB", "checksum")
    # Those that need a look first.
    ordered = sorted(inspection.files, key=lambda file: file.checksum == "agrees")
    for file in ordered[:MAX_LINES]:
        style = "red" if file.checksum == "differs" else ""
        megabytes = f"{file.num_bytes / 1e6:.2f}"
        name = _plain_text(file.path.name)
        table.add_row(name, str(file.num_rows), megabytes, file.checksum, style=style)
    if len(ordered) > MAX_LINES:
        table.add_row(f"... and {len(ordered) - MAX_LINES} more", "", "", "")
    return table


def _print_pictures(inspection: Inspection, console: Console, num_objects: int) -> None:
    if console.color_system is None:
        console.print("the pictures are left out: they need a terminal with colours")
        return
    fitting = max(1, console.width // (PICTURE_SIDE + 1))
    for row in sample_rows([file.path for file in inspection.files], num_objects):
        label = NONE_SHOWN["label"] if row["label"] is None else row["label"]
        caption = (row["captions"] or [""])[0]
        console.print(_plain_text(f"{row['object_id']}: {label}  {caption}", style="bold"))
        stored = row["views"] or []
        used = ring_views(min(fitting, len(stored)), len(stored))
        if used:
            # As they stand: a terminal that is too narrow for one cuts it off, and folds nothing.
            strip = half_blocks(np.concatenate([_tile(stored[place]) for place in used], axis=1))
            console.print(strip, no_wrap=True, overflow="crop", crop=True)


def _tile(view: bytes | None) -> npt.NDArray[np.uint8]:
    """(S, S + 1, 3): a small view and a black line to its right."""
    side = PICTURE_SIDE
    tile = np.zeros((side, side + 1, 3), np.uint8)
    try:
        tile[:, :side] = decode_view(view or b"", side).transpose(1, 2, 0)
    except OSError:
        tile[:, :side] = UNREADABLE
    return tile
