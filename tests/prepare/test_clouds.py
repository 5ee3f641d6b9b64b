"""Clouds of any format: the same points and colours come out of each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.prepare import clouds
from crossmost_ray.prepare.clouds import read_cloud, unpack_lzf
from crossmost_ray.prepare.errors import ObjectError

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 3)).astype(np.float32)
COLORS = RNG.integers(0, 256, (40, 3), np.uint8)
NORMALS = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)


def text(*columns: Any, between: str = " ", head: str = "") -> str:
    rows = np.concatenate([np.asarray(c, np.float64) for c in columns], axis=1)
    lines = [between.join(f"{value:.9g}" for value in row) for row in rows]
    return head + "\n".join(lines) + "\n"


def pcd(kind: str, body: bytes, rgb: str = "U", count: int = 40) -> bytes:
    head = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\n"
        f"TYPE F F F {rgb}\nCOUNT 1 1 1 1\nWIDTH {count}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\nDATA {kind}\n"
    )
    return head.encode() + body


def packed_colors() -> np.ndarray[Any, Any]:
    red, green, blue = COLORS.astype(np.uint32).T
    return red << 16 | green << 8 | blue


def pcd_table() -> np.ndarray[Any, Any]:
    table = np.empty(40, [("p", "<f4", 3), ("rgb", "<u4")])
    table["p"], table["rgb"] = POINTS, packed_colors()
    return table


def pack_lzf(data: bytes) -> bytes:
    """Literal runs alone: what a packer does with data that do not repeat."""
    runs = [data[start : start + 32] for start in range(0, len(data), 32)]
    return b"".join(bytes([len(run) - 1]) + run for run in runs)


def pcd_compressed() -> bytes:
    table = pcd_table()
    data = table["p"].T.tobytes() + table["rgb"].tobytes()
    packed = pack_lzf(data)
    return struct.pack("<II", len(packed), len(data)) + packed


def npz(path: Path, **arrays: Any) -> None:
    np.savez_compressed(path, **arrays)


def ply(path: Path, encoding: str) -> None:
    trimesh.PointCloud(POINTS, colors=COLORS).export(path, encoding=encoding)


def las(path: Path) -> None:
    laspy = pytest.importorskip("laspy")
    header = laspy.LasHeader(point_format=2, version="1.2")
    header.scales, header.offsets = np.full(3, 1e-6), np.zeros(3)
    cloud = laspy.LasData(header)
    cloud.x, cloud.y, cloud.z = POINTS.astype(np.float64).T
    cloud.red, cloud.green, cloud.blue = COLORS.astype(np.uint16).T * 257
    cloud.write(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.npy": lambda p: np.save(p, np.concatenate([POINTS, COLORS], axis=1)),
    "b.npy": lambda p: np.save(p, np.concatenate([POINTS, COLORS / 255], axis=1)),
    "a.npz": lambda p: npz(p, points=POINTS, colors=COLORS, other=np.ones(3)),
    "b.npz": lambda p: npz(p, xyz=np.asfortranarray(POINTS.astype(np.float64)), rgb=COLORS / 255),
    "c.npz": lambda p: npz(p, anything=np.concatenate([POINTS, COLORS], axis=1)),
    "a.txt": lambda p: p.write_text(text(POINTS, COLORS)),
    "b.txt": lambda p: p.write_text(text(POINTS, COLORS / 255, head="# by hand\n//X Y Z R G B\n")),
    "c.txt": lambda p: p.write_text(text(POINTS, NORMALS, COLORS)),
    "a.xyz": lambda p: p.write_text(text(POINTS, COLORS, NORMALS, between="\t")),
    "a.csv": lambda p: p.write_text(text(POINTS, COLORS, between=", ", head="x,y,z,r,g,b\n")),
    "b.csv": lambda p: p.write_text(text(POINTS, COLORS, between=";", head="Höhe;b;c\n")),
    "a.pts": lambda p: p.write_text(text(POINTS, POINTS[:, :1], COLORS, head="40\n")),
    "a.PCD": lambda p: p.write_bytes(pcd("ascii", text(POINTS, packed_colors()[:, None]).encode())),
    "b.pcd": lambda p: p.write_bytes(
        pcd("ascii", text(POINTS, packed_colors().view(np.float32)[:, None]).encode(), rgb="F")
    ),
    "c.pcd": lambda p: p.write_bytes(
        pcd("ascii", text(POINTS, packed_colors()[:, None]).encode(), rgb="F")
    ),
    "d.pcd": lambda p: p.write_bytes(pcd("binary", pcd_table().tobytes(), rgb="F")),
    "e.pcd": lambda p: p.write_bytes(pcd("binary_compressed", pcd_compressed())),
    "a.ply": lambda p: ply(p, "binary"),
    "b.ply": lambda p: ply(p, "ascii"),
    "a.las": las,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_points_and_colours(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    points, colors = read_cloud(tmp_path / name)
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, POINTS, rtol=1e-6, atol=1e-6)
    assert colors is not None
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors, COLORS)


@pytest.mark.parametrize(
    "columns",
    [
        (POINTS,),
        (POINTS, NORMALS),
        (POINTS, np.abs(NORMALS)),
        (POINTS, np.eye(3)[RNG.integers(0, 3, 40)]),
        (POINTS, POINTS),
        (POINTS, POINTS[:, :1]),
        (POINTS, np.zeros((40, 3))),
    ],
    ids=["three", "normals", "positive-normals", "axes", "else", "intensity", "zeros"],
)
def test_columns_that_are_no_colours_are_left_out(columns: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(*columns))
    points, colors = read_cloud(tmp_path / "a.txt")
    np.testing.assert_allclose(points, POINTS, rtol=1e-6)
    assert colors is None


def test_a_few_lost_points_are_dropped_with_their_colours(tmp_path: Path) -> None:
    table = np.concatenate([RNG.normal(size=(200, 3)), RNG.integers(2, 256, (200, 3))], axis=1)
    table[[7, 90], 1] = np.nan, np.inf
    (tmp_path / "a.txt").write_text(text(table))
    points, colors = read_cloud(tmp_path / "a.txt")
    kept = np.delete(table, [7, 90], axis=0)
    np.testing.assert_allclose(points, kept[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(colors, kept[:, 3:])
    table[11, 0] = np.nan
    (tmp_path / "a.txt").write_text(text(table))
    with pytest.raises(ObjectError, match=r"1\.5 % of the points of .*a\.txt are NaN or infinite"):
        read_cloud(tmp_path / "a.txt")


def test_map_coordinates_keep_their_detail(tmp_path: Path) -> None:
    east = POINTS + np.array([4e5, 5.5e6, 100])
    np.save(tmp_path / "a.npy", east)
    points, _ = read_cloud(tmp_path / "a.npy")
    np.testing.assert_allclose(points - points.mean(0), POINTS - POINTS.mean(0), atol=1e-6)


REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "few": ("a.txt", text(POINTS[:15]), "holds 15 points, fewer than 16"),
    "far": ("a.txt", text(POINTS * 1e13), "at most 1e[+]12 is allowed"),
    "empty": ("a.txt", "", "its first 100 lines hold no point"),
    "prose": ("a.txt", "# c\nDear reader,\nthis is no cloud.\n", "line 3 holds no point: 'this"),
    "ragged": ("a.txt", text(POINTS) + "1 2\n", "number of columns changed from 3 to 2 at row 41"),
    "word": ("a.txt", text(POINTS) + "1 2 x\n", "could not convert string 'x'"),
    "two columns": ("a.csv", "x,y\n" + "1,2\n" * 20, "line 2 holds no point"),
    "long line": ("a.txt", "# " + "a" * 20_000, "line 1 is longer than 10,000 letters"),
    "no pcd": ("a.pcd", b"\x00" * 500, "it is no PCD file"),
    "pcd kind": ("a.pcd", pcd("zip", b""), "its DATA is zip"),
    "pcd short": ("a.pcd", pcd("binary", b"\x00" * 639), "640 bytes are promised, 639 are there"),
    "pcd lines": ("a.pcd", pcd("ascii", b"1 2 3 4\n" * 39), "40 points of 4 numbers are promised"),
    "pcd axes": (
        "a.pcd",
        pcd("binary", b"").replace(b"x y z", b"u v w"),
        "it has no field x, y, z of one number",
    ),
    "no npz": ("a.npz", b"PK", "cannot be read: File is not a zip file"),
    "no las": ("a.las", b"x" * 400, "it does not begin with the header of a LAS file"),
    "no ply": ("a.ply", "nothing", "it has no PLY header"),
    "format": ("a.e57", b"", r"is none of \.csv, \.las"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_file_says_what_is_wrong(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    if name.endswith(".las"):
        pytest.importorskip("laspy")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ObjectError, match=message) as refused:
        read_cloud(path)
    assert name in str(refused.value)


def test_arrays_of_an_archive_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for arrays, message in (
        ({"first": POINTS, "second": POINTS}, "it holds first, second; its points must be called"),
        ({"points": np.array([{}] * 20)}, "holds object of shape"),
        ({"points": POINTS, "colors": COLORS[:7]}, "holds 40 points, but 7 colours"),
        ({"points": POINTS, "colors": POINTS}, "lie neither in 0 to 1 nor in 0 to 255"),
    ):
        npz(path, **arrays)
        with pytest.raises(ObjectError, match=message):
            read_cloud(path)


def test_a_missing_file_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ObjectError, match=r"the file .*a\.txt is missing"):
        read_cloud(tmp_path / "a.txt")
    monkeypatch.setattr(clouds.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.laz").write_bytes(b"")
    with pytest.raises(ObjectError, match=r"without laspy: pip install laspy\[lazrs\]"):
        read_cloud(tmp_path / "a.laz")


def test_a_packed_las_file_without_its_unpacker_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laspy = pytest.importorskip("laspy")
    monkeypatch.setattr(laspy.LazBackend, "detect_available", lambda: ())
    las(tmp_path / "a.las")
    (tmp_path / "a.las").rename(tmp_path / "a.laz")
    with pytest.raises(ObjectError, match=r"without lazrs: pip install laspy\[lazrs\]"):
        read_cloud(tmp_path / "a.laz")


@given(st.binary(max_size=300))
def test_lzf_gives_back_what_was_packed_as_literals(data: bytes) -> None:
    assert unpack_lzf(pack_lzf(data), len(data)) == data


@given(head=st.binary(min_size=1, max_size=32), back=st.integers(1, 32), length=st.integers(3, 264))
def test_lzf_copies_byte_by_byte_where_a_copy_overlaps(head: bytes, back: int, length: int) -> None:
    back = min(back, len(head))
    extra = [] if length < 9 else [length - 9]
    copy = bytes([(min(length, 9) - 2) << 5 | (back - 1) >> 8, *extra, (back - 1) & 255])
    expected = bytearray(head)
    for _ in range(length):
        expected.append(expected[-back])
    packed = bytes([len(head) - 1]) + head + copy
    assert unpack_lzf(packed, len(expected)) == expected
    with pytest.raises(ValueError, match="it unpacks to"):
        unpack_lzf(packed, len(expected) - 1)


def test_lzf_reaches_no_further_back_than_the_beginning() -> None:
    with pytest.raises(ValueError, match="a copy begins before the first byte"):
        unpack_lzf(b"\x00a\x20\x05", 4)
