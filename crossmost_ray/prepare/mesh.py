"""Bytes of a mesh file in, textured pieces of it and coloured points of its surface out."""

from __future__ import annotations

import io
import posixpath
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Pixels = NDArray[np.uint8]

ReadFile = Callable[[str], bytes | None]
"""Bytes of a file by its path inside the archive or folder, or None where there is no such file."""

TEXTURE_SIZE = 512
"""Longest side in pixels to which a texture is reduced; views are far smaller."""

SAMPLING_ROUNDS = 200
"""Draws of N points before a surface counts as see-through: enough for the net of a goal."""


class MeshError(ValueError):
    """A mesh that cannot become a row: the message says why, the object is left out."""


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


def read_mesh(path: str, read_file: ReadFile) -> Mesh:
    """Reads a mesh with its materials and textures.

    Wavefront files go through `prepare.wavefront`, which forgives what the catalogues hold; the
    rest goes through trimesh.

    Args:
        path: Path of the mesh as `read_file` knows it; the suffix tells the format.
        read_file: Gives the bytes of `path` and of the files it names.

    Raises:
        MeshError: If the file is missing, broken, or holds no surface.
    """
    from crossmost_ray.prepare.wavefront import read_wavefront

    data = read_file(path)
    if data is None:
        raise MeshError(f"the file {path} is missing")
    if path.lower().endswith(".obj"):
        mesh = read_wavefront(data, path, read_file)
    else:
        mesh = _read_with_trimesh(data, path, read_file)
    if not mesh.pieces:
        raise MeshError(f"{path} holds no face with an area")
    return mesh


def decode_texture(data: bytes) -> Pixels | None:
    """Decodes an image to (H, W, 4) of at most `TEXTURE_SIZE`, or None if it is not an image."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data)).convert("RGBA")
    # Pillow reports a broken image by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError):
        return None
    image.thumbnail((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BOX)
    return np.asarray(image)


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
        MeshError: If no face has an area, or everything is see-through.
    """
    corners = np.concatenate([piece.vertices[piece.faces] for piece in mesh.pieces])
    owner = np.repeat(np.arange(len(mesh.pieces)), [len(piece.faces) for piece in mesh.pieces])
    first_face = np.cumsum([0, *(len(piece.faces) for piece in mesh.pieces)])
    area = np.linalg.norm(
        np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1
    )
    if not area.sum() > 0:
        raise MeshError("no face has an area")
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
        raise MeshError("its textures are see-through almost everywhere")
    return points[:num_points].astype(np.float32), colors[:num_points]


def normalize_to_unit_sphere(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centres a cloud on its centroid and scales its farthest point to radius 1.

    Args:
        points: (N, 3), in any unit of length.

    Raises:
        MeshError: If all points coincide.

    Source:
        PointNet (Qi et al., 2017): clouds are normalised into a unit sphere.
    """
    centred = points.astype(np.float64)
    centred -= centred.mean(axis=0)
    radius = np.linalg.norm(centred, axis=-1).max()
    if not radius > 0:
        raise MeshError("all its points coincide")
    return (centred / radius).astype(np.float32)


def _barycentric(count: int, rng: np.random.Generator) -> Floats:
    """(count, 3) weights, uniform over a triangle."""
    root, split = np.sqrt(rng.random(count)), rng.random(count)
    return np.stack([1 - root, root * (1 - split), root * split], axis=-1)


def _appearance(piece: Piece, faces: Indices, weights: Floats) -> tuple[Pixels, Floats]:
    """Colour (n, 3) and texture alpha (n,) of n points of a piece."""
    texture = piece.material.texture
    if texture is None or piece.uv is None:
        color = np.round(np.asarray(piece.material.color) * 255).astype(np.uint8)
        return np.broadcast_to(color, (len(faces), 3)), np.ones(len(faces))
    uv = np.einsum("nk,nkd->nd", weights, piece.uv[piece.faces[faces]])
    height, width, _ = texture.shape
    column = np.minimum((uv[:, 0] % 1.0 * width).astype(np.int64), width - 1)
    # From below, as v counts: v = 0 is in the last row, also where all of a face has it.
    row = height - 1 - np.minimum((uv[:, 1] % 1.0 * height).astype(np.int64), height - 1)
    texel = texture[row, column]
    return texel[:, :3], texel[:, 3] / 255.0


def _read_with_trimesh(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    """Reads what trimesh reads: OFF, PLY, STL, glTF, Collada where its reader is installed."""
    suffix = posixpath.splitext(path)[1].lstrip(".").lower()
    try:
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=suffix, resolver=cast("Any", _Resolver(path, read_file))
        )
    # trimesh's readers have no error of their own: they let through whatever breaks first.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as broken:
        raise MeshError(f"{path} cannot be read: {broken}") from broken
    pieces = []
    for part in scene.dump():
        if not isinstance(part, trimesh.Trimesh) or len(part.faces) == 0:
            continue
        uv = getattr(part.visual, "uv", None)
        pieces.append(
            Piece(
                vertices=np.asarray(part.vertices, np.float64),
                faces=np.asarray(part.faces, np.int64),
                material=_material_of(part),
                uv=None if uv is None else np.asarray(uv, np.float64),
            )
        )
    return Mesh(tuple(pieces))


def _material_of(part: trimesh.Trimesh) -> Material:
    """Main colour and texture of a trimesh part."""
    material = getattr(part.visual, "material", None)
    image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    main = getattr(material, "main_color", None)
    if main is None:
        main = getattr(part.visual, "main_color", (204, 204, 204, 255))
    rgba = np.asarray(main, np.float64) / 255
    texture = None
    if image is not None:
        stored = io.BytesIO()
        image.convert("RGBA").save(stored, "PNG")
        texture = decode_texture(stored.getvalue())
    return Material(
        color=(float(rgba[0]), float(rgba[1]), float(rgba[2])),
        opacity=float(rgba[3]) if len(rgba) > 3 else 1.0,
        texture=texture,
    )


class _Resolver:
    """Lets trimesh find the files a mesh names."""

    def __init__(self, base: str, read_file: ReadFile) -> None:
        self.base, self.read_file = base, read_file

    def get(self, name: str) -> bytes:
        """Bytes of `name`; trimesh expects a KeyError where there is none."""
        data = resolve(name, self.base, self.read_file)
        if data is None:
            raise KeyError(name)
        return data


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)
