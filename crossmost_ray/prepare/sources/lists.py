"""Lists of names and tables in text files, as collections come with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from crossmost_ray.config import ConfigError

MAX_TEXT_BYTES = 64 * 2**20
"""Largest list or table that is read; those of the published collections have a few megabytes."""


@dataclass(frozen=True)
class Listed:
    """One line of a list."""

    name: str
    split: str

    place: str
    """Where it stands, for messages: "line 3 of /data/train.txt"."""


def read_splits(lists: Mapping[str, Path], *, example: str, hint: str) -> list[Listed]:
    """Reads lists of names, one a line, such as those of the training and the test split.

    Args:
        lists: File by split.
        example: A proper line; a name has as many parts between slashes as it has.
        hint: What to do about a missing list.

    Returns:
        One split after the other, each sorted by name; blank lines don't count.

    Raises:
        ConfigError: If a list is missing, is not UTF-8, names something outside its folder, or what
            it or another list has named already, or all of them are empty.
    """
    parts = len(PurePosixPath(example).parts)
    found: dict[str, Listed] = {}
    for split, path in lists.items():
        # Not splitlines(), which breaks at characters that an editor counts no line by.
        for number, line in enumerate(read_text(path, hint).split("\n"), start=1):
            name = line.strip()
            if not name:
                continue
            place = f"line {number} of {path}"
            _check_name(name, parts, place, example)
            if name in found:
                raise ConfigError(f"{place} repeats {name}, which {found[name].place} is already")
            found[name] = Listed(name, split, place)
    if not found:
        raise ConfigError(
            f"{' and '.join(map(str, lists.values()))} name nothing; write one name a line, "
            f"such as {example}"
        )
    order = list(lists)
    return sorted(found.values(), key=lambda listed: (order.index(listed.split), listed.name))


def read_json(path: Path, hint: str) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: If it is missing or no JSON in UTF-8; `hint` says what to do if it is missing.
    """
    text = read_text(path, hint)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as broken:
        raise ConfigError(f"{path} is no proper JSON: {broken}") from None


def read_text(path: Path, hint: str) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: If it is missing, unreadable, not UTF-8, or larger than `MAX_TEXT_BYTES`;
            `hint` says what to do if it is missing.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path} is missing; {hint}")
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise ConfigError(
                f"{path} has {size:,} bytes, a list or table at most {MAX_TEXT_BYTES:,}: "
                "it must be another file"
            )
        data = path.read_bytes()
    except OSError as unreadable:
        raise ConfigError(f"{path} cannot be read: {unreadable}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = data.count(b"\n", 0, wrong.start) + 1
        raise ConfigError(f"line {line} of {path} is not UTF-8; save the file as UTF-8") from None


def require_folder(path: Path, hint: str) -> None:
    """Checks that a folder is there.

    Raises:
        ConfigError: If it is not; `hint` says what to do.
    """
    if not path.is_dir():
        raise ConfigError(f"the folder {path} is missing; {hint}")


def _check_name(name: str, parts: int, place: str, example: str) -> None:
    """Refuses a name that is not a plain path of some parts below a folder."""
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    # A name that is written in two ways, such as "a//b", would be two objects.
    if leaves or len(path.parts) != parts or str(path) != name:
        reason = "leaves its folder" if leaves else "is not of that form"
        raise ConfigError(f"{place} {reason}: {name!r}; expected such as {example}")
