"""CO3D's video sequences in, their objects, clouds and frames out."""

from __future__ import annotations

from collections.abc import Iterator

from crossmost_ray.config import read_list, resolve_path
from crossmost_ray.data.classes import match_labels
from crossmost_ray.prepare.config import CO3D
from crossmost_ray.prepare.sources.base import Content, Object
from crossmost_ray.prepare.sources.lists import read_splits, require_folder
from crossmost_ray.prepare.sources.scans import load_scan

HINT = "docs/sources/co3d.md says what to download, how to make the rest, and where it goes"


def list_objects(config: CO3D) -> Iterator[Object]:
    """Lists the sequences of both splits.

    CO3D runs the words of a category together; classes are spelled as in the package's list
    `co3d`, and a category that the list lacks keeps its name. A sequence without frames stays:
    views of it can be made from its points.

    Raises:
        ConfigError: If a list or a folder is missing or wrong.
    """
    clouds, images = resolve_path(config.path), resolve_path(config.images)
    require_folder(clouds, HINT)
    require_folder(images, HINT)
    lists = {split: clouds.parent / f"{split}_set_80.txt" for split in ("train", "test")}
    listed = read_splits(lists, example="teddybear/34_1479_4753", hint=HINT)
    names = [entry.name.split("/") for entry in listed]
    labels = match_labels([category for category, _ in names], read_list("classes", "co3d"))
    for entry, (_, sequence), label in zip(listed, names, labels, strict=True):
        yield Object(
            object_id=f"{config.name}/{entry.name}",
            source=config.name,
            split=entry.split,
            captions=(f"sequence {sequence}",),
            label=label,
            place={
                "cloud": str(clouds / entry.name / "pointcloud1.npy"),
                "frames": str(images / entry.name / "images"),
            },
        )


def load(item: Object, config: CO3D) -> Content:
    """Loads a cloud, and frames of its video from beginning to end, if there are any.

    Raises:
        ObjectError: If the cloud or a frame is broken, or the cloud is missing.
    """
    return load_scan(item, config.max_views)
