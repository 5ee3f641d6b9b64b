"""One object in, its row out, or the reason why it has none."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

from crossmost_ray.prepare.config import PrepareConfig
from crossmost_ray.prepare.mesh import Mesh, MeshError, normalize_to_unit_sphere, sample_surface
from crossmost_ray.prepare.render import encode_view, render_views
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.prepare.sources.base import Object

Row = dict[str, Any]


def build_row(item: Object, config: PrepareConfig) -> Row:
    """Loads, samples and renders one object.

    Returns:
        `row`, with the columns of `SHARD_SCHEMA` but label and captions, or None; `reason` why it
        is None; and `mesh_sha256`, which two objects share if their surfaces are the same.
    """
    try:
        mesh = SOURCES[item.kind].load_mesh(item)
        points, colors = sample_surface(mesh, config.num_points, object_rng(item, config.seed))
        points = normalize_to_unit_sphere(points)
        views = render_views(mesh, config.render)
    except MeshError as unusable:
        return {"object_id": item.object_id, "row": None, "reason": str(unusable)}
    row = {
        "object_id": item.object_id,
        "points": points.astype(np.float16),
        "colors": colors,
        "views": [encode_view(view, config.render.quality) for view in views],
        "source": item.source,
        "author": item.author,
        "license": item.license,
    }
    return {"object_id": item.object_id, "row": row, "mesh_sha256": mesh_checksum(mesh)}


def object_rng(item: Object, seed: int) -> np.random.Generator:
    """A generator that depends on the object and the seed, not on the order of the tasks."""
    digest = hashlib.sha256(f"{seed} {item.object_id}".encode()).digest()
    return np.random.default_rng(struct.unpack("<4Q", digest))


def mesh_checksum(mesh: Mesh) -> str:
    """SHA-256 of the triangles in their box: a copy of a model has the same, whatever its size."""
    least, greatest = mesh.bounds
    corners = np.concatenate([piece.vertices[piece.faces] for piece in mesh.pieces])
    unit = (corners - least) / np.where(greatest > least, greatest - least, 1.0)
    grid = np.round(unit * 1000).astype(np.int64).reshape(-1, 9)
    return hashlib.sha256(grid[np.lexsort(grid.T)].tobytes()).hexdigest()
