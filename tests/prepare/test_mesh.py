"""Meshes as the catalogues have them: what is read, and where points fall."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from crossmost_ray.prepare.mesh import (
    Material,
    Mesh,
    MeshError,
    Piece,
    decode_texture,
    normalize_to_unit_sphere,
    read_mesh,
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
    with pytest.raises(MeshError, match=message):
        read({"m/a.obj": content})


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MeshError, match=r"the file m/b\.obj is missing"):
        read({}, path="m/b.obj")


def test_other_formats_go_through_trimesh() -> None:
    off = "OFF\n3 1 0\n0 0 0\n4 0 0\n0 2 0\n3 0 1 2\n"
    mesh = read({"m/a.off": off}, path="m/a.off")
    np.testing.assert_array_equal(mesh.bounds, [[0, 0, 0], [4, 2, 0]])
    with pytest.raises(MeshError, match=r"m/a\.off cannot be read"):
        read({"m/a.off": "OFF\nnothing"}, path="m/a.off")


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
    with pytest.raises(MeshError, match="all its points coincide"):
        normalize_to_unit_sphere(np.ones((4, 3), np.float32))
