"""What a check is given, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crossmost_ray.config import AdaptConfig, PretrainConfig

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    name: str
    """What was looked at."""

    status: Status
    """fail: a run would stop or wait for ever. warn: it would be slow, unsafe, or fail later on."""

    found: str
    remedy: str = ""
    """What to do; empty if all is well."""

    def __str__(self) -> str:
        """Says it in one line."""
        line = f"{self.status:<4}  {self.name}: {self.found}"
        return f"{line}; to mend: {self.remedy}" if self.remedy else line


@dataclass(frozen=True)
class Case:
    """What is to be looked at."""

    config: AdaptConfig | PretrainConfig | None = None
    """The run that is meant; None leaves out what depends on it."""

    address: str | None = None
    """The cluster's, as RAY_ADDRESS has it; None: one on this machine."""


def ok(name: str, found: str) -> Finding:
    """Says that all is well."""
    return Finding(name, "ok", found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """Says what would be slow, unsafe, or fail later on."""
    return Finding(name, "warn", found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """Says what a run would stop at, or wait for."""
    return Finding(name, "fail", found, remedy)


def size_text(num_bytes: float) -> str:
    """Writes a size in GiB, or in MiB if it is small."""
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def brief(error: BaseException) -> str:
    """Gives the line of an error that says most: the last one of a traceback from elsewhere."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
