"""A folder of shards in, wherever it lies, what it holds and what is wrong with it out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossmost_ray.config import ConfigError, check_classes
from crossmost_ray.data.decode import decode_points, decode_view
from crossmost_ray.data.whole import looks_whole
from crossmost_ray.schema import MANIFEST_NAME, UNFINISHED_NAME
from crossmost_ray.storage import Store

OPENED_AT_ONCE = 16
"""Shards whose columns are read at a time."""

ROWS_AT_ONCE = 64
"""Rows that are looked at at a time: what is in memory does not grow with the shards."""


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that can't be used."""

    shard: str
    row: int
    object_id: str
    problem: str

    def __str__(self) -> str:
        return f"{self.shard}, row {self.row} ({self.object_id}): {self.problem}"


@dataclasses.dataclass(frozen=True)
class ShardCheck:
    """What reading a folder of shards once has shown."""

    num_objects: int
    """Rows, bad ones included."""
    bad: tuple[BadRow, ...]
    files: tuple[str, ...]
    """Names of the files, in the order in which they are read."""

    @property
    def num_good(self) -> int:
        """Rows that can be used."""
        return self.num_objects - len(self.bad)


def shard_store(shards: str) -> Store:
    """Gives access to a folder of shards, by its path or its address."""
    return Store(shards, key="data.shards")


def list_shards(shards: str, columns: Sequence[str]) -> list[str]:
    """Lists the names of the Parquet files of a folder, sorted.

    Raises:
        ConfigError: If the folder is missing or empty, a file is no Parquet file, or a column
            is missing.
    """
    store = shard_store(shards)
    if not store.is_folder():
        raise ConfigError(
            f"there is no folder of shards '{shards}' ({store}); "
            "write one with `python jobs/prepare.py`, or mend data.shards"
        )
    if store.has_file(UNFINISHED_NAME):
        raise ConfigError(
            f"the preparation of '{shards}' was not finished ({store}/{UNFINISHED_NAME} says so); "
            "start it again with the same config: it goes on where it stopped"
        )
    files = [name for name in store.names() if name.endswith(".parquet")]
    if not files:
        raise ConfigError(
            f"the folder '{shards}' holds no .parquet file; write shards into it with "
            "`python jobs/prepare.py`"
        )
    # A store far away takes a tenth of a second for each: thousands are asked side by side.
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        found = list(pool.map(functools.partial(_columns, shards), files))
    for name, names in zip(files, found, strict=True):
        missing = [column for column in columns if column not in names]
        if missing:
            raise ConfigError(
                f"{store}/{name} lacks the column {', '.join(missing)} (it has "
                f"{', '.join(names)}); write it anew with `python jobs/prepare.py`"
            )
    return files


def _columns(shards: str, name: str) -> list[str]:
    with open_shard(shards, name) as shard:
        names: list[str] = shard.schema_arrow.names
        return names


def open_shard(shards: str, name: str) -> pq.ParquetFile:
    """Opens one file of a folder of shards.

    Raises:
        ConfigError: If it can't be read as Parquet.
    """
    store = shard_store(shards)
    try:
        return pq.ParquetFile(store.open_input(name))
    except (pa.ArrowInvalid, OSError) as broken:
        raise ConfigError(
            f"{store}/{name} can't be read as Parquet ({broken}); "
            "write it anew with `python jobs/prepare.py`"
        ) from None


def read_batches(
    shards: str, name: str, columns: Sequence[str], *, at_once: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields the rows of one file, a few at a time, each time with the place of the first.

    Raises:
        ConfigError: If the file can't be read as Parquet, or not to its end.
    """
    first = 0
    with open_shard(shards, name) as shard:
        batches = shard.iter_batches(at_once, columns=list(columns))
        while True:
            try:
                rows = next(batches, None)
            except OSError as broken:
                reason = str(broken).partition("\n")[0]
                raise ConfigError(
                    f"{shard_store(shards)}/{name} can't be read beyond row {first} ({reason}); "
                    "write it anew with `python jobs/prepare.py`"
                ) from None
            if rows is None:
                return
            yield first, rows
            first += rows.num_rows


def read_manifest(shards: str) -> dict[str, Any]:
    """Reads the manifest beside the shards; empty where there is none.

    Raises:
        ConfigError: If it is no JSON object.
    """
    store = shard_store(shards)
    stored = store.read(MANIFEST_NAME)
    if stored is None:
        return {}
    path = f"{store}/{MANIFEST_NAME}"
    try:
        manifest = json.loads(stored)
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{path} is not JSON ({broken}); prepare the shards anew") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{path} must hold a JSON object; prepare the shards anew")
    return manifest


def class_names(classes: Sequence[str] | None, shards: str) -> list[str]:
    """Gives the classes to tell apart: those of the config, else those of the manifest.

    Raises:
        ConfigError: If neither names any, or they can't make a classifier.
    """
    if classes is not None:
        return list(classes)
    named = read_manifest(shards).get("classes")
    if not named:
        raise ConfigError(
            f"neither data.classes nor the manifest of '{shards}' names classes; "
            "list them in data.classes"
        )
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(
            f"the manifest of '{shards}' must list names under `classes`, it holds {named!r}; "
            "list them in data.classes"
        )
    try:
        check_classes(named, f"the manifest of '{shards}'")
    except ValueError as unfit:
        raise ConfigError(str(unfit)) from None
    return list(named)


def check_file(
    shards: str,
    name: str,
    columns: Sequence[str],
    *,
    num_points: int,
    num_views: int,
    view_size: int,
    full: bool = False,
) -> ShardCheck:
    """Reads one shard and looks at each row, a few rows at a time.

    Args:
        shards: Its folder.
        name: The file's.
        columns: What training reads of it.
        num_points: Least number of points of a cloud.
        num_views: Least number of views.
        view_size: Side that views are decoded to.
        full: Decode every view, and not only those that don't look whole.

    Raises:
        ConfigError: If the file can't be read to its end.
    """
    bad, num_objects = [], 0
    for first, rows in read_batches(shards, name, columns, at_once=ROWS_AT_ONCE):
        for row, object_id, problem in _problems(
            rows, num_points=num_points, num_views=num_views, size=view_size, full=full
        ):
            bad.append(BadRow(name, first + row, object_id, problem))
        num_objects = first + rows.num_rows
    return ShardCheck(num_objects=num_objects, bad=tuple(bad), files=(name,))


def find_row(shards: str, files: Sequence[str], object_id: str) -> tuple[str, int] | None:
    """Finds the shard and the row of an object; None where it is not among them."""
    for name in files:
        with open_shard(shards, name) as shard:
            place = pc.index(shard.read(columns=["object_id"])["object_id"], object_id).as_py()
        if place >= 0:
            return name, place
    return None


def _problems(
    rows: pa.RecordBatch, *, num_points: int, num_views: int, size: int, full: bool
) -> Iterator[tuple[int, str, str]]:
    """Yields place, id and problem of each row that can't be used."""
    captions = rows["captions"].to_pylist() if "captions" in rows.schema.names else None
    for row, points in enumerate(decode_points(rows["points"])):
        problem = _problem_of_points(points, num_points)
        if problem is None:
            problem = _problem_of_views(rows["views"][row].as_py() or [], num_views, size, full)
        if problem is None and captions is not None:
            named = captions[row] and all(captions[row])
            problem = None if named else "no caption, or an empty one"
        if problem is not None:
            yield row, str(rows["object_id"][row].as_py()), problem


def _problem_of_points(points: np.ndarray[Any, np.dtype[np.float32]], least: int) -> str | None:
    if len(points) < least:
        return f"{len(points)} points, data.num_points asks for {least}"
    if np.isfinite(points).all():
        return None
    unfit = int((~np.isfinite(points).all(axis=1)).sum())
    return f"{unfit} of {len(points)} points are NaN or infinite"


def _problem_of_views(views: Sequence[bytes], least: int, size: int, full: bool) -> str | None:
    if len(views) < least:
        return f"{len(views)} views, data.num_views asks for {least}"
    for place, view in enumerate(views):
        if not full and looks_whole(view):
            continue
        try:
            decode_view(view, size)
        except (OSError, TypeError, ValueError) as broken:
            return f"view {place} can't be decoded ({broken})"
    return None
