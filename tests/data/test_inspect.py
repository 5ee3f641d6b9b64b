"""What is said of a folder of shards, and that any reader of Parquet can open one."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.data.decode import decode_view
from crossmost_ray.data.inspect import (
    Inspection,
    Spread,
    inspect_all,
    inspect_shards,
    sample_rows,
)
from crossmost_ray.data.shards import read_manifest
from crossmost_ray.data.show import MAX_LINES, UNREADABLE, half_blocks, print_inspection
from crossmost_ray.schema import SHARD_SCHEMA
from tests.synthetic import write_shards

EMBEDDED = "assets:furniture/target_a"
FILES = sorted(resolve_path(EMBEDDED).glob("*.parquet"))
COUNTS = read_manifest(EMBEDDED)["counts"]


@pytest.fixture(scope="module")
def embedded() -> Inspection:
    return inspect_shards(EMBEDDED)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_path(EMBEDDED), tmp_path / "copied"))


def replace_column(file: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(file)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, values), file)


def shown(inspection: Inspection, *, pictures: int = 0, colors: bool = False) -> str:
    stream = io.StringIO()
    system: Any = "truecolor" if colors else None
    console = Console(file=stream, width=160, force_terminal=colors, color_system=system)
    print_inspection(inspection, console, pictures=pictures)
    return stream.getvalue()


def test_counts_are_those_of_the_manifest(embedded: Inspection) -> None:
    assert embedded.num_objects == COUNTS["rows"] == 91
    assert embedded.classes == COUNTS["classes"]
    assert embedded.sources == COUNTS["sources"]
    assert embedded.points == Spread(2048, 2048.0, 2048)
    assert embedded.views == Spread(12, 12.0, 12)
    assert embedded.view_sizes == {(96, 96): 12 * 91}
    assert embedded.num_colored == read_manifest(EMBEDDED)["colors"]["objects_with"] >= 80
    assert embedded.bad == ()
    assert embedded.schema.equals(SHARD_SCHEMA)


def test_files_are_those_of_the_manifest(embedded: Inspection) -> None:
    stated = read_manifest(EMBEDDED)["shards"]
    assert [(file.path.name, file.num_rows, file.num_bytes) for file in embedded.files] == [
        (shard["file"], shard["rows"], shard["bytes"]) for shard in stated
    ]
    assert {file.checksum for file in embedded.files} == {"agrees"}
    assert embedded.intact


def test_facts_are_those_of_the_manifest(embedded: Inspection) -> None:
    facts = embedded.facts
    assert facts["name"] == "furniture/target_a"
    assert (facts["up axis"], facts["front axis"], facts["seed"]) == ("+y", "+z", "0")
    assert facts["kinds of views"].startswith("renders")
    assert "pyarrow " in facts["versions"]


@pytest.mark.parametrize(
    ("manifest", "kinds"),
    [
        (
            {"counts": {"views": {"depth": 2, "photos": 5}}},
            "depth of 2 objects, photos of 5 objects",
        ),
        ({"cameras": {"num_views": 12}}, "renders"),
        ({"counts": 3, "cameras": 4, "versions": 5}, None),
    ],
)
def test_a_manifest_tells_where_its_views_come_from(
    tmp_path: Path, manifest: dict[str, Any], kinds: str | None
) -> None:
    folder = write_shards(tmp_path / "s", num_objects=2)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert inspect_shards(str(folder)).facts.get("kinds of views") == kinds


def test_shards_without_a_manifest_are_counted_all_the_same(
    copied: Path, embedded: Inspection
) -> None:
    (copied / "manifest.json").unlink()
    found = inspect_shards(str(copied))
    assert found.facts == {}
    assert {file.checksum for file in found.files} == {"not stated"}
    assert not found.intact
    assert (found.classes, found.views) == (embedded.classes, embedded.views)
    assert "states no checksum of these files" in shown(found)


def test_a_file_that_was_changed_or_lost_is_told(copied: Path) -> None:
    pq.write_table(pq.read_table(FILES[1]), copied / FILES[1].name, compression="none")
    (copied / FILES[3].name).unlink()
    shutil.copy(FILES[0], copied / "part-00009.parquet")
    found = inspect_shards(str(copied))
    expected = {file.name: "agrees" for file in FILES} | {FILES[1].name: "differs"}
    del expected[FILES[3].name]
    expected["part-00009.parquet"] = "not stated"
    assert {file.path.name: file.checksum for file in found.files} == expected
    assert found.missing == (FILES[3].name,)
    assert not found.intact
    text = shown(found)
    assert "does not agree with the files" in text
    assert f"{FILES[3].name}: named by manifest.json, but missing" in text


def test_uneven_objects_are_counted(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path / "s",
        num_objects=9,
        num_files=3,
        corrupt={2: "few_points", 3: "few_views", 4: "no_points"},
    )
    file = folder / "part-00002.parquet"
    replace_column(file, "label", pa.array(["ball", None, None], pa.string()))
    colors = pq.read_table(file)["colors"].to_pylist()
    kind = SHARD_SCHEMA.field("colors").type
    replace_column(file, "colors", pa.array([None, None, colors[2]], kind))
    found = inspect_shards(str(folder))
    assert found.points == Spread(0, 128.0, 128)
    assert found.views == Spread(1, 4.0, 4)
    assert found.view_sizes == {(48, 48): 8 * 4 + 1}
    assert found.num_colored == 7
    assert list(found.classes.items()) == [
        ("ball", 3),
        ("box", 2),
        ("cone", 1),
        ("pillar", 1),
        (None, 2),
    ]
    text = shown(found)
    assert "no label" in text
    assert "0 to 128, median 128" in text
    assert "7 of 9 objects" in text


def test_views_that_are_no_image_are_named(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path / "s", num_objects=80, num_files=1, corrupt={1: "bad_view", 70: "null_view"}
    )
    found = inspect_shards(str(folder))
    assert [str(row) for row in found.bad] == [
        f"part-00000.parquet, row {row} (synthetic/0-{row}): no WebP, PNG or JPEG image: view 3"
        for row in (1, 70)
    ]
    assert found.views == Spread(4, 4.0, 4)
    assert sum(found.view_sizes.values()) == 80 * 4 - 2
    assert "row 70 (synthetic/0-70)" in shown(found)


def test_a_shard_without_rows_is_no_fault(tmp_path: Path) -> None:
    pq.write_table(SHARD_SCHEMA.empty_table(), tmp_path / "part-00000.parquet")
    found = inspect_shards(str(tmp_path))
    assert (found.num_objects, found.classes, found.points) == (0, {}, Spread(0, 0.0, 0))
    assert "no view" in shown(found, pictures=2, colors=True)


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder of shards 'none'"):
        inspect_shards("none")
    with pytest.raises(ConfigError, match=r"no folder 'none'"):
        inspect_all("none")
    with pytest.raises(ConfigError, match=r"holds no \.parquet file"):
        inspect_shards(str(tmp_path))
    (tmp_path / "inner").mkdir()
    with pytest.raises(ConfigError, match=r"nor a folder in it holds a \.parquet file"):
        inspect_all(str(tmp_path))


def test_a_file_cut_short_is_named(copied: Path) -> None:
    file = copied / FILES[2].name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=rf"{FILES[2].name} can't be read as Parquet"):
        inspect_shards(str(copied))
    with pytest.raises(ConfigError, match=rf"{FILES[2].name} is damaged .*jobs/prepare\.py"):
        sample_rows(sorted(copied.glob("*.parquet")), 8)


def test_a_file_whose_pages_are_damaged_is_named(copied: Path) -> None:
    file = copied / FILES[2].name
    data = bytearray(file.read_bytes())
    data[1000:-20_000] = bytes(len(data) - 21_000)
    file.write_bytes(data)
    for read in (
        lambda: inspect_shards(str(copied)),
        lambda: sample_rows(sorted(copied.glob("*.parquet")), 91),
    ):
        with pytest.raises(ConfigError, match=rf"{FILES[2].name} is damaged .*jobs/prepare\.py"):
            read()


def test_columns_of_another_version_are_named(copied: Path) -> None:
    file = copied / FILES[2].name
    table = pq.read_table(file)
    pq.write_table(table.append_column("normals", table["points"]), file)
    with pytest.raises(ConfigError, match=rf"{FILES[2].name} has the column normals, which this"):
        inspect_shards(str(copied))
    with pytest.raises(ConfigError, match="has the column normals"):
        sample_rows([file], 1)
    pq.write_table(table.drop_columns(["author"]), file)
    with pytest.raises(ConfigError, match=rf"{FILES[2].name} lacks the column author"):
        inspect_shards(str(copied))
    pq.write_table(table, file)
    replace_column(file, "label", pa.array(range(len(table))))
    with pytest.raises(ConfigError, match="the column label is int64, expected string"):
        inspect_shards(str(copied))


@pytest.mark.parametrize("shards", ['"x"', '["x"]', '[{"file": "a"}]', "3"])
def test_a_manifest_without_checksums_of_its_shards_is_named(copied: Path, shards: str) -> None:
    (copied / "manifest.json").write_text(f'{{"shards": {shards}}}')
    with pytest.raises(ConfigError, match=r"manifest\.json must give `file` and `sha256`"):
        inspect_shards(str(copied))


def test_folders_are_inspected_one_by_one(tmp_path: Path) -> None:
    for name, number in (("train", 6), ("test", 4), (".train-new", 2)):
        write_shards(tmp_path / name, num_objects=number)
    (tmp_path / "notes").mkdir()
    found = inspect_all(str(tmp_path))
    assert {name: each.num_objects for name, each in found.items()} == {"test": 4, "train": 6}
    assert list(found) == ["test", "train"]
    assert list(inspect_all(str(tmp_path / "train"))) == ["."]
    shutil.copy(tmp_path / "test" / "part-00000.parquet", tmp_path)
    assert {name: each.num_objects for name, each in inspect_all(str(tmp_path)).items()} == {
        ".": 2,
        "test": 4,
        "train": 6,
    }


def test_sampled_rows_are_spread_over_the_shards() -> None:
    rows = sample_rows(FILES, 5)
    everything = [name for file in FILES for name in pq.read_table(file)["object_id"].to_pylist()]
    assert [row["object_id"] for row in rows] == [everything[k] for k in (0, 18, 36, 54, 72)]
    (stored,) = pq.read_table(FILES[0]).slice(0, 1).to_pylist()
    for key, value in stored.items():
        np.testing.assert_array_equal(rows[0][key], value)
    assert (rows[0]["points"].dtype, rows[0]["colors"].dtype) == (np.float32, np.uint8)
    assert len(sample_rows(FILES, 1000)) == 91
    assert sample_rows([], 5) == []


def test_a_sampled_row_without_colours_has_none(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=4, num_files=1)
    file = folder / "part-00000.parquet"
    colors = pq.read_table(file)["colors"].to_pylist()
    kind = SHARD_SCHEMA.field("colors").type
    replace_column(file, "colors", pa.array([colors[0], None, None, colors[3]], kind))
    found = [row["colors"] for row in sample_rows([file], 4)]
    assert [color is None for color in found] == [False, True, True, False]
    np.testing.assert_array_equal(found[3], colors[3])


def test_tables_show_every_class_and_file(embedded: Inspection) -> None:
    text = shown(embedded)
    for name, count in COUNTS["classes"].items():
        assert any(name in line and f" {count} " in line for line in text.splitlines()), name
    for file in FILES:
        assert file.name in text
    assert "1092 of 96 x 96" in text
    assert "its checksums agree with the files" in text
    assert "fixed_size_list<element: float>[3]" in " ".join(text.split())


def test_of_many_files_the_doubtful_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=30, num_files=30, num_points=8)
    text = shown(inspect_shards(str(folder)))
    assert f"... and {30 - MAX_LINES} more" in text
    assert f"part-000{MAX_LINES}" not in text


def test_what_a_file_says_cannot_reach_the_terminal(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=2, num_files=1)
    file = folder / "part-00000.parquet"
    replace_column(file, "label", pa.array(["\x1b[2Jgone", "[red]plain[/red]"]))
    text = shown(inspect_shards(str(folder)), pictures=2)
    assert "\x1b" not in text
    assert "?[2Jgone" in text
    assert "[red]plain[/red]" in text


def test_half_blocks_carry_two_pixels_each() -> None:
    pixels = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    text = half_blocks(pixels)
    assert text.plain == "▀▀▀\n▀▀▀"
    drawn = {span.start: span.style for span in text.spans}
    for line, column in ((0, 0), (0, 2), (1, 1)):
        style: Any = drawn[line * 4 + column]
        assert tuple(style.color.triplet) == tuple(pixels[2 * line, column])
        assert tuple(style.bgcolor.triplet) == tuple(pixels[2 * line + 1, column])


def test_pictures_are_the_views(embedded: Inspection) -> None:
    text = shown(embedded, pictures=2, colors=True)
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if "blendswap" in line and ": " in line]
    row = sample_rows(FILES, 2)[1]
    assert row["object_id"] in lines[heads[-1]]
    assert row["label"] in lines[heads[-1]]
    picture = lines[heads[-1] + 1 :]
    assert len(picture) == 12
    # 160 columns hold six views of 24 columns and a line beside each.
    assert {line.count("▀") for line in picture} == {6 * 25}
    view = decode_view(row["views"][0], 24)
    upper, lower = view[:, 0, 5], view[:, 1, 5]
    code = f"38;2;{';'.join(map(str, upper))};48;2;{';'.join(map(str, lower))}m▀"
    assert picture[0].split("\x1b[")[1 + 2 * 5] == code


def test_a_broken_view_is_a_loud_colour(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", num_objects=1, num_files=1, corrupt={0: "null_view"})
    text = shown(inspect_shards(str(folder)), pictures=1, colors=True)
    loud = ";".join(map(str, UNREADABLE))
    assert text.count(f"38;2;{loud};48;2;{loud}m") == 24 * 12


def test_without_colours_the_pictures_are_refused_aloud(embedded: Inspection) -> None:
    text = shown(embedded, pictures=1)
    assert "▀" not in text
    assert "need a terminal with colours" in text
    assert "need a terminal" not in shown(embedded)


def test_inspecting_needs_neither_torch_nor_ray() -> None:
    code = "import sys, crossmost_ray.data.inspect; print({'torch', 'ray'} & set(sys.modules))"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_shards_are_plain_parquet_for_pandas() -> None:
    frame = pd.concat([pd.read_parquet(file) for file in FILES])
    assert frame["label"].value_counts().to_dict() == COUNTS["classes"]
    assert frame["source"].value_counts().to_dict() == COUNTS["sources"]
    assert frame["object_id"].is_unique
    row = frame.iloc[0]
    assert np.stack(row["points"]).shape == (2048, 3)
    assert np.stack(row["colors"]).shape == (2048, 3)
    assert {type(view) for view in row["views"]} == {bytes}


def test_shards_hold_no_extension_types() -> None:
    def inner_types(kind: pa.DataType) -> list[pa.DataType]:
        below = [kind.field(place) for place in range(kind.num_fields)]
        return [kind, *(deep for field in below for deep in inner_types(field.type))]

    for file in FILES:
        schema = pq.read_schema(file)
        for column in schema:
            assert not any(isinstance(k, pa.BaseExtensionType) for k in inner_types(column.type))
            assert not any(b"extension" in key for key in column.metadata or {})


def test_shards_are_plain_parquet_for_duckdb() -> None:
    pattern = str(resolve_path(EMBEDDED) / "*.parquet")
    query = (
        "select label, count(*), min(len(points)), max(len(views)) from read_parquet(?) group by 1"
    )
    found = duckdb.execute(query, [pattern]).fetchall()
    assert {label: count for label, count, _, _ in found} == COUNTS["classes"]
    assert {(points, views) for _, _, points, views in found} == {(2048, 12)}
