"""Which collections can be read: a kind, how its objects are listed, and how one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crossmost_ray.prepare.sources import (
    co3d,
    folder,
    modelnet,
    redwood,
    scanobjectnn,
    shapenet,
    sweethome3d,
)
from crossmost_ray.prepare.sources.base import Content, Object


@dataclass(frozen=True)
class Source:
    """How one kind of collection is read; both functions take the source's own config class."""

    list_objects: Callable[[Any], Iterator[Object]]
    """Lists the objects, not yet what they hold; raises ConfigError for a file it cannot read."""

    load: Callable[[Object, Any], Content]
    """Loads one object; raises ObjectError if it cannot become a row."""


SOURCES: dict[str, Source] = {
    "sweethome3d": Source(sweethome3d.list_objects, sweethome3d.load),
    "modelnet_off": Source(modelnet.list_off, modelnet.load_off),
    "modelnet_text": Source(modelnet.list_text, modelnet.load_text),
    "modelnet_hdf5": Source(modelnet.list_hdf5, modelnet.load_hdf5),
    "modelnet_pickle": Source(modelnet.list_pickle, modelnet.load_pickle),
    "scanobjectnn": Source(scanobjectnn.list_objects, scanobjectnn.load),
    "shapenet55": Source(shapenet.list_objects, shapenet.load),
    "redwood": Source(redwood.list_objects, redwood.load),
    "co3d": Source(co3d.list_objects, co3d.load),
    "folder": Source(folder.list_objects, folder.load),
}
"""A key for each `kind` of `prepare.config.AnySource`."""
