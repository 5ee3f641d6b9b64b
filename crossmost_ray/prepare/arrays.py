"""A .npy file that anyone may have written in, its points and colours out."""

from __future__ import annotations

import math
import os
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from crossmost_ray.prepare.errors import ObjectError

MAX_BYTES = 50_000_000 * 6 * 8
"""Largest array that is read: 50 million points of six doubles, 2.4 GB."""

MAX_COORDINATE = 1e12
"""Largest coordinate in magnitude: the square of a larger one is near the end of float32."""

BROKEN_HEADER = (
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)
"""What NumPy lets through of a header that is no header: it parses one as a Python literal."""


def read_npy(path: Path) -> NDArray[Any]:
    """Reads an array of points, without ever running code from the file.

    Nothing is allocated before the size that the header promises is compared with the file's.

    Args:
        path: A .npy file of any version.

    Returns:
        (N, C) with N >= 1 and C >= 3, integers or floats as in the file, all of them finite.

    Raises:
        ObjectError: If there is no such file, it is no .npy file, is cut short, larger than
            `MAX_BYTES`, or holds something else: objects, text, another shape, NaN or infinity.
    """
    try:
        # A pipe would be waited on for ever.
        if not path.is_file():
            raise ObjectError(f"the file {path} is missing")
        with path.open("rb") as file:
            _check_header(file, path)
            file.seek(0)
            array: NDArray[Any] = np.load(file, allow_pickle=False)
    except OSError as unreadable:
        raise ObjectError(f"{path} cannot be read: {unreadable}") from None
    if not np.isfinite(array).all():
        raise ObjectError(f"{path} holds values that are NaN or infinite")
    return array


def read_colored_npy(path: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Reads points, and their colours where an array has six columns.

    Columns 3 to 5 are taken for red, green and blue: in [0, 1] if their maximum is at most 1, else
    in [0, 255]. Where one of them is negative or above 255 they are something else, such as
    normals, and there are no colours. Columns of any other array are not looked at.

    Args:
        path: A .npy file of (N, C), C >= 3.

    Returns:
        (N, 3) float32 in the file's own axes and unit, and (N, 3) sRGB or None.

    Raises:
        ObjectError: If `read_npy` does, or a coordinate is beyond `MAX_COORDINATE`.
    """
    array = read_npy(path)
    points = array[:, :3].astype(np.float64)
    greatest = np.abs(points).max()
    if greatest > MAX_COORDINATE:
        raise ObjectError(
            f"{path} holds a coordinate of {greatest:g}; at most {MAX_COORDINATE:g} is allowed"
        )
    colors = _colors(array[:, 3:].astype(np.float64)) if array.shape[1] == 6 else None
    return points.astype(np.float32), colors


def _check_header(file: IO[bytes], path: Path) -> None:
    """Refuses an array that is not one of points, or larger than its file."""
    try:
        version = npy.read_magic(file)
        # Version 3 differs in the encoding of the names of columns, which points have none of.
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    except BROKEN_HEADER as broken:
        raise ObjectError(f"{path} is no .npy file, or a damaged one: {broken}") from None
    if dtype.hasobject or dtype.kind not in "iuf":
        raise ObjectError(f"{path} holds {dtype}, expected integers or floats")
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 3:
        raise ObjectError(f"{path} has shape {shape}, expected (N, 3) or more columns, N >= 1")
    promised = math.prod(shape) * dtype.itemsize
    if promised > MAX_BYTES:
        raise ObjectError(
            f"{path} promises {promised:,} bytes; at most {MAX_BYTES:,} are read: thin it out"
        )
    there = os.fstat(file.fileno()).st_size - file.tell()
    if promised > there:
        raise ObjectError(
            f"{path} is cut short: {promised:,} bytes are promised, {there:,} are there"
        )


def _colors(columns: NDArray[np.float64]) -> NDArray[np.uint8] | None:
    least, greatest = columns.min(), columns.max()
    if least < 0 or greatest > 255:
        return None
    return np.round(columns * (255 if greatest <= 1 else 1)).astype(np.uint8)
