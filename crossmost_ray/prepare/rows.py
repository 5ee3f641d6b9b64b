"""One object in, its row out, or the reason why it has none."""

from __future__ import annotations

import hashlib
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmost_ray.prepare.axes import axes_matrix
from crossmost_ray.prepare.config import PrepareConfig, kind_of
from crossmost_ray.prepare.depth import render_depth
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import (
    Material,
    Mesh,
    Pixels,
    normalize_to_unit_sphere,
    sample_surface,
)
from crossmost_ray.prepare.photos import shrink_photo
from crossmost_ray.prepare.render import encode_view, render_views
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.prepare.sources.base import Content, Object

Row = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What became of one object."""

    object_id: str

    row: Row | None
    """The columns of `SHARD_SCHEMA`, or None."""

    reason: str = ""
    """Why there is no row."""

    mesh_sha256: str | None = None
    """Two objects share it if their surfaces are the same; None of a cloud."""

    kind_of_views: str = ""
    """photos, renders, depth, or photos and another."""


def build_row(item: Object, config: PrepareConfig) -> Built:
    """Loads one object, draws its points and makes its views."""
    source = config.source(item.source)
    try:
        with time_limit(config.timeout_s):
            content = SOURCES[kind_of(source)].load(item, source)
            content = turned(content, axes_matrix(source.axes))
            rng = object_rng(item, config.seed)
            points, colors = draw_points(content, config.num_points, rng)
            views, kind = make_views(content, points, config)
    except ObjectError as unusable:
        return Built(item.object_id, None, str(unusable))
    row = {
        "object_id": item.object_id,
        "captions": list(item.captions),
        "label": item.label,
        "points": points.astype(np.float16).astype(np.float32),
        "colors": colors,
        "views": views,
        "source": item.source,
        "author": item.author,
        "license": source.license,
    }
    checksum = None if content.mesh is None else mesh_checksum(content.mesh)
    return Built(item.object_id, row, mesh_sha256=checksum, kind_of_views=kind)


def turned(content: Content, matrix: NDArray[np.float32]) -> Content:
    """Turns an object's mesh or points by a (3, 3) matrix."""
    mesh, points = content.mesh, content.points
    return Content(
        mesh=None if mesh is None else mesh.transformed(matrix.astype(np.float64)),
        points=None if points is None else (points @ matrix.T).astype(np.float32),
        colors=content.colors,
        photos=content.photos,
    )


def draw_points(
    content: Content, num_points: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], Pixels | None]:
    """Gives points of an object in the unit sphere, in random order.

    Args:
        content: A mesh, of which points are drawn uniformly by area, or points.
        num_points: N; a cloud with fewer points keeps all it has.
        rng: Source of randomness.

    Returns:
        (N, 3) float32, and (N, 3) uint8 sRGB, or None where the object states no colour.

    Raises:
        ObjectError: If the object has no surface, or all its points coincide or are not finite.
    """
    if content.mesh is not None:
        points, sampled = sample_surface(content.mesh, num_points, rng)
        return normalize_to_unit_sphere(points), sampled if has_colors(content.mesh) else None
    assert content.points is not None, "a source gives a mesh or points"
    if not np.isfinite(content.points).all():
        raise ObjectError("some of its points are NaN or infinite")
    if len(content.points) == 0:
        raise ObjectError("it has no points")
    # In random order, so that any prefix of a cloud is a fair sample of it.
    order = rng.permutation(len(content.points))[:num_points]
    colors = None if content.colors is None else content.colors[order]
    return normalize_to_unit_sphere(content.points[order]), colors


def has_colors(mesh: Mesh) -> bool:
    """Whether a mesh states any colour; one that does not is drawn in a light grey."""
    return any(
        piece.material.texture is not None
        or piece.material.color != Material().color
        or piece.colors is not None
        for piece in mesh.pieces
    )


def make_views(
    content: Content, points: NDArray[np.float32], config: PrepareConfig
) -> tuple[list[bytes], str]:
    """Makes an object's encoded views, as `config.views` wants them.

    Returns:
        WebP images, and what they are.

    Raises:
        ObjectError: If a view is blank or broken, or there is nothing to make one from.
    """
    wanted = config.views
    if wanted == "photos" and not content.photos:
        raise ObjectError("it has no photographs, and `views` asks for photos")
    if wanted == "render" and content.mesh is None:
        raise ObjectError("it has no mesh to render; `views: depth` projects bare points")
    photos: list[bytes] = []
    if content.photos and wanted in ("auto", "photos", "photos_and_render"):
        longest, quality = config.photo_resolution, config.render.quality
        photos = [
            shrink_photo(photo, longest, quality, f"photograph {number}")
            for number, photo in enumerate(content.photos, start=1)
        ]
        if wanted != "photos_and_render":
            return photos, "photos"
    if content.mesh is not None and wanted != "depth":
        drawn, kind = render_views(content.mesh, config.render), "renders"
    else:
        drawn, kind = render_depth(points, config.depth), "depth"
    encoded = [encode_view(view, config.render.quality) for view in drawn]
    return [*photos, *encoded], f"photos and {kind}" if photos else kind


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops what runs inside after some seconds, as far as Python has a say.

    A call into a library that never comes back is beyond it. Works in a process's main thread,
    where Ray runs tasks.

    Raises:
        ObjectError: If the time is up.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise ObjectError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
