"""Reads a checkpoint that may come from anywhere: tensors by name, and nothing of it is run."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.models.foreign.archive import is_archive, read_archive

CONTAINERS = ("state_dict", "model", "base_model")
"""Keys that published checkpoints keep their weights under, beside those of the optimiser."""
TEACHER = "model_ema"
PARALLEL = "module"
"""Part that torch's wrappers for several devices add to every name."""

ZIP_MAGIC = b"PK\x03\x04"

# What readers of pickles and zips raise on a file that is damaged: anything but an exit.
FAULTS = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, struct.error, zlib.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file."""

    path: Path
    sha256: str
    """Of the file, in hexadecimal digits."""
    tensors: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    """The moving average of the same, where the file holds one."""


class _Number:
    """Stands in for a number of NumPy's, such as an accuracy: takes anything, keeps nothing."""

    def __init__(self, *_: object) -> None:
        """Takes what NumPy's would."""

    def __setstate__(self, _: object) -> None:
        """Takes what NumPy's would."""


# The settings of a run are stored as a Namespace, which is no more than names and values. NumPy's
# functions are not allowed: their names are answered by the stand-in.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_Number, "numpy.dtype"),
    (_Number, "numpy.core.multiarray.scalar"),
    (_Number, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the tensors of a checkpoint, on the CPU, as they are.

    What kind of file it is, its content says: a TorchScript archive, what `torch.save` wrote, or
    safetensors. Names lose their `module.` parts.

    Raises:
        ConfigError: If there is no such file, if it is damaged, if it asks for anything to be run
            or built but tensors and plain values, or if it holds no tensors by name.
    """
    file = resolve_path(str(path))
    if not file.is_file():
        raise ConfigError(
            f"there is no checkpoint '{path}' ({file}); docs/checkpoints.md says more"
        )
    with file.open("rb") as stream:
        head = stream.read(512)
        stream.seek(0)
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if head.lstrip().startswith(b"<"):
        raise ConfigError(
            f"{file} is a web page, not a checkpoint: the download was refused or has to be "
            "confirmed; fetch it with a browser"
        )
    try:
        content = _content(file, head)
    except FAULTS as fault:
        raise _refusal(file, fault) from None
    return Checkpoint(file, sha256, *_weights(content, file))


def _content(file: Path, head: bytes) -> Any:
    if head[8:9] == b"{":
        return safetensors.torch.load_file(file)
    if head.startswith(ZIP_MAGIC):
        with zipfile.ZipFile(file) as archive:
            # torch does not look at the checksums: it would load a flipped bit.
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
            if is_archive(archive):
                return read_archive(archive)
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(file, map_location="cpu", weights_only=True)


def _refusal(file: Path, fault: BaseException) -> ConfigError:
    reason = str(fault)
    asked = re.search(r"GLOBAL (\w[\w.]*)", reason)
    if isinstance(fault, pickle.UnpicklingError) and asked:
        return ConfigError(
            f"{file} asks for '{asked[1]}', which is neither a tensor nor a plain value: it is "
            "refused, and nothing of it was run. It is damaged, or holds more than weights: if you "
            "trust where it comes from, save its tensors alone with torch.save, and convert those"
        )
    reason = reason.partition("\n")[0] or type(fault).__name__
    return ConfigError(f"{file} is damaged, cut short or no checkpoint ({reason}); fetch it anew")


def _weights(content: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Finds the weights, and those of the teacher."""
    found, teacher = content, None
    if isinstance(content, dict):
        held = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
        if held:
            found, teacher = content[held[0]], content.get(TEACHER)
    tensors = _tensors(found, file)
    if not tensors:
        keys = ", ".join(list(map(str, content))[:5]) if isinstance(content, dict) else "none"
        raise ConfigError(
            f"{file} holds no tensors by name (its keys: {keys or 'none'}); expected a checkpoint "
            "of those in docs/checkpoints.md"
        )
    return tensors, _tensors(teacher, file) or None


def _tensors(found: Any, file: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for given, value in found.items() if isinstance(found, Mapping) else ():
        if not isinstance(value, Tensor):
            continue
        name = ".".join(part for part in str(given).split(".") if part != PARALLEL)
        if name in tensors:
            raise ConfigError(f"{file} holds {name} twice, with and without '{PARALLEL}.'")
        tensors[name] = value.detach()
    return tensors
