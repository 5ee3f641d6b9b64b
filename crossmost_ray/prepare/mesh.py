"""What a mesh is: textured pieces; and points of its surface with their colours."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmost_ray.prepare.arrays import MAX_COORDINATE
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.photos import BROKEN_IMAGE, MAX_PIXELS

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Pixels = NDArray[np.uint8]

ReadFile = Callable[[str], bytes | None]
"""Bytes of a file by its path inside the archive or folder, or None where there is no such file."""

FAR = 1000.0
"""Distance from the origin, in sizes of the object, beyond which it is moved there."""

TEXTURE_SIZE = 512
"""Longest side in pixels to which a texture is reduced; views are far smaller."""

TEXTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TGA", "TIFF", "WEBP")
"""What a texture may be. Pillow knows more, among them PostScript, which is a program to run."""

SAMPLING_ROUNDS = 200
"""Draws of N points before a surface counts as see-through: enough for the net of a goal."""


@dataclass(frozen=True)
class Material:
    """What a piece looks like."""

    color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    """sRGB in [0, 1]; used where there is no texture."""

    opacity: float = 1.0
    """1 is solid; window panes have less."""

    texture: Pixels | None = None
    """(H, W, 4) sRGB and alpha, row 0 at the top, or None."""


@dataclass(frozen=True)
class Piece:
    """The triangles of a mesh that share a material."""

    vertices: Floats
    """(P, 3) x-y-z."""

    faces: Indices
    """(F, 3) indices into `vertices`."""

    material: Material
    normals: Floats | None = None
    """(P, 3) unit length, or None where the file states none: the faces are then shaded flat."""

    uv: Floats | None = None
    """(P, 2) with v upwards; textures repeat outside [0, 1]."""

    colors: Pixels | None = None
    """(P, 3) sRGB of the vertices, in place of the material's colour where there is no texture."""


@dataclass(frozen=True)
class Mesh:
    """One object: its pieces, in one coordinate system."""

    pieces: tuple[Piece, ...]

    @property
    def bounds(self) -> Floats:
        """(2, 3): least and greatest corner of the box around the faces."""
        used = np.concatenate([piece.vertices[piece.faces].reshape(-1, 3) for piece in self.pieces])
        return np.stack([used.min(axis=0), used.max(axis=0)])

    def transformed(self, matrix: Floats) -> Mesh:
        """Applies a (3, 3) matrix to every vertex, and what follows from it to every normal."""
        cotangent = np.linalg.inv(matrix).T
        pieces = []
        for piece in self.pieces:
            normals = None
            if piece.normals is not None:
                normals = _unit(piece.normals @ cotangent.T)
            pieces.append(replace(piece, vertices=piece.vertices @ matrix.T, normals=normals))
        return Mesh(tuple(pieces))

    def translated(self, offset: Floats) -> Mesh:
        """Moves every vertex by (3,) `offset`."""
        return Mesh(tuple(replace(p, vertices=p.vertices + offset) for p in self.pieces))


def check_coordinates(points: NDArray[Any], path: str) -> None:
    """Refuses (N, 3) points that are NaN, infinite or beyond `MAX_COORDINATE`.

    Raises:
        ObjectError: If one is.
    """
    if not np.isfinite(points).all():
        raise ObjectError(f"{path} holds coordinates that are NaN or infinite")
    greatest = np.abs(points).max(initial=0)
    if greatest > MAX_COORDINATE:
        raise ObjectError(
            f"{path} holds a coordinate of {greatest:g}; at most {MAX_COORDINATE:g} is allowed"
        )


def far_offset(least: Floats, greatest: Floats) -> Floats:
    """Where to move the origin for a box between two (3,) corners: its centre, or (0, 0, 0).

    float32 has seven digits. Of a chair in the coordinates of a map it would keep decimetres; of
    one less than `FAR` of its own sizes away, a ten-thousandth.
    """
    centre = (least + greatest) / 2
    is_far = np.abs(centre).max() > FAR * (greatest - least).max()
    return centre if is_far else np.zeros(3)


def decode_texture(data: bytes) -> Pixels | None:
    """Decodes an image to (H, W, 4) of at most `TEXTURE_SIZE`.

    Returns:
        None if it is no image of `TEXTURE_FORMATS`, broken, or promises more than `MAX_PIXELS`.
    """
    try:
        return reduced_texture(Image.open(io.BytesIO(data), formats=TEXTURE_FORMATS))
    except BROKEN_IMAGE:
        return None


def resolve(reference: str, base: str, read_file: ReadFile) -> bytes | None:
    """Finds a file that a mesh or material refers to.

    Catalogues refer with backslashes, doubled slashes and the absolute paths of the artist's own
    disk; the file, if it is there at all, then lies beside the mesh.

    Args:
        reference: As written in the file.
        base: Path of the file that refers.
        read_file: Gives the bytes of a path.
    """
    cleaned = posixpath.normpath(reference.strip().strip('"').replace("\\", "/"))
    folder = posixpath.dirname(base)
    for candidate in (cleaned.lstrip("/"), posixpath.basename(cleaned)):
        data = read_file(posixpath.normpath(posixpath.join(folder, candidate)))
        if data is not None:
            return data
    return None


def sample_surface(
    mesh: Mesh, num_points: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], Pixels]:
    """Draws points uniformly by area, with the colour of the surface under each.

    Points that fall on see-through parts of a texture (the gaps between leaves) are drawn anew.

    Args:
        mesh: At least one face with an area.
        num_points: N.
        rng: Source of randomness.

    Returns:
        (N, 3) float32 in the unit of the mesh, and (N, 3) uint8 sRGB.

    Raises:
        ObjectError: If no face has an area, or everything is see-through.
    """
    corners = np.concatenate([piece.vertices[piece.faces] for piece in mesh.pieces])
    owner = np.repeat(np.arange(len(mesh.pieces)), [len(piece.faces) for piece in mesh.pieces])
    first_face = np.cumsum([0, *(len(piece.faces) for piece in mesh.pieces)])
    area = double_area(corners)
    if not area.sum() > 0:
        raise ObjectError("no face has an area")
    cumulative = np.cumsum(area)

    points, colors = np.empty((0, 3)), np.empty((0, 3), np.uint8)
    for _ in range(SAMPLING_ROUNDS):
        draw = rng.random(num_points) * cumulative[-1]
        face = np.minimum(np.searchsorted(cumulative, draw, side="right"), len(area) - 1)
        weights = _barycentric(num_points, rng)
        color, alpha = np.empty((num_points, 3), np.uint8), np.empty(num_points)
        for index in np.unique(owner[face]):
            here = owner[face] == index
            color[here], alpha[here] = _appearance(
                mesh.pieces[index], face[here] - first_face[index], weights[here]
            )
        solid = alpha >= 0.5
        points = np.concatenate([points, np.einsum("nk,nkd->nd", weights, corners[face])[solid]])
        colors = np.concatenate([colors, color[solid]])
        if len(points) >= num_points:
            break
    if len(points) < num_points:
        raise ObjectError("its textures are see-through almost everywhere")
    return points[:num_points].astype(np.float32), colors[:num_points]


def normalize_to_unit_sphere(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centres a cloud on its centroid and scales its farthest point to radius 1.

    Args:
        points: (N, 3), in any unit of length.

    Raises:
        ObjectError: If all points coincide.

    Source:
        PointNet (Qi et al., 2017): clouds are normalised into a unit sphere.
    """
    centred = points.astype(np.float64)
    centred -= centred.mean(axis=0)
    radius = np.linalg.norm(centred, axis=-1).max()
    if not radius > 0:
        raise ObjectError("all its points coincide")
    return (centred / radius).astype(np.float32)


def _barycentric(count: int, rng: np.random.Generator) -> Floats:
    """(count, 3) weights, uniform over a triangle."""
    root, split = np.sqrt(rng.random(count)), rng.random(count)
    return np.stack([1 - root, root * (1 - split), root * split], axis=-1)


def _appearance(piece: Piece, faces: Indices, weights: Floats) -> tuple[Pixels, Floats]:
    """Colour (n, 3) and texture alpha (n,) of n points of a piece."""
    texture, corners = piece.material.texture, piece.faces[faces]
    if texture is not None and piece.uv is not None:
        uv = np.einsum("nk,nkd->nd", weights, piece.uv[corners])
        height, width, _ = texture.shape
        column = np.minimum((uv[:, 0] % 1.0 * width).astype(np.int64), width - 1)
        # From below, as v counts: v = 0 is in the last row, also where all of a face has it.
        row = height - 1 - np.minimum((uv[:, 1] % 1.0 * height).astype(np.int64), height - 1)
        texel = texture[row, column]
        return texel[:, :3], texel[:, 3] / 255.0
    if piece.colors is not None:
        mixed = np.einsum("nk,nkd->nd", weights, piece.colors[corners])
        return np.round(mixed).astype(np.uint8), np.ones(len(faces))
    color = np.round(np.asarray(piece.material.color) * 255).astype(np.uint8)
    return np.broadcast_to(color, (len(faces), 3)), np.ones(len(faces))


def double_area(corners: Floats) -> Floats:
    """Twice the areas of (F, 3, 3) triangles."""
    edges = corners[:, 1:] - corners[:, :1]
    return np.asarray(np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1))


def reduced_texture(image: Image.Image) -> Pixels | None:
    """An image's pixels as `decode_texture` gives them; lets through `BROKEN_IMAGE`."""
    width, height = image.size
    if image.format not in TEXTURE_FORMATS or width * height > MAX_PIXELS:
        return None
    rgba = image.convert("RGBA")
    rgba.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BOX)
    return np.asarray(rgba)


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)
