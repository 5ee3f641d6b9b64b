"""Bytes of a results folder in, values out, and one line for each file that can't be read."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pyarrow.fs as pafs
import yaml

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.status import age

SILENT_S = 60.0
"""A run that has said nothing for so long has lost its driver; a driver speaks every 5 s."""

CONFIG_LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C where PyYAML has it: ten times as quick."""

UNREADABLE = (ValueError, yaml.YAMLError)
"""What parsing a damaged file raises."""


def try_read(root: Store, name: str, problems: list[str]) -> bytes | None:
    """Reads a file; None, and a line in `problems`, if it can't be reached."""
    try:
        return root.read(name)
    except ConfigError as unreachable:
        problems.append(str(unreachable))
        return None


def fingerprint(root: Store, name: str, problems: list[str]) -> str:
    """Tells one version of a file from another without reading it; empty where there is none."""
    try:
        info = root.system.get_file_info(root.path(name))
    except OSError as unreachable:
        problems.append(problem(name, unreachable))
        return ""
    return f"{info.mtime_ns}:{info.size}" if info.type == pafs.FileType.File else ""


def read_status(
    said: bytes | None, name: str, problems: list[str]
) -> tuple[str | None, str | None, str | None]:
    """Reads status, error and stage of `status.json`; None where it does not say.

    One that is running and has fallen silent is interrupted.
    """
    if said is None:
        return None, None, None
    try:
        values = json_mapping(said)
        status = str(values.get("status") or "pending")
        if status == "running" and age(str(values.get("heartbeat"))) > SILENT_S:
            status = "interrupted"
    except ValueError as broken:
        problems.append(problem(name, broken))
        return None, None, None
    error, stage = values.get("error"), values.get("stage")
    return status, None if error is None else str(error), None if stage is None else str(stage)


def json_mapping(data: bytes) -> dict[str, Any]:
    """Parses an object of JSON.

    Raises:
        ValueError: If it is none.
    """
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object of JSON, found {type(value).__name__}")
    return value


def yaml_mapping(data: bytes) -> dict[str, Any]:
    """Parses keys and values of YAML.

    Raises:
        ValueError: If it holds something else.
        yaml.YAMLError: If it is no YAML.
    """
    value = yaml.load(data, Loader=CONFIG_LOADER)
    if not isinstance(value, dict):
        raise ValueError(f"expected keys and values, found {type(value).__name__}")
    return value


def json_names(data: bytes) -> tuple[str, ...]:
    """Parses a list of names.

    Raises:
        ValueError: If it is none.
    """
    value = json.loads(data)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected a list of names")
    return tuple(value)


def number(value: Any) -> float | None:
    """Gives a number as a float; None for anything else, and for NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def digest(*parts: bytes) -> str:
    """Gives a short text that differs where the bytes differ."""
    return hashlib.sha1(b"\0".join(parts), usedforsecurity=False).hexdigest()


def problem(name: str, broken: Exception) -> str:
    """Says in one line what is wrong with a file."""
    return f"{name} can't be read: {str(broken).partition(chr(10))[0]}"
