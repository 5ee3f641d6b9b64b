"""Bytes of a mesh file in any format in, textured pieces of it out."""

from __future__ import annotations

import importlib.util
import io
import json
import posixpath
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import pyvista as pv
import trimesh

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import (
    Floats,
    Indices,
    Material,
    Mesh,
    Piece,
    ReadFile,
    check_coordinates,
    double_area,
    far_offset,
    reduced_texture,
    resolve,
)
from crossmost_ray.prepare.off import read_off
from crossmost_ray.prepare.photos import BROKEN_IMAGE
from crossmost_ray.prepare.wavefront import read_wavefront

MESH_SUFFIXES = (".3mf", ".dae", ".glb", ".gltf", ".obj", ".off", ".ply", ".stl", ".wrl")
"""Formats that `read_mesh` knows."""

MAX_FACES = 20_000_000
"""Most triangles of a mesh, each of its instances counted."""

MAX_UNPACKED = 2**30
"""Most bytes that a packed file may unpack to, or that a mesh may take from files it names."""

SHARED = 8
"""Factor by which the parts of a glTF file may together exceed its bytes: parts may overlap."""

NEEDED_PACKAGES = {".3mf": ("lxml", "lxml"), ".dae": ("collada", "pycollada")}
"""Module and package without which trimesh does not read a format."""

HINTS = {
    "PLY is unexpected length!": "it is cut short, or has faces of three corners and of "
    "more: triangulate it, or write it as text"
}
"""What trimesh says, and how it is put here."""

COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression")
"""Extensions of glTF behind which the geometry is unreadable here."""

GLTF_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
GLTF_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
PLY_BYTES = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16", "float16"), 2),
    **dict.fromkeys(("int", "uint", "int32", "uint32", "float", "float32"), 4),
    **dict.fromkeys(("double", "int64", "uint64", "float64"), 8),
}
PLY_HEADER = 2**20
"""Bytes within which the header of a PLY file must end."""


def read_mesh(path: str, read_file: ReadFile) -> Mesh:
    """Reads a mesh with its materials, textures and vertex colours.

    Wavefront files go through `prepare.wavefront` and OFF files through `prepare.off`, which
    forgive what collections hold; VRML 2 goes through VTK, the rest through trimesh. No file is
    trusted: what its header promises is compared with its size before anything is allocated. Faces
    without an area are dropped. A mesh that lies `FAR` from the origin is moved there.

    Args:
        path: Path of the mesh as `read_file` knows it; the suffix tells the format.
        read_file: Gives the bytes of `path` and of the files it names.

    Raises:
        ObjectError: If the file is missing, broken, of an unknown format or one whose package is
            not installed, promises more than it holds, has more than `MAX_FACES` triangles, holds
            NaN, infinity or a coordinate beyond `MAX_COORDINATE`, or no surface.
    """
    data = read_file(path)
    if data is None:
        raise ObjectError(f"the file {path} is missing")
    suffix = posixpath.splitext(path)[1].lower()
    try:
        if suffix == ".obj":
            mesh = read_wavefront(data, path, read_file)
        elif suffix == ".off":
            mesh = read_off(data, path)
        elif suffix == ".wrl":
            mesh = _read_vrml(data, path)
        else:
            mesh = _read_with_trimesh(data, path, read_file)
        return _checked(mesh, path)
    except (MemoryError, RecursionError) as huge:
        raise ObjectError(f"{path} is too large or too deeply nested to be read") from huge


def ply_elements(data: bytes) -> dict[str, tuple[int, int]]:
    """Reads the header of a PLY file: of each element, how many there are and their least bytes.

    Args:
        data: The file, or its first `PLY_HEADER` bytes.

    Raises:
        ValueError: If it has no such header.
    """
    end = data.find(b"end_header", 0, PLY_HEADER)
    if not data[:3].lower() == b"ply" or end < 0:
        raise ValueError("it has no PLY header")
    text = data[:end].decode("ascii", errors="replace")
    is_ascii = "format ascii" in text
    elements: dict[str, tuple[int, int]] = {}
    name = ""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words[:1] == ["element"]:
            if len(words) != 3 or not words[2].isdecimal():
                raise ValueError(
                    f"line {number} of its header is '{line}', not a name and a number"
                )
            name = words[1]
            elements[name] = (int(words[2]), 0)
        elif words[:1] == ["property"] and elements:
            # A list may be empty: only its length is sure to be there. A number in text takes a
            # digit and a blank.
            kind = words[2] if words[1:2] == ["list"] and len(words) > 2 else words[1]
            count, size = elements[name]
            elements[name] = (count, size + (2 if is_ascii else PLY_BYTES[kind]))
    return elements


def _checked(mesh: Mesh, path: str) -> Mesh:
    """What `read_mesh` promises of every mesh, whichever reader it comes from."""
    num_faces = sum(len(piece.faces) for piece in mesh.pieces)
    if num_faces > MAX_FACES:
        raise ObjectError(f"{path} has {num_faces:,} faces, more than {MAX_FACES:,}: simplify it")
    mesh = Mesh(tuple(kept for piece in mesh.pieces for kept in _with_area(piece, path)))
    if not mesh.pieces:
        raise ObjectError(f"{path} holds no face with an area")
    offset = far_offset(*mesh.bounds)
    return mesh.translated(-offset) if offset.any() else mesh


def _with_area(piece: Piece, path: str) -> Iterator[Piece]:
    """The piece without the faces that have no area, unless nothing is left of it."""
    _check_indices(piece.faces, len(piece.vertices), path)
    used = np.zeros(len(piece.vertices), bool)
    used[piece.faces] = True
    check_coordinates(piece.vertices[used], path)
    solid = double_area(piece.vertices[piece.faces]) > 0
    if solid.any():
        # What only decorates is left out where it cannot be used; the colour then stands alone.
        yield replace(
            piece,
            faces=piece.faces if solid.all() else piece.faces[solid],
            normals=_usable(piece.normals, len(piece.vertices)),
            uv=_usable(piece.uv, len(piece.vertices)),
        )


def _check_indices(faces: Indices, num_vertices: int, path: str) -> None:
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ObjectError(f"{path} holds faces of shape {faces.shape}, expected (F, 3)")
    if faces.size and not 0 <= faces.min() <= faces.max() < num_vertices:
        raise ObjectError(f"{path}: a face names a corner beyond the {num_vertices} vertices")


def _usable(values: Floats | None, num_vertices: int) -> Floats | None:
    """Per-vertex values, or None if there are too few or any is NaN or infinite."""
    if values is None or len(values) != num_vertices or not np.isfinite(values).all():
        return None
    return values


def _read_with_trimesh(data: bytes, path: str, read_file: ReadFile) -> Mesh:
    suffix = posixpath.splitext(path)[1].lower()
    if suffix not in MESH_SUFFIXES:
        raise ObjectError(
            f"{path} is none of {', '.join(MESH_SUFFIXES)}: convert it to one of them"
        )
    module, package = NEEDED_PACKAGES.get(suffix, ("trimesh", "trimesh"))
    try:
        # First of all, so that a bomb is called one whatever is installed.
        _check_promises(data, suffix)
        if importlib.util.find_spec(module) is None:
            raise ObjectError(
                f"{path} cannot be read without {package}: pip install {package}, "
                "or convert it to .glb"
            )
        if suffix == ".stl":
            # Text that is no UTF-8 would be searched for its encoding, for minutes.
            data = data if _is_binary_stl(data) else data.decode("utf-8", "replace").encode()
        scene = trimesh.load_scene(
            io.BytesIO(data),
            file_type=suffix.lstrip("."),
            resolver=cast("Any", _Resolver(path, read_file)),
            process=False,
        )
        return Mesh(tuple(_placed_pieces(scene, path)))
    except ObjectError:
        raise
    # trimesh's readers have no error of their own: they let through whatever breaks first.
    except Exception as broken:
        reason = HINTS.get(str(broken), str(broken) or type(broken).__name__)
        raise ObjectError(f"{path} cannot be read: {reason}") from broken


def _placed_pieces(scene: trimesh.Scene, path: str) -> Iterator[Piece]:
    """Pieces of a scene, each where the scene has it, and as often."""
    placed = [scene.graph[node] for node in scene.graph.nodes_geometry]
    shapes = {
        name: shape
        for name, shape in scene.geometry.items()
        if isinstance(shape, trimesh.Trimesh) and len(shape.faces)
    }
    # Before any of them is copied: a few bytes place a large part once more.
    num_faces = sum(len(shapes[name].faces) for _, name in placed if name in shapes)
    if num_faces > MAX_FACES:
        raise ObjectError(f"{path} has {num_faces:,} faces, more than {MAX_FACES:,}: simplify it")
    pieces = {name: _piece_of(shape, path) for name, shape in shapes.items()}
    for matrix, name in placed:
        if name in pieces:
            vertices = pieces[name].vertices @ matrix[:3, :3].T + matrix[:3, 3]
            yield replace(pieces[name], vertices=vertices)


def _piece_of(part: trimesh.Trimesh, path: str) -> Piece:
    vertices = np.asarray(part.vertices, np.float64)
    faces = np.asarray(part.faces, np.int64)
    _check_indices(faces, len(vertices), path)
    visual: Any = part.visual
    colors: Any = None
    if visual.kind == "vertex":
        colors = visual.vertex_colors
    elif visual.kind == "face":
        # Corners that have a colour of their own face: none is shared.
        colors = np.repeat(visual.face_colors, 3, axis=0)
        vertices, faces = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
    elif visual.kind == "texture" and "color" in visual.vertex_attributes:
        colors = trimesh.visual.color.to_rgba(visual.vertex_attributes["color"])
    uv = getattr(visual, "uv", None)
    return Piece(
        vertices=vertices,
        faces=faces,
        material=_material_of(part),
        uv=None if uv is None else np.asarray(uv, np.float64),
        colors=None if np.shape(colors) != (len(vertices), 4) else np.asarray(colors)[:, :3],
    )


def _material_of(part: trimesh.Trimesh) -> Material:
    """Main colour and texture of a trimesh part."""
    visual: Any = part.visual
    material = getattr(visual, "material", None)
    image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    main = getattr(material, "main_color", None)
    if main is None:
        main = (204, 204, 204, 255)
    rgba = np.asarray(main, np.float64) / 255
    texture = None
    if image is not None:
        try:
            texture = reduced_texture(image)
        except BROKEN_IMAGE:
            texture = None
    opacity = float(rgba[3]) if len(rgba) > 3 else 1.0
    # glTF says so where alpha counts; elsewhere exporters leave anything in it.
    if isinstance(material, trimesh.visual.material.PBRMaterial) and material.alphaMode not in (
        "MASK",
        "BLEND",
    ):
        opacity = 1.0
        if texture is not None:
            texture = np.dstack([texture[..., :3], np.full(texture.shape[:2], 255, np.uint8)])
    return Material(
        color=(float(rgba[0]), float(rgba[1]), float(rgba[2])), opacity=opacity, texture=texture
    )


class _Resolver:
    """Lets trimesh find the files a mesh names, `MAX_UNPACKED` bytes of them in all."""

    def __init__(self, base: str, read_file: ReadFile) -> None:
        self.base, self.read_file = base, read_file
        self.bytes_left = MAX_UNPACKED

    def get(self, name: str) -> bytes:
        """Bytes of `name`; trimesh expects a KeyError where there is none."""
        data = resolve(name, self.base, self.read_file)
        if data is None:
            # In glTF a name is an address, where a blank is %20.
            data = resolve(unquote(name), self.base, self.read_file)
        if data is None:
            raise KeyError(f"the file {name} that it names is missing")
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise ObjectError(
                f"{self.base} names files of more than {MAX_UNPACKED:,} bytes in all: simplify it"
            )
        return data

    __getitem__ = get


def _check_promises(data: bytes, suffix: str) -> None:
    """Refuses a file whose header promises more than it holds, before trimesh allocates it.

    Raises:
        ValueError: With what is promised and what is there, or why the header cannot be read.
    """
    if suffix == ".ply":
        check_ply(data)
    elif suffix in (".glb", ".gltf"):
        _check_gltf(data)
    elif suffix == ".3mf":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_UNPACKED:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {MAX_UNPACKED:,}")
    elif suffix == ".stl" and not _is_binary_stl(data) and b"facet" not in data[:PLY_HEADER]:
        raise ValueError(
            f"it is no text, and as a binary file of {len(data):,} bytes it does not hold the "
            "number of faces that its header promises"
        )


def check_ply(data: bytes) -> None:
    """Refuses a PLY file whose header promises more than it holds.

    Raises:
        ValueError: If it does, holds far more lines, or has no such header.
    """
    elements = ply_elements(data)
    body = len(data) - data.find(b"end_header")
    least = sum(count * size for count, size in elements.values())
    if least > body:
        raise ValueError(f"its header promises at least {least:,} bytes; {body:,} are there")
    rows = sum(count for count, _ in elements.values())
    # A line of text becomes an object, even an empty one. A few may end a file.
    if b"format ascii" in data[:PLY_HEADER] and data.count(b"\n") > rows + PLY_HEADER:
        raise ValueError(f"it holds far more lines than the {rows:,} that its header promises")


def _check_gltf(data: bytes) -> None:
    text = data
    if data[:4] == b"glTF":
        text = data[20 : 20 + int.from_bytes(data[12:16], "little")]
    tree = json.loads(text.decode("utf-8", errors="replace"))
    closed = sorted(set(tree.get("extensionsRequired", ())) & set(COMPRESSED))
    if closed:
        raise ValueError(f"its geometry is compressed ({closed[0]}): export it without compression")
    named = [b for b in tree.get("buffers", ()) if not b.get("uri", "data:").startswith("data:")]
    there = len(data) + sum(abs(int(buffer["byteLength"])) for buffer in named)
    views = sum(abs(int(view["byteLength"])) for view in tree.get("bufferViews", ()))
    arrays = sum(
        abs(int(a["count"])) * GLTF_COMPONENTS[a["type"]] * GLTF_BYTES[a["componentType"]]
        for a in tree.get("accessors", ())
    )
    for promised in (views, arrays):
        if promised > min(SHARED * there, MAX_UNPACKED):
            raise ValueError(f"its header promises {promised:,} bytes; {there:,} are there")


def _is_binary_stl(data: bytes) -> bool:
    """Whether the size is that of the header, a count and so many faces of 50 bytes."""
    return len(data) >= 84 and len(data) == 84 + 50 * int.from_bytes(data[80:84], "little")


def _read_vrml(data: bytes, path: str) -> Mesh:
    """Reads VRML 2 through VTK: faces, transforms and colours, no textures."""
    from vtkmodules.vtkIOImport import vtkVRMLImporter

    if not data.startswith(b"#VRML V2.0"):
        raise ObjectError(
            f"{path} does not begin with '#VRML V2.0': unpack it or convert it to .glb"
        )
    importer = vtkVRMLImporter()
    # Without an observer, VTK prints its errors and goes on with what it has read before.
    errors = pv.Observer(log=False)
    errors.observe(importer)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "scene.wrl"
        stored.write_bytes(data)
        importer.SetFileName(str(stored))
        importer.Update()
    if errors.has_event_occurred():
        raise ObjectError(f"{path} cannot be read: {errors.get_message()}")
    pieces = []
    for actor in importer.GetRenderer().GetActors():
        if actor.GetMapper() is None or actor.GetMapper().GetNumberOfInputConnections(0) == 0:
            continue
        actor.GetMapper().Update()
        surface = pv.wrap(actor.GetMapper().GetInput())
        corners = np.asarray(pv.convert_array(surface.GetPolys().GetConnectivityArray()))
        if len(corners) == 0:
            continue
        # VTK does not look before it reads.
        if not 0 <= corners.min() <= corners.max() < surface.n_points:
            raise ObjectError(f"{path}: a face names a corner beyond the {surface.n_points} points")
        matrix = np.array(
            [[actor.GetMatrix().GetElement(r, c) for c in range(4)] for r in range(4)]
        )
        points = np.asarray(surface.points, np.float64)
        check_coordinates(points, path)
        look = actor.GetProperty()
        colors = actor.GetMapper().MapScalars(1.0)
        mapped = None if colors is None else np.asarray(pv.convert_array(colors))[:, :3]
        pieces.append(
            Piece(
                vertices=points @ matrix[:3, :3].T + matrix[:3, 3],
                faces=np.asarray(surface.triangulate().regular_faces, np.int64).reshape(-1, 3),
                material=Material(color=look.GetDiffuseColor(), opacity=look.GetOpacity()),
                colors=mapped if mapped is not None and len(mapped) == len(points) else None,
            )
        )
    return Mesh(tuple(pieces))
