"""Reads the tensors of a TorchScript archive: neither its pickle nor its code is executed.

`torch.jit.load` would compile and run code that comes with the file. An archive's tensors can be
had without: its pickle says which tensor lies where, and this module follows what it says with a
dozen and a half instructions, none of which can call anything.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    """A class or function that a pickle names; it is never looked up."""

    path: str
    """Module and name, a space between."""


class _Scripted:
    """A module of the archive: its attributes by name."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


def is_archive(file: zipfile.ZipFile) -> bool:
    """Tells a TorchScript archive from what `torch.save` writes."""
    return any(name.endswith("/constants.pkl") for name in file.namelist())


def read_archive(file: zipfile.ZipFile) -> dict[str, Tensor]:
    """Reads the tensors of the archive's modules by their dotted names.

    Those are the names of `torch.jit.load(path).state_dict()`, and tensors that are plain
    attributes of a module beside them.

    Raises:
        UnpicklingError: If the archive asks for anything but modules, tensors and plain values.
        KeyError, IndexError, TypeError, ValueError, RuntimeError: If it is damaged.
    """
    (pickled,) = (name for name in file.namelist() if name.split("/")[1:] == ["data.pkl"])
    module = _Reader(file, pickled.removesuffix("data.pkl")).read(file.read(pickled))
    return dict(_tensors(module))


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Scripted):
        raise UnpicklingError(f"the archive holds {type(module).__name__}, expected a module")
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Scripted):
            yield from _tensors(value, f"{prefix}{name}.")


class _Reader:
    """The machine that a pickle's instructions are for, with those that TorchScript writes."""

    def __init__(self, file: zipfile.ZipFile, folder: str) -> None:
        self.file = file
        self.folder = folder
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, pickled: bytes) -> Any:
        """Follows the instructions to their end, and gives what they made."""
        for instruction, value, _ in pickletools.genops(pickled):
            name = instruction.name
            if name in VALUES:
                self.stack.append(value)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in TUPLES:
                self.stack.append(tuple(self._take(TUPLES[name])))
            elif name not in ("PROTO", "STOP"):
                self._follow(name, value)
        return self.stack[-1]

    def _follow(self, name: str, value: Any) -> None:
        """Follows one instruction."""
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._take_marked()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                items = self._take(1) if name == "APPEND" else self._take_marked()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._take(2) if name == "SETITEM" else self._take_marked()
                _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_Name(value))
            case "BINPERSID":
                stack.append(self._storage(*_expect(self._take(1)[0], tuple)))
            case "REDUCE":
                stack.append(_make(*self._take(2)))
            case "NEWOBJ":
                scripted, _ = self._take(2)
                if not _expect(scripted, _Name).path.startswith("__torch__"):
                    raise _refused(scripted)
                stack.append(_Scripted())
            case "BUILD":
                (state,) = self._take(1)
                _expect(stack[-1], _Scripted).attributes = _expect(state, dict)
            case _:
                raise UnpicklingError(f"the archive's pickle holds the instruction {name}")

    def _take(self, count: int) -> list[Any]:
        """Takes the last values off the stack."""
        if len(self.stack) < count:
            raise IndexError("the archive's pickle takes more than it put down")
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _take_marked(self) -> list[Any]:
        """Takes all values since the last mark."""
        return self._take(len(self.stack) - self.marks.pop())

    def _storage(self, kind: str, dtype: _Name, key: str, _: str, count: int) -> Tensor:
        """Reads one of the archive's flat arrays, wherever it lay when it was saved."""
        if kind != "storage" or _expect(dtype, _Name).path not in DTYPES:
            raise UnpicklingError(f"the archive's pickle refers to {kind} {dtype}")
        if key not in self.storages:
            record = self.file.read(f"{self.folder}data/{_expect(key, str)}")
            # Not an empty buffer, which frombuffer refuses.
            values = torch.frombuffer(bytearray(record or b"\0" * 8), dtype=DTYPES[dtype.path])
            self.storages[key] = values[: len(record) // values.element_size()]
        if len(self.storages[key]) != count:
            raise ValueError(
                f"the array {key} has {len(self.storages[key])} values, expected {count}"
            )
        return self.storages[key]


def _make(name: _Name, arguments: tuple[Any, ...]) -> Any:
    """Makes what the three kinds of calls in an archive would make."""
    path = _expect(name, _Name).path
    if path == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides = _expect(arguments, tuple)[:4]
        if not isinstance(storage, Tensor) or math.prod(shape) > len(storage):
            raise ValueError(f"the archive holds a tensor of shape {shape}, and too few numbers")
        # as_strided refuses what reaches beyond the array.
        return storage.as_strided(shape, strides, offset)
    if path == "collections OrderedDict" and arguments == ():
        return {}
    if path.startswith("torch.jit._pickle "):  # build_intlist and its like: a list, typed
        return arguments[0]
    raise _refused(name)


def _refused(name: _Name) -> UnpicklingError:
    return UnpicklingError(f"GLOBAL {name.path.replace(' ', '.')} is not allowed in an archive")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the archive's pickle has {type(value).__name__} for {kind.__name__}")
    return value
