"""Nested configs and dotted keys, one turned into the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of a config and their values; lists are values."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """Gives the value of a dotted key; None if there is none."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def merged(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes dotted keys into a copy of a config."""
    copy = dict(config)
    for key, value in settings.items():
        section, dot, rest = key.partition(".")
        below = copy.get(section)
        copy[section] = (
            merged(below if isinstance(below, Mapping) else {}, {rest: value}) if dot else value
        )
    return copy
