"""Rows in, the bytes of Parquet shards and of an attribution out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crossmost_ray.schema import SHARD_SCHEMA

Row = dict[str, Any]

COLORS = "colors.list.element.list.element"
"""The numbers of this column, as Parquet calls them."""


def half_of(object_id: str) -> str:
    """'a' or 'b', fixed for ever by the id: the lowest bit of its SHA-256."""
    return "ab"[hashlib.sha256(object_id.encode()).digest()[-1] & 1]


def shuffle_key(object_id: str) -> str:
    """Sorting by it mixes the classes, in the same order on every machine."""
    return hashlib.sha256(f"order of {object_id}".encode()).hexdigest()


def encode_shard(rows: Sequence[Row], compression_level: int) -> bytes:
    """Encodes rows with the columns of `SHARD_SCHEMA` as one Parquet file.

    Args:
        rows: At least one.
        compression_level: Of zstd; views are compressed already, points gain by it.
    """
    stored = io.BytesIO()
    table = _table(rows)
    pq.write_table(
        table,
        stored,
        compression="zstd",
        compression_level=compression_level,
        use_dictionary=[COLORS, "label", "source", "author", "license"],
        # Two to a shard: a reader may take half of it.
        row_group_size=max(1, -(-table.num_rows // 2)),
    )
    return stored.getvalue()


def decode_shard(data: bytes) -> list[Row]:
    """Decodes what `encode_shard` wrote."""
    table = pq.read_table(io.BytesIO(data))
    rows: list[Row] = table.to_pylist()
    for row in rows:
        row["points"] = np.array(row["points"], np.float32).reshape(-1, 3)
        if row["colors"] is not None:
            row["colors"] = np.array(row["colors"], np.uint8).reshape(-1, 3)
    return rows


def row_bytes(row: Row) -> int:
    """About what a row takes in a shard."""
    return sum(len(view) for view in row["views"]) + 8 * len(row["points"])


def checksum(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def attribution(
    credits: Sequence[Mapping[str, str]], titles: Mapping[str, str], licenses: Mapping[str, str]
) -> str:
    """Says who made what under which licence, as Markdown.

    Args:
        credits: `object_id`, `caption`, `source`, `author` and `license` of each object.
        titles: Name of each source, for people, in the order wanted.
        licenses: Address of each licence's text.
    """
    lines = [
        "# Attribution",
        "",
        "The points and views in this folder are made from the 3D models named below, which were",
        "scaled, sampled and rendered, and are redistributed under the licences of the models.",
        "No author endorses this work.",
    ]
    for source, title in titles.items():
        here = [credit for credit in credits if credit["source"] == source]
        for license_name in sorted({credit["license"] for credit in here}):
            lines += ["", f"## {title}: {license_name}", "", f"<{licenses[license_name]}>", ""]
            authors: dict[str, list[str]] = {}
            for credit in here:
                if credit["license"] == license_name:
                    item = f"{credit['caption']} (`{credit['object_id']}`)"
                    authors.setdefault(credit["author"], []).append(item)
            for author in sorted(authors, key=str.casefold):
                lines.append(f"- **{author}**: {', '.join(sorted(authors[author]))}")
    return "\n".join(lines) + "\n"


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
