"""Pickles of arrays: NumPy's own are read back, and nothing else is followed."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.pickled import read_columns


class Touch:
    """A pickle of it creates a file when it is loaded the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Fields:
    """Pickled by its class and its dictionary."""

    def __init__(self) -> None:
        self.value = 1


def stored(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["<f4", ">f8", "<i4", "|u1", "<i8", "<f2"])
def test_arrays_are_read_back(tmp_path: Path, protocol: int, kind: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(kind)
    columns = [[values, np.asfortranarray(values), values[:, ::2]], [1, np.int32(2), np.array([3])]]
    arrays, labels = read_columns(stored(tmp_path / "a.dat", columns, protocol), 2)
    for read, expected in zip(arrays, columns[0], strict=True):
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == expected.dtype
    assert labels[:2] == [1, 2]
    np.testing.assert_array_equal(labels[2], [3])


def test_names_of_numpy_1_are_known(tmp_path: Path) -> None:
    # Written by NumPy 1, where the module had no underscore.
    content = pickle.dumps([[np.arange(3)], [np.int64(7)]], 3)
    old = content.replace(b"numpy._core", b"numpy.core")
    assert old != content
    arrays, labels = read_columns(stored(tmp_path / "a.dat", old), 2)
    np.testing.assert_array_equal(arrays[0], [0, 1, 2])
    assert labels == [7]


def test_code_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = stored(tmp_path / "a.dat", [[Touch(mark)], [0]])
    with pytest.raises(ObjectError, match=r"a\.dat is not read: it asks for 'posix\.system'"):
        read_columns(path, 2)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cbuiltins\neval\n(V1\ntR.", "the instruction UNICODE"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "asks for 'builtins.eval'"),
        (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x001\x85R.", "asks for 'numpy.load'"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "'str' object is not callable"),
        (b"\x80\x02X\x01\x00\x00\x001Q.", "the instruction BINPERSID at byte 8 .* refused"),
        (b"P1\n.", "the instruction PERSID at byte 0 .* refused"),
        (pickle.dumps([[{}], [0]]), "the instruction EMPTY_DICT"),
        (pickle.dumps([[{1}], [0]]), "the instruction EMPTY_SET"),
        (pickle.dumps([[Fields()], [0]]), "the instruction (NEWOBJ|EMPTY_DICT)"),
        (pickle.dumps([[np.array([None, "x"], object)], [0]]), "an array of type 'O8'"),
        (pickle.dumps([[np.array(["x"])], [0]]), "an array of type 'U1'"),
        (pickle.dumps([[np.zeros(2, [("a", "f4")])], [0]]), "an array of type 'V4'|EMPTY_DICT"),
        (pickle.dumps([[np.arange(3).view(np.matrix)], [0]]), "asks for 'numpy.*matrix'"),
        (pickle.dumps([[b"raw"], [0]]), "a bytes where an array or a number"),
        (pickle.dumps([[[1]], [0]]), "a list where an array or a number"),
        (pickle.dumps([[1], [2], [3]]), "not hold a list of 2 lists"),
        (pickle.dumps([1, 2]), "not hold a list of 2 lists"),
        (pickle.dumps(1), "not hold a list of 2 lists"),
        (pickle.dumps([[1, 2], [0]]), r"different lengths, \[2, 1\]"),
        (b"", "if it is damaged, fetch it anew"),
        (b"<html>", "if it is damaged, fetch it anew"),
        (pickle.dumps([[np.zeros(100)], [0]])[:-200], "if it is damaged, fetch it anew"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ObjectError, match=rf"a\.dat is not read: .*({message})"):
        read_columns(stored(tmp_path / "a.dat", content), 2)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match=r"none\.dat is missing"):
        read_columns(tmp_path / "none.dat", 2)


def test_promises_are_not_believed(tmp_path: Path) -> None:
    # An entry with a number of 2 billion: the unpickler would fill a table of 32 GB up to it.
    bomb = b"\x80\x02]r" + struct.pack("<I", 2_000_000_000) + b"."
    with pytest.raises(ObjectError, match="keeps its entry 0 as number 2000000000"):
        read_columns(stored(tmp_path / "a.dat", bomb), 2)
    # Each byte a list of its own, of 56 bytes.
    with pytest.raises(ObjectError, match="more than 1000 instructions"):
        read_columns(stored(tmp_path / "b.dat", b"\x80\x02" + b"]" * 2000 + b"."), 2)
    # A hundred times one list of a hundred arrays, in little more than a thousand bytes.
    column = [np.zeros(1)] * 100
    with pytest.raises(ObjectError, match="not hold a list of 2 lists"):
        read_columns(stored(tmp_path / "c.dat", [column] * 100), 2)


@pytest.fixture(autouse=True)
def _few_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmost_ray.prepare.pickled.MAX_OPCODES", 1000)


def test_a_promised_shape_beyond_its_bytes_is_refused(tmp_path: Path) -> None:
    content = pickle.dumps([[np.zeros((2, 3), np.uint8)], [0]], 4)
    shape = b"K\x02K\x03\x86"
    assert shape in content
    with pytest.raises(ObjectError, match="cannot reshape array of size 6"):
        read_columns(stored(tmp_path / "a.dat", content.replace(shape, b"K\xffK\xff\x86")), 2)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_object_error_or_still_arrays(tmp_path: Path, data: st.DataObject) -> None:
    protocol = data.draw(st.sampled_from([2, 4, 5]))
    content = bytearray(pickle.dumps([[np.eye(2), np.eye(3)], [np.array([1]), 2]], protocol))
    opcodes = [ord(opcode.code) for opcode in pickletools.opcodes]
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.sampled_from(opcodes) | st.integers(0, 255)
        )
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    try:
        columns = read_columns(stored(tmp_path / "fuzz.dat", bytes(content)), 2)
    except ObjectError:
        return
    assert all(isinstance(v, np.ndarray | int | float) for column in columns for v in column)
