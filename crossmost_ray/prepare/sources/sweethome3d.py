"""A furniture catalogue of Sweet Home 3D in, its objects and their meshes out."""

from __future__ import annotations

import functools
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from crossmost_ray.config import ConfigError, resolve_path
from crossmost_ray.prepare.config import SweetHome3D
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.formats import read_mesh
from crossmost_ray.prepare.mesh import ReadFile
from crossmost_ray.prepare.sources.base import Content, Object
from crossmost_ray.prepare.wavefront import STANDARD_MATERIALS

PROPERTY_FILES = (
    "PluginFurnitureCatalog.properties",
    "com/eteks/sweethome3d/io/DefaultFurnitureCatalog.properties",
)
"""What a .sh3f file and the application's own jar call their list of furniture."""

READER_CLASS = "com/eteks/sweethome3d/j3d/OBJLoader.class"


def list_objects(config: SweetHome3D) -> Iterator[Object]:
    """Reads the list of a catalogue, not yet its meshes.

    Raises:
        ConfigError: If the file is missing, is no archive, or holds no list of furniture.
    """
    with _open(config) as archive:
        names = set(archive.namelist())
        listed = [name for name in PROPERTY_FILES if name in names]
        if not listed:
            raise ConfigError(
                f"{config.path} holds none of {', '.join(PROPERTY_FILES)}: "
                "it is not a furniture catalogue of Sweet Home 3D"
            )
        entries = parse_properties(archive.read(listed[0]))
    for number, entry in enumerate(entries, start=1):
        try:
            yield _object(entry, config)
        except (KeyError, ValueError) as wrong:
            raise ConfigError(
                f"entry {number} of {config.path} ({entry.get('id', 'without an id')}) "
                f"lacks a key or states no number: {wrong}"
            ) from None


def load(item: Object, config: SweetHome3D) -> Content:
    """Reads an object's mesh: y upwards, front to +z, in centimetres.

    Raises:
        ObjectError: If it cannot be read, or has no surface.
    """
    place = item.place
    size = np.array(place["size"])
    if not size.min() > 0:
        raise ObjectError(f"its size in the catalogue is {tuple(place['size'])}")
    mesh = read_mesh(place["model"], _reader(str(resolve_path(config.path))))
    if place["rotation"] is not None:
        mesh = mesh.transformed(np.array(place["rotation"]).reshape(3, 3))
    least, greatest = mesh.bounds
    extent = greatest - least
    if not extent.max() > 0:
        raise ObjectError("all its vertices coincide")
    # The catalogue stretches a model to its width, height and depth; a flat one stays flat.
    scale = np.where(extent > 1e-9 * extent.max(), size / np.maximum(extent, 1e-12), 1.0)
    centred = mesh.translated(-(least + greatest) / 2)
    return Content(mesh=centred.transformed(np.diag(scale)))


def parse_properties(data: bytes) -> list[dict[str, str]]:
    """Entries of a catalogue's Java properties, in the order of their numbers."""
    entries: dict[int, dict[str, str]] = {}
    # Java reads these files as Latin-1 with \uXXXX for the rest.
    for line in data.decode("latin-1").splitlines():
        match = re.match(r"\s*(\w+)#(\d+)\s*[=:]\s*(.*?)\s*$", line)
        if match:
            key, number, value = match.groups()
            value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), value)
            entries.setdefault(int(number), {})[key] = re.sub(r"\\(.)", r"\1", value)
    return [entries[number] for number in sorted(entries)]


def _object(entry: Mapping[str, str], config: SweetHome3D) -> Object:
    return Object(
        # "Scopia#armchair3": the catalogue's own name before the hash is known already.
        object_id=f"{config.name}/{entry['id'].split('#', 1)[-1]}",
        source=config.name,
        split="all",
        captions=(entry["name"],),
        author=entry.get("creator", config.title),
        place={
            "model": entry["model"].lstrip("/"),
            # Width (x), height (y) and depth (z) in centimetres.
            "size": [float(entry[side]) for side in ("width", "height", "depth")],
            "rotation": _rotation(entry.get("modelRotation", "")),
        },
    )


def _open(config: SweetHome3D) -> zipfile.ZipFile:
    path = resolve_path(config.path)
    if not path.exists():
        raise ConfigError(
            f"the catalogue {path} is missing; install it (apt-get install {config.package}) "
            f"or set the path of the catalogue '{config.name}'"
        )
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ConfigError(
            f"the catalogue {path} is not a complete zip archive; "
            f"fetch it anew (apt-get install --reinstall {config.package})"
        ) from None


def _rotation(text: str) -> list[float] | None:
    """Nine numbers of a matrix, row by row, that turns the mesh upright; None for none."""
    values = [float(value) for value in text.split()]
    return values if len(values) == 9 else None


@functools.lru_cache(maxsize=8)
def _archive(path: str) -> tuple[zipfile.ZipFile, frozenset[str]]:
    """An open archive of this process and the names in it."""
    archive = zipfile.ZipFile(Path(path))
    return archive, frozenset(archive.namelist())


def _reader(path: str) -> ReadFile:
    """Reads files of an archive by their path in it, doubled slashes and all."""
    archive, names = _archive(path)

    def read_file(name: str) -> bytes | None:
        if name == STANDARD_MATERIALS:
            return _standard_materials(path)
        cleaned = posixpath.normpath(name).lstrip("/")
        try:
            return archive.read(cleaned) if cleaned in names else None
        except (zipfile.BadZipFile, zlib.error, EOFError) as damaged:
            raise ObjectError(f"{cleaned} in {path} is damaged: {damaged}") from damaged

    return read_file


@functools.lru_cache(maxsize=8)
def _standard_materials(path: str) -> bytes | None:
    """Materials that the application knows by itself and its own models use without a library.

    They are one text in the class that reads OBJ files: a constant of a class file is stored as
    its length in two bytes, then its characters.
    """
    archive, names = _archive(path)
    if READER_CLASS not in names:
        return None
    code = archive.read(READER_CLASS)
    start = code.find(b"newmtl amber\n")
    return (
        None if start < 2 else code[start : start + int.from_bytes(code[start - 2 : start], "big")]
    )
