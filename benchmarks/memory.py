"""What memory the processes of this machine's cluster hold over time, and whether it grows."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

PROC = Path("/proc")

WORKER = "worker"
ROLES = {
    "gcs_server": "gcs",
    "raylet": "raylet",
    "ray::RayTrainWorker": WORKER,
    "ray::TrainController": "controller",
    "ray::SplitCoordinator": "stream",
    "ray::DatasetManager": "helpers",
    "ray::SynchronizationActor": "helpers",
    "ray::PreemptionWatcher": "helpers",
    "ray::PlacementGroupCleaner": "helpers",
    "ray::_AutoscalingCoordinatorActor": "helpers",
    "ray::_StatsActor": "helpers",
    "ray::ActorLocationTracker": "helpers",
    "ray::DashboardAgent": "services",
    "ray::RuntimeEnvAgent": "services",
    "ray::": "tasks",
    "default_worker.py": "tasks",  # it has not named itself yet
}
"""Role by how a process' name begins; whoever is not in it is one of Ray's services."""

POOLED = ("tasks", "helpers", "services")
"""Roles of several processes that come and go: what counts is what they hold together."""

DROPPED_SHARE = 1 / 3
"""First part of every life that does not count in a trend: imports, caches and buffers fill."""

FEW = 5
"""Samples that the start and the end of a curve are the medians of."""


def processes(root: int) -> dict[int, str]:
    """Names a process and all that descend from it, by their ids."""
    children = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The command stands in parentheses and may hold any character.
            children[int(stat.rpartition(")")[2].split()[1])].append(int(folder.name))
    names, waiting = {}, [root]
    while waiting:
        pid = waiting.pop()
        waiting += children[pid]
        try:
            arguments = (PROC / str(pid) / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        names[pid] = process_name(arguments.decode(errors="replace").split("\0"))
    return names


def process_name(arguments: Sequence[str]) -> str:
    """Gives a process' own title, or the name of its program, or of the script that Python runs."""
    first = arguments[0]
    if first.startswith("ray::"):
        return first
    program = os.path.basename(first)
    if program.startswith("python"):
        program = next(
            (os.path.basename(word) for word in arguments[1:] if word.endswith(".py")), program
        )
    return program


def roles(root: int) -> dict[int, str]:
    """Gives the role of a driver and of every process of the cluster that it started, by id.

    Training workers are numbered in the order of their ids, which is mostly that of their ranks.
    """
    found: dict[int, str] = {}
    for pid, name in sorted(processes(root).items()):
        role = next((role for start, role in ROLES.items() if name.startswith(start)), "services")
        if role == WORKER:
            role = f"{WORKER} {sum(other.startswith(WORKER) for other in found.values())}"
        found[pid] = "driver" if pid == root else role
    return found


def pss_mb(pid: int) -> float | None:
    """Gives a process' share of the memory in MB, pages that n processes share counting as 1/n.

    None if the process is gone.
    """
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:")), None)


class StoreUse(NamedTuple):
    """The object store at one moment, in MB."""

    used: float
    spilled: float
    """Written to disk since the cluster began."""


class ObjectStore:
    """Asks a cluster of one node, to which the driver is connected, about its object store."""

    def __init__(self) -> None:
        (node,) = ray.nodes()
        # One channel for all calls; Ray's own helper opens another for each, and the driver's
        # memory is one of the things that are measured.
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        self._stub = node_manager_pb2_grpc.NodeManagerServiceStub(init_grpc_channel(address))

    def use(self) -> StoreUse:
        """Reads the counters."""
        # mypy does not see what protobuf generates.
        request = node_manager_pb2.FormatGlobalMemoryInfoRequest(  # type: ignore[attr-defined]
            include_memory_info=False
        )
        stats = self._stub.FormatGlobalMemoryInfo(request, timeout=30).store_stats
        return StoreUse(stats.object_store_bytes_used / 1e6, stats.spilled_bytes_total / 1e6)


@dataclass(frozen=True)
class Sample:
    """All processes at one moment."""

    seconds: float
    step: int
    pss: dict[str, float]
    """MB by role."""

    pids: dict[str, tuple[int, ...]]
    store: StoreUse


class Sampler:
    """Takes samples in a thread as long as it is entered.

    Args:
        every_s: Time between two samples.
        step: How far the work is.
        look: Called with every sample, in the sampler's thread.
    """

    def __init__(
        self,
        every_s: float,
        *,
        step: Callable[[], int] = lambda: 0,
        look: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        self.samples: list[Sample] = []
        self._every_s = every_s
        self._step = step
        self._look = look
        self._store = ObjectStore()
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Sampler:
        self._watching = self._thread.submit(self._watch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.shutdown()
        if error is None:
            self._watching.result()

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            # Asked before the sample: the last one is of after the end.
            stopped = self._stop.wait(self._every_s if self.samples else 0)
            sample = self._take()
            self.samples.append(sample)
            self._look(sample)

    def _take(self) -> Sample:
        pss: dict[str, float] = defaultdict(float)
        pids: dict[str, tuple[int, ...]] = {}
        for pid, role in roles(os.getpid()).items():
            memory = pss_mb(pid)
            if memory is not None:
                pss[role] += memory
                pids[role] = (*pids.get(role, ()), pid)
        seconds = time.monotonic() - self._began
        return Sample(seconds, self._step(), dict(pss), pids, self._store.use())


class Point(NamedTuple):
    """One role at one moment."""

    step: int
    mb: float
    life: tuple[int, ...]
    """Processes that hold the memory: only points of one life are compared."""


def curve(samples: Sequence[Sample], role: str) -> list[Point]:
    """Gives the memory of a role, sample by sample, where it was there."""
    return [
        Point(sample.step, sample.pss[role], () if role in POOLED else sample.pids[role])
        for sample in samples
        if role in sample.pss
    ]


@dataclass(frozen=True)
class Trend:
    """How a role's memory went, in MB."""

    start: float
    """Once warm."""

    peak: float
    end: float
    slope: float | None
    """Growth per 100 steps; None if no process lived for long enough to tell."""


def trend(points: Sequence[Point]) -> Trend:
    """Sums up a curve of at least one point."""
    warm = settled(points)
    shown = np.array([point.mb for point in warm or points])
    return Trend(
        start=float(np.median(shown[:FEW])),
        peak=max(point.mb for point in points),
        end=float(np.median(shown[-FEW:])),
        slope=growth(warm),
    )


def settled(points: Sequence[Point]) -> list[Point]:
    """Drops the first third of the steps of every life."""
    spans: dict[tuple[int, ...], tuple[int, int]] = {}
    for point in points:
        first, _ = spans.get(point.life, (point.step, point.step))
        spans[point.life] = (first, point.step)
    kept = []
    for point in points:
        first, last = spans[point.life]
        if point.step >= first + DROPPED_SHARE * (last - first):
            kept.append(point)
    return kept


def growth(points: Sequence[Point]) -> float | None:
    """Gives the median slope between any two points of one life, in MB per 100 steps.

    A restart frees what a process had lost: across one, a leak would not be seen.

    Source:
        Theil-Sen estimator: up to 29 % of the points may lie anywhere.
    """
    steps, mb = np.array([[point.step, point.mb] for point in points]).reshape(-1, 2).T
    number = {life: place for place, life in enumerate(dict.fromkeys(p.life for p in points))}
    lives = np.array([number[point.life] for point in points], dtype=int)
    left, right = np.triu_indices(len(points), 1)
    pairs = (lives[left] == lives[right]) & (steps[left] != steps[right])
    left, right = left[pairs], right[pairs]
    if len(left) == 0:
        return None
    slopes: npt.NDArray[np.float64] = (mb[right] - mb[left]) / (steps[right] - steps[left])
    return float(100 * np.median(slopes))


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Draws values as a line of blocks, the lowest for 0 and the highest for their largest."""
    blocks = " ▁▂▃▄▅▆▇█"
    highest = max(values, default=0) or 1
    places = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    return "".join(blocks[round(values[place] / highest * (len(blocks) - 1))] for place in places)
