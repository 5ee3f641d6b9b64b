"""This machine: Python, libraries, CUDA, rendering, memory, disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crossmost_ray.doctor.finding import Case, Finding, fail, ok, size_text, warn

GIB = 2**30
OLDEST_PYTHON = (3, 11)
PACKAGES = ("ray", "torch", "pyarrow")
"""What has to be the same, or nearly, on all nodes."""


@dataclass(frozen=True)
class Limits:
    """What a machine should have; sizes in bytes."""

    memory_warn: int = 4 * GIB
    """Ray's own processes take about two, and a worker one."""

    memory_fail: int = GIB
    open_files: int = 8192
    """Each process of Ray's is connected to each other one; it raises the limit by itself as far as
    it may."""

    temp_free: int = 5 * GIB
    temp_used_share: float = 0.95
    """Above it, Ray refuses to put objects on the disk (RAY_local_fs_capacity_threshold)."""


@dataclass(frozen=True)
class MachineReport:
    """What one machine says of itself."""

    host: str
    python: str
    versions: dict[str, str]
    """Of `PACKAGES`; those that aren't installed are left out."""

    clock: float
    """Seconds since 1970."""

    memory_free: int | None
    """Bytes; None where the system doesn't say."""

    shm_total: int | None
    """Bytes of /dev/shm; None where there is none."""

    temp: str
    """Ray's temporary folder."""

    temp_total: int
    temp_free: int
    open_files: int
    """How far the limit can be raised."""


def report_machine(temp: str | None = None) -> MachineReport:
    """Looks at the machine that this runs on.

    Args:
        temp: Ray's temporary folder; by default, where Ray would make it.
    """
    folder = Path(temp or Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray")
    disk = shutil.disk_usage(nearest_folder(folder))
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    shm = Path("/dev/shm")
    return MachineReport(
        host=socket.gethostname(),
        python=platform.python_version(),
        versions=versions,
        clock=time.time(),
        memory_free=free_memory(),
        shm_total=shutil.disk_usage(shm).total if shm.is_dir() else None,
        temp=str(folder),
        temp_total=disk.total,
        temp_free=disk.free,
        open_files=_highest_limit(),
    )


def nearest_folder(path: Path) -> Path:
    """Gives the folder itself, or the first one above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _highest_limit() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def free_memory(root: Path = Path("/")) -> int | None:
    """Reads how many bytes can be had, within the container's limit if there is one.

    Args:
        root: Where /proc and /sys are mounted.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {line.partition(":")[0]: line.split()[1] for line in lines if ":" in line}
    free = int(kib["MemAvailable"]) * 1024 if "MemAvailable" in kib else None
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max" or free is None:
        return free
    # Files that were read count as used, and are given up when memory is asked for.
    return min(free, max(int(limit) - used + int(stat.get("inactive_file", 0)), 0))


def machine_findings(
    report: MachineReport, limits: Limits = Limits(), *, where: str = ""
) -> Iterator[Finding]:
    """Judges memory, open files, and the disk that Ray falls back on.

    Args:
        report: Of any machine.
        limits: What it should have.
        where: Which machine, if it isn't this one, such as " on 10.0.0.2".
    """
    free = report.memory_free
    if free is not None:
        found = f"{size_text(free)} free{where}"
        cure = "end what else runs there, or take a larger machine or container limit"
        if free < limits.memory_fail:
            yield fail("memory", f"{found}, a run needs {size_text(limits.memory_warn)}", cure)
        elif free < limits.memory_warn:
            yield warn("memory", f"{found}, a run needs {size_text(limits.memory_warn)}", cure)
        else:
            yield ok("memory", found)
    if report.open_files < limits.open_files:
        yield warn(
            "open files",
            f"a process may open {report.open_files}{where}, Ray wants {limits.open_files}",
            "raise it before Ray starts: `ulimit -Hn 65536`, LimitNOFILE= of a systemd unit, or "
            "--ulimit nofile=65536 of docker run",
        )
    else:
        yield ok("open files", f"enough{where}")
    used = 1 - report.temp_free / report.temp_total
    found = f"{size_text(report.temp_free)} free at {report.temp}{where}"
    cure = "make room, or start Ray with --temp-dir (RAY_TMPDIR here) on another disk"
    if used > limits.temp_used_share:
        yield fail(
            "temporary disk",
            f"{found}: {100 * used:.0f} % are used, and above "
            f"{100 * limits.temp_used_share:.0f} % Ray puts no object there",
            cure,
        )
    elif report.temp_free < limits.temp_free:
        yield warn("temporary disk", f"{found}, {size_text(limits.temp_free)} are wanted", cure)
    else:
        yield ok("temporary disk", found)


def check_python(case: Case) -> Iterator[Finding]:
    """Looks at the version of Python."""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield fail("python", found, f"make an environment with Python {wanted} or newer")
    else:
        yield ok("python", found)


def check_machine(case: Case) -> Iterator[Finding]:
    """Looks at this machine's memory, open files and temporary disk."""
    yield from machine_findings(report_machine())
