"""A folder of shards in, what it holds and what is wrong with it out; in plain Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossmost_ray.config import ConfigError, check_classes, resolve_path
from crossmost_ray.data.decode import decode_points, decode_view
from crossmost_ray.schema import MANIFEST_NAME, UNFINISHED_NAME


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

    @property
    def num_good(self) -> int:
        """Rows that can be used."""
        return self.num_objects - len(self.bad)


def list_shards(shards: str, columns: Sequence[str]) -> list[Path]:
    """Lists the Parquet files of a folder, in the order of their names.

    Raises:
        ConfigError: If the folder is missing or empty, a file is no Parquet file, or a column
            is missing.
    """
    folder = resolve_path(shards)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder of shards '{shards}' ({folder}); "
            "write one with `python jobs/prepare.py`, or mend data.shards"
        )
    if (folder / UNFINISHED_NAME).exists():
        raise ConfigError(
            f"the preparation of '{shards}' was not finished ({folder / UNFINISHED_NAME} says so); "
            "start it again with the same config: it goes on where it stopped"
        )
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise ConfigError(
            f"the folder '{shards}' holds no .parquet file; write shards into it with "
            "`python jobs/prepare.py`"
        )
    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as broken:
            raise ConfigError(
                f"{file} can't be read as Parquet ({broken}); "
                "write it anew with `python jobs/prepare.py`"
            ) from None
        missing = [name for name in columns if name not in names]
        if missing:
            raise ConfigError(
                f"{file} lacks the column {', '.join(missing)} (it has {', '.join(names)}); "
                "write it anew with `python jobs/prepare.py`"
            )
    return files


def read_manifest(shards: str) -> dict[str, Any]:
    """Reads the manifest beside the shards; empty where there is none.

    Raises:
        ConfigError: If it is no JSON object.
    """
    path = resolve_path(shards) / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
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
    file: Path, columns: Sequence[str], *, num_points: int, num_views: int, view_size: int
) -> ShardCheck:
    """Reads one shard whole and looks at each row as training would.

    Args:
        file: Parquet file.
        columns: What training reads of it.
        num_points: Least number of points of a cloud.
        num_views: Least number of views.
        view_size: Side that views are decoded to.
    """
    bad = []
    table = pq.read_table(file, columns=list(columns))
    ids = table["object_id"].to_pylist()
    for row, points in enumerate(decode_points(table["points"])):
        problem = _problem_of_points(points, num_points)
        if problem is None:
            views = table["views"][row].as_py() or []
            problem = _problem_of_views(views, num_views, view_size)
        if problem is None and "captions" in columns:
            captions = table["captions"][row].as_py() or []
            problem = None if captions and all(captions) else "no caption, or an empty one"
        if problem is not None:
            bad.append(BadRow(file.name, row, str(ids[row]), problem))
    return ShardCheck(num_objects=table.num_rows, bad=tuple(bad))


def _problem_of_points(points: np.ndarray[Any, np.dtype[np.float32]], least: int) -> str | None:
    if len(points) < least:
        return f"{len(points)} points, data.num_points asks for {least}"
    unfit = int((~np.isfinite(points).all(axis=1)).sum())
    return f"{unfit} of {len(points)} points are NaN or infinite" if unfit else None


def _problem_of_views(views: Sequence[bytes], least: int, size: int) -> str | None:
    if len(views) < least:
        return f"{len(views)} views, data.num_views asks for {least}"
    for place, view in enumerate(views):
        try:
            decode_view(view, size)
        except (OSError, TypeError, ValueError) as broken:
            return f"view {place} can't be decoded ({broken})"
    return None
