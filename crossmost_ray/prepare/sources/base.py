"""What a source yields: objects, and what one of them holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmost_ray.prepare.mesh import Mesh


@dataclass(frozen=True)
class Object:
    """One thing in the world before it is a row: what is known of it, and where it lies."""

    object_id: str
    """The source's own identifier, prefixed by the source's name: "modelnet/chair_0001"."""

    source: str
    """Name of its source in the config."""

    split: str
    """The source's own split, such as train or test; "all" where it has none."""

    captions: tuple[str, ...]
    """Its own name first, names from a taxonomy after it, the most general last. None is blank."""

    label: str | None = None
    """Its class in the source, or None."""

    author: str | None = None
    """Who made it, where that is known."""

    place: dict[str, Any] = field(default_factory=dict)
    """What the source's own `load` needs to find it; nobody else reads it. Plain values."""


@dataclass(frozen=True)
class Content:
    """What an object holds, in the axes and the unit of its source: a mesh or points, and images.

    Exactly one of `mesh` and `points` is given.
    """

    mesh: Mesh | None = None

    points: NDArray[np.float32] | None = None
    """(N, 3)."""

    colors: NDArray[np.uint8] | None = None
    """(N, 3) sRGB of `points`, where the source has them."""

    photos: tuple[bytes, ...] = ()
    """Encoded images as the source has them, in a fixed order; empty where it has none."""
