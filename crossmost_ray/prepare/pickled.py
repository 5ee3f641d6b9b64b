"""A pickle of lists of arrays in, the arrays out; nothing that it asks for is run."""

from __future__ import annotations

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from crossmost_ray.prepare.errors import ObjectError

# What lists, tuples, numbers, text and bytes are written with, and the call of a named function.
# No dictionaries and no sets: nothing has to be hashed. No persistent ids, no other classes.
PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
OPCODES = PUTS | {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
    *("BINBYTES8", "BYTEARRAY8", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINGET"),
    "LONG_BINGET",
}

MAX_OPCODES = 5_000_000
"""An array takes about thirty; each may cost some hundred bytes of memory."""

NUMBERS = re.compile(r"[fiu][1248]|b1")
"""Types of arrays that are read; O, which holds objects, is none of them."""

NDARRAY = "numpy.ndarray"

# What a damaged or foreign pickle makes the unpickler, or our stand-ins, raise.
FAULTS = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError),
    *(LookupError, ArithmeticError, MemoryError),
)


class _Type:
    """Stands in for numpy.dtype: a code such as f4, then its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if not NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(
                f"it holds an array of type {code!r}; only arrays of numbers are read"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds an array of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for an array: NumPy's own would allocate what the file merely promises."""

    def __init__(self, kind: object, *_: object) -> None:
        if kind != NDARRAY:
            raise pickle.UnpicklingError("it holds an array of another class than numpy.ndarray")
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self.values = _decode(raw, kind, shape, "F" if fortran else "C")


def _decode(raw: object, kind: object, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(raw, bytes | bytearray) or not isinstance(kind, _Type):
        raise pickle.UnpicklingError(
            "it holds an array of objects; only arrays of numbers are read"
        )
    return np.frombuffer(raw, kind.dtype).reshape(shape, order=order)


def _from_buffer(raw: object, kind: object, shape: Any, order: Any) -> _Array:
    array = _Array(NDARRAY)
    array.values = _decode(raw, kind, shape, order)
    return array


def _scalar(kind: object, raw: object) -> Any:
    return _decode(raw, kind, (), "C").item()


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes encoded as {codec!r}")
    return text.encode("latin-1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): NDARRAY,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
"""What arrays of numbers ask for by name, and our own functions that are called instead."""


class _Unpickler(pickle.Unpickler):
    """Knows the names in `STAND_INS` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for '{module}.{name}', which no array of numbers needs: that is refused, "
                "and nothing of it was run"
            )
        return STAND_INS[module, name]


def read_columns(path: Path, count: int) -> list[list[Any]]:
    """Reads a pickle that holds a list or tuple of columns, each a list of arrays or numbers.

    NumPy's functions are answered by stand-ins of ours, and instructions that such files don't need
    are refused before any is followed. Memory grows with the size of the file: the arrays lie in
    the bytes read, and are not copied.

    Args:
        path: The file.
        count: How many columns it must hold.

    Returns:
        The columns, all of one length; arrays may be read-only.

    Raises:
        ObjectError: If the file is missing, damaged, or of other content, or asks for anything to
            be run: the message names it.
    """
    try:
        with path.open("rb") as stream:
            _check(stream)
            stream.seek(0)
            columns = _Unpickler(stream).load()
        return _plain(columns, count)
    except FileNotFoundError:
        raise ObjectError(f"the file {path} is missing") from None
    except (*FAULTS, OSError) as fault:
        reason = str(fault) or type(fault).__name__
        raise ObjectError(
            f"{path} is not read: {reason}; if it is damaged, fetch it anew"
        ) from None


def _check(stream: BinaryIO) -> None:
    """Goes through the instructions of a pickle without following them.

    Raises:
        pickle.UnpicklingError: If there is another than those of `OPCODES`, or there are too many.
    """
    num_puts = 0
    for index, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(
                f"the instruction {opcode.name} at byte {position} is none that lists of arrays "
                "need: it is refused, and nothing was run"
            )
        if index == MAX_OPCODES:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES} instructions")
        if opcode.name in PUTS:
            # The unpickler makes room for every smaller number, too: a large one is a bomb.
            if argument is not None and argument > num_puts + 1:
                raise pickle.UnpicklingError(
                    f"at byte {position} it keeps its entry {num_puts} as number {argument}"
                )
            num_puts += 1


def _plain(columns: object, count: int) -> list[list[Any]]:
    """Takes the arrays out of their stand-ins."""
    # Counted first: a pickle of two lines may hold a list of a million times the same list.
    if not isinstance(columns, list | tuple) or len(columns) != count:
        raise ValueError(f"it does not hold a list of {count} lists")
    if not all(isinstance(column, list | tuple) for column in columns):
        raise ValueError(f"it does not hold a list of {count} lists")
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"its lists are of different lengths, {lengths}")
    return [[_value(entry) for entry in column] for column in columns]


def _value(entry: object) -> Any:
    if isinstance(entry, _Array) and entry.values is not None:
        return entry.values
    if isinstance(entry, int | float):
        return entry
    raise ValueError(f"it holds a {type(entry).__name__} where an array or a number was expected")
