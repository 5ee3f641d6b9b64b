"""Redwood's object scans in, their objects, clouds and video frames out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crossmost_ray.config import ConfigError, read_list, resolve_path
from crossmost_ray.data.classes import match_labels
from crossmost_ray.prepare.config import Redwood
from crossmost_ray.prepare.sources.base import Content, Object
from crossmost_ray.prepare.sources.lists import read_json, read_splits, require_folder
from crossmost_ray.prepare.sources.scans import load_scan

HINT = "docs/sources/redwood.md says what to download, how to make the rest, and where it goes"


def list_objects(config: Redwood) -> Iterator[Object]:
    """Lists the scans that a split list and a category name.

    A scan that no category names is of no class that anyone could be asked for, and left out. A
    class is spelled as in the package's list `redwood`, if that has it.

    Raises:
        ConfigError: If a list, the categories or a folder is missing or wrong, two categories name
            one scan, or the lists and the categories have no scan in common.
    """
    clouds, images = resolve_path(config.path), resolve_path(config.images)
    require_folder(clouds, HINT)
    require_folder(images, HINT)
    categories = resolve_path(config.categories)
    label_of = _labels_by_scan(categories)
    lists = {split: clouds.parent / f"{split}_set80.txt" for split in ("train", "test")}
    listed = read_splits(lists, example="00033", hint=HINT)
    known = [entry for entry in listed if entry.name in label_of]
    if not known:
        raise ConfigError(
            f"{categories} names none of the scans of {' and '.join(map(str, lists.values()))}; "
            f"ids must be written alike, such as {listed[0].name}"
        )
    for entry in known:
        yield Object(
            object_id=f"{config.name}/{entry.name}",
            source=config.name,
            split=entry.split,
            captions=(f"scan {entry.name}",),
            label=label_of[entry.name],
            place={
                "cloud": str(clouds / f"{entry.name}.npy"),
                "frames": str(images / entry.name),
            },
        )


def load(item: Object, config: Redwood) -> Content:
    """Loads a cloud, and frames of its video from beginning to end, if there are any.

    Raises:
        ObjectError: If the cloud or a frame is broken, or the cloud is missing.
    """
    return load_scan(item, config.max_views)


def _labels_by_scan(path: Path) -> dict[str, str | None]:
    """The class of each scan of a JSON file of ids by class."""
    table = read_json(path, HINT)
    if not isinstance(table, dict):
        raise ConfigError(f'{path} must hold ids by class, such as {{"chair": ["00033"]}}')
    owners: dict[str, str] = {}
    for category, scans in table.items():
        if not isinstance(scans, list) or not all(isinstance(scan, str) for scan in scans):
            raise ConfigError(
                f"'{category}' of {path} must be a list of texts, such as [\"00033\"]"
            )
        for scan in scans:
            other = owners.setdefault(scan, category)
            if other != category:
                raise ConfigError(
                    f"{path} names {scan} in '{other}' and in '{category}'; "
                    "a scan is of one class: remove it from the other"
                )
    spelled = match_labels(list(owners.values()), read_list("classes", "redwood"))
    return dict(zip(owners, spelled, strict=True))
