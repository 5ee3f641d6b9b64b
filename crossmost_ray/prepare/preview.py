"""Rows of shards in, one picture out that shows what became of the objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crossmost_ray.config import ConfigError
from crossmost_ray.data.decode import decode_view, ring_views
from crossmost_ray.data.inspect import sample_rows
from crossmost_ray.prepare.depth import view_axes
from crossmost_ray.prepare.mesh import Pixels

GAP = 4
"""Pixels between two pictures."""

TEXT_WIDTH = 220
TEXT_SIZE = 12
LINE_HEIGHT = 16
PAPER = (255, 255, 255)
INK = (20, 20, 20)

POINTS_CAMERA = (30.0, 20.0)
"""Azimuth and elevation in degrees under which the points are shown."""

POINTS_BACKGROUND = 232
DOT = 2
"""Side of a point in pixels."""

LOW, HIGH = np.array([40.0, 60.0, 160.0]), np.array([230.0, 120.0, 30.0])
"""sRGB of the lowest and the highest point of a cloud without colours."""

LONGEST_TEXT = 200


def contact_sheet(
    rows: Sequence[Mapping[str, Any]], *, views_per_row: int = 6, side: int = 96
) -> Image.Image:
    """Draws one line per object: some of its views, its points, and what is known of it.

    Views are cut to squares as training cuts them. Points are drawn to one scale, in which the unit
    sphere fills the square: a cloud that is not normalised shows.

    Args:
        rows: At least one, with `object_id`, `label`, `captions`, `views` (encoded), `points`
            (N, 3) and `colors` (N, 3) or None.
        views_per_row: Views of each object, spread evenly over those it has; fewer where it has
            fewer.
        side: Of each picture, in pixels.

    Raises:
        ConfigError: If a view is no image.
    """
    if not rows:
        raise ValueError("there is no row to draw")
    step = side + GAP
    left = GAP + TEXT_WIDTH
    sheet = Image.new("RGB", (left + (views_per_row + 1) * step, GAP + len(rows) * step), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    for number, row in enumerate(rows):
        top = GAP + number * step
        for line, text in enumerate(_texts(row)[: side // LINE_HEIGHT]):
            fitting = _fit(text, font)
            draw.text((GAP, top + line * LINE_HEIGHT), fitting, font=font, fill=INK)
        views = row["views"]
        for column, place in enumerate(ring_views(min(views_per_row, len(views)), len(views))):
            sheet.paste(_view(row, place, side), (left + column * step, top))
        points = draw_points(np.asarray(row["points"], np.float32), row["colors"], side)
        sheet.paste(Image.fromarray(points), (left + views_per_row * step, top))
    return sheet


def write_preview(files: Sequence[Path], output: Path, num_objects: int = 24) -> None:
    """Writes the contact sheet of objects spread evenly over shards.

    Args:
        files: Shards.
        output: Image file; its suffix says the format.
        num_objects: At most so many.

    Raises:
        ConfigError: If a shard cannot be read, all are empty, or the file cannot be written.
    """
    rows = sample_rows(files, num_objects)
    if not rows:
        raise ConfigError("there is nothing to preview: the shards hold no object")
    sheet = contact_sheet(rows)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    except (OSError, ValueError) as refused:
        raise ConfigError(
            f"the preview can't be written to {output} ({refused}); name a .png file in a folder "
            "that can be written to"
        ) from None


def draw_points(points: NDArray[np.float32], colors: NDArray[np.uint8] | None, side: int) -> Pixels:
    """Draws a cloud from its front's right, a little from above, nearer points over farther ones.

    Args:
        points: (N, 3), y upwards; what lies outside the unit sphere may be outside the picture.
        colors: (N, 3) sRGB, or None to colour the points by their height.
        side: Of the picture, in pixels.

    Returns:
        (side, side, 3).
    """
    picture = np.full((side, side, 3), POINTS_BACKGROUND, np.uint8)
    if colors is None:
        height = ((1 + points[:, 1:2]) / 2).clip(0, 1)
        colors = np.nan_to_num(LOW + height * (HIGH - LOW)).astype(np.uint8)
    seen = points @ view_axes(*POINTS_CAMERA).T
    inside = (np.abs(seen[:, :2]) <= 1).all(axis=1)
    seen, colors = seen[inside], np.asarray(colors, np.uint8)[inside]
    # Of pixels that several points fall on, the last written stays: so the nearest goes last.
    order = np.argsort(seen[:, 2], kind="stable")
    seen, colors = seen[order], colors[order]
    room = side - DOT
    row = ((1 - seen[:, 1]) / 2 * room).round().astype(np.int64)
    column = ((1 + seen[:, 0]) / 2 * room).round().astype(np.int64)
    down, right = np.divmod(np.arange(DOT * DOT), DOT)
    picture[row[:, None] + down, column[:, None] + right] = colors[:, None]
    return picture


def _texts(row: Mapping[str, Any]) -> list[str]:
    captions = row["captions"] or [""]
    return [
        str(captions[0]),
        "no label" if row["label"] is None else str(row["label"]),
        str(row["object_id"]),
        f"{len(row['views'])} views, {len(row['points'])} points",
    ]


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text on one line, cut to the width of its column."""
    text = " ".join(text[:LONGEST_TEXT].split())
    if font.getlength(text) <= TEXT_WIDTH - GAP:
        return text
    while text and font.getlength(f"{text}...") > TEXT_WIDTH - GAP:
        text = text[:-1]
    return f"{text}..."


def _view(row: Mapping[str, Any], place: int, side: int) -> Image.Image:
    try:
        pixels = decode_view(row["views"][place], side)
    except (OSError, TypeError) as broken:
        raise ConfigError(
            f"view {place} of {row['object_id']} can't be decoded ({broken}); "
            "prepare its shard anew"
        ) from None
    return Image.fromarray(pixels.transpose(1, 2, 0))
