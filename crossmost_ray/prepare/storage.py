"""Bytes to a folder, wherever pyarrow or fsspec can write, whole or not at all."""

from __future__ import annotations

import functools
import posixpath

import pyarrow as pa
import pyarrow.fs as pafs

from crossmost_ray.config import ConfigError, resolve_path

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Here a file appears once its upload is complete; elsewhere it is written aside and moved."""


class Store:
    """A folder, by its path or its address. Can be sent to another process.

    Args:
        address: Path, or an address such as `s3://bucket/folder`; what comes after `?` goes to the
            file system, as in `s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def write(self, name: str, data: bytes) -> None:
        """Writes a file below the folder: a reader finds all of it or none.

        Raises:
            ConfigError: If it can't be written.
        """
        system, root = self._open()
        path = posixpath.join(root, name)
        direct = system.type_name.removeprefix("py::") in OBJECT_STORES
        folder, base = posixpath.split(path)
        fresh = path if direct else posixpath.join(folder, f".{base}.new")
        try:
            if not direct:
                system.create_dir(folder, recursive=True)
            with system.open_output_stream(fresh) as stream:
                stream.write(data)
            if not direct:
                system.move(fresh, path)
        except OSError as refused:
            raise ConfigError(
                f"{name} can't be written to {self.address} ({_first_line(refused)}); mend `output`"
            ) from None

    def read(self, name: str) -> bytes | None:
        """Reads a file below the folder; None if there is none.

        Raises:
            ConfigError: If the folder can't be reached.
        """
        system, root = self._open()
        try:
            info = system.get_file_info(posixpath.join(root, name))
            if info.type != pafs.FileType.File:
                return None
            with system.open_input_stream(info.path) as stream:
                data: bytes = stream.read()
                return data
        except OSError as refused:
            raise ConfigError(
                f"{name} can't be read from {self.address} ({_first_line(refused)}); mend `output`"
            ) from None

    def names(self, folder: str = "") -> list[str]:
        """Lists files and folders directly below a folder of it, sorted; empty if it is missing."""
        system, root = self._open()
        selector = pafs.FileSelector(posixpath.join(root, folder), allow_not_found=True)
        try:
            return sorted(info.base_name for info in system.get_file_info(selector))
        except OSError as refused:
            raise ConfigError(
                f"{self.address} can't be listed ({_first_line(refused)}); mend `output`"
            ) from None

    def remove(self, name: str) -> None:
        """Removes a file or a folder with all that is in it; nothing if it is missing."""
        system, root = self._open()
        path = posixpath.join(root, name)
        kind = system.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            system.delete_dir(path)
        elif kind == pafs.FileType.File:
            system.delete_file(path)

    def _open(self) -> tuple[pafs.FileSystem, str]:
        return _file_system(self.address)


@functools.lru_cache(maxsize=8)
def _file_system(address: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address, and the folder in it."""
    if "://" not in address:
        return pafs.LocalFileSystem(), str(resolve_path(address))
    try:
        system, root = pafs.FileSystem.from_uri(address)
    except pa.ArrowInvalid:
        # Not one of pyarrow's own: fsspec knows more, where its part for them is installed.
        import fsspec

        try:
            inner, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as unknown:
            raise ConfigError(
                f"the address {address} can't be opened ({_first_line(unknown)}); "
                "install the package that it names, or mend `output`"
            ) from None
        system = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return system, root


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
