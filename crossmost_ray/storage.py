"""Files below a folder, wherever pyarrow or fsspec can reach it; written whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import json
import posixpath
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from crossmost_ray.config import ASSETS, ConfigError, resolve_path

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Here a file appears once its upload is complete; elsewhere it is written aside and moved."""

PAUSES_S = (0.5, 2.0)
"""Before a refused write is tried again. Stores far away refuse now and then; what a wrong path or
missing rights refuse on this machine is not tried again."""

LASTING = (
    *(FileNotFoundError, FileExistsError, PermissionError),
    *(NotADirectoryError, IsADirectoryError),
)

Result = TypeVar("Result")


def is_remote(address: str) -> bool:
    """Whether a path of a config is an address such as `s3://bucket/folder`."""
    return "://" in address


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder, by its path or its address. Can be sent to another process."""

    address: str
    """Path, or an address such as `s3://bucket/folder`; what comes after `?` goes to the file
    system, as in `s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`."""

    key: str = "output"
    """The key of the config that names it, for the errors."""

    def __post_init__(self) -> None:
        # Other processes have other working directories. What comes with the package lies where
        # the package lies, which each node knows for itself.
        if not is_remote(self.address) and not self.address.startswith(ASSETS):
            object.__setattr__(self, "address", str(resolve_path(self.address)))

    def __str__(self) -> str:
        """Shows where it is, but not what the address tells the file system: keys, say."""
        if not is_remote(self.address):
            return str(resolve_path(self.address))
        return re.sub(r"//[^/@]*@", "//", self.address.partition("?")[0])

    @property
    def local(self) -> Path | None:
        """The folder's path on this machine; None if it is an address."""
        return None if is_remote(self.address) else resolve_path(self.address)

    @property
    def system(self) -> pafs.FileSystem:
        """The file system.

        Raises:
            ConfigError: If the address can't be opened.
        """
        return self._open()[0]

    @property
    def root(self) -> str:
        """The folder's path in `system`."""
        return self._open()[1]

    def path(self, name: str) -> str:
        """Gives the path of a file in `system`."""
        return posixpath.join(self.root, name)

    def child(self, name: str) -> Store:
        """Gives a folder in it."""
        place, mark, settings = self.address.partition("?")
        return Store(f"{place.rstrip('/')}/{name}{mark}{settings}", key=self.key)

    def write(self, name: str, data: bytes | str) -> None:
        """Writes a file below the folder: a reader finds all of it or none.

        Raises:
            ConfigError: If it can't be written.
        """
        content = data.encode() if isinstance(data, str) else data

        def fill(stream: pa.NativeFile) -> None:
            stream.write(content)

        self._put(name, fill)

    def upload(self, file: Path, name: str) -> None:
        """Copies a file of this machine into the folder: a reader finds all of it or none.

        Raises:
            ConfigError: If it can't be written.
        """

        def fill(stream: pa.NativeFile) -> None:
            with file.open("rb") as source:
                stream.upload(source)

        self._put(name, fill)

    def download(self, folder: Path) -> None:
        """Copies all files below the folder to this machine.

        Args:
            folder: Exists.

        Raises:
            ConfigError: If they can't be read.
        """

        def copy() -> None:
            pafs.copy_files(
                self.root, str(folder), source_filesystem=self.system, use_threads=False
            )

        self._reached(copy, "can't be read")

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Reads a file of one JSON object a line; empty if there is none.

        Raises:
            ConfigError: If the folder can't be reached.
        """
        return [json.loads(line) for line in (self.read(name) or b"").splitlines()]

    def read(self, name: str) -> bytes | None:
        """Reads a file below the folder; None if there is none.

        Raises:
            ConfigError: If the folder can't be reached.
        """

        def take() -> bytes | None:
            info = self.system.get_file_info(self.path(name))
            if info.type != pafs.FileType.File:
                return None
            with self.system.open_input_stream(info.path) as stream:
                data: bytes = stream.read()
                return data

        return self._reached(take, f"{name} can't be read")

    def open_input(self, name: str) -> pa.NativeFile:
        """Opens a file below the folder for reading here and there in it.

        Raises:
            OSError: If it can't be opened.
        """
        return self.system.open_input_file(self.path(name))

    def has_file(self, name: str) -> bool:
        """Whether there is such a file below the folder."""
        return self._kind(name) == pafs.FileType.File

    def is_folder(self) -> bool:
        """Whether there is such a folder; in a store of objects: whether it holds something."""
        return self._kind("") == pafs.FileType.Directory

    def names(self, folder: str = "") -> list[str]:
        """Lists files and folders directly below a folder of it, sorted; empty if it is missing."""
        return sorted(info.base_name for info in self._list(folder))

    def sizes(self) -> dict[str, int]:
        """Gives the bytes of each file directly below the folder, by name, in one question."""
        return {info.base_name: info.size for info in self._list("") if info.is_file}

    def _list(self, folder: str) -> list[pafs.FileInfo]:
        def look() -> list[pafs.FileInfo]:
            selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
            found: list[pafs.FileInfo] = self.system.get_file_info(selector)
            return found

        return self._reached(look, "can't be listed")

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that is in it; nothing if it is missing."""
        kind = self._kind(name)
        if kind == pafs.FileType.Directory:
            self.system.delete_dir(self.path(name))
        elif kind == pafs.FileType.File:
            self.system.delete_file(self.path(name))

    def _put(self, name: str, fill: Callable[[pa.NativeFile], None]) -> None:
        system, path = self.system, self.path(name)
        direct = system.type_name.removeprefix("py::") in OBJECT_STORES
        folder, base = posixpath.split(path)
        fresh = path if direct else posixpath.join(folder, f".{base}.new")

        def put() -> None:
            if not direct:
                system.create_dir(folder, recursive=True)
            with system.open_output_stream(fresh) as stream:
                fill(stream)
            if not direct:
                system.move(fresh, path)

        def patiently() -> None:
            for pause in PAUSES_S:
                try:
                    return put()
                except LASTING:
                    raise
                except OSError:
                    time.sleep(pause)
            return put()

        self._reached(patiently, f"{name} can't be written")

    def _kind(self, name: str) -> pafs.FileType:
        def look() -> pafs.FileType:
            return self.system.get_file_info(self.path(name).rstrip("/")).type

        return self._reached(look, "can't be reached")

    def _reached(self, act: Callable[[], Result], problem: str) -> Result:
        try:
            return act()
        except OSError as refused:
            reason = str(refused).partition("\n")[0] or type(refused).__name__
            raise ConfigError(f"{self}: {problem} ({reason}); mend `{self.key}`") from None

    def _open(self) -> tuple[pafs.FileSystem, str]:
        return _file_system(self.address, self.key)


@functools.lru_cache(maxsize=8)
def _file_system(address: str, key: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address, and the folder in it."""
    if not is_remote(address):
        return pafs.LocalFileSystem(), str(resolve_path(address))
    try:
        system, root = pafs.FileSystem.from_uri(address)
    except pa.ArrowInvalid:
        # Not one of pyarrow's own: fsspec knows more, where its part for them is installed.
        import fsspec

        try:
            inner, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as unknown:
            reason = str(unknown).partition("\n")[0]
            raise ConfigError(
                f"the address {address} can't be opened ({reason}); "
                f"install the package that it names, or mend `{key}`"
            ) from None
        system = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return system, root
