"""ShapeNet-55 in ULIP's layout in, its objects, clouds and renders out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.prepare.arrays import read_colored_npy
from crossmost_ray.prepare.config import ShapeNet55
from crossmost_ray.prepare.photos import list_photos, read_photos
from crossmost_ray.prepare.sources.base import Content, Object
from crossmost_ray.prepare.sources.lists import read_json, read_splits, require_folder

HINT = (
    "download the folder shapenet-55 of ULIP's data and set the source's `path` to it; "
    "docs/sources/shapenet55.md says what lies where"
)

MODEL_FILE = re.compile(r"(\d+)-(.+)\.npy")

DEGREES = range(0, 360, 12)
"""Azimuths of the renders."""

RENAMED = {"display": "monitor", "vessel": "ship", "ashcan": "trashcan"}
"""Names of the taxonomy that are hardly anyone's, and what CrossMoST captions with instead."""


def list_objects(config: ShapeNet55) -> Iterator[Object]:
    """Lists the objects of both splits, with the names of their synset for captions.

    Raises:
        ConfigError: If a list, the taxonomy or a folder is missing or wrong, a line is no file name
            of a model, or of a synset that the taxonomy lacks.

    Source:
        The layout and the names are those of ULIP (Xue et al., 2023).
    """
    root = resolve_path(config.path)
    clouds = resolve_path(config.clouds) if config.clouds else root / "shapenet_pc"
    images = resolve_path(config.images) if config.images else root / "rendered_images"
    require_folder(clouds, HINT)
    if config.images:
        # The default one may be missing: views are then made from the points.
        require_folder(images, HINT)
    taxonomy = root / "taxonomy.json"
    names = _names_by_synset(taxonomy)
    example = "02691156-1a04e3eab45ca15dd86060f189eb133.npy"
    lists = {split: root / f"{split}.txt" for split in ("train", "test")}
    for listed in read_splits(lists, example=example, hint=HINT):
        match = MODEL_FILE.fullmatch(listed.name)
        if match is None:
            raise ConfigError(f"{listed.place} is {listed.name!r}, expected such as {example}")
        synset = match.group(1)
        if synset not in names:
            raise ConfigError(f"{listed.place} is of synset {synset}, which {taxonomy} lacks")
        model = listed.name.removesuffix(".npy")
        yield Object(
            object_id=f"{config.name}/{model}",
            source=config.name,
            split=listed.split,
            captions=names[synset],
            label=names[synset][0],
            place={"cloud": str(clouds / listed.name), "images": str(images / model)},
        )


def load(item: Object, config: ShapeNet55) -> Content:
    """Loads a cloud, and the renders that there are: 30 in colour, then 30 of depth.

    Raises:
        ObjectError: If the cloud or an image is broken, or the cloud is missing.
    """
    points, colors = read_colored_npy(Path(item.place["cloud"]))
    folder = Path(item.place["images"])
    there = {file.name: file for file in list_photos(folder)}
    wanted = [
        f"{folder.name}_r_{degree:03d}{kind}.png"
        for kind in (("", "_depth0001") if config.depth else ("",))
        for degree in DEGREES
    ]
    photos = read_photos([there[name] for name in wanted if name in there])
    return Content(points=points, colors=colors, photos=photos)


def _names_by_synset(path: Path) -> dict[str, tuple[str, ...]]:
    """The names of each synset in the order of the taxonomy."""
    taxonomy = read_json(path, HINT)
    if not isinstance(taxonomy, list):
        raise ConfigError(f"{path} must hold a list of synsets")
    names = {}
    for number, entry in enumerate(taxonomy, start=1):
        synset, listed = (
            (entry.get("synsetId"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(synset, str) or not isinstance(listed, str) or not listed.strip(" ,"):
            raise ConfigError(
                f"entry {number} of {path} must have a synsetId such as '02691156' and a name such "
                "as 'airplane,aeroplane,plane'"
            )
        synonyms = (name.strip() for name in listed.split(","))
        renamed = (RENAMED.get(name, name) for name in synonyms if name)
        # A dict keeps the order and drops what a new name repeats.
        names[synset] = tuple(dict.fromkeys(renamed))
    return names
