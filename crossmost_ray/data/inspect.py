"""A folder of shards in, what it holds out, as numbers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.data.decode import FORMATS, decode_points, ring_views
from crossmost_ray.data.shards import BadRow, list_shards, read_manifest
from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA

Checksum = Literal["agrees", "differs", "not stated"]

READ_COLUMNS = ("object_id", "label", "source", "points", "colors", "views")

BATCH_ROWS = 64
"""Rows in memory at a time."""


@dataclass(frozen=True)
class Spread:
    """Of a count over all objects; zeros where there is no object."""

    least: int
    median: float
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.least} to {self.most}, median {self.median:g}"


@dataclass(frozen=True)
class ShardFile:
    """One Parquet file."""

    path: Path
    num_rows: int
    num_bytes: int
    checksum: Checksum
    """Whether its SHA-256 is the one that the manifest states."""


@dataclass(frozen=True)
class Inspection:
    """What one folder of shards holds."""

    folder: Path
    schema: pa.Schema
    files: tuple[ShardFile, ...]
    missing: tuple[str, ...]
    """Files that the manifest names and the folder lacks."""

    classes: dict[str | None, int]
    """Objects by label, sorted; None, for those without one, comes last."""

    sources: dict[str | None, int]
    """Objects by source, likewise."""

    points: Spread
    """Of a cloud."""

    views: Spread
    """Of an object."""

    view_sizes: dict[tuple[int, int], int]
    """Views by (width, height) in pixels, the most frequent first."""

    num_colored: int
    """Objects whose points have colours."""

    bad: tuple[BadRow, ...]
    """Objects with a view that is no image."""

    facts: dict[str, str]
    """What the manifest says of the data as a whole; empty where there is none."""

    @property
    def num_objects(self) -> int:
        """Rows of all files."""
        return sum(file.num_rows for file in self.files)

    @property
    def intact(self) -> bool:
        """Whether the manifest vouches for every file, and every file that it names is there."""
        return not self.missing and all(file.checksum == "agrees" for file in self.files)


@dataclass
class _Counts:
    """What is counted while the rows go by."""

    classes: Counter[str | None] = field(default_factory=Counter)
    sources: Counter[str | None] = field(default_factory=Counter)
    points: Counter[int] = field(default_factory=Counter)
    views: Counter[int] = field(default_factory=Counter)
    view_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    num_colored: int = 0
    bad: list[BadRow] = field(default_factory=list)

    def update(self, batch: pa.RecordBatch, shard: str, first_row: int) -> None:
        """Adds a few rows of a shard."""
        self.classes.update(batch["label"].to_pylist())
        self.sources.update(batch["source"].to_pylist())
        self.points.update(pc.list_value_length(batch["points"]).fill_null(0).to_pylist())
        self.num_colored += len(batch) - batch["colors"].null_count
        ids = batch["object_id"].to_pylist()
        for row, views in enumerate(batch["views"].to_pylist()):
            self.views[len(views or ())] += 1
            unreadable = []
            for place, view in enumerate(views or ()):
                size = _image_size(view)
                if size is None:
                    unreadable.append(str(place))
                else:
                    self.view_sizes[size] += 1
            if unreadable:
                problem = f"no WebP, PNG or JPEG image: view {', '.join(unreadable)}"
                self.bad.append(BadRow(shard, first_row + row, str(ids[row]), problem))


def inspect_shards(shards: str) -> Inspection:
    """Reads every row of a folder of shards once, a few at a time.

    Args:
        shards: Folder of Parquet files.

    Raises:
        ConfigError: If the folder is missing or empty, a file is damaged or has other columns than
            this version writes, or the manifest cannot be read.
    """
    files = [resolve_path(shards) / name for name in list_shards(shards, SHARD_SCHEMA.names)]
    manifest = read_manifest(shards)
    stated = _stated_checksums(manifest, resolve_path(shards))
    counts = _Counts()
    seen = []
    for file in files:
        with _reading(file):
            _check_columns(file)
            num_rows = 0
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(BATCH_ROWS, columns=list(READ_COLUMNS)):
                    counts.update(batch, file.name, num_rows)
                    num_rows += len(batch)
            checksum = _compare(file, stated.get(file.name))
        seen.append(ShardFile(file, num_rows, file.stat().st_size, checksum))
    return Inspection(
        folder=resolve_path(shards),
        schema=pq.read_schema(files[0]),
        files=tuple(seen),
        missing=tuple(sorted(set(stated) - {file.name for file in files})),
        classes=_by_name(counts.classes),
        sources=_by_name(counts.sources),
        points=_spread(counts.points),
        views=_spread(counts.views),
        view_sizes=dict(counts.view_sizes.most_common()),
        num_colored=counts.num_colored,
        bad=tuple(counts.bad),
        facts=_facts(manifest),
    )


def inspect_all(folder: str) -> dict[str, Inspection]:
    """Inspects a folder of shards, or each folder of shards in it, such as train and test.

    Returns:
        By the name of the folder, sorted; "." is the folder itself, if it holds shards.

    Raises:
        ConfigError: As `inspect_shards` does, and if there are no shards in any of them.
    """
    root = resolve_path(folder)
    if not root.is_dir():
        raise ConfigError(f"there is no folder '{folder}' ({root}); name a folder of shards")
    names = sorted({str(file.parent.relative_to(root)) for file in root.glob("*.parquet")})
    # Hidden folders are those in which a preparation is at work.
    names += sorted(
        inner.name
        for inner in root.iterdir()
        if inner.is_dir() and not inner.name.startswith(".") and any(inner.glob("*.parquet"))
    )
    if not names:
        raise ConfigError(
            f"neither '{folder}' nor a folder in it holds a .parquet file; write shards into it "
            "with `python jobs/prepare.py`"
        )
    return {name: inspect_shards(str(root / name)) for name in names}


def sample_rows(files: Sequence[Path], num_rows: int) -> list[dict[str, Any]]:
    """Reads a few rows, spread evenly over the shards.

    Args:
        files: Shards.
        num_rows: At most so many; fewer where there are fewer.

    Returns:
        Rows with the columns of the shards; `points` is (N, 3) float32, `colors` (N, 3) uint8 or
        None, `views` a list of encoded images.

    Raises:
        ConfigError: If a file cannot be read or has other columns than this version writes.
    """
    groups: list[tuple[Path, int, int]] = []
    for file in files:
        with _reading(file):
            _check_columns(file)
            metadata = pq.read_metadata(file)
            groups += [
                (file, group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]
    total = sum(size for _, _, size in groups)
    wanted = ring_views(min(num_rows, total), total)
    rows: list[dict[str, Any]] = []
    first = 0
    for file, group, size in groups:
        here = [place - first for place in wanted if first <= place < first + size]
        if here:
            with _reading(file), pq.ParquetFile(file) as parquet:
                rows += plain_rows(parquet.read_row_group(group).take(here))
        first += size
    return rows


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Names the file in what goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as broken:
        reason = str(broken).partition("\n")[0]
        raise ConfigError(
            f"{file} is damaged ({reason}); write it anew with `python jobs/prepare.py`"
        ) from None


def _check_columns(file: Path) -> None:
    schema = pq.read_schema(file)
    unknown = [name for name in schema.names if name not in SHARD_SCHEMA.names]
    if unknown:
        raise ConfigError(
            f"{file} has the column {', '.join(unknown)}, which this version does not know: it was "
            "written by a newer one, or by hand; update crossmost_ray, or leave the column out"
        )
    for expected in SHARD_SCHEMA:
        place = schema.get_field_index(expected.name)
        found = "missing" if place < 0 else schema.field(place).type
        if found != expected.type:
            raise ConfigError(
                f"{file}: the column {expected.name} is {found}, expected {expected.type}; "
                "write it anew with `python jobs/prepare.py`"
            )


def _stated_checksums(manifest: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 by file name. The names are compared with the folder's own; none is opened."""
    try:
        return {str(shard["file"]): str(shard["sha256"]) for shard in manifest.get("shards", [])}
    except (TypeError, KeyError):
        raise ConfigError(
            f"{folder / MANIFEST_NAME} must give `file` and `sha256` of each of its `shards`; "
            "prepare the shards anew"
        ) from None


def _compare(file: Path, stated: str | None) -> Checksum:
    if stated is None:
        return "not stated"
    with file.open("rb") as stream:
        return (
            "agrees" if hashlib.file_digest(stream, "sha256").hexdigest() == stated else "differs"
        )


def _image_size(view: bytes | None) -> tuple[int, int] | None:
    """(width, height) by the header alone, or None where there is none."""
    try:
        return Image.open(io.BytesIO(view or b""), formats=FORMATS).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _by_name(counts: Counter[str | None]) -> dict[str | None, int]:
    return dict(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or "")))


def _spread(counts: Counter[int]) -> Spread:
    if not counts:
        return Spread(0, 0.0, 0)
    return Spread(min(counts), float(statistics.median(counts.elements())), max(counts))


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What is worth knowing of a manifest, as text; what it does not state is left out."""
    facts = {
        key.replace("_", " "): str(manifest[key])
        for key in ("name", "description", "up_axis", "front_axis", "num_points", "seed")
        if manifest.get(key) is not None
    }
    counts = manifest.get("counts")
    kinds = counts.get("views") if isinstance(counts, dict) else None
    if isinstance(kinds, dict):
        facts["kinds of views"] = ", ".join(f"{kind} of {n} objects" for kind, n in kinds.items())
    elif isinstance(manifest.get("cameras"), dict):
        # A manifest of the days when every view was rendered from a mesh counts no kinds.
        facts["kinds of views"] = "renders"
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        facts["versions"] = ", ".join(f"{tool} {number}" for tool, number in versions.items())
    return facts


def plain_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of a table, with arrays for the nested numbers."""
    points = decode_points(table["points"])
    colors = decode_points(table["colors"])
    colored = table["colors"].is_valid().to_pylist()
    rest = table.drop_columns(["points", "colors"]).to_pylist()
    return [
        {**row, "points": cloud, "colors": color.astype(np.uint8) if there else None}
        for row, cloud, color, there in zip(rest, points, colors, colored, strict=True)
    ]
