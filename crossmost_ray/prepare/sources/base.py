"""What a source yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Object:
    """One thing in the world before it is a row: what is known of it, and where its mesh lies."""

    object_id: str
    """The source's own identifier, prefixed by the source's name."""

    caption: str
    """Its name in the catalogue."""

    kind: str
    """How its source is read; a key of `SOURCES`."""

    source: str
    """Name of its catalogue."""

    author: str
    license: str

    archive: str
    """Path of the archive that holds its mesh."""

    model: str
    """Path of the mesh inside the archive."""

    size: tuple[float, float, float]
    """Width (x), height (y) and depth (z) in centimetres."""

    rotation: tuple[float, ...] | None = None
    """Nine numbers of a matrix, row by row, that turns the mesh upright; None for none."""
