"""OFF files: what is read, how faces become triangles, and that damage is an ObjectError."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Piece
from crossmost_ray.prepare.off import read_off

TRIANGLE = "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


def read(text: str | bytes) -> Piece:
    mesh = read_off(text.encode() if isinstance(text, str) else text, "a.off")
    (piece,) = mesh.pieces
    return piece


@pytest.mark.parametrize(
    "text",
    [
        f"OFF\n3 1 0\n{TRIANGLE}",
        f"OFF3 1 0\n{TRIANGLE}",
        f"OFF 3 1 0\n{TRIANGLE}",
        f"OFF\n3 1\n{TRIANGLE}",
        f"# a comment\n\n OFF # another\n\n3 1 0\n\n{TRIANGLE}".replace("\n3 0", "  # end\n\n3 0"),
        f"OFF\n3 1 0\n{TRIANGLE}".replace("\n", "\r\n"),
        f"OFF\n3 1 0\n{TRIANGLE}".replace("\n", "\r"),
        f"OFF\n3 1 0\n{TRIANGLE}".rstrip(),
        f"OFF\n3 1 0\n{TRIANGLE}".replace(" ", "\t "),
        f"OFF\n3 1 0\n{TRIANGLE}rubbish behind the last face\n",
        f"OFF\n3 1 0\n{TRIANGLE}".replace("3 0 1 2", "3 0 1 2 0.5 0.25 1 1"),
        f"OFF\n3 1 0\n{TRIANGLE}".replace("3 0 1 2", "3 0.0 1e0 2"),
        f"COFF\n3 1 0\n{TRIANGLE}".replace("1 0 0", "1 0 0 255 0 0 255"),
        f"OFF\n3 2 0\n{TRIANGLE}2 0 1\n",
    ],
    ids=range(14),
)
def test_a_triangle_is_read_however_it_is_written(text: str) -> None:
    piece = read(text)
    np.testing.assert_array_equal(piece.vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(piece.faces, [[0, 1, 2]])
    assert (piece.vertices.dtype, piece.faces.dtype) == (np.float64, np.int64)


def test_faces_of_more_corners_become_fans() -> None:
    piece = read("OFF 5 3 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n0 0 1\n4 3 2 1 0\n3 0 1 4\n5 0 1 2 3 4\n")
    fans = [[3, 2, 1], [3, 1, 0], [0, 1, 4], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    np.testing.assert_array_equal(piece.faces, fans)


coordinate = st.floats(-1e6, 1e6, width=32)


@given(
    vertices=st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=3, max_size=12),
    data=st.data(),
)
def test_what_is_written_is_read_back(
    vertices: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    corner = st.integers(0, len(vertices) - 1)
    faces = data.draw(st.lists(st.lists(corner, min_size=3, max_size=6), min_size=1, max_size=8))
    glue = data.draw(st.sampled_from(["", " ", "\n"]))
    lines = [" ".join(map(repr, vertex)) for vertex in vertices]
    lines += [" ".join(map(str, [len(face), *face])) for face in faces]
    piece = read(f"OFF{glue}{len(vertices)} {len(faces)} 0\n" + "\n".join(lines))

    np.testing.assert_array_equal(piece.vertices, vertices)
    fans = [[face[0], *pair] for face in faces for pair in pairwise(face[1:])]
    np.testing.assert_array_equal(piece.faces, fans)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with OFF"),
        ("ply\nformat ascii 1.0\n", "does not begin with OFF"),
        ("OFF BINARY\n\0\0\0\3", "a binary one has to be converted"),
        ("OFF\n3 -1 0\n" + TRIANGLE, "does not begin with OFF"),
        (
            "OFF\n999999999999 1 0\n" + TRIANGLE,
            "too short for the 999999999999 vertices and 1 face",
        ),
        ("OFF\n3 999999999999 0\n" + TRIANGLE, "too short .* it is cut off or damaged"),
        ("OFF\n3 2 0\n" + TRIANGLE, "there are only 4 lines"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("1 0 0", "1 0"), "vertex 1 has fewer than three"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("1 0 0", "1 nan 0"), "vertex 1 .* not finite"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("1 0 0", "1 1e999 0"), "vertex 1 .* not finite"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("1 0 0", "1 x 0"), "something in it is no number"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("1 0 0", "1-2 0 0"), "something in it is no number"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "3 0 1 3"), "face 0 names a vertex that is"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "3 0 1 -1"), "face 0 names a vertex that is"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "3 0 1 .5"), "face 0 names a vertex that is"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "4 0 1 2"), "face 0 does not list as many"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "nan 0 1 2"), "face 0 does not list as many"),
        ("OFF\n3 1 0\n" + TRIANGLE.replace("3 0 1 2", "2 0 1 2"), "no face of three corners"),
        ("OFF\n3 0 0\n" + TRIANGLE, "no face of three corners"),
        ("OFF\n0 0 0\n", "no face of three corners"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ObjectError, match=rf"a\.off .*{message}"):
        read(text)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_an_object_error_or_still_a_mesh(data: st.DataObject) -> None:
    text = bytearray(
        f"OFF5 2 0\n# faces\n0.5 0 1e2\n-1 0 0\n{TRIANGLE}4 0 1 2 3 255 0 0\n".encode()
    )
    for _ in range(data.draw(st.integers(1, 6))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(
            st.sampled_from(b"0123456789-+.eE \n\r#naifx\0\xff") | st.integers(0, 255)
        )
    del text[data.draw(st.integers(0, len(text))) :]
    try:
        piece = read(bytes(text))
    except ObjectError:
        return
    assert np.isfinite(piece.vertices).all()
    assert piece.faces.min() >= 0
    assert piece.faces.max() < len(piece.vertices)
