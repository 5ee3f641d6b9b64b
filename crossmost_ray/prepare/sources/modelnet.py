"""ModelNet in any of the four forms in which it is handed on in, its objects out."""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.prepare.config import (
    ModelNetHdf5,
    ModelNetOff,
    ModelNetPickle,
    ModelNetText,
)
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import read_mesh
from crossmost_ray.prepare.hdf5 import listed_files, read_lines
from crossmost_ray.prepare.photos import read_photos
from crossmost_ray.prepare.pickled import read_columns
from crossmost_ray.prepare.sources.base import Content, Object
from crossmost_ray.prepare.sources.scanobjectnn import list_rows, load_row

SPLITS = ("train", "test")

MAX_OFF_BYTES = 500_000_000
MAX_TEXT_BYTES = 64_000_000
"""A cloud of 10,000 points takes 600 kB."""

OBJECT_NAME = re.compile(r"([A-Za-z0-9][\w-]*)_\d+", re.ASCII)
VIEW_NAME = re.compile(r"(.+)_([0-9]{1,6})\.png")

OFF_REMEDY = (
    "download ModelNet40.zip or ModelNet10.zip from https://modelnet.cs.princeton.edu, unpack it "
    "and set `path` to the folder that holds airplane/ or bathtub/"
)
TEXT_REMEDY = (
    "download https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip, unpack it "
    "and set `path` to its folder modelnet40_normal_resampled"
)
HDF5_REMEDY = (
    "download https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip, unpack it "
    "and set `path` to its folder modelnet40_ply_hdf5_2048"
)
PICKLE_REMEDY = (
    "download the folder modelnet40_normal_resampled from "
    "https://huggingface.co/datasets/SFXX/ulip and set `path` to it"
)


def list_off(config: ModelNetOff) -> Iterator[Object]:
    """Lists `path/<class>/<split>/<name>.off`, class by class.

    Raises:
        ConfigError: If there is none, or no folder of views where one is named.
    """
    folder = resolve_path(config.path)
    if config.images is not None and not resolve_path(config.images).is_dir():
        raise ConfigError(
            f"images of the source '{config.name}' is no folder: {resolve_path(config.images)}; "
            "leave it out where there are no rendered views"
        )
    files = [
        file
        for split in SPLITS
        for file in folder.glob(f"*/{split}/*.off")
        # The archives hold hidden files of macOS that are called like meshes.
        if not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise ConfigError(f"{folder} holds no <class>/<split>/<name>.off; {OFF_REMEDY}")
    for file in sorted(files):
        split, class_name = file.parts[-2], file.parts[-3]
        yield Object(
            object_id=f"{config.name}/{file.stem}",
            source=config.name,
            split=split,
            captions=(_in_words(file.stem),),
            label=_in_words(class_name),
            place={"class": class_name, "split": split, "name": file.stem},
        )


def load_off(item: Object, config: ModelNetOff) -> Content:
    """Reads a mesh, z upwards, and the views `images/<split>/<class>/<name>_<number>.png`.

    Raises:
        ObjectError: If it cannot be read.
    """
    class_name, split, name = (item.place[key] for key in ("class", "split", "name"))
    file = resolve_path(config.path) / class_name / split / f"{name}.off"
    views: Sequence[Path] = ()
    if config.images is not None:
        views = _views_by_name(resolve_path(config.images) / split / class_name).get(name, ())
    files = {str(file): _read(file, MAX_OFF_BYTES)}
    return Content(mesh=read_mesh(str(file), files.get), photos=read_photos(views))


def list_text(config: ModelNetText) -> Iterator[Object]:
    """Lists the names in `modelnet40_train.txt` and `modelnet40_test.txt`, or modelnet10's.

    Raises:
        ConfigError: If a list is missing, or holds a name without a class.
    """
    for split in SPLITS:
        yield from _named_objects(config, config.num_classes, split, TEXT_REMEDY)


def load_text(item: Object, config: ModelNetText) -> Content:
    """Reads the points of `path/<class>/<name>.txt`, y upwards, without their normals.

    Raises:
        ObjectError: If the file is missing or damaged.
    """
    file = resolve_path(config.path) / item.place["class"] / f"{item.place['name']}.txt"
    data = _read(file, MAX_TEXT_BYTES)
    try:
        text = io.StringIO(data.decode("ascii"))
        points = np.loadtxt(
            text, np.float32, delimiter=",", usecols=(0, 1, 2), ndmin=2, comments=None
        )
    except ValueError as wrong:
        raise ObjectError(f"{file} does not hold lines of x,y,z,nx,ny,nz: {wrong}") from None
    if len(points) == 0 or not np.isfinite(points).all():
        raise ObjectError(f"{file} holds no points, or a coordinate that is not finite")
    return Content(points=points)


def list_hdf5(config: ModelNetHdf5) -> Iterator[Object]:
    """Lists the rows of the files that `train_files.txt` and `test_files.txt` name.

    Raises:
        ConfigError: If a list or a file of it is missing or damaged, or a label has no class.
    """
    folder = resolve_path(config.path)
    classes = [_in_words(name) for name in _class_names(folder / "shape_names.txt", HDF5_REMEDY)]
    for split in SPLITS:
        for file in listed_files(folder / f"{split}_files.txt", HDF5_REMEDY):
            # The pictures of ply_data_train0.h5 lie in image_data_train0/.
            views = file.with_name(file.stem.replace("ply", "image"))
            yield from list_rows(config, split, file, classes, views, _names_of_rows(file))


def load_hdf5(item: Object, config: ModelNetHdf5) -> Content:
    """Reads one row of an HDF5 file, y upwards, and its pictures if there are any.

    Raises:
        ObjectError: If it cannot be read.
    """
    return load_row(item)


def list_pickle(config: ModelNetPickle) -> Iterator[Object]:
    """Lists what `modelnet40_train.txt` and `modelnet40_test.txt` say the pickles hold.

    A split is left out if its pickle is not there: each can be downloaded alone.

    Raises:
        ConfigError: If there is no pickle at all, or a list is missing or holds a wrong name.
    """
    splits = [split for split in SPLITS if _pickle_of(config, split).is_file()]
    if not splits:
        raise ConfigError(
            f"{resolve_path(config.path)} holds neither {_pickle_of(config, 'train').name} nor "
            f"{_pickle_of(config, 'test').name}; {PICKLE_REMEDY}"
        )
    for split in splits:
        yield from _named_objects(config, 40, split, PICKLE_REMEDY)


def load_pickle(item: Object, config: ModelNetPickle) -> Content:
    """Takes one cloud, y upwards, out of a split's pickle.

    The pickle is read once in each process and kept as (8192, 3) clouds: 1.0 GB for the train
    split, 0.25 GB for the test split, and twice that while it is read. Run no more processes on a
    machine than its memory holds.

    Raises:
        ObjectError: If the pickle cannot be read or asks for anything to be run, if it has no such
            row, or if the row's label is not that of the name in the list.
    """
    file, row = _pickle_of(config, item.place["split"]), item.place["row"]
    columns = _clouds_and_labels(str(file))
    if isinstance(columns, ObjectError):
        raise columns
    clouds, labels = columns
    if row >= len(clouds):
        raise ObjectError(f"{file} holds {len(clouds)} clouds, fewer than its list has names")
    if labels[row] != item.place["index"]:
        raise ObjectError(
            f"row {row} of {file} has label {labels[row]}, but its list says "
            f"{item.place['name']}, which is of class {item.place['index']}: "
            "the list and the file don't belong together"
        )
    if clouds[row] is None:
        raise ObjectError(f"row {row} of {file} is no cloud of (N, 3) or (N, 6) finite numbers")
    return Content(points=clouds[row])


def _named_objects(
    config: ModelNetText | ModelNetPickle, num_classes: int, split: str, remedy: str
) -> Iterator[Object]:
    """The objects of a list of names, such as night_stand_0001, in its order."""
    prefix = f"modelnet{num_classes}"
    folder = resolve_path(config.path)
    classes = _class_names(folder / f"{prefix}_shape_names.txt", remedy)
    path = folder / f"{prefix}_{split}.txt"
    for row, (number, name) in enumerate(read_lines(path, remedy)):
        match = OBJECT_NAME.fullmatch(name)
        if match is None or match[1] not in classes:
            raise ConfigError(
                f"line {number} of {path} is {name!r}, expected a name such as "
                f"{next(iter(classes))}_0001, of a class of {prefix}_shape_names.txt; {remedy}"
            )
        yield Object(
            object_id=f"{config.name}/{name}",
            source=config.name,
            split=split,
            captions=(_in_words(name),),
            label=_in_words(match[1]),
            place={
                "class": match[1],
                "name": name,
                "split": split,
                "row": row,
                "index": classes[match[1]],
            },
        )


def _class_names(path: Path, remedy: str) -> dict[str, int]:
    """Index of each class by its name, in their order."""
    names = [name for _, name in read_lines(path, remedy)]
    if len(set(names)) < max(len(names), 1):
        raise ConfigError(f"{path} names no class, or one twice; {remedy}")
    return {name: index for index, name in enumerate(names)}


def _names_of_rows(file: Path) -> list[str] | None:
    """Reads `ply_data_train_0_id2file.json` beside ply_data_train0.h5: the mesh of each row."""
    path = file.with_name(re.sub(r"(\d+)$", r"_\1", file.stem) + "_id2file.json")
    if not path.is_file():
        return None
    text = "\n".join(line for _, line in read_lines(path, HDF5_REMEDY))
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path} is no list of names in JSON; {HDF5_REMEDY}")
    return [_in_words(PurePosixPath(name).stem) for name in names]


def _pickle_of(config: ModelNetPickle, split: str) -> Path:
    return resolve_path(config.path) / f"modelnet40_{split}_8192pts_fps.dat"


@functools.lru_cache(maxsize=len(SPLITS))
def _clouds_and_labels(path: str) -> tuple[list[Any], list[int]] | ObjectError:
    """Clouds, None for one that is none, and labels; an error is kept, too, and not met again."""
    try:
        clouds, labels = read_columns(Path(path), 2)
    except ObjectError as broken:
        return broken
    for row, cloud in enumerate(clouds):
        # In place, so that an array with its normals goes as soon as its points are copied.
        clouds[row] = _points_of(cloud)
    return clouds, [_label_of(label) for label in labels]


def _points_of(cloud: Any) -> NDArray[np.float32] | None:
    cloud = np.asarray(cloud)
    if cloud.ndim != 2 or len(cloud) == 0 or cloud.shape[1] < 3:
        return None
    with np.errstate(over="ignore"):
        points = np.ascontiguousarray(cloud[:, :3], np.float32)
    return points if np.isfinite(points).all() else None


def _label_of(label: Any) -> int:
    """Index in a number or an array of one; -1, which is no class, for anything else."""
    label = np.asarray(label)
    return int(label.reshape(())) if label.size == 1 and label.dtype.kind in "iu" else -1


@functools.lru_cache(maxsize=80)
def _views_by_name(folder: Path) -> Mapping[str, Sequence[Path]]:
    """The views in a folder by the name of their object, in the order of their numbers."""
    views: dict[str, list[tuple[int, Path]]] = {}
    for file in sorted(folder.glob("*.png")):
        match = VIEW_NAME.fullmatch(file.name)
        if match is not None:
            views.setdefault(match[1], []).append((int(match[2]), file))
    return {name: [file for _, file in sorted(numbered)] for name, numbered in views.items()}


def _read(file: Path, most: int) -> bytes:
    """Bytes of a file of at most `most` of them."""
    try:
        size = file.stat().st_size
        if size > most:
            raise ObjectError(f"{file} has {size} bytes; more than {most} are not read")
        return file.read_bytes()
    except FileNotFoundError:
        raise ObjectError(f"the file {file} is missing") from None
    except OSError as unreadable:
        raise ObjectError(f"{file} cannot be read: {unreadable}") from None


def _in_words(name: str) -> str:
    return name.replace("_", " ").strip()
