"""What may be wrong with shards' axes and colours: every convention that an audit tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

UP_AXES = ("+y", "-y", "+z", "-z", "+x", "-x")

IMAGE_CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as stored": lambda images: images,
    "channels swapped": lambda images: images.flip(-3),
    "upside down": lambda images: images.flip(-2),
    "inverted": lambda images: 255 - images,
}
"""What is done to (..., 3, S, S) uint8 before a model sees them; doing it twice undoes it."""

IMAGE_CURES = {
    "channels swapped": "save them as RGB (OpenCV reads and writes BGR)",
    "upside down": "save them with the top row first",
    "inverted": "save 255 minus each value",
}


def sorted_ups(model_up: str) -> list[str]:
    """Lists the axes that may point up, the model's own first: what is stored wins a tie."""
    return sorted(UP_AXES, key=lambda up: up != f"+{model_up}")


def _unit(axis: str) -> npt.NDArray[np.float64]:
    unit = np.zeros(3)
    unit["xyz".index(axis[-1])] = -1 if axis[0] == "-" else 1
    return unit


def turn_up(up: str, model_up: str) -> npt.NDArray[np.float64]:
    """Builds the shortest turn that brings a stored axis to where the model expects up.

    The turn leaves the front open, but models are trained on clouds turned at random about the up
    axis. Where up only has to be turned round, the axis after it (z for y) stays.

    Args:
        up: Stored axis, such as "+z".
        model_up: x, y or z.

    Returns:
        (3, 3) of -1, 0 and 1, determinant 1, for `points @ turn.T`.
    """
    source, target = _unit(up), _unit(model_up)
    if (source == target).all():
        return np.eye(3)
    if (source == -target).all():
        return 2 * np.diag(_unit("xyz"[("xyz".index(model_up) + 1) % 3])) - np.eye(3)
    across = np.cross(source, target)
    # Source to target, target to minus source, and the axis of the turn stays.
    return np.outer(target, source) - np.outer(source, target) + np.outer(across, across)


def mirror_of(model_up: str) -> npt.NDArray[np.float64]:
    """Builds the (3, 3) mirror of the axis before up: x for y. All mirrors whose plane holds the up
    axis are the same but for a turn about it."""
    return np.eye(3) - 2 * np.diag(_unit("xyz"[("xyz".index(model_up) + 2) % 3]))


def write_axes(matrix: npt.NDArray[np.floating[Any]]) -> str:
    """Writes a matrix of -1, 0 and 1 as a source's `axes`, such as "yzx" or "x-zy"."""
    letters = []
    for row in matrix:
        place = int(np.abs(row).argmax())
        letters.append(("-" if row[place] < 0 else "") + "xyz"[place])
    return "".join(letters)


# The model's answers -----------------------------------------------------------------------------
