"""Every knob of the preparation, in the order the data meets them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from crossmost_ray.config import STRICT, Classes, Count, Name, Natural, check_classes

Share = Annotated[float, Field(gt=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]

Axes = Annotated[str, Field(pattern=r"^([+-]?[xyz]){3}$")]
"""Where a source's axes go: "yzx" takes its y for x, its z for y (up) and its x for z (front). A
minus turns an axis round, as in "x-zy"."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One collection of objects, and what is known of all of them."""

    name: Name
    """Prefix of the ids, and key of the class mapping."""

    path: str
    """File or folder that holds it."""

    axes: Axes = "xyz"
    """Turns the source's axes so that y points up and, where it has one, the front to +z."""

    unit: str = "unknown"
    """Of its lengths, for the manifest: every cloud is normalised into the unit sphere."""

    split: Name | None = None
    """Dataset folder of its objects; None takes the source's own splits, such as train and test."""

    halves: bool = False
    """Parts its labelled objects into `<split>_a` and `<split>_b`, by a hash of their ids, and puts
    those without a label into `<split>_other`."""

    teach_labels: bool = False
    """Whether an object's label is its last caption, for pre-training."""

    title: str | None = None
    """How the attribution names it."""

    license: str | None = None
    """Under which its objects are taken; a key of `licenses`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweetHome3D(SourceConfig):
    """A furniture catalogue: an .sh3f file, or the application's own jar."""

    kind: Literal["sweethome3d"]
    unit: str = "cm"
    package: str
    """Debian package to install where `path` is missing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelNetOff(SourceConfig):
    """ModelNet40 or ModelNet10 as meshes: `path/<class>/<split>/<name>.off`."""

    kind: Literal["modelnet_off"]
    axes: Axes = "yzx"
    images: str | None = None
    """Folder of rendered views, `images/<split>/<class>/<name>_<number>.png`, if there is one."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelNetText(SourceConfig):
    """`modelnet40_normal_resampled`: text files of x, y, z and a normal, and lists of names."""

    kind: Literal["modelnet_text"]
    num_classes: Literal[10, 40] = 40
    """Which lists: modelnet10_train.txt, or modelnet40_train.txt."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelNetHdf5(SourceConfig):
    """`modelnet40_ply_hdf5_2048`: lists of HDF5 files, and views in `image_data_*` beside them."""

    kind: Literal["modelnet_hdf5"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelNetPickle(SourceConfig):
    """ULIP's `modelnet40_<split>_8192pts_fps.dat` with the lists beside them."""

    kind: Literal["modelnet_pickle"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScanObjectNN(SourceConfig):
    """ScanObjectNN's HDF5 files: those of the release, or those that list files name."""

    kind: Literal["scanobjectnn"]
    variant: Literal["object_only", "with_background", "hardest"] = "object_only"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShapeNet55(SourceConfig):
    """ShapeNet-55 in ULIP's layout: lists, clouds, taxonomy.json and 30 x 2 rendered images."""

    kind: Literal["shapenet55"]
    clouds: str | None = None
    """Folder of the .npy clouds; None takes `path/shapenet_pc`."""

    images: str | None = None
    """Folder of the images; None takes `path/rendered_images`."""

    depth: bool = True
    """Whether the 30 depth images are views, too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Redwood(SourceConfig):
    """Redwood's scans with video frames: clouds `path/<id>.npy`, frames `images/<id>/*`."""

    kind: Literal["redwood"]
    images: str
    categories: str
    """JSON file of ids by class."""

    max_views: Count = 60
    """Frames kept of a scan, evenly spread over the video."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CO3D(SourceConfig):
    """CO3D: clouds `path/<line>/pointcloud1.npy`, frames `images/<line>/images/*`, where a line
    of the lists is `<class>/<sequence>`."""

    kind: Literal["co3d"]
    axes: Axes = "yxz"
    images: str
    max_views: Count = 60
    """Frames kept of a sequence, evenly spread over the video."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Folder(SourceConfig):
    """A folder of one's own meshes or clouds, with or without class folders and photographs."""

    kind: Literal["folder"]
    class_folders: bool = False
    """Whether the first folder below `path` (or below train/ and test/) names the class."""

    labels: str | None = None
    """Table of one's own labels: CSV with the columns `file` (below `path`) and `label`, and, if it
    likes, `caption` and `split`."""

    images: str | None = None
    """Folder of photographs: those of `a/b.ply` are `images/a/b.*`, `images/a/b_*` and
    `images/a/b/*`."""

    max_views: Count = 60
    """Photographs kept of an object."""


AnySource = Annotated[
    SweetHome3D
    | ModelNetOff
    | ModelNetText
    | ModelNetHdf5
    | ModelNetPickle
    | ScanObjectNN
    | ShapeNet55
    | Redwood
    | CO3D
    | Folder,
    Field(discriminator="kind"),
]


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

    background: Byte = 144
    """Grey level behind the object: far from white objects and from black ones."""

    light: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Factor on the two lights that stand with the camera."""

    supersampling: Annotated[int, Field(ge=1, le=8)] = 3
    """Factor by which views are rendered larger, then reduced: no jagged edges."""

    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """Of the WebP codec."""

    least_foreground: Share = 0.004
    """Least part of a view's pixels that must differ from the background, or it is blank."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DepthConfig:
    """Views straight from bare points: ten projections onto a grid, nearer is darker."""

    resolution: Annotated[int, Field(ge=16, le=1024)] = 224
    """Side of a view in pixels."""

    grid: Annotated[int, Field(ge=8, le=512)] = 112
    """Cells along each side of the projection."""

    num_slices: Count = 8
    """Cells in depth."""


Views = Literal["auto", "photos", "render", "photos_and_render", "depth"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig:
    """Collections in, dataset folders out."""

    name: Name
    """Of the datasets together, for the manifest."""

    sources: Annotated[tuple[AnySource, ...], Field(min_length=1)]
    """Read in this order."""

    licenses: dict[str, str] = Field(default_factory=dict)
    """Address of each licence's text by its name."""

    class_mapping: str | None = None
    """YAML file that maps names to classes; None takes the sources' own labels."""

    classes: Classes | None = None
    """The classes in the order of the manifest; None takes the mapping's, or the labels found."""

    ignore_labels: bool = False
    """Leaves every label out."""

    output: str
    """Folder, or address such as s3://bucket/folder, that receives a folder for each dataset."""

    overwrite: bool = False
    """Replaces datasets of another preparation that lie in `output`."""

    num_points: Annotated[int, Field(ge=16)] = 2048
    """Points drawn of a mesh; of a cloud, the most that are kept."""

    views: Views = "auto"
    """auto: photographs where a source has them, else renders of a mesh, or depth views of bare
    points. render and depth never take photographs; photos_and_render puts renders after them."""

    render: RenderConfig = RenderConfig()
    """The camera ring."""

    depth: DepthConfig = DepthConfig()
    """Depth views."""

    photo_resolution: Annotated[int, Field(ge=16, le=4096)] = 256
    """Longest side in pixels to which photographs are reduced."""

    shard_mb: Annotated[float, Field(gt=0)] = 64.0
    """About how large a shard is, in megabytes: each is a unit of parallel work and reading."""

    compression_level: Annotated[int, Field(ge=1, le=22)] = 3
    """Of zstd, for the points."""

    seed: Natural = 0
    """With an object's id, the seed of its points."""

    limit: Count | None = None
    """Objects to read of each source, for a quick look; null for all."""

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one object may take; it is left out then."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"sources names {', '.join(repeated)} more than once")
        unknown = sorted({s.license for s in self.sources if s.license} - set(self.licenses))
        if unknown:
            raise ValueError(
                f"licenses lacks {', '.join(unknown)}: the attribution needs the address of each"
            )
        if self.classes is not None:
            check_classes(self.classes, "classes")
        undecided = [s.name for s in self.sources if s.halves and s.split is None]
        if undecided:
            raise ValueError(f"sources {', '.join(undecided)}: `halves` needs a `split` to part")

    def source(self, name: str) -> SourceConfig:
        """The source of this name."""
        return next(source for source in self.sources if source.name == name)


def kind_of(source: SourceConfig) -> str:
    """Key of `SOURCES` under which a source's reader is found."""
    kind: str = getattr(source, "kind")  # noqa: B009
    return kind
