"""Folders of shards: what is read from them, and what is said of those that can't be used."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from crossmost_ray.config import ConfigError
from crossmost_ray.data.decode import decode_view
from crossmost_ray.data.shards import (
    ROWS_AT_ONCE,
    check_file,
    class_names,
    find_row,
    list_shards,
    read_manifest,
)
from crossmost_ray.data.whole import looks_whole
from crossmost_ray.schema import SHARD_SCHEMA
from tests.synthetic import CLASSES, Fault, broken_pixels, replace_view, write_shards

COLUMNS = ("object_id", "points", "views")
LEAST = {"num_points": 100, "num_views": 4, "view_size": 32}


def test_shards_are_listed_by_name(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_files=3)
    (folder / "notes.txt").write_text("not a shard")
    assert list_shards(str(folder), COLUMNS) == [
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no folder of shards 'none'.*jobs/prepare\.py.*data\.shards"
    ):
        list_shards("none", COLUMNS)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="no folder of shards"):
        list_shards(str(file), COLUMNS)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{tmp_path}' holds no .parquet file.*jobs/prepare.py"):
        list_shards(str(tmp_path), COLUMNS)


@pytest.mark.parametrize("content", [b"", b"no parquet at all, but long enough to hold a footer"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_shards(tmp_path / "s")
    (folder / "part-00007.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"part-00007\.parquet can't be read as Parquet.*prepare"):
        list_shards(str(folder), COLUMNS)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s")
    file = folder / "part-00001.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"part-00001\.parquet can't be read as Parquet"):
        list_shards(str(folder), COLUMNS)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_files=2)
    file = folder / "part-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["views", "points"]), file)
    with pytest.raises(ConfigError) as refused:
        list_shards(str(folder), COLUMNS)
    message = str(refused.value)
    assert f"{file} lacks the column points, views" in message
    assert "it has object_id, captions, label, colors" in message
    assert "jobs/prepare.py" in message


def test_good_shards_are_good(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=6, num_files=2)
    checks = [
        check_file(str(folder), name, COLUMNS, **LEAST)
        for name in list_shards(str(folder), COLUMNS)
    ]
    assert [(check.num_objects, check.num_good, check.bad) for check in checks] == [(3, 3, ())] * 2


def test_every_bad_row_is_named_with_its_fault(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path / "s",
        num_objects=9,
        num_files=1,
        corrupt={
            1: "nan",
            2: "few_points",
            3: "few_views",
            5: "bad_view",
            6: "null_view",
            8: "no_points",
        },
    )
    check = check_file(str(folder), "part-00000.parquet", COLUMNS, **LEAST)
    assert (check.num_objects, check.num_good) == (9, 3)
    assert [(bad.row, bad.object_id) for bad in check.bad] == [
        (row, f"synthetic/0-{row}") for row in (1, 2, 3, 5, 6, 8)
    ]
    texts = [str(bad) for bad in check.bad]
    for text, row, fault in zip(
        texts,
        (1, 2, 3, 5, 6, 8),
        (
            "1 of 128 points are NaN or infinite",
            "7 points, data.num_points asks for 100",
            "1 views, data.num_views asks for 4",
            r"view 3 can't be decoded \(.+\)",
            r"view 3 can't be decoded \(.+\)",
            "0 points, data.num_points asks for 100",
        ),
        strict=True,
    ):
        assert re.fullmatch(
            rf"part-00000\.parquet, row {row} \(synthetic/0-{row}\): {fault}", text
        ), text


def test_rows_are_counted_through_a_shard_that_is_read_in_parts(tmp_path: Path) -> None:
    number = 2 * ROWS_AT_ONCE + 5
    faults: dict[int, Fault] = {0: "nan", ROWS_AT_ONCE: "bad_view", number - 1: "few_points"}
    folder = write_shards(tmp_path / "s", num_objects=number, num_files=1, corrupt=faults)
    check = check_file(str(folder), "part-00000.parquet", COLUMNS, **LEAST)
    assert check.num_objects == number
    assert [bad.row for bad in check.bad] == list(faults)
    assert [bad.object_id for bad in check.bad] == [f"synthetic/0-{row}" for row in faults]


def test_damage_among_pixels_is_found_by_the_full_check_alone(
    tmp_path: Path,
) -> None:
    folder = write_shards(tmp_path / "s", num_objects=4, num_files=1)
    replace_view(folder / "part-00000.parquet", row=2, place=1, view=broken_pixels())
    (name,) = list_shards(str(folder), COLUMNS)
    assert check_file(str(folder), name, COLUMNS, **LEAST).bad == ()
    (bad,) = check_file(str(folder), name, COLUMNS, **LEAST, full=True).bad
    assert (bad.row, bad.object_id) == (2, "synthetic/0-2")
    assert bad.problem.startswith("view 1 can't be decoded (")


def test_a_view_that_decodes_is_good_however_it_looks(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=1, num_files=1)
    stream = io.BytesIO()
    Image.new("RGB", (48, 48), (9, 99, 199)).save(stream, "JPEG")
    # Padding in the place of the marker at its end, which decoders can do without.
    view = stream.getvalue()[:-2] + bytes(2000)
    assert not looks_whole(view)
    assert decode_view(view, 32).shape == (3, 32, 32)
    replace_view(folder / "part-00000.parquet", row=0, place=0, view=view)
    assert check_file(str(folder), "part-00000.parquet", COLUMNS, **LEAST).bad == ()


def test_an_object_is_found_by_its_id(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=7, num_files=3)
    files = list_shards(str(folder), COLUMNS)
    assert find_row(str(folder), files, "synthetic/0-4") == ("part-00001.parquet", 1)
    assert find_row(str(folder), files, "synthetic/0-7") is None


@pytest.mark.parametrize(("num_points", "good"), [(128, 1), (129, 0)])
def test_exactly_enough_points_are_enough(tmp_path: Path, num_points: int, good: int) -> None:
    folder = write_shards(tmp_path / "s", num_objects=1, num_points=128, num_files=1)
    check = check_file(
        str(folder),
        "part-00000.parquet",
        COLUMNS,
        num_points=num_points,
        num_views=4,
        view_size=32,
    )
    assert check.num_good == good


def test_a_caption_counts_only_where_it_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=3, num_files=1)
    file = folder / "part-00000.parquet"
    table = pq.read_table(file)
    captions = pa.array([["ball"], [], ["box", ""]], SHARD_SCHEMA.field("captions").type)
    place = table.schema.get_field_index("captions")
    pq.write_table(table.set_column(place, SHARD_SCHEMA.field("captions"), captions), file)
    assert check_file(str(file.parent), file.name, COLUMNS, **LEAST).bad == ()
    bad = check_file(str(file.parent), file.name, (*COLUMNS, "captions"), **LEAST).bad
    assert [(row.row, row.problem) for row in bad] == [
        (1, "no caption, or an empty one"),
        (2, "no caption, or an empty one"),
    ]


def test_a_shard_without_rows_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "part-00000.parquet"
    pq.write_table(SHARD_SCHEMA.empty_table(), file)
    check = check_file(str(file.parent), file.name, COLUMNS, **LEAST)
    assert (check.num_objects, check.bad) == (0, ())


def test_rows_without_any_cloud_or_views_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=4, num_files=1)
    file = folder / "part-00000.parquet"
    table = pq.read_table(file)
    points, views = table["points"].to_pylist(), table["views"].to_pylist()
    points[1], views[2] = None, None
    columns = {
        "object_id": table["object_id"],
        "points": pa.array(points, SHARD_SCHEMA.field("points").type),
        "views": pa.array(views, SHARD_SCHEMA.field("views").type),
    }
    pq.write_table(pa.table(columns), file)
    check = check_file(str(file.parent), file.name, COLUMNS, **LEAST)
    assert [(bad.row, bad.problem) for bad in check.bad] == [
        (1, "0 points, data.num_points asks for 100"),
        (2, "0 views, data.num_views asks for 4"),
    ]


def test_the_manifest_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=5)
    assert read_manifest(str(folder))["num_objects"] == 5
    (folder / "manifest.json").unlink()
    assert read_manifest(str(folder)) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1]", "must hold a JSON object")],
)
def test_a_broken_manifest_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = write_shards(tmp_path / "s")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"manifest\.json {problem}.*prepare the shards anew"):
        read_manifest(str(folder))


def test_classes_of_the_config_win_over_the_manifest(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s")
    assert class_names(None, str(folder)) == list(CLASSES)
    assert class_names(["b", "a"], str(folder)) == ["b", "a"]


def test_classes_named_nowhere_are_asked_for(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s")
    for manifest in ("{}", '{"classes": []}', '{"classes": null}'):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(ConfigError, match=r"names classes; list them in data\.classes"):
            class_names(None, str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=f"nor the manifest of '{folder}' names classes"):
        class_names(None, str(folder))


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ('["a", "a", "b"]', "names a more than once"),
        ('["a"]', "holds one class only"),
        ('["a", ""]', "holds a blank name"),
    ],
)
def test_an_unfit_class_list_of_a_manifest_is_named(
    tmp_path: Path, classes: str, problem: str
) -> None:
    folder = write_shards(tmp_path / "s")
    (folder / "manifest.json").write_text(f'{{"classes": {classes}}}')
    with pytest.raises(ConfigError, match=f"the manifest of '{folder}' {problem}"):
        class_names(None, str(folder))


@pytest.mark.parametrize("classes", ['"chair"', "[1, 2]", '{"a": 1, "b": 2}', '["a", null]'])
def test_a_class_list_that_is_none_is_named(tmp_path: Path, classes: str) -> None:
    folder = write_shards(tmp_path / "s")
    (folder / "manifest.json").write_text(f'{{"classes": {classes}}}')
    with pytest.raises(ConfigError, match=f"the manifest of '{folder}'"):
        class_names(None, str(folder))
