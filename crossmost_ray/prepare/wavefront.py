"""Bytes of a Wavefront OBJ file and its materials in, textured pieces out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyvista as pv
from numpy.typing import NDArray

from crossmost_ray.prepare.mesh import (
    Floats,
    Indices,
    Material,
    Mesh,
    MeshError,
    Piece,
    Pixels,
    ReadFile,
    decode_texture,
    resolve,
)

STANDARD_MATERIALS = "standard.mtl"
"""File that `read_file` may offer for materials that a mesh uses and no library of it defines."""

NONE = -1
"""Index of a texture coordinate or a normal that a corner does not state."""


def read_wavefront(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    """Reads an OBJ file as the catalogues have them, which is not always as the format has it.

    Material names may be numbers or hold spaces, a library or a texture may be missing (the
    colour then stands alone), faces may have two corners (dropped) or be concave, indices may
    count from the end.

    Raises:
        MeshError: If an index or a number cannot be understood.
    """
    try:
        return _parse(data, path, read_file)
    except (ValueError, IndexError) as broken:
        raise MeshError(f"{path} is not a readable OBJ file: {broken}") from broken


def _parse(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    columns: dict[bytes, list[bytes]] = {b"v": [], b"vt": [], b"vn": []}
    groups: dict[str, list[list[bytes]]] = {}
    libraries: list[str] = []
    current = groups.setdefault("", [])
    joined = data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    for line in joined.replace(b"\t", b" ").splitlines():
        keyword, _, rest = line.strip().partition(b" ")
        if keyword in columns:
            columns[keyword].append(rest)
        elif keyword == b"f":
            corners = rest.split()
            if len(corners) >= 3:
                # Negative indices count from the end of what has been read *so far*.
                if b"-" in rest:
                    corners = [_from_start(corner, columns) for corner in corners]
                current.append(corners)
        elif keyword == b"usemtl":
            current = groups.setdefault(_text(rest), [])
        elif keyword == b"mtllib":
            libraries.append(_text(rest))

    vertices = _numbers(columns[b"v"], 3)
    uv, normals = _numbers(columns[b"vt"], 2), _numbers(columns[b"vn"], 3)
    materials = _read_materials(libraries, path, read_file)
    pieces = []
    for name, faces in groups.items():
        if faces:
            piece = _piece(faces, vertices, uv, normals, materials.get(name, Material()))
            if piece is not None:
                pieces.append(piece)
    return Mesh(tuple(pieces))


def _text(raw: bytes) -> str:
    return raw.strip().decode("utf-8", errors="replace")


def _from_start(corner: bytes, columns: Mapping[bytes, list[bytes]]) -> bytes:
    """Turns -1 into the number of the last vertex read so far, and likewise for uv and normal."""
    parts = []
    for part, keyword in zip(corner.split(b"/"), (b"v", b"vt", b"vn"), strict=False):
        negative = part.startswith(b"-")
        parts.append(b"%d" % (len(columns[keyword]) + 1 + int(part)) if negative else part)
    return b"/".join(parts)


def _numbers(lines: list[bytes], width: int) -> Floats:
    """(len(lines), width): the first `width` numbers of each line."""
    # Joined and parsed at once where all lines are of the usual length: ten times faster.
    values = b" ".join(lines).split()
    if len(values) == width * len(lines):
        return np.array(values, dtype="S32").astype(np.float64).reshape(-1, width)
    rows = [[float(value) for value in line.split()[:width]] for line in lines]
    return np.array([row + [0.0] * (width - len(row)) for row in rows]).reshape(-1, width)


def _read_materials(libraries: list[str], path: str, read_file: ReadFile) -> dict[str, Material]:
    """Materials by name; the mesh's own libraries win over the standard ones."""
    materials: dict[str, Material] = {}
    standard = read_file(STANDARD_MATERIALS)
    if standard is not None:
        materials |= _parse_library(standard, path, read_file)
    for library in libraries:
        data = resolve(library, path, read_file)
        if data is not None:
            materials |= _parse_library(data, path, read_file)
    return materials


def _parse_library(data: bytes, path: str, read_file: ReadFile) -> dict[str, Material]:
    blocks: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in data.decode("utf-8", errors="replace").splitlines():
        keyword, _, rest = line.strip().replace("\t", " ").partition(" ")
        if keyword == "newmtl":
            current = blocks.setdefault(rest.strip(), {})
        elif keyword:
            current[keyword.lower()] = rest.strip()
    textures: dict[str, Pixels | None] = {}
    return {name: _material(block, path, read_file, textures) for name, block in blocks.items()}


def _material(
    block: Mapping[str, str], path: str, read_file: ReadFile, textures: dict[str, Pixels | None]
) -> Material:
    red, green, blue = (*_floats(block.get("kd", ""), 3), 0.8, 0.8, 0.8)[:3]
    opacity = 1.0
    if "d" in block:
        opacity = (*_floats(block["d"].replace("-halo", ""), 1), 1.0)[0]
    elif "tr" in block:
        opacity = 1.0 - (*_floats(block["tr"], 1), 0.0)[0]
    reference = block.get("map_kd", "")
    if reference not in textures:
        stored = resolve(reference, path, read_file) if reference else None
        textures[reference] = None if stored is None else decode_texture(stored)
    return Material(
        color=(min(red, 1.0), min(green, 1.0), min(blue, 1.0)),
        opacity=min(max(opacity, 0.0), 1.0),
        texture=textures[reference],
    )


def _floats(text: str, count: int) -> list[float]:
    return [float(value) for value in text.split()[:count]]


def _piece(
    faces: list[list[bytes]], vertices: Floats, uv: Floats, normals: Floats, material: Material
) -> Piece | None:
    """Triangles of one material, their corners merged; None if no triangle has an area."""
    sizes = np.array([len(face) for face in faces])
    corners = _corner_indices([corner for face in faces for corner in face])
    limits = (len(vertices), len(uv), len(normals))
    if (corners >= limits).any() or (corners < NONE).any() or (corners[:, 0] == NONE).any():
        raise IndexError(f"a face names a corner beyond the {limits} vertices, uv and normals")

    triangles = _triangulate(vertices[corners[:, 0]], sizes)
    a, b, c = (vertices[corners[triangles[:, k], 0]] for k in range(3))
    triangles = triangles[np.linalg.norm(np.cross(b - a, c - a), axis=-1) > 0]
    if len(triangles) == 0:
        return None
    unique, flat = np.unique(corners[triangles.ravel()], axis=0, return_inverse=True)
    has_uv, has_normals = (unique[:, 1] != NONE).all(), (unique[:, 2] != NONE).all()
    return Piece(
        vertices=vertices[unique[:, 0]],
        faces=flat.reshape(-1, 3).astype(np.int64),
        material=material,
        normals=normals[unique[:, 2]] if has_normals else None,
        uv=uv[unique[:, 1]] if has_uv else None,
    )


def _corner_indices(corners: list[bytes]) -> Indices:
    """(len(corners), 3) indices of vertex, uv and normal, from 0, `NONE` where not stated."""
    # The forms are v, v/vt, v//vn and v/vt/vn; padded to the last one, they parse as one array.
    padded = b" ".join(corner + (b"/" * (2 - corner.count(b"/"))) for corner in corners)
    # A 0 is no index in this format, so it can stand for "not stated".
    filled = padded.replace(b"//", b"/0/").replace(b"/ ", b"/0 ")
    filled = filled + b"0" if filled.endswith(b"/") else filled
    numbers = np.array(filled.replace(b"/", b" ").split(), dtype="S16").astype(np.int64)
    return numbers.reshape(-1, 3) - 1


def _triangulate(positions: Floats, sizes: NDArray[np.int64]) -> Indices:
    """(T, 3) indices of `positions`, which holds the corners of faces of `sizes`, face by face."""
    start = np.cumsum(sizes) - sizes
    pieces = [start[sizes == 3, None] + np.arange(3)]

    quads = start[sizes == 4, None] + np.arange(4)
    if len(quads):
        pieces.append(_split_quads(positions, quads))

    # Larger faces may be concave, where a fan would cover what lies outside.
    large = [first + np.arange(size) for first, size in zip(start, sizes, strict=True) if size > 4]
    if large:
        faces = np.concatenate([np.concatenate([[len(face)], face]) for face in large])
        surface = pv.PolyData(positions, faces=faces).triangulate()
        # Without a triangle left, its faces would come as an array of no particular shape.
        pieces.append(np.asarray(surface.regular_faces, np.int64).reshape(-1, 3))
    return np.concatenate(pieces)


def _split_quads(positions: Floats, quads: Indices) -> Indices:
    """Cuts each (Q, 4) quad along the diagonal that keeps both halves on its inside."""
    first = np.stack([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]], axis=1)
    second = np.stack([quads[:, [0, 1, 3]], quads[:, [1, 2, 3]]], axis=1)

    def agree(halves: Indices) -> Floats:
        a, b, c = (positions[halves[..., k]] for k in range(3))
        normal = np.cross(b - a, c - a)
        return np.asarray((normal[:, 0] * normal[:, 1]).sum(axis=-1))

    # The halves of a concave quad cut on the wrong side face opposite ways.
    inside = (agree(first) >= 0)[:, None, None]
    return np.where(inside, first, second).reshape(-1, 3)
