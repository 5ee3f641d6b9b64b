"""Which collections can be read: a name and the functions that list its objects and load one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crossmost_ray.prepare.config import CatalogueConfig
from crossmost_ray.prepare.mesh import Mesh
from crossmost_ray.prepare.sources import sweethome3d
from crossmost_ray.prepare.sources.base import Object


@dataclass(frozen=True)
class Source:
    """How one kind of collection is read."""

    read_objects: Callable[[CatalogueConfig], Iterator[Object]]
    """Lists the objects without their meshes; raises ConfigError for a file it cannot read."""

    load_mesh: Callable[[Object], Mesh]
    """Loads one mesh, y upwards; raises MeshError if the object cannot become a row."""


SOURCES: dict[str, Source] = {
    "sweethome3d": Source(sweethome3d.read_catalogue, sweethome3d.load_mesh),
}
