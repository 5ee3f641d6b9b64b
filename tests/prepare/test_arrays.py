"""Arrays of points: what is read, and what is refused before it takes memory or runs code."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.lib import format as npy

from crossmost_ray.prepare.arrays import MAX_COORDINATE, read_colored_npy, read_npy
from crossmost_ray.prepare.errors import ObjectError

from .layouts_scans import cloud, write

DTYPES = st.sampled_from(["<f4", ">f8", "<f2", "<i4", ">i2", "u1"])
SHAPES = st.tuples(st.integers(1, 40), st.integers(3, 9))


def promise(shape: tuple[int, ...], data: bytes = b"", descr: str = "<f4") -> bytes:
    """A .npy file whose header promises `shape`."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@given(
    array=st.tuples(DTYPES, SHAPES).flatmap(
        lambda kind: arrays.arrays(
            kind[0],
            kind[1],
            elements={"allow_nan": False, "allow_infinity": False} if "f" in kind[0] else None,
        )
    ),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_what_numpy_writes_is_read(
    tmp_path: Path, array: Any, fortran: bool, version: tuple[int, int]
) -> None:
    file = io.BytesIO()
    npy.write_array(file, np.asfortranarray(array) if fortran else array, version=version)
    path = write(tmp_path / "a.npy", file.getvalue())
    np.testing.assert_array_equal(read_npy(path), array)


@given(position=st.integers(0, 200), value=st.integers(0, 255), length=st.integers(0, 600))
def test_damaged_files_cost_their_object_only(
    tmp_path: Path, position: int, value: int, length: int
) -> None:
    file = io.BytesIO()
    np.save(file, cloud())
    data = bytearray(file.getvalue())
    data[position] = value
    path = write(tmp_path / "a.npy", bytes(data[:length]) if length < 512 else bytes(data))
    try:
        array = read_npy(path)
    except ObjectError:
        return
    assert array.ndim == 2
    assert array.shape[1] >= 3
    assert np.isfinite(array).all()


@given(text=st.text("(){}[]'\",:<f48descrshapefortran_order TrueFalse123\\\n-", max_size=120))
def test_a_header_of_any_text_is_refused(tmp_path: Path, text: str) -> None:
    header = text.encode()
    path = write(
        tmp_path / "a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    )
    with pytest.raises(ObjectError, match=r"a\.npy"):
        read_npy(path)


def test_a_nested_header_is_refused(tmp_path: Path) -> None:
    header = b"(" * 9000
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(ObjectError, match=r"is no \.npy file, or a damaged one"):
        read_npy(write(tmp_path / "a.npy", data))


def test_a_promise_larger_than_the_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    # 40 million points of 12 bytes would be 480 MB.
    path = write(tmp_path / "a.npy", promise((40_000_000, 3), b"\0" * 24))
    with pytest.raises(ObjectError, match="480,000,000 bytes are promised, 24 are there"):
        read_npy(path)


def test_an_absurd_promise_is_refused_even_if_the_file_keeps_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", promise((10**9, 3)))
    # A sparse file: large, and not a block of the disk.
    os.truncate(path, 13 * 10**9)
    with pytest.raises(ObjectError, match="promises 12,000,000,000 bytes; at most 2,400,000,000"):
        read_npy(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.array([[Trap(), 1, 2]], object), allow_pickle=True)
    with pytest.raises(ObjectError, match="holds object, expected integers or floats"):
        read_npy(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(3), r"shape \(3,\), expected \(N, 3\)"),
        (np.zeros((4, 2)), r"shape \(4, 2\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((2, 4, 3)), r"shape \(2, 4, 3\)"),
        (np.zeros((4, 3), complex), "holds complex128"),
        (np.zeros((4, 3), bool), "holds bool"),
        (np.full((4, 3), "x"), "holds <U1"),
        (np.zeros((4, 3), [("x", "f4")]), r"holds \[\('x'"),
        (np.array([[0, 0, np.nan]]), "NaN or infinite"),
        (np.array([[0, 0, -np.inf]]), "NaN or infinite"),
    ],
)
def test_what_is_no_cloud_is_refused(tmp_path: Path, array: Any, reason: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(ObjectError, match=reason):
        read_npy(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match=r"none\.npy is missing"):
        read_npy(tmp_path / "none.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ObjectError, match=r"pipe\.npy is missing"):
        read_npy(tmp_path / "pipe.npy")
    np.savez(tmp_path / "many.npz", cloud())
    with pytest.raises(ObjectError, match=r"many\.npz is no \.npy file"):
        read_npy(tmp_path / "many.npz")


def colors_of(tmp_path: Path, colors: Any, columns: int = 6) -> Any:
    array = np.zeros((2, columns))
    array[:, 3:6] = colors
    np.save(tmp_path / "a.npy", array)
    points, read = read_colored_npy(tmp_path / "a.npy")
    assert (points.shape, points.dtype) == ((2, 3), np.float32)
    return read


def test_colors_are_bytes_or_shares_by_their_maximum(tmp_path: Path) -> None:
    shares = colors_of(tmp_path, [[0, 0.5, 1], [0.2, 0, 0]])
    assert shares.dtype == np.uint8
    # round(0.5 * 255): 127.5 goes to the even 128.
    assert shares.tolist() == [[0, 128, 255], [51, 0, 0]]
    assert colors_of(tmp_path, [[0, 0.5, 1.2], [255, 7, 8]]).tolist() == [[0, 0, 1], [255, 7, 8]]


def test_columns_that_are_no_colors_give_none(tmp_path: Path) -> None:
    assert colors_of(tmp_path, [[0, 0, -1], [0, 1, 0]]) is None
    assert colors_of(tmp_path, [[0, 0, 0], [0, 256, 0]]) is None
    assert colors_of(tmp_path, [[0, 0, 0], [0, 1, 0]], columns=7) is None


@pytest.mark.parametrize("value", [2 * MAX_COORDINATE, -1e300])
def test_coordinates_too_large_for_a_float_are_refused(tmp_path: Path, value: float) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.0, value, 0.0]]))
    with pytest.raises(ObjectError, match=r"a\.npy holds a coordinate of"):
        read_colored_npy(tmp_path / "a.npy")
