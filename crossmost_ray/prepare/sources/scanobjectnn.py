"""ScanObjectNN's HDF5 files in, its scanned objects out; ModelNet's are of the same form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossmost_ray.config import ConfigError, read_list, resolve_path
from crossmost_ray.prepare.config import ScanObjectNN, SourceConfig
from crossmost_ray.prepare.hdf5 import listed_files, numbered_photos, read_cloud, read_labels
from crossmost_ray.prepare.photos import read_photos
from crossmost_ray.prepare.sources.base import Content, Object

REMEDY = (
    "ask for h5_files.zip at https://hkust-vgd.github.io/scanobjectnn, unpack it and set `path` to "
    "its folder h5_files"
)


@dataclass(frozen=True)
class _Variant:
    """How the files of a variant are called."""

    folder: str
    suffix: str
    """Of the release's files."""

    lists: str
    """Suffix of the lists of files."""


VARIANTS = {
    "object_only": _Variant("main_split_nobg", "", ""),
    "with_background": _Variant("main_split", "", "_withbg"),
    "hardest": _Variant("main_split", "_augmentedrot_scale75", "_hardest"),
}

SPLITS = {"train": "training", "test": "test"}
"""What the release's files call a split."""


def list_objects(config: ScanObjectNN) -> Iterator[Object]:
    """Lists the rows of a variant's train and test files.

    Where `path` holds `train_files.txt` and `test_files.txt` (for the other variants, with
    `_withbg` or `_hardest` before the dot), the files that they name; else those of the release,
    `main_split*/*_objectdataset*.h5`. A row's pictures, if there are any, lie beside its file as
    `<stem>image/<row>/<number>.png`.

    Raises:
        ConfigError: If there are neither, or a file is missing or damaged.
    """
    folder, variant = resolve_path(config.path), VARIANTS[config.variant]
    classes: list[str] = read_list("classes", "scanobjectnn")
    lists = {split: folder / f"{split}_files{variant.lists}.txt" for split in SPLITS}
    listed = any(path.is_file() for path in lists.values())
    for split, stem in SPLITS.items():
        released = folder / variant.folder / f"{stem}_objectdataset{variant.suffix}.h5"
        if not listed and not released.is_file():
            raise ConfigError(
                f"{folder} holds neither {lists[split].name} nor "
                f"{released.relative_to(folder)}; {REMEDY}"
            )
        for file in listed_files(lists[split], REMEDY) if listed else [released]:
            views = file.with_name(f"{file.stem}image")
            yield from list_rows(config, split, file, classes, views)


def load(item: Object, config: ScanObjectNN) -> Content:
    """Reads one scan, y upwards, and its pictures if there are any.

    Raises:
        ObjectError: If it cannot be read.
    """
    return load_row(item)


def list_rows(
    config: SourceConfig,
    split: str,
    file: Path,
    classes: Sequence[str],
    views: Path,
    names: Sequence[str] | None = None,
) -> Iterator[Object]:
    """Lists the rows of an HDF5 file of clouds and labels.

    Args:
        config: The source.
        split: Split of all its rows.
        file: The file.
        classes: In the order of the labels.
        views: Folder with a folder of pictures for each row.
        names: Captions of the rows, if they have names. A row without one has its class for a
            caption: nothing else is known of it.

    Raises:
        ConfigError: If the file is damaged, a label is not that of a class, or the names are not
            as many as the rows.
    """
    labels = read_labels(file)
    unknown = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(unknown):
        row = unknown[0]
        raise ConfigError(
            f"row {row} of {file} has label {labels[row]}, but there are {len(classes)} classes"
        )
    if names is not None and len(names) != len(labels):
        raise ConfigError(
            f"{file} holds {len(labels)} rows, but the file of their names {len(names)}; "
            "fetch both anew, or remove the latter"
        )
    for row, index in enumerate(labels.tolist()):
        label = classes[index]
        yield Object(
            object_id=f"{config.name}/{file.stem}/{row}",
            source=config.name,
            split=split,
            captions=((names[row] if names else "") or label,),
            label=label,
            place={"file": str(file), "row": row, "views": str(views / str(row))},
        )


def load_row(item: Object) -> Content:
    """Reads an object of `list_rows`: its points and its pictures.

    Raises:
        ObjectError: If it cannot be read.
    """
    photos = read_photos(numbered_photos(Path(item.place["views"])))
    return Content(points=read_cloud(Path(item.place["file"]), item.place["row"]), photos=photos)
