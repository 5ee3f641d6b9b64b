"""Every knob of the preparation, in the order the data meets them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from crossmost_ray.config import STRICT, Count, Name, Natural

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CatalogueConfig:
    """One collection of meshes and what is known of all its objects."""

    name: Name
    """Prefix of the ids and key of the class mapping."""

    kind: Literal["sweethome3d"] = "sweethome3d"
    """How it is read; a key of `prepare.sources.SOURCES`."""

    path: str
    """The file that holds it."""

    domain: Literal["source", "target"]
    """Source objects pre-train; target objects are fixed to half a or b by a hash of their id."""

    license: str
    """Under which its models are taken; a key of `licenses`."""

    title: str
    """How the attribution names it."""

    package: str
    """Debian package to install where `path` is missing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RenderConfig:
    """The ring of cameras. An object's distance is the least at which all its views fit."""

    resolution: Annotated[int, Field(ge=16, le=1024)] = 96
    """Side of a view in pixels."""

    num_views: Count = 12
    """Cameras at equal steps of azimuth; azimuth 0 faces the object's front (+z)."""

    first_azimuth: float = 15.0
    """Of the first camera, in degrees: with 0, a door would be seen exactly edge-on."""

    elevations: tuple[Annotated[float, Field(ge=-89, le=89)], ...] = (15.0, 35.0)
    """Degrees above the horizon, taken in turn around the ring."""

    field_of_view: Annotated[float, Field(gt=1, lt=120)] = 30.0
    """Vertical opening of the camera, in degrees."""

    fill: Share = 0.88
    """Part of the frame's side that the widest view spans."""

    background: Annotated[int, Field(ge=0, le=255)] = 144
    """Grey level behind the object: far from white objects and from black ones."""

    supersampling: Annotated[int, Field(ge=1, le=8)] = 3
    """Factor by which views are rendered larger, then reduced: no jagged edges."""

    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of the WebP codec."""

    least_foreground: Share = 0.004
    """Least part of a view's pixels that must differ from the background, or it is blank."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig:
    """Catalogues in, dataset folders out."""

    name: Name
    """Of the collection of datasets, for the manifest."""

    catalogues: Annotated[tuple[CatalogueConfig, ...], Field(min_length=1)]
    """Read in this order."""

    licenses: dict[str, str]
    """Address of each licence's text by its name."""

    classes: str
    """YAML file that maps catalogue names to classes."""

    output: str
    """Folder that receives one folder a dataset, the attribution and the rejects."""

    num_points: Annotated[int, Field(ge=16)] = 2048
    """Points of a cloud."""

    render: RenderConfig = RenderConfig()
    """The camera ring."""

    shard_mb: Annotated[float, Field(gt=0)] = 0.5
    """Size at which a shard is closed, in megabytes: each is a unit of parallel reading."""

    seed: Natural = 0
    """With an object's id, the seed of its points."""

    limit: Count | None = None
    """Objects to read of each catalogue, for a quick look; null for all."""

    def __post_init__(self) -> None:
        names = [catalogue.name for catalogue in self.catalogues]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"catalogues names {', '.join(repeated)} more than once")
        unknown = sorted({c.license for c in self.catalogues} - set(self.licenses))
        if unknown:
            raise ValueError(
                f"licenses lacks {', '.join(unknown)}: the attribution needs the address of each"
            )
