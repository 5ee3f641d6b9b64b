"""Files that lie: readers of our own refuse them with an ObjectError, in little time and memory."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmost_ray.prepare import formats
from crossmost_ray.prepare import mesh as mesh_module
from crossmost_ray.prepare.clouds import read_cloud
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import read_mesh
from crossmost_ray.prepare.mesh import sample_surface
from crossmost_ray.prepare.sources.folder import folder_reader
from tests.prepare.test_clouds import POINTS, WRITERS, pack_lzf, pcd
from tests.prepare.test_mesh import VRML, export, png

MEGABYTE = 2**20
OBJ = (
    "mtllib a.mtl\nv 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 0 1 0 0 0 1\nv 1 1 0 1 1 1\nvt 0 0\nvn 0 0 1\n"
    "usemtl t\nf 1/1/1 2/1/1 3/1/1\nf 1 2 3 4\nf -1//1 -2//1 -3//1\nf 1 2 4 3 1\n"
)
MTL = "newmtl t\nKd 0 1 0\nd 0.5\nmap_Kd t.png\n"


@contextmanager
def bounded(megabytes: float = 16, seconds: float = 5) -> Iterator[None]:
    """Fails if the body allocates more, or takes longer."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * MEGABYTE
    assert time.perf_counter() - start < seconds


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with up to six places overwritten, cut out, doubled or filled in."""
    place = st.integers(0, len(data))
    edit = st.tuples(place, place, st.binary(max_size=6) | st.sampled_from(NASTY))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        changed = data
        for start, end, filling in edits:
            changed = changed[:start] + filling + changed[min(end, start + 12) :]
        return changed

    return st.lists(edit, min_size=1, max_size=6).map(apply)


NASTY = [b"nan", b"-1", b"1e999", b"999999999999", b"\x00", b"\xff\xff\xff\xff", b"/", b"\n", b" "]


@settings(max_examples=200)
@given(obj=mutations(OBJ.encode()), mtl=mutations(MTL.encode()))
def test_any_obj_is_read_or_refused(obj: bytes, mtl: bytes) -> None:
    files = {"a.obj": obj, "a.mtl": mtl, "t.png": png(((255, 0, 0),))}
    with np.errstate(all="ignore"):
        try:
            points, _ = sample_surface(read_mesh("a.obj", files.get), 16, np.random.default_rng(0))
        except ObjectError:
            return
    assert np.isfinite(points).all()


@pytest.mark.parametrize("name", ["a.PCD", "b.pcd", "d.pcd", "e.pcd", "a.csv", "b.txt", "a.npz"])
def test_any_cloud_is_read_or_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)

    @settings(max_examples=60)
    @given(mutations(path.read_bytes()))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with np.errstate(all="ignore"):
                points, colors = read_cloud(path)
        except ObjectError:
            return
        assert np.isfinite(points).all()
        assert colors is None or colors.shape == points.shape

    check()


@pytest.mark.parametrize("suffix", ["glb", "ply", "stl", "wrl"])
def test_any_mesh_of_another_format_is_read_or_refused(suffix: str) -> None:
    data = VRML.encode() if suffix == "wrl" else export(suffix)

    @settings(max_examples=25)
    @given(mutations(data))
    def check(changed: bytes) -> None:
        try:
            with np.errstate(all="ignore"):
                read_mesh(f"a.{suffix}", {f"a.{suffix}": changed}.get)
        except ObjectError:
            return

    check()


def ply_that_promises(what: str, encoding: str) -> bytes:
    vertices, faces = (10**9, 0) if what == "vertex" else (3, 10**9)
    return (
        f"ply\nformat {encoding} 1.0\nelement vertex {vertices}\n"
        "property float x\nproperty float y\nproperty float z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    ).encode() + bytes(100)


def gltf(accessor: dict[str, Any], **values: Any) -> bytes:
    tree = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": 36, "uri": "data:;base64," + "A" * 48}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"componentType": 5126, "type": "VEC3", "count": 3, **accessor}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        **values,
    }
    return json.dumps(tree).encode()


def zipped(**entries: bytes) -> bytes:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stored.getvalue()


PROMISES: dict[str, tuple[str, bytes, str]] = {
    "ply vertices": ("a.ply", ply_that_promises("vertex", "ascii"), "promises at least 6,000,000"),
    "ply faces": (
        "a.ply",
        ply_that_promises("face", "binary_little_endian"),
        "promises at least 1,000,000,036 bytes",
    ),
    "ply lines": (
        "a.ply",
        ply_that_promises("face", "ascii").replace(b"1000000000", b"0") + b"\n" * 2**21,
        "far more lines than the 3 ",
    ),
    "stl": ("a.stl", bytes(80) + b"\xff\xff\xff\xff" + bytes(50), "does not hold the number"),
    "off": ("a.off", b"OFF\n1000000000 1000000000 0\n0 0 0\n", r"a\.off"),
    "gltf zeros": ("a.gltf", gltf({"count": 10**9}), "promises 12,000,000,000 bytes"),
    "gltf count": ("a.gltf", gltf({"count": 10**9, "bufferView": 0}), "promises 12,000,000,000"),
    "gltf views": (
        "a.gltf",
        gltf({}, bufferViews=[{"buffer": 0, "byteLength": 10**10}]),
        "promises 10,000,000,000",
    ),
    "gltf packed": (
        "a.gltf",
        gltf({}, extensionsRequired=["KHR_draco_mesh_compression"]),
        "its geometry is compressed",
    ),
    "gltf nested": ("a.gltf", b"[" * 100_000, "cannot be read|too deeply nested"),
    "corners": (
        "a.obj",
        b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf" + b" 1 2 3" * 1000 + b"\n",
        "a face has 3,000 corners, more than 2,000",
    ),
    "libraries": (
        "a.obj",
        "".join(f"mtllib ./{'./' * n}a.mtl\n" for n in range(65)).encode(),
        "it names 65 material libraries, more than 64",
    ),
}


@pytest.mark.parametrize("case", PROMISES)
def test_a_promise_is_refused_before_it_costs_memory(case: str) -> None:
    name, data, message = PROMISES[case]
    with bounded(), pytest.raises(ObjectError, match=message):
        read_mesh(name, {name: data}.get)


def test_a_3mf_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_UNPACKED", 20 * MEGABYTE)
    data = zipped(**{"3D/3dmodel.model": bytes(21 * MEGABYTE)})
    assert len(data) < MEGABYTE / 8
    with bounded(), pytest.raises(ObjectError, match="it unpacks to 22,020,096 bytes, more than"):
        read_mesh("a.3mf", {"a.3mf": data}.get)


def test_entries_of_an_archive_are_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "in" / "a.3mf").write_bytes(
        zipped(**{"../evil": b"x", "/evil": b"x", "3D/3dmodel.model": b"<model/>"})
    )
    np.savez(tmp_path / "in" / "a.npz", **{"../points": POINTS})
    with pytest.raises(ObjectError, match=r"a\.3mf"):
        read_mesh("a.3mf", folder_reader(tmp_path / "in"))
    np.testing.assert_array_equal(read_cloud(tmp_path / "in" / "a.npz")[0], POINTS)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.3mf", "a.npz", "in"]


def test_instances_are_counted_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_FACES", 100)
    accessor = {"bufferView": 0}
    read_mesh("a.gltf", {"a.gltf": triangle(accessor, 100)}.get)
    with pytest.raises(ObjectError, match="has 101 faces, more than 100: simplify it"):
        read_mesh("a.gltf", {"a.gltf": triangle(accessor, 101)}.get)


def triangle(accessor: dict[str, Any], times: int) -> bytes:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()

    uri = "data:;base64," + base64.b64encode(corners).decode()
    return gltf(
        accessor,
        buffers=[{"byteLength": 36, "uri": uri}],
        nodes=[{"mesh": 0}] * times,
        scenes=[{"nodes": list(range(times))}],
    )


def test_files_that_a_mesh_names_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_UNPACKED", 100_000)
    data = gltf({}, buffers=[{"byteLength": 36, "uri": "big.bin"}] * 3)
    with pytest.raises(ObjectError, match="names files of more than 100,000 bytes in all"):
        read_mesh("a.gltf", {"a.gltf": data, "big.bin": bytes(40_000)}.get)


def test_textures_of_an_obj_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmost_ray.prepare.wavefront.MAX_TEXTURES", 3)
    names = [f"newmtl {n}\nmap_Kd {'./' * n}t.png\n" for n in range(6)]
    files = {"a.obj": OBJ.encode(), "a.mtl": "".join(names).encode(), "t.png": png(((1, 2, 3),))}
    with pytest.raises(ObjectError, match="its materials name more than 3 textures"):
        read_mesh("a.obj", files.get)


def test_a_texture_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert mesh_module.decode_texture(postscript) is None


def test_a_texture_bomb_leaves_the_colour() -> None:
    head = b"\x89PNG\r\n\x1a\n"
    size = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\x00\x00\x00"
    bomb = head + b"\x00\x00\x00\x0dIHDR" + size + bytes(4)
    with bounded():
        assert mesh_module.decode_texture(bomb) is None


def las(points: int, records: int) -> bytes:
    head = bytearray(375)
    head[:4], head[24:26] = b"LASF", b"\x01\x02"
    struct.pack_into("<HII", head, 94, 227, 375, records)
    struct.pack_into("<BHI", head, 104, 0, 20, points)
    return bytes(head)


CLOUD_PROMISES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "pcd binary": ("a.pcd", lambda: pcd("binary", b"", count=10**7), "160,000,000 bytes are"),
    "pcd text": (
        "a.pcd",
        lambda: pcd("ascii", b"1 2 3 4\n", count=10**7),
        "10,000,000 points are promised",
    ),
    "pcd points": ("a.pcd", lambda: pcd("binary", b"", count=10**9), "more than 50,000,000"),
    "pcd packed": (
        "a.pcd",
        lambda: pcd("binary_compressed", struct.pack("<II", 9, 16 * 10**7) + bytes(9), count=10**7),
        "that unpack to 160,000,000",
    ),
    "pcd field": (
        "a.pcd",
        lambda: pcd("ascii", b"1 2 3\n").replace(b"COUNT 1", b"COUNT 999999999"),
        "its field x has a COUNT of 999999999",
    ),
    "npy": ("a.npy", lambda: npy_header((10**9, 3)), "promise"),
    "npz": ("a.npz", lambda: zipped(**{"points.npy": npy_header((10**7, 3))}), "are promised"),
    "npz code": (
        "a.npz",
        lambda: zipped(**{"points.npy": npy_header((1, 3), "O") + b"cos\nsystem\n"}),
        "holds object",
    ),
    "las points": ("a.las", lambda: las(10**7, 0), "promises 10,000,000 points, more than its 375"),
    "las records": ("a.las", lambda: las(0, 10**9), "more than its 375 bytes hold"),
    "ply": ("a.ply", lambda: ply_that_promises("vertex", "ascii"), "promises at least"),
}


def npy_header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    stored = io.BytesIO()
    header = {"descr": "|O" if dtype == "O" else dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stored, header)
    return stored.getvalue()


@pytest.mark.parametrize("case", CLOUD_PROMISES)
def test_a_cloud_promise_is_refused_before_it_costs_memory(case: str, tmp_path: Path) -> None:
    name, content, message = CLOUD_PROMISES[case]
    if name.endswith(".las"):
        pytest.importorskip("laspy")
    (tmp_path / name).write_bytes(content())
    with bounded(), pytest.raises(ObjectError, match=message):
        read_cloud(tmp_path / name)


def test_lzf_stops_where_the_promise_ends(tmp_path: Path) -> None:
    # A head that promises 640 bytes, and copies that would go on to a gigabyte.
    body = pack_lzf(b"a") + b"\xe0\xff\x00" * 4_000
    data = pcd("binary_compressed", struct.pack("<II", len(body), 640) + body)
    (tmp_path / "a.pcd").write_bytes(data)
    with bounded(megabytes=2), pytest.raises(ObjectError, match="it unpacks to"):
        read_cloud(tmp_path / "a.pcd")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:

    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ObjectError, match="is missing"):
        read_cloud(tmp_path / "a.txt")
    assert folder_reader(tmp_path)("a.txt") is None
