"""Lists of HDF5 files in, their labels and single clouds of them out."""

from __future__ import annotations

import math
import os.path
import posixpath
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from crossmost_ray.config import ConfigError
from crossmost_ray.prepare.errors import ObjectError

MAX_LIST_BYTES = 64_000_000
MAX_ROWS = 1_000_000
"""Clouds in a file; the published ones hold 11,416 and fewer."""
MAX_POINTS = 1_000_000
"""Points of one cloud."""
MAX_CHUNK_BYTES = 512_000_000
"""HDF5 unpacks whole chunks, however little of one is wanted; a packed chunk can be a bomb."""

PHOTO = re.compile(r"([0-9]{1,6})\.png")

# What h5py raises on a file that is damaged, depending on where.
FAULTS = (OSError, ValueError, LookupError, TypeError, RuntimeError, MemoryError)


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """Reads a list, one entry a line.

    Args:
        path: Text file in UTF-8.
        remedy: What to do if it is not there, for the message.

    Returns:
        Number from 1, and text, of each line that is not blank.

    Raises:
        ConfigError: If the file is missing, no text, or too large for a list.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {remedy}")
    if path.stat().st_size > MAX_LIST_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_LIST_BYTES} bytes: it is no list; {remedy}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as broken:
        raise ConfigError(f"{path} is not text in UTF-8: {broken}; {remedy}") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def listed_files(path: Path, remedy: str) -> list[Path]:
    """Finds the files that a list names, below the folder that the list lies in.

    Such lists come with the paths of their makers' machines: where a path is not that of a file
    below the folder, the file of that name in the folder itself is taken.

    Raises:
        ConfigError: If the list cannot be read or is empty, or a file is not below the folder.
    """
    folder = path.parent
    files = []
    for number, line in read_lines(path, remedy):
        given = line.replace("\\", "/")
        candidates = (folder / given, folder / posixpath.basename(given))
        found = next((file for file in candidates if _is_file_below(file, folder)), None)
        if found is None:
            raise ConfigError(
                f"line {number} of {path} names {line!r}, which is no file below {folder}; {remedy}"
            )
        files.append(found)
    if not files:
        raise ConfigError(f"{path} names no files; {remedy}")
    return files


def numbered_photos(folder: Path) -> list[Path]:
    """Lists a folder's 0.png, 1.png, 2.png and so on, by number; none if there is no folder."""
    if not folder.is_dir():
        return []
    matches = filter(None, map(PHOTO.fullmatch, sorted(os.listdir(folder))))
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def read_labels(path: Path) -> NDArray[np.int64]:
    """Reads the class indices of a file, and checks without reading them that it has the clouds.

    Returns:
        (n,) of the n clouds in its dataset `data`.

    Raises:
        ConfigError: If the file is damaged, lacks `data` or `label`, or has them in other shapes.
    """
    try:
        with h5py.File(path, "r") as file:
            num_rows = _clouds(file).shape[0]
            labels = _dataset(file, "label")
            if labels.shape not in ((num_rows,), (num_rows, 1)) or labels.dtype.kind not in "iu":
                raise ValueError(
                    f"its dataset 'label' has shape {labels.shape} and type {labels.dtype}, "
                    f"expected ({num_rows},) or ({num_rows}, 1) integers, one for each cloud"
                )
            return np.asarray(labels[()]).astype(np.int64).reshape(-1)
    except FAULTS as fault:
        raise ConfigError(f"{path} is no HDF5 file of clouds: {_reason(fault)}") from None


def read_cloud(path: Path, row: int) -> NDArray[np.float32]:
    """Reads one cloud, (N, 3), and no other.

    Raises:
        ObjectError: If the file is damaged, has no such row, or a coordinate is not finite.
    """
    try:
        with h5py.File(path, "r") as file, np.errstate(over="ignore"):
            cloud = np.asarray(_clouds(file)[row]).astype(np.float32)
    except FAULTS as fault:
        raise ObjectError(f"row {row} of {path} cannot be read: {_reason(fault)}") from None
    if not np.isfinite(cloud).all():
        raise ObjectError(f"row {row} of {path} has a coordinate that is not finite")
    return cloud


def _is_file_below(file: Path, folder: Path) -> bool:
    # By its text: a link that the user has put there is his own.
    below = Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder))
    return below and os.path.isfile(file)


def _clouds(file: Any) -> Any:
    """The dataset of clouds, not yet read."""
    clouds = _dataset(file, "data")
    shape = clouds.shape
    if len(shape) != 3 or shape[2] != 3 or clouds.dtype.kind != "f":
        raise ValueError(
            f"its dataset 'data' has shape {shape} and type {clouds.dtype}, "
            "expected (clouds, points, 3) floating point numbers"
        )
    if shape[0] > MAX_ROWS or shape[1] > MAX_POINTS:
        raise ValueError(
            f"its dataset 'data' has shape {shape}: more than {MAX_ROWS} clouds or {MAX_POINTS} "
            "points in each are not read"
        )
    return clouds


def _dataset(file: Any, name: str) -> Any:
    """A dataset that lies in the file itself: HDF5 would follow links to any other one."""
    link = file.get(name, getlink=True)
    if link is None:
        raise ValueError(
            f"it has no dataset '{name}', only {', '.join(sorted(file)[:8]) or 'none'}"
        )
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise ValueError(f"its '{name}' is a link, a group or empty, expected a dataset")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"its dataset '{name}' takes its numbers from other files")
    if math.prod(dataset.chunks or ()) * dataset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"the chunks of its dataset '{name}' are above {MAX_CHUNK_BYTES} bytes")
    return dataset


def _reason(fault: BaseException) -> str:
    reason = str(fault).partition("\n")[0] or type(fault).__name__
    return (
        reason if isinstance(fault, ValueError) else f"{reason}; it may be damaged: fetch it anew"
    )
