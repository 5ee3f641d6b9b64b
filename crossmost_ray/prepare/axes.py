"""A source's `axes` in, the matrix that turns its points out."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

AXES = re.compile(r"([+-]?)([xyz])" * 3)


def axes_matrix(axes: str) -> NDArray[np.float32]:
    """Builds the matrix that turns a source's points, which are rows: `points @ matrix.T`.

    Args:
        axes: Three of the source's axes, each once, for our x, y and z: "yzx" takes its y for x,
            its z for y and its x for z. A minus turns an axis round, as in "x-zy".

    Returns:
        (3, 3) of -1, 0 and 1: row k holds the source's axis that becomes our axis k. Its
        determinant is 1 for a rotation, and -1 where `axes` mirrors the object as well: a mesh's
        faces then point inwards, until their corners are listed the other way round.

    Raises:
        ValueError: If `axes` is not of this form or names an axis twice.
    """
    match = AXES.fullmatch(axes)
    if match is None:
        raise ValueError(
            f"axes {axes!r} must be three of x, y and z, each with or without a minus, "
            "such as 'yzx' or 'x-zy'"
        )
    signs, letters = match.groups()[::2], match.groups()[1::2]
    if len(set(letters)) < 3:
        raise ValueError(f"axes {axes!r} must name x, y and z once each, such as 'yzx'")
    matrix = np.zeros((3, 3), np.float32)
    for row, (sign, letter) in enumerate(zip(signs, letters, strict=True)):
        matrix[row, "xyz".index(letter)] = -1 if sign == "-" else 1
    return matrix
