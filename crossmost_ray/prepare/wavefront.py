"""Bytes of a Wavefront OBJ file and its materials in, textured pieces out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyvista as pv
from numpy.typing import NDArray

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import (
    Floats,
    Indices,
    Material,
    Mesh,
    Piece,
    Pixels,
    ReadFile,
    check_coordinates,
    decode_texture,
    resolve,
)

STANDARD_MATERIALS = "standard.mtl"
"""File that `read_file` may offer for materials that a mesh uses and no library of it defines."""

NONE = -1
"""Index of a texture coordinate or a normal that a corner does not state."""

MAX_LIBRARIES = 64
MAX_TEXTURES = 512
"""Of one mesh, whose few bytes could else have the same large file read again and again."""

MAX_CORNERS = 2000
"""Of one face: the time in which it is cut into triangles grows faster than with their square."""

NUMBER_BYTES = 32
"""Longest number that is parsed with its column as a whole."""


class Corners(NamedTuple):
    """What the corners of a file's faces are made of, each with indices of its own."""

    vertices: Floats
    colors: Pixels | None
    """Of the vertices, if the file has them."""

    uv: Floats
    normals: Floats


def read_wavefront(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    """Reads an OBJ file as the catalogues have them, which is not always as the format has it.

    Material names may be numbers or hold spaces, a library or a texture may be missing (the
    colour then stands alone), faces may have two corners (dropped) or be concave, indices may
    count from the end. Vertices of six numbers carry a colour, in [0, 1] or in [0, 255].

    Raises:
        ObjectError: If an index or a number cannot be understood, a face has more than
            `MAX_CORNERS`, or it names more than `MAX_LIBRARIES` or `MAX_TEXTURES`.
    """
    try:
        return _parse(data, path, read_file)
    except (ValueError, IndexError, OverflowError) as broken:
        raise ObjectError(f"{path} is not a readable OBJ file: {broken}") from broken


def _parse(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    columns: dict[bytes, list[bytes]] = {b"v": [], b"vt": [], b"vn": []}
    groups: dict[str, list[list[bytes]]] = {}
    libraries: dict[str, None] = {}
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
            libraries[_text(rest)] = None

    vertices, colors = _vertices(columns[b"v"])
    uv, normals = _numbers(columns[b"vt"], 2), _numbers(columns[b"vn"], 3)
    materials = _read_materials(list(libraries), path, read_file)
    parts = Corners(vertices, colors, uv, normals)
    pieces = []
    for name, faces in groups.items():
        if faces:
            piece = _piece(faces, parts, materials.get(name, Material()))
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


def _vertices(lines: list[bytes]) -> tuple[Floats, Pixels | None]:
    """(P, 3) positions, and (P, 3) colours where all lines have six numbers, all within a range."""
    if len(b" ".join(lines).split()) != 6 * len(lines) or not lines:
        return _numbers(lines, 3), None
    table = _numbers(lines, 6)
    colors = table[:, 3:]
    if not (np.isfinite(colors).all() and 0 <= colors.min() <= colors.max() <= 255):
        return table[:, :3], None
    scale = 255 if colors.max() <= 1 else 1
    return table[:, :3], np.round(colors * scale).astype(np.uint8)


def _numbers(lines: list[bytes], width: int) -> Floats:
    """(len(lines), width): the first `width` numbers of each line."""
    # Joined and parsed at once where all lines are of the usual length: ten times faster.
    values = b" ".join(lines).split()
    if len(values) == width * len(lines) and len(max(values, key=len, default=b"")) <= NUMBER_BYTES:
        numbers = np.array(values, dtype=f"S{NUMBER_BYTES}").astype(np.float64)
        return numbers.reshape(-1, width)
    rows = [[float(value) for value in line.split()[:width]] for line in lines]
    return np.array([row + [0.0] * (width - len(row)) for row in rows]).reshape(-1, width)


def _read_materials(libraries: list[str], path: str, read_file: ReadFile) -> dict[str, Material]:
    """Materials by name; the mesh's own libraries win over the standard ones."""
    if len(libraries) > MAX_LIBRARIES:
        raise ValueError(
            f"it names {len(libraries):,} material libraries, more than {MAX_LIBRARIES}"
        )
    materials: dict[str, Material] = {}
    textures: dict[str, Pixels | None] = {}
    standard = read_file(STANDARD_MATERIALS)
    if standard is not None:
        materials |= _parse_library(standard, path, read_file, textures)
    for library in libraries:
        data = resolve(library, path, read_file)
        if data is not None:
            materials |= _parse_library(data, path, read_file, textures)
    return materials


def _parse_library(
    data: bytes, path: str, read_file: ReadFile, textures: dict[str, Pixels | None]
) -> dict[str, Material]:
    blocks: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in data.decode("utf-8", errors="replace").splitlines():
        keyword, _, rest = line.strip().replace("\t", " ").partition(" ")
        if keyword == "newmtl":
            current = blocks.setdefault(rest.strip(), {})
        elif keyword:
            current[keyword.lower()] = rest.strip()
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
        if len(textures) > MAX_TEXTURES:
            raise ValueError(f"its materials name more than {MAX_TEXTURES} textures")
        stored = resolve(reference, path, read_file) if reference else None
        textures[reference] = None if stored is None else decode_texture(stored)
    return Material(
        color=(_share(red), _share(green), _share(blue)),
        opacity=_share(opacity),
        texture=textures[reference],
    )


def _share(value: float) -> float:
    """The value within [0, 1]; NaN becomes 0, as no comparison with it holds."""
    return min(max(0.0, value), 1.0)


def _floats(text: str, count: int) -> list[float]:
    return [float(value) for value in text.split()[:count]]


def _piece(faces: list[list[bytes]], parts: Corners, material: Material) -> Piece | None:
    """Triangles of one material, their corners merged; None if no triangle has an area."""
    vertices, colors, uv, normals = parts
    sizes = np.array([len(face) for face in faces])
    if sizes.max() > MAX_CORNERS:
        raise ValueError(f"a face has {sizes.max():,} corners, more than {MAX_CORNERS:,}")
    indices = _corner_indices([corner for face in faces for corner in face])
    limits = (len(vertices), len(uv), len(normals))
    if (indices >= limits).any() or (indices < NONE).any() or (indices[:, 0] == NONE).any():
        raise IndexError(f"a face names a corner beyond the {limits} vertices, uv and normals")
    check_coordinates(vertices[indices[:, 0]], "a face")

    triangles = _triangulate(vertices[indices[:, 0]], sizes)
    a, b, c = (vertices[indices[triangles[:, k], 0]] for k in range(3))
    triangles = triangles[np.linalg.norm(np.cross(b - a, c - a), axis=-1) > 0]
    if len(triangles) == 0:
        return None
    unique, flat = np.unique(indices[triangles.ravel()], axis=0, return_inverse=True)
    has_uv, has_normals = (unique[:, 1] != NONE).all(), (unique[:, 2] != NONE).all()
    return Piece(
        vertices=vertices[unique[:, 0]],
        faces=flat.reshape(-1, 3).astype(np.int64),
        material=material,
        normals=normals[unique[:, 2]] if has_normals else None,
        uv=uv[unique[:, 1]] if has_uv else None,
        colors=None if colors is None else colors[unique[:, 0]],
    )


def _corner_indices(corners: list[bytes]) -> Indices:
    """(len(corners), 3) indices of vertex, uv and normal, from 0, `NONE` where not stated."""
    # The forms are v, v/vt, v//vn and v/vt/vn; padded to the last one, they parse as one array.
    padded = b" ".join(corner + (b"/" * (2 - corner.count(b"/"))) for corner in corners)
    # A 0 is no index in this format, so it can stand for "not stated".
    filled = padded.replace(b"//", b"/0/").replace(b"/ ", b"/0 ")
    filled = filled + b"0" if filled.endswith(b"/") else filled
    numbers = np.array(filled.replace(b"/", b" ").split(), dtype="S16").astype(np.int64)
    if len(numbers) != 3 * len(corners):
        raise ValueError("a corner of a face is more than a vertex, a uv and a normal, or less")
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
