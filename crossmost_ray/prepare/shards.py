"""Rows in, dataset folders of Parquet shards with a manifest and an attribution out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA

Row = dict[str, Any]

POINTS, COLORS = (f"{column}.list.element.list.element" for column in ("points", "colors"))
"""The numbers of these columns, as Parquet calls them."""

PART = "part-{:05d}.parquet"
ATTRIBUTION_NAME = "ATTRIBUTION.md"
REJECTS_NAME = "rejects.json"


def half_of(object_id: str) -> str:
    """'a' or 'b', fixed for ever by the id: the lowest bit of its SHA-256."""
    return "ab"[hashlib.sha256(object_id.encode()).digest()[-1] & 1]


def shuffle_key(object_id: str) -> str:
    """Sorting by it mixes the classes, in the same order on every machine."""
    return hashlib.sha256(f"order of {object_id}".encode()).hexdigest()


def write_dataset(
    rows: Sequence[Row], folder: Path, shard_bytes: int, manifest: Mapping[str, Any]
) -> None:
    """Writes one dataset folder, replacing what was there once it is complete.

    Args:
        rows: With the columns of `SHARD_SCHEMA`; written in the order of `shuffle_key`.
        folder: Receives part-00000.parquet, ... and the manifest.
        shard_bytes: A shard is closed once it holds so much.
        manifest: What the rows cannot tell; counts and checksums are added.
    """
    ordered = sorted(rows, key=lambda row: shuffle_key(row["object_id"]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shards = []
        for index, table in enumerate(_tables(ordered, shard_bytes)):
            path = building / PART.format(index)
            pq.write_table(
                table,
                path,
                compression="zstd",
                compression_level=19,
                use_dictionary=[COLORS, "label", "source", "author", "license"],
                # The two bytes of a half-precision number compress better apart.
                column_encoding={POINTS: "BYTE_STREAM_SPLIT"},
                # Two to a shard: a reader may take half of it.
                row_group_size=max(1, -(-table.num_rows // 2)),
            )
            shards.append(
                {
                    "file": path.name,
                    "rows": table.num_rows,
                    "bytes": path.stat().st_size,
                    "sha256": file_checksum(path),
                }
            )
        counts = {
            "rows": len(ordered),
            "classes": _counts(row["label"] for row in ordered),
            "sources": _counts(row["source"] for row in ordered),
            "licenses": _counts(row["license"] for row in ordered),
        }
        _write_json({**manifest, "counts": counts, "shards": shards}, building / MANIFEST_NAME)
        building.chmod(0o755)
        _replace_folder(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_rejects(rejects: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes which objects were left out, and why."""
    _write_json({"rejects": list(rejects)}, folder / REJECTS_NAME)


def write_attribution(
    rows: Sequence[Row], titles: Mapping[str, str], licenses: Mapping[str, str], folder: Path
) -> None:
    """Writes who made what under which licence.

    Args:
        rows: Of all datasets together.
        titles: Name of each source, for people.
        licenses: Address of each licence's text.
        folder: Receives the file.
    """
    lines = [
        "# Attribution",
        "",
        "The points and views in this folder are made from the 3D models named below, which were",
        "scaled, sampled and rendered, and are redistributed under the licences of the models.",
        "No author endorses this work.",
    ]
    for source, title in titles.items():
        here = [row for row in rows if row["source"] == source]
        for license_name in sorted({row["license"] for row in here}):
            lines += ["", f"## {title}: {license_name}", "", f"<{licenses[license_name]}>", ""]
            authors: dict[str, list[str]] = {}
            for row in here:
                if row["license"] == license_name:
                    item = f"{row['captions'][0]} (`{row['object_id']}`)"
                    authors.setdefault(row["author"], []).append(item)
            for author in sorted(authors, key=str.casefold):
                lines.append(f"- **{author}**: {', '.join(sorted(authors[author]))}")
    _write_text("\n".join(lines) + "\n", folder / ATTRIBUTION_NAME)


def _tables(rows: Sequence[Row], shard_bytes: int) -> Iterator[pa.Table]:
    """Tables of about `shard_bytes` each, by what their points, colours and views take."""
    held: list[Row] = []
    size = 0
    for row in rows:
        row_size = sum(len(view) for view in row["views"]) + 8 * len(row["points"])
        if held and size + row_size > shard_bytes:
            yield _table(held)
            held, size = [], 0
        held.append(row)
        size += row_size
    if held:
        yield _table(held)


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = []
    for field in SHARD_SCHEMA:
        values = [row[field.name] for row in rows]
        if field.name in ("points", "colors"):
            columns.append(_nested(values, field.type))
        else:
            columns.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(columns, schema=SHARD_SCHEMA)


def _nested(values: Sequence[NDArray[Any] | None], kind: pa.ListType) -> pa.ListArray:
    """A column of (N, 3) arrays or nulls, which Arrow cannot convert by itself."""
    triple = kind.value_type
    none = np.empty((0, 3), triple.value_type.to_pandas_dtype())
    arrays = [none if value is None else value for value in values]
    flat = pa.array(np.concatenate(arrays).ravel(), type=triple.value_type)
    triples = pa.FixedSizeListArray.from_arrays(flat, type=triple)
    mask = pa.array([value is None for value in values])
    offsets = pa.array(np.cumsum([0, *map(len, arrays)]), type=pa.int32())
    return pa.ListArray.from_arrays(offsets, triples, type=kind, mask=mask)


def _counts(values: Iterator[str | None]) -> dict[str, int]:
    """Counts by name; objects without a label are counted as 'null'."""
    counts = Counter("null" if value is None else value for value in values)
    return dict(sorted(counts.items()))


def _replace_folder(new: Path, folder: Path) -> None:
    """Moves `new` to `folder`; whoever reads meanwhile finds the old one or the new one."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old)
    else:
        os.replace(new, folder)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    _write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def _write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.new")
    building.write_text(text, encoding="utf-8")
    os.replace(building, path)
