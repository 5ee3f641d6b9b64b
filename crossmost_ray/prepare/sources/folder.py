"""A folder of one's own meshes or clouds in, its objects and what they hold out."""

from __future__ import annotations

import csv
import errno
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote_to_bytes

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.prepare.clouds import CLOUD_SUFFIXES, read_cloud
from crossmost_ray.prepare.config import Folder
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import MESH_SUFFIXES, PLY_HEADER, ply_elements, read_mesh
from crossmost_ray.prepare.mesh import ReadFile
from crossmost_ray.prepare.photos import PHOTO_SUFFIXES, read_photos, spread
from crossmost_ray.prepare.sources.base import Content, Object

SPLITS = ("train", "test", "val")
"""Folders directly below the path that name the split of what they hold."""

DOCUMENTS = {"readme", "license", "licence", "copying", "notice", "changelog"}
"""Names of text files that are no clouds."""

COLUMNS = ("file", "label", "caption", "split")
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

MAX_BYTES = 2**30
"""Largest file of a mesh, its textures and buffers."""


@dataclass(frozen=True)
class Entry:
    """What a row of the table of labels says of a file."""

    row: int
    label: str | None
    caption: str | None
    split: str | None


def list_objects(config: Folder) -> Iterator[Object]:
    """Lists the meshes and clouds below a folder, by their suffix and in the order of their paths.

    Hidden files, documents such as README.txt, the table of labels, folders that are links and
    links that lead out of the folder are passed over. An object is called by its path without the
    suffix, or with it where two files differ in nothing else. Its caption is its name in words, or
    what the table says.

    Raises:
        ConfigError: If the folder is missing or holds no object, the table or the photographs do
            not fit it, or there are no class folders where the config promises them.
    """
    root = resolve_path(config.path)
    where = f"the folder of the source '{config.name}', {root},"
    if not root.is_dir():
        raise ConfigError(f"{where} is missing: put meshes or clouds there, or set its `path`")
    table = None if config.labels is None else resolve_path(config.labels).resolve()
    files = [name for name in list_files(root) if _is_object(name, root, table)]
    if not files:
        raise ConfigError(
            f"{where} holds no mesh or cloud; it may hold {' '.join(suffixes())}. "
            "Links that lead out of it are not followed"
        )
    entries = {} if table is None else read_labels(table, files)
    photos = {} if config.images is None else _assign_photos(resolve_path(config.images), files)
    classes = {name: _class_of(name) if config.class_folders else None for name in files}
    if config.class_folders and not any(classes.values()):
        raise ConfigError(
            f"{where} has no class folders, as in chair/a.obj or train/chair/a.obj: "
            "set class_folders to false, or sort the files into them"
        )
    for name, identity in zip(files, _identities(files), strict=True):
        entry = entries.get(name, Entry(0, classes[name], None, None))
        yield Object(
            object_id=f"{config.name}/{identity}",
            source=config.name,
            split=entry.split or _split_of(name),
            captions=(entry.caption or in_words(PurePosixPath(name).stem),),
            label=entry.label,
            place={
                "file": _quoted(name),
                "photos": [_quoted(p) for p in spread(photos.get(name, []), config.max_views)],
            },
        )


def load(item: Object, config: Folder) -> Content:
    """Reads a mesh with the files it names, or a cloud, and the object's photographs.

    A .ply file is a mesh if its header promises faces. A mesh finds its materials, textures and
    buffers anywhere below the folder, and nowhere else.

    Raises:
        ObjectError: If one of them is missing, broken, or more than `read_mesh`, `read_cloud` and
            `read_photos` take.
    """
    root, name = resolve_path(config.path), _unquoted(item.place["file"])
    images = resolve_path(config.images or config.path)
    try:
        photos = read_photos([images / _unquoted(photo) for photo in item.place["photos"]])
        if _is_mesh(root / name):
            return Content(mesh=read_mesh(name, folder_reader(root)), photos=photos)
        points, colors = read_cloud(root / name)
        return Content(points=points, colors=colors, photos=photos)
    except ObjectError as unusable:
        # What is no UTF-8 of a name could not be written into the report.
        raise ObjectError(_printable(str(unusable))) from unusable


def suffixes() -> list[str]:
    """Every format that a folder may hold."""
    return sorted({*MESH_SUFFIXES, *CLOUD_SUFFIXES})


def list_files(root: Path) -> list[str]:
    """Lists paths of files below a folder, relative to it, with /, sorted.

    Hidden files and folders, folders that are links, and links to files outside are left out.

    Raises:
        ConfigError: If a folder cannot be read.
    """
    inside, found, waiting = root.resolve(), [], [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                    elif entry.is_file() and (
                        not entry.is_symlink() or _is_inside(Path(entry.path), inside)
                    ):
                        found.append(name)
        except OSError as refused:
            raise ConfigError(f"the folder {root / folder} cannot be read: {refused}") from None
    return sorted(found)


def folder_reader(root: Path) -> ReadFile:
    """Reads files of a folder by their path in it; what leads out of it is not there."""
    inside = root.resolve()

    def read_file(name: str) -> bytes | None:
        path = inside / name
        # A name from a file may be anything: absolute, too long, or hold a zero byte.
        try:
            if not _is_inside(path, inside) or not path.is_file():
                return None
            if path.stat().st_size > MAX_BYTES:
                raise ObjectError(f"{name} is larger than {MAX_BYTES:,} bytes: simplify it")
            return path.read_bytes()
        except OSError as unreadable:
            if unreadable.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return None
            raise ObjectError(f"{name} cannot be read: {unreadable}") from None

    return read_file


def read_labels(table: Path, files: Iterable[str]) -> dict[str, Entry]:
    """Reads a table of labels: CSV in UTF-8 with a line of column names.

    Args:
        table: Its columns are `file`, `label` and, if it likes, `caption` and `split`. Where one
            but `file` is empty, nothing is said.
        files: Paths as `file` has them.

    Returns:
        Entries by file.

    Raises:
        ConfigError: If it is missing or no such table, names a file that is none of `files` or one
            twice, or a split that is no name of a folder.
    """
    known = set(files)
    entries: dict[str, Entry] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            columns = list(rows.fieldnames or ())
            if not {"file", "label"} <= set(columns) <= set(COLUMNS):
                raise ConfigError(
                    f"the columns of {table} are {', '.join(columns) or 'missing'}; "
                    "they must be file and label, and may be caption and split"
                )
            for values in rows:
                where = f"line {rows.line_num} of {table}"
                if None in values:
                    raise ConfigError(f"{where} has more values than there are columns")
                cells = {key: (value or "").strip() for key, value in values.items()}
                name = cells["file"].replace("\\", "/").removeprefix("./")
                if name not in known:
                    raise ConfigError(f"{where} names {name!r}, which is no mesh or cloud there")
                if name in entries:
                    raise ConfigError(
                        f"{where} names {name!r} again, after line {entries[name].row}"
                    )
                split = cells.get("split") or None
                if split is not None and not SPLIT_NAME.fullmatch(split):
                    raise ConfigError(
                        f"{where} has the split {split!r}: letters, digits, '.', '_' and '-' only"
                    )
                entries[name] = Entry(
                    rows.line_num, cells["label"] or None, cells.get("caption") or None, split
                )
    except FileNotFoundError:
        raise ConfigError(f"the table of labels {table} is missing") from None
    except UnicodeDecodeError as foreign:
        raise ConfigError(f"the table of labels {table} is not UTF-8: {foreign}") from None
    except (OSError, csv.Error) as unreadable:
        raise ConfigError(f"the table of labels {table} cannot be read: {unreadable}") from None
    return entries


def in_words(name: str) -> str:
    """A file's name as one would say it: "office_chair-01" becomes "office chair 01"."""
    words = " ".join(re.split(r"[\s_.,+-]+", _printable(name))).strip()
    return words or _printable(name)


def _is_object(name: str, root: Path, table: Path | None) -> bool:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix == ".txt" and path.stem.lower() in DOCUMENTS:
        return False
    if table is not None and suffix == table.suffix and (root / name).resolve() == table:
        return False
    return suffix in {*MESH_SUFFIXES, *CLOUD_SUFFIXES}


def _is_mesh(path: Path) -> bool:
    if path.suffix.lower() != ".ply":
        return path.suffix.lower() in MESH_SUFFIXES
    try:
        with path.open("rb") as stream:
            return ply_elements(stream.read(PLY_HEADER)).get("face", (0, 0))[0] > 0
    except OSError as unreadable:
        raise ObjectError(f"{path} cannot be read: {unreadable}") from None
    except (ValueError, KeyError, IndexError) as broken:
        raise ObjectError(f"{path} is no PLY file: {broken}") from None


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, which has no links in its own; no file need be there."""
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):
        return False


def _split_of(name: str) -> str:
    first = name.split("/")[0]
    return first if "/" in name and first in SPLITS else "all"


def _class_of(name: str) -> str | None:
    """First folder of a path, or the one below that of the split, in words."""
    folders = name.split("/")[:-1]
    if folders and folders[0] in SPLITS:
        folders = folders[1:]
    return _printable(folders[0]).replace("_", " ").strip() or None if folders else None


def _identities(files: list[str]) -> Iterator[str]:
    """Paths without their suffix, or with it where another file would be called the same."""
    shortened = [name.removesuffix(PurePosixPath(name).suffix) for name in files]
    count, full = Counter(shortened), set(files)
    for name, short in zip(files, shortened, strict=True):
        yield _printable(name if count[short] > 1 or short in full else short)


def _assign_photos(images: Path, files: list[str]) -> dict[str, list[str]]:
    """Photographs of each file: those of a/b.ply are a/b.*, a/b_* and what lies in a/b/.

    Of two objects chair and chair_2, chair_2_front.jpg belongs to the one with the longer name.

    Raises:
        ConfigError: If the folder is missing, or none of its photographs belongs to a file.
    """
    if not images.is_dir():
        raise ConfigError(f"the folder of photographs {images} is missing: set `images`, or null")
    owners: dict[str, list[str]] = {}
    for name in files:
        owners.setdefault(name.removesuffix(PurePosixPath(name).suffix), []).append(name)
    listed = [name for name in list_files(images) if name.lower().endswith(PHOTO_SUFFIXES)]
    photos: dict[str, list[str]] = {}
    for photo in listed:
        for owner in _owners_of(photo, owners):
            photos.setdefault(owner, []).append(photo)
    if not photos:
        raise ConfigError(
            f"none of the {len(listed)} photographs ({' '.join(PHOTO_SUFFIXES)}) in {images} "
            "belongs to an object: those of a/b.ply are a/b.jpg, a/b_1.jpg or a/b/1.jpg"
        )
    return photos


def _owners_of(photo: str, owners: Mapping[str, list[str]]) -> list[str]:
    stem = photo.removesuffix(PurePosixPath(photo).suffix)
    folder, _, name = stem.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    while name:
        if prefix + name in owners:
            return owners[prefix + name]
        name = name.rpartition("_")[0]
    return owners.get(folder, [])


def _quoted(name: str) -> str:
    """A path in ASCII, whatever bytes it is made of: what is no UTF-8 cannot be stored as text."""
    return quote(os.fsencode(name))


def _unquoted(name: str) -> str:
    return os.fsdecode(unquote_to_bytes(name))


def _printable(text: str) -> str:
    """Text whose bytes that are no UTF-8 are written out by their numbers."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
