"""Shards of any size, made of the embedded objects over and over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossmost_ray.config import resolve_path
from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA

SOURCE = "assets:furniture/target_a"
NUM_POINTS = 8192
"""Of each cloud: the embedded ones repeat theirs to become as large as those of common sets."""

NUM_VIEWS = 2
"""Kept of each object unless told otherwise; the rest would only be read and thrown away."""

SHARD_OBJECTS = 64
"""Objects in a shard: about 6.5 MB, several of which fit even into the smallest object store."""


def write_copies(
    folder: Path,
    num_objects: int,
    *,
    num_views: int = NUM_VIEWS,
    view: Callable[[Sequence[bytes]], bytes] | None = None,
    shard_objects: int = SHARD_OBJECTS,
) -> float:
    """Writes shards of so many objects with ids of their own, and their manifest.

    Args:
        folder: Made if it is missing.
        num_objects: At least 1.
        num_views: Of each object, at most 12.
        view: Makes of an object's embedded views the one that is kept; without it, `num_views` of
            them are kept as they are.
        shard_objects: In a shard.

    Returns:
        What they take in memory, in MB. The files are as large: they are not compressed, since
        compression would undo the repetition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = resolve_path(SOURCE)
    objects = pa.concat_tables(map(pq.read_table, sorted(source.glob("*.parquet"))))
    made = None if view is None else [[view(views)] for views in objects["views"].to_pylist()]
    objects = _heavy(objects, num_views)
    if made is not None:
        place = SHARD_SCHEMA.get_field_index("views")
        field = SHARD_SCHEMA.field(place)
        objects = objects.set_column(place, field, pa.array(made, field.type))
    num_bytes = 0
    for shard, first in enumerate(range(0, num_objects, shard_objects)):
        places = np.arange(first, min(first + shard_objects, num_objects))
        ids = pa.array([f"copies/{place}" for place in places], pa.string())
        table = objects.take(pa.array(places % len(objects)))
        table = table.set_column(0, SHARD_SCHEMA.field("object_id"), ids)
        path = folder / f"part-{shard:05d}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False)
        num_bytes += table.nbytes
    manifest = json.loads((source / MANIFEST_NAME).read_text(encoding="utf-8"))
    told = {"name": "copies", "classes": manifest["classes"], "up_axis": manifest["up_axis"]}
    (folder / MANIFEST_NAME).write_text(json.dumps(told), encoding="utf-8")
    return num_bytes / 1e6


def _heavy(objects: pa.Table, num_views: int) -> pa.Table:
    """Gives every cloud `NUM_POINTS` points and every object so many views, and no colours."""
    columns = {name: objects[name].combine_chunks() for name in objects.column_names}
    clouds = columns["points"].flatten().flatten().to_numpy().reshape(len(objects), -1, 3)
    repeats = -(-NUM_POINTS // clouds.shape[1])
    clouds = np.tile(clouds, (1, repeats, 1))[:, :NUM_POINTS]
    columns["points"] = _lists(pa.FixedSizeListArray.from_arrays(clouds.ravel(), 3), len(objects))
    views = columns["views"]
    places = views.offsets.to_numpy()[:-1, None] + np.arange(num_views)
    columns["views"] = _lists(views.values.take(pa.array(places.ravel())), len(objects))
    columns["colors"] = pa.nulls(len(objects), SHARD_SCHEMA.field("colors").type)
    return pa.table([columns[field.name] for field in SHARD_SCHEMA], names=SHARD_SCHEMA.names).cast(
        SHARD_SCHEMA
    )


def _lists(values: pa.Array, number: int) -> pa.ListArray:
    """Cuts values into so many lists of one length."""
    offsets = np.linspace(0, len(values), number + 1).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
