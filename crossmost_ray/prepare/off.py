"""Bytes of an OFF file in, a mesh out."""

from __future__ import annotations

import contextlib
import re

import numpy as np
from numpy.typing import NDArray

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Floats, Indices, Material, Mesh, Piece

# The keyword may stand alone, before the counts, or glued to them, as in ModelNet's "OFF490 518 0";
# its prefixes announce colours, normals and the like behind each vertex. Edges are never listed.
HEADER = re.compile(
    rb"\s*(?:ST)?C?N?OFF\s*(\d{1,12})[^\S\n]+(\d{1,12})(?:[^\S\n]+\d+)?[^\S\n]*(?:\n|\Z)"
)
COMMENT = re.compile(rb"#[^\r\n]*")

LEAST_VERTEX, LEAST_FACE = len(b"0 0 0\n"), len(b"0\n")
"""Bytes that the shortest vertex and the shortest face take."""

NEWLINE = ord("\n")
BLANK = np.isin(np.arange(256), list(b" \t\n\v\f\r"))


def read_off(data: bytes, path: str) -> Mesh:
    """Reads an OFF file of text: a line for each vertex, then one for each face.

    Lines may be blank, hold comments behind #, and go on behind what is needed: normals and colours
    of vertices, and colours of faces, are skipped. Faces of more than three corners become fans
    around their first corner, which is right for convex ones. Faces of two corners or fewer are
    dropped.

    Memory grows with the size of the file (twenty times as much at worst), and not with what its
    header promises.

    Args:
        data: The whole file.
        path: Its name, for messages.

    Returns:
        One piece, grey, in the file's own axes and unit.

    Raises:
        ObjectError: If the file is no OFF file, is binary or cut short, holds something that is no
            finite number, names a vertex that is not there, or holds no face.
    """
    text = COMMENT.sub(b"", data).replace(b"\r", b"\n")
    header = HEADER.match(text)
    if header is None:
        raise ObjectError(
            f"{path} does not begin with OFF and the numbers of its vertices and faces, as OFF "
            "files of text do; a binary one has to be converted"
        )
    num_vertices, num_faces = int(header[1]), int(header[2])
    body = text[header.end() :]
    promised = f"the {num_vertices} vertices and {num_faces} faces that its header promises"
    # One more than there are: the last line may lack its end.
    if LEAST_VERTEX * num_vertices + LEAST_FACE * num_faces > len(body) + 1:
        raise ObjectError(f"{path} is too short for {promised}: it is cut off or damaged")
    try:
        numbers, first, length = _lines(body, num_vertices + num_faces)
        vertices = _vertices(numbers, first[:num_vertices], length[:num_vertices])
        faces = _triangles(numbers, first[num_vertices:], length[num_vertices:], num_vertices)
    except ValueError as wrong:
        raise ObjectError(f"{path} does not hold {promised}: {wrong}") from None
    if len(faces) == 0:
        raise ObjectError(f"{path} holds no face of three corners or more")
    return Mesh((Piece(vertices, faces, Material()),))


def _lines(text: bytes, count: int) -> tuple[Floats, Indices, Indices]:
    """Parses the first lines of a text, blank ones aside.

    Args:
        text: Numbers between white space.
        count: L, lines wanted.

    Returns:
        Their numbers one after another; and (L,), where each line begins among them, and (L,), how
        many it holds.

    Raises:
        ValueError: If there are fewer lines, or one holds something that is no number.
    """
    raw = np.frombuffer(text, np.uint8)
    blank = BLANK[raw]
    words = np.flatnonzero(~blank & np.concatenate([[True], blank])[:-1])
    line_of = np.searchsorted(np.flatnonzero(raw == NEWLINE), words)
    first = np.flatnonzero(np.diff(line_of, prepend=-1))
    if len(first) < count:
        raise ValueError(f"there are only {len(first)} lines")
    num_words, end = len(words), len(text)
    if len(first) > count:
        num_words = int(first[count])
        end = int(words[num_words])
    numbers = _numbers(text[:end], num_words)
    return numbers, first[:count], np.diff(first[:count], append=num_words)


def _numbers(text: bytes, count: int) -> Floats:
    """(count,): as many numbers as there are words."""
    # NumPy takes a text without a word for the number -1.
    numbers = np.empty(0)
    if count:
        # At a word that is no number NumPy raises; its older versions stop there, and warn.
        with contextlib.suppress(ValueError):
            numbers = np.fromstring(text, sep=" ")
    if len(numbers) != count:
        raise ValueError("something in it is no number")
    return numbers


def _vertices(numbers: Floats, first: Indices, length: Indices) -> Floats:
    """(P, 3): the first three numbers of each line."""
    _refuse(length < 3, "vertex {} has fewer than three coordinates")
    vertices = numbers[first[:, None] + np.arange(3)]
    _refuse(~np.isfinite(vertices).all(axis=1), "vertex {} has a coordinate that is not finite")
    return vertices


def _triangles(numbers: Floats, first: Indices, length: Indices, num_vertices: int) -> Indices:
    """(F, 3) vertices of the fans: the first number of each line says how many corners follow."""
    corners = numbers[first]
    # Compared before they are cast: a count may be NaN, or beyond every integer.
    counts = (corners >= 0) & (corners < length) & (corners == np.floor(corners))
    _refuse(~counts, "face {} does not list as many corners as it says")
    fan = np.maximum(corners.astype(np.int64) - 2, 0)
    centre = np.repeat(first + 1, fan)
    step = np.arange(len(centre)) - np.repeat(np.cumsum(fan) - fan, fan)
    stated = numbers[np.stack([centre, centre + step + 1, centre + step + 2], axis=-1)]
    known = (stated >= 0) & (stated < num_vertices) & (stated == np.floor(stated))
    if not known.all():
        unknown = np.repeat(np.arange(len(fan)), fan)[~known.all(axis=1)][0]
        raise ValueError(f"face {unknown} names a vertex that is not there")
    return stated.astype(np.int64)


def _refuse(wrong: NDArray[np.bool_], message: str) -> None:
    """Raises ValueError with the index of the first entry that is wrong."""
    if wrong.any():
        raise ValueError(message.format(int(wrong.argmax())))
