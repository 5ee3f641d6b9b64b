"""Contact sheets: what stands where, and what cannot be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.data.decode import decode_view
from crossmost_ray.data.inspect import sample_rows
from crossmost_ray.prepare.preview import (
    GAP,
    HIGH,
    LOW,
    PAPER,
    POINTS_BACKGROUND,
    TEXT_WIDTH,
    contact_sheet,
    draw_points,
    write_preview,
)
from crossmost_ray.schema import SHARD_SCHEMA
from tests.synthetic import write_shards

SHARDS = sorted(resolve_path("assets:furniture/target_a").glob("*.parquet"))
SIDE = 40
STEP = SIDE + GAP
LEFT = GAP + TEXT_WIDTH


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return sample_rows(SHARDS, 3)


def sheet_of(rows: list[dict[str, Any]], views_per_row: int = 4) -> Any:
    return np.asarray(contact_sheet(rows, views_per_row=views_per_row, side=SIDE))


def tile(sheet: Any, line: int, column: int) -> Any:
    top, left = GAP + line * STEP, LEFT + column * STEP
    return sheet[top : top + SIDE, left : left + SIDE]


def text_area(sheet: Any, line: int) -> Any:
    return sheet[GAP + line * STEP : GAP + (line + 1) * STEP - GAP, :LEFT]


def test_each_line_shows_views_around_the_ring_and_then_the_points(
    rows: list[dict[str, Any]],
) -> None:
    sheet = sheet_of(rows)
    assert sheet.shape == (GAP + 3 * STEP, LEFT + 5 * STEP, 3)
    for line, row in enumerate(rows):
        for column, place in enumerate((0, 3, 6, 9)):
            expected = decode_view(row["views"][place], SIDE).transpose(1, 2, 0)
            np.testing.assert_array_equal(tile(sheet, line, column), expected)
        expected = draw_points(row["points"], row["colors"], SIDE)
        np.testing.assert_array_equal(tile(sheet, line, 4), expected)


def test_an_object_with_few_views_leaves_room(rows: list[dict[str, Any]]) -> None:
    row = {**rows[0], "views": rows[0]["views"][:2]}
    sheet = sheet_of([row, {**row, "views": []}])
    for line, column in ((0, 2), (0, 3), (1, 0), (1, 3)):
        assert (tile(sheet, line, column) == PAPER).all()
    assert not (tile(sheet, 0, 1) == PAPER).all()
    assert not (tile(sheet, 1, 4) == PAPER).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("captions", ["another name"]),
        ("captions", []),
        ("label", None),
        ("label", "no chair"),
        ("captions", ["Stühle, größer"]),
    ],
)
def test_what_is_known_of_an_object_is_written_beside_it(
    rows: list[dict[str, Any]], key: str, value: object
) -> None:
    before, after = sheet_of([rows[0]]), sheet_of([{**rows[0], key: value}])
    assert (text_area(before, 0) != after[GAP : GAP + SIDE, :LEFT]).any()
    np.testing.assert_array_equal(before[:, LEFT:], after[:, LEFT:])


@pytest.mark.parametrize(
    "text", ["W" * 5000, "a word " * 900, "two\nlines\tand a tab", "椅子 \x1b[31m"]
)
def test_no_text_runs_into_the_pictures_or_the_next_line(
    rows: list[dict[str, Any]], text: str
) -> None:
    row = {**rows[0], "captions": [text], "label": text, "object_id": text}
    sheet = sheet_of([row, {**row, "captions": [""], "label": ""}])
    assert (sheet[:, TEXT_WIDTH + 1 : LEFT] == PAPER).all()
    np.testing.assert_array_equal(sheet[:, LEFT:], sheet_of([rows[0]] * 2)[:, LEFT:])


def test_a_view_that_is_no_image_is_named(rows: list[dict[str, Any]]) -> None:
    for broken in (b"no image", None):
        row = {**rows[0], "views": [*rows[0]["views"][:3], broken]}
        with pytest.raises(ConfigError, match=rf"view 3 of {row['object_id']} can't be decoded"):
            sheet_of([row])


def test_no_rows_are_a_wrong_call() -> None:
    with pytest.raises(ValueError, match="no row to draw"):
        contact_sheet([])


def test_higher_points_are_higher_up_and_of_the_warmer_colour() -> None:
    points = np.array([[0, -0.9, 0], [0, 0.9, 0]], np.float32)
    picture = draw_points(points, None, 101).astype(int)
    found, _ = np.nonzero((picture != POINTS_BACKGROUND).any(axis=-1))
    assert sorted(set(found)) == [8, 9, 91, 92]
    np.testing.assert_allclose(picture[8, 50], LOW + 0.95 * (HIGH - LOW), atol=2)
    np.testing.assert_allclose(picture[92, 50], LOW + 0.05 * (HIGH - LOW), atol=2)


def test_the_nearer_point_hides_the_farther_whatever_their_order() -> None:
    points = np.array([[0.0, 0, 0], [0, 0, 0]], np.float32)
    towards = np.array([0.4698, 0.3420, 0.8138], np.float32)
    points[1] += 0.5 * towards
    colors = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    for order in ([0, 1], [1, 0]):
        picture = draw_points(points[order], colors[order], 64)
        seen = picture[(picture != POINTS_BACKGROUND).any(axis=-1)]
        assert (seen == [0, 255, 0]).all()


def test_right_of_the_front_is_to_the_right() -> None:
    picture = draw_points(np.array([[0.9, 0, 0]], np.float32), None, 64)
    _, columns = np.nonzero((picture != POINTS_BACKGROUND).any(axis=-1))
    assert columns.min() > 50


def test_points_outside_the_picture_or_not_finite_are_left_out() -> None:
    points = np.array([[5, 0, 0], [np.nan, 0, 0], [0, np.inf, 0], [-1, 0, 0]], np.float32)
    for colors in (None, np.zeros((4, 3), np.uint8)):
        with np.errstate(invalid="ignore"):
            picture = draw_points(points, colors, 32)
        assert (picture != POINTS_BACKGROUND).any(axis=-1).sum() == 4
    empty = draw_points(np.zeros((0, 3), np.float32), None, 32)
    assert (empty == POINTS_BACKGROUND).all()


def test_a_preview_shows_objects_of_every_shard(tmp_path: Path) -> None:
    output = tmp_path / "new" / "preview.png"
    write_preview(SHARDS, output, num_objects=7)
    written = np.asarray(Image.open(output))
    np.testing.assert_array_equal(written, np.asarray(contact_sheet(sample_rows(SHARDS, 7))))


def test_a_preview_of_few_objects_shows_them_all(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=3, num_files=2)
    write_preview(sorted(folder.glob("*.parquet")), tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").height == GAP + 3 * (96 + GAP)


def test_previews_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be written to .*p\.strange.*name a \.png file"):
        write_preview(SHARDS[:1], tmp_path / "p.strange", num_objects=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't be written to .*file/p\.png"):
        write_preview(SHARDS[:1], tmp_path / "file" / "p.png", num_objects=1)
    empty = tmp_path / "part-00000.parquet"
    pq.write_table(SHARD_SCHEMA.empty_table(), empty)
    for files in ([], [empty]):
        with pytest.raises(ConfigError, match="nothing to preview"):
            write_preview(files, tmp_path / "p.png")
    assert not list(tmp_path.glob("p.*"))
