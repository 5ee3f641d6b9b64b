"""Meshes as the catalogues have them: what is read, and where points fall."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import NEEDED_PACKAGES, read_mesh
from crossmost_ray.prepare.mesh import (
    Material,
    Mesh,
    Piece,
    decode_texture,
    normalize_to_unit_sphere,
    sample_surface,
)

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
RED, GREEN = (255, 0, 0), (0, 255, 0)


def png(*rows: tuple[tuple[int, ...], ...]) -> bytes:
    """A tiny image, its first row at the top."""
    stored = io.BytesIO()
    Image.fromarray(np.array(rows, np.uint8)).save(stored, "PNG")
    return stored.getvalue()


def read(files: Mapping[str, str | bytes], path: str = "m/a.obj") -> Mesh:
    contents = {n: c.encode() if isinstance(c, str) else c for n, c in files.items()}
    return read_mesh(path, contents.get)


def colors_of(mesh: Mesh) -> set[tuple[int, ...]]:
    _, colors = sample_surface(mesh, 64, np.random.default_rng(0))
    return {tuple(int(value) for value in color) for color in colors}


def test_points_fall_in_proportion_to_area() -> None:
    # Two triangles with areas 1/2 and 3/2; the second one lies at x >= 10.
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [10, 0, 0], [13, 0, 0], [10, 1, 0]], float)
    mesh = Mesh((Piece(corners, np.array([[0, 1, 2], [3, 4, 5]]), Material()),))
    points, _ = sample_surface(mesh, 20_000, np.random.default_rng(0))
    # Five standard deviations of a share of 3/4 over 20,000 draws are 0.015.
    assert (points[:, 0] >= 10).mean() == pytest.approx(0.75, abs=0.015)


def test_points_are_uniform_over_a_triangle() -> None:
    mesh = Mesh((Piece(np.eye(3), np.array([[0, 1, 2]]), Material()),))
    points, _ = sample_surface(mesh, 20_000, np.random.default_rng(0))
    # The mean of a uniform triangle is its centroid, and a quarter of it lies where x > 1/2.
    np.testing.assert_allclose(points.mean(axis=0), [1 / 3] * 3, atol=0.01)
    assert (points[:, 0] > 0.5).mean() == pytest.approx(0.25, abs=0.016)
    np.testing.assert_allclose(points.sum(axis=1), 1.0, atol=1e-6)


def test_colors_come_from_the_texture_under_the_point() -> None:
    # v counts upwards, rows of an image downwards: the lower half of the triangle is green.
    square = TRIANGLE + "v 1 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nvt 1 1\n"
    mesh = read(
        {
            "m/a.obj": f"mtllib a.mtl\n{square}usemtl t\nf 1/1 2/2 4/4 3/3\n",
            "m/a.mtl": "newmtl t\nKd 0 0 1\nmap_Kd t.png\n",
            "m/t.png": png((RED, RED), (GREEN, GREEN)),
        }
    )
    points, colors = sample_surface(mesh, 500, np.random.default_rng(0))
    upper = points[:, 1] > 0.5
    assert (colors[upper] == RED).all()
    assert (colors[~upper] == GREEN).all()


def test_a_face_of_one_texel_takes_its_colour() -> None:
    # Palettes are used so: every corner has the same uv, and v = 0 is the lowest row.
    mesh = read(
        {
            "m/a.obj": f"mtllib a.mtl\n{TRIANGLE}vt 0 0\nusemtl t\nf 1/1 2/1 3/1\n",
            "m/a.mtl": "newmtl t\nmap_Kd t.png\n",
            "m/t.png": png((RED, RED), (GREEN, RED)),
        }
    )
    assert colors_of(mesh) == {GREEN}


def test_tabs_and_continued_lines_are_understood() -> None:
    mesh = read({"m/a.obj": "v\t0 0 0\nv 1\t0 0\nv 0 1 \\\n0\nf\t1 2 \\\r\n3\n"})
    np.testing.assert_array_equal(mesh.bounds, [[0, 0, 0], [1, 1, 0]])


def test_see_through_parts_of_a_texture_hold_no_points() -> None:
    mesh = read(
        {
            "m/a.obj": f"mtllib a.mtl\n{TRIANGLE}vt 0 0\nvt 1 0\nvt 0 1\nusemtl t\nf 1/1 2/2 3/3\n",
            "m/a.mtl": "newmtl t\nmap_Kd t.png\n",
            "m/t.png": png(((*RED, 255), (*GREEN, 0))),
        }
    )
    points, colors = sample_surface(mesh, 300, np.random.default_rng(0))
    assert len(points) == 300
    assert (points[:, 0] < 0.5).all()
    assert (colors == RED).all()


@pytest.mark.parametrize("name", ["7", "dark wood (oak)", "blå"])
def test_material_names_may_be_numbers_or_hold_spaces(name: str) -> None:
    mesh = read(
        {
            "m/a.obj": f"mtllib my colours.mtl\n{TRIANGLE}usemtl {name}\nf 1 2 3\n",
            "m/my colours.mtl": f"newmtl other\nKd 0 1 0\nnewmtl {name}\nKd 1 0 0\n",
        }
    )
    assert colors_of(mesh) == {RED}


@pytest.mark.parametrize(
    "reference",
    ["t.png", "/t.png", "./t.png", ".//t.png", "..//m//t.png", "C:\\Users\\me\\t.png"],
)
def test_textures_are_found_however_they_are_referenced(reference: str) -> None:
    uv = "vt 0 0\nvt 1 0\nvt 0 1\n"
    mesh = read(
        {
            "m/a.obj": f"mtllib a.mtl\n{TRIANGLE}{uv}usemtl t\nf 1/1 2/2 3/3\n",
            "m/a.mtl": f"newmtl t\nmap_Kd {reference}\n",
            "m/t.png": png((RED,)),
        }
    )
    assert colors_of(mesh) == {RED}


@pytest.mark.parametrize("texture", [None, b"", b"no image", png((RED,))[:40]])
def test_a_missing_or_broken_texture_leaves_the_colour(texture: bytes | None) -> None:
    files: dict[str, str | bytes] = {
        "m/a.obj": f"mtllib a.mtl\n{TRIANGLE}vt 0 0\nusemtl t\nf 1/1 2/1 3/1\n",
        "m/a.mtl": "newmtl t\nKd 0 1 0\nmap_Kd t.png\n",
    }
    if texture is not None:
        files["m/t.png"] = texture
    assert colors_of(read(files)) == {GREEN}


def test_materials_without_a_library_fall_back_to_the_standard_ones() -> None:
    mesh = read(
        {
            "m/a.obj": f"{TRIANGLE}usemtl flgrass\nf 1 2 3\n",
            "standard.mtl": "newmtl flgrass\nKd 0 1 0\n",
        }
    )
    assert colors_of(mesh) == {GREEN}


def test_faces_of_two_corners_are_dropped() -> None:
    mesh = read({"m/a.obj": f"{TRIANGLE}f 1 2\nf 1 2 3\nf 3 3 3\n"})
    assert [len(piece.faces) for piece in mesh.pieces] == [1]


def test_indices_may_count_from_the_end() -> None:
    mesh = read({"m/a.obj": f"{TRIANGLE}f -3 -2 -1\nv 9 9 9\n"})
    np.testing.assert_array_equal(mesh.bounds, [[0, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize(
    ("corners", "area"),
    [
        ([(0, 0), (2, 0), (2, 2), (0, 2)], 4.0),
        ([(0, 0), (2, 0), (0.5, 0.5), (0, 2)], 1.0),  # an arrow head, first corner on the cut
        ([(2, 0), (0.5, 0.5), (0, 2), (0, 0)], 1.0),  # the same one, begun elsewhere
        ([(0, 0), (3, 0), (3, 1), (1, 1), (1, 3), (0, 3)], 5.0),  # an L
    ],
)
def test_concave_faces_keep_their_area(corners: list[tuple[float, float]], area: float) -> None:
    vertices = "".join(f"v {x} {y} 0\n" for x, y in corners)
    face = " ".join(str(index + 1) for index in range(len(corners)))
    (piece,) = read({"m/a.obj": f"{vertices}f {face}\n"}).pieces
    a, b, c = (piece.vertices[piece.faces[:, k]] for k in range(3))
    assert np.linalg.norm(np.cross(b - a, c - a), axis=-1).sum() / 2 == pytest.approx(area)


def test_a_large_face_without_an_area_is_dropped() -> None:
    mesh = read({"m/a.obj": f"{TRIANGLE}f 1 2 3\nf 1 2 1 2 1\n"})
    assert [len(piece.faces) for piece in mesh.pieces] == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "m/a.obj holds no face with an area"),
        ("# only a light\nv 0 0 0\n", "m/a.obj holds no face with an area"),
        (f"{TRIANGLE}f 1 2 9\n", "m/a.obj is not a readable OBJ file: a face names a corner"),
        (f"{TRIANGLE}f 1 2 -9\n", "m/a.obj is not a readable OBJ file: a face names a corner"),
        (f"{TRIANGLE}f 1 2 -x\n", "m/a.obj is not a readable OBJ file: invalid literal"),
        (f"{TRIANGLE}v 0 x 0\nf 1 2 4\n", "m/a.obj is not a readable OBJ file: could not convert"),
    ],
)
def test_a_broken_file_says_what_is_wrong(content: str, message: str) -> None:
    with pytest.raises(ObjectError, match=message):
        read({"m/a.obj": content})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ObjectError, match=r"the file m/b\.obj is missing"):
        read({}, path="m/b.obj")


def test_other_formats_go_through_trimesh() -> None:
    off = "OFF\n3 1 0\n0 0 0\n4 0 0\n0 2 0\n3 0 1 2\n"
    mesh = read({"m/a.off": off}, path="m/a.off")
    np.testing.assert_array_equal(mesh.bounds, [[0, 0, 0], [4, 2, 0]])
    with pytest.raises(ObjectError, match=r"m/a\.off"):
        read({"m/a.off": "OFF\nnothing"}, path="m/a.off")


SQUARE = np.array([[0, 0, 0], [4, 0, 0], [4, 2, 0], [0, 2, 0]], float)
HALVES = np.array([[0, 1, 2], [0, 2, 3]])


def export(suffix: str, **looks: Any) -> bytes:
    """A square of 4 by 2 as trimesh writes it."""
    mesh = trimesh.Trimesh(SQUARE, HALVES, process=False, **looks)
    data = mesh.export(file_type=suffix)
    return data.encode() if isinstance(data, str) else data


@pytest.mark.parametrize("suffix", ["3mf", "dae", "glb", "off", "ply", "stl", "stl_ascii"])
def test_every_format_gives_the_same_square(suffix: str) -> None:
    if f".{suffix}" in NEEDED_PACKAGES:
        pytest.importorskip(NEEDED_PACKAGES[f".{suffix}"][0])
    path = f"m/a.{suffix.removesuffix('_ascii')}"
    mesh = read({path: export(suffix)}, path)
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [4, 2, 0]], atol=1e-6)
    assert area(mesh) == pytest.approx(8)


def area(mesh: Mesh) -> float:
    corners = np.concatenate([piece.vertices[piece.faces] for piece in mesh.pieces])
    edges = corners[:, 1:] - corners[:, :1]
    return float(np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1).sum() / 2)


def test_gltf_finds_its_buffer_beside_it_by_an_encoded_name() -> None:
    files = trimesh.Scene(trimesh.Trimesh(SQUARE, HALVES)).export(file_type="gltf")
    tree = json.loads(files.pop("model.gltf"))
    renamed: dict[str, str | bytes] = {}
    for buffer in tree["buffers"]:
        renamed[f"m/my {buffer['uri']}"] = files[buffer["uri"]]
        buffer["uri"] = f"my%20{buffer['uri']}"
    mesh = read({**renamed, "m/a.gltf": json.dumps(tree)}, "m/a.gltf")
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [4, 2, 0]])
    with pytest.raises(ObjectError, match=r"m/a\.gltf cannot be read: .*my%20"):
        read({"m/a.gltf": json.dumps(tree)}, "m/a.gltf")


def test_a_part_that_a_scene_has_twice_is_there_twice() -> None:
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.Trimesh(SQUARE, HALVES), geom_name="part")
    scene.graph.update("other", geometry="part", matrix=np.diag([2.0, 2.0, 2.0, 1.0]))
    mesh = read({"m/a.glb": scene.export(file_type="glb")}, "m/a.glb")
    assert area(mesh) == pytest.approx(8 + 4 * 8)


VRML = """#VRML V2.0 utf8
Transform { translation 1 2 3 children [ Shape {
  appearance Appearance { material Material { diffuseColor 1 0 0 } }
  geometry IndexedFaceSet {
    coord Coordinate { point [ 0 0 0, 4 0 0, 4 2 0, 0 2 0 ] } coordIndex [ 0 1 2 3 -1 ] } } ] }
"""


def test_vrml_keeps_its_transform_and_colour() -> None:
    mesh = read({"m/a.wrl": VRML}, "m/a.wrl")
    np.testing.assert_allclose(mesh.bounds, [[1, 2, 3], [5, 4, 3]])
    assert colors_of(mesh) == {RED}
    with pytest.raises(ObjectError, match="a face names a corner beyond the 4 points"):
        read({"m/a.wrl": VRML.replace("2 3 -1", "2 3000000 -1")}, "m/a.wrl")
    with pytest.raises(ObjectError, match=r"does not begin with '#VRML V2\.0'"):
        read({"m/a.wrl": "#VRML V1.0 ascii\n"}, "m/a.wrl")


@pytest.mark.parametrize("suffix", ["glb", "ply"])
def test_vertex_colors_blend_over_a_face(suffix: str) -> None:
    colors = np.array([[*RED, 255], [*GREEN, 255], [*GREEN, 255], [*RED, 255]], np.uint8)
    mesh = read({f"m/a.{suffix}": export(suffix, vertex_colors=colors)}, f"m/a.{suffix}")
    points, drawn = sample_surface(mesh, 200, np.random.default_rng(0))
    # Red at x = 0 turns green at x = 4, in a straight line.
    np.testing.assert_allclose(drawn[:, 1], 255 * points[:, 0] / 4, atol=1)
    np.testing.assert_allclose(drawn[:, 0], 255 - 255 * points[:, 0] / 4, atol=1)


def test_face_colors_end_at_the_edge() -> None:
    colors = np.array([[*RED, 255], [*GREEN, 255]], np.uint8)
    mesh = read({"m/a.ply": export("ply", face_colors=colors)}, "m/a.ply")
    points, drawn = sample_surface(mesh, 200, np.random.default_rng(0))
    below = points[:, 1] < points[:, 0] / 2
    assert (drawn[below] == RED).all()
    assert (drawn[~below] == GREEN).all()


@pytest.mark.parametrize("scale", [1, 255])
def test_an_obj_may_have_colors_at_its_vertices(scale: int) -> None:
    lines = [f"v {x} {y} 0 {scale} 0 0\n" for x, y in ((0, 0), (1, 0), (0, 1))]
    assert colors_of(read({"m/a.obj": "".join(lines) + "f 1 2 3\n"})) == {RED}


def test_alpha_counts_in_gltf_only_where_it_says_so() -> None:
    uv = SQUARE[:, :2] / [4, 2]
    image = Image.fromarray(np.array([[[*RED, 0]]], np.uint8))
    for mode, is_solid in ((None, True), ("OPAQUE", True), ("BLEND", False)):
        material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, alphaMode=mode)
        looks = trimesh.visual.TextureVisuals(uv=uv, material=material)
        mesh = read({"m/a.glb": export("glb", visual=looks)}, "m/a.glb")
        if is_solid:
            assert colors_of(mesh) == {RED}
        else:
            with pytest.raises(ObjectError, match="see-through"):
                colors_of(mesh)


def test_a_broken_texture_of_a_glb_leaves_the_colour() -> None:
    uv = SQUARE[:, :2] / [4, 2]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=image, baseColorFactor=[0, 255, 0, 255]
    )
    looks = trimesh.visual.TextureVisuals(uv=uv, material=material)
    data = bytearray(export("glb", visual=looks))
    start = data.index(b"IDAT")
    data[start + 40 : start + 400] = bytes(360)
    assert colors_of(read({"m/a.glb": bytes(data)}, "m/a.glb")) == {GREEN}


def test_a_far_mesh_is_moved_near_before_its_points_are_rounded() -> None:
    # In metres of a map, float32 would put all points of a chair onto a grid of half a metre.
    east, north = 4_000_000.0, 5_500_000.0
    corners = [(0, 0), (1, 0), (0, 1)]
    text = "".join(f"v {east + x} {north + y} 0\n" for x, y in corners) + "f 1 2 3\n"
    points, _ = sample_surface(read({"m/a.obj": text}), 500, np.random.default_rng(0))
    np.testing.assert_allclose(points.mean(axis=0), [-1 / 6, -1 / 6, 0], atol=0.05)
    assert len(np.unique(points[:, 0])) > 400


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "NaN or infinite"), ("1e13", r"a coordinate of 1e\+13")]
)
@pytest.mark.parametrize("suffix", ["obj", "ply"])
def test_coordinates_that_are_no_place_are_refused(value: str, message: str, suffix: str) -> None:
    header = (
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty double x\nproperty double y\n"
        "property double z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    content = {
        "obj": f"v 0 0 0\nv 1 {value} 0\nv 0 1 0\nf 1 2 3\n",
        "ply": f"{header}0 0 0\n1 {value} 0\n0 1 0\n3 0 1 2\n",
    }[suffix]
    with pytest.raises(ObjectError, match=message):
        read({f"m/a.{suffix}": content}, f"m/a.{suffix}")
    # Of a vertex that no face uses, nothing is asked.
    unused = {"obj": f"{TRIANGLE}v {value} 0 0\nf 1 2 3\n"}
    if suffix in unused:
        read({"m/a.obj": unused["obj"]})


def test_a_uv_that_is_nan_leaves_the_colour() -> None:
    mesh = read(
        {
            "m/a.obj": f"mtllib a.mtl\n{TRIANGLE}vt nan 0\nusemtl t\nf 1/1 2/1 3/1\n",
            "m/a.mtl": "newmtl t\nKd 0 1 0\nmap_Kd t.png\n",
            "m/t.png": png((RED,)),
        }
    )
    assert colors_of(mesh) == {GREEN}


def test_a_colour_beyond_its_range_is_the_nearest_in_it() -> None:
    files = {"m/a.mtl": "newmtl t\nKd 7 -3 nan\n"}
    files["m/a.obj"] = f"mtllib a.mtl\n{TRIANGLE}usemtl t\nf 1 2 3\n"
    assert colors_of(read(files)) == {RED}


def test_a_binary_ply_of_mixed_faces_says_how_to_mend_it() -> None:
    data = export("ply")
    start = data.index(b"end_header\n") + len("end_header\n") + 4 * 12
    quad = data[:start] + b"\x04" + np.array([0, 1, 2, 3], "<i4").tobytes() + data[start + 13 :]
    with pytest.raises(
        ObjectError, match=r"faces of three corners and of more: triangulate it, or write"
    ):
        read({"m/a.ply": quad}, "m/a.ply")


def test_an_unknown_format_and_a_missing_package_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ObjectError, match=r"m/a\.max is none of \.3mf, \.dae"):
        read({"m/a.max": b"x"}, "m/a.max")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ObjectError, match=r"m/a\.dae .* pip install pycollada, or convert"):
        read({"m/a.dae": b"<COLLADA/>"}, "m/a.dae")


def test_stretching_keeps_normals_upright() -> None:
    # A slope of 45 degrees, made twice as high: its normal must lean towards the ground plane.
    slope = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 0]], float)
    normal = np.array([-1, 1, 0]) / np.sqrt(2)
    piece = Piece(slope, np.array([[0, 1, 2]]), Material(), normals=np.tile(normal, (3, 1)))
    (stretched,) = Mesh((piece,)).transformed(np.diag([1.0, 2.0, 1.0])).pieces
    assert stretched.normals is not None
    edges = stretched.vertices[1:] - stretched.vertices[0]
    np.testing.assert_allclose(edges @ stretched.normals[0], 0, atol=1e-12)


def test_large_textures_are_reduced() -> None:
    stored = io.BytesIO()
    Image.new("RGB", (2048, 1024)).save(stored, "PNG")
    texture = decode_texture(stored.getvalue())
    assert texture is not None
    assert texture.shape == (256, 512, 4)


def test_normalised_clouds_touch_the_unit_sphere() -> None:
    points = np.random.default_rng(0).normal(5, 3, (100, 3)).astype(np.float32)
    normalised = normalize_to_unit_sphere(points)
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-6)
    assert np.linalg.norm(normalised, axis=-1).max() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ObjectError, match="all its points coincide"):
        normalize_to_unit_sphere(np.ones((4, 3), np.float32))
