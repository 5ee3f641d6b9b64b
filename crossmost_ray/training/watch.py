"""What the driver shows of a run while it goes on, and the ear for what befalls its workers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.train.v2.api.callback import UserCallback
from rich.console import Console

from crossmost_ray.config import ClusterConfig
from crossmost_ray.storage import Store
from crossmost_ray.training.events import event_line, log_event, read_events
from crossmost_ray.training.worker import PROGRESS_NAME

PATIENCE_S = 60.0
"""Without a step for so long, the driver looks whether the cluster has become too small."""

console = Console()


def say(text: str) -> None:
    """Prints a line on the driver's terminal as it stands."""
    # Without markup: errors of torch hold brackets, which rich would take for commands.
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class EventLog(UserCallback):
    """Writes down why workers were lost, in the run's folder. Lives in Ray's controller."""

    def __init__(self, run: Store) -> None:
        self.run = run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Adds a line: when, and each worker's last words."""
        words = {rank: last_words(error) for rank, error in worker_exceptions.items()}
        log_event(self.run, "workers lost", workers=words)


def last_words(error: Exception) -> str:
    """Gives what an error says went wrong: of a traceback's last line, the first sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip().partition(". ")[0] if lines else type(error).__name__


@contextmanager
def shown(run: Store, num_epochs: int, cluster: ClusterConfig) -> Iterator[None]:
    """Prints a line for every twentieth of a run's steps, and for everything that goes wrong."""
    stop = threading.Event()
    run.remove(PROGRESS_NAME)
    known = len(read_events(run))

    def watch() -> None:
        mark: tuple[int, int] | None = None
        num_events = known
        moved = time.monotonic()
        while not stop.wait(0.5 if run.local is not None else 5.0):
            events = read_events(run)
            for event in events[num_events:]:
                say(event_line(event))
            num_events = len(events)
            status = read_progress(run)
            if status is None:
                continue
            now = (status["epoch"], int(status["step"] * 20 / status["num_steps"]))
            if now != mark:
                mark, moved = now, time.monotonic()
                say(progress_line(status, num_epochs))
            elif time.monotonic() - moved > PATIENCE_S:
                moved = time.monotonic()
                if (lack := lack_of(cluster)) is not None:
                    say(lack)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def read_progress(run: Store) -> dict[str, Any] | None:
    """Reads how far the workers are; None where nothing can be read at this moment."""
    try:
        status: dict[str, Any] = json.loads(run.read(PROGRESS_NAME) or b"")
    except ValueError:
        # There is none yet, or it was replaced in the midst of being read: stores of objects are
        # read piece by piece.
        return None
    return status


def lack_of(cluster: ClusterConfig) -> str | None:
    """Says what the cluster lacks for the fewest workers of a run; None if it has all of it."""
    have = ray.cluster_resources()
    asked = {"CPU": cluster.fewest_workers * cluster.cpus_per_worker}
    if cluster.use_gpu:
        asked["GPU"] = cluster.fewest_workers
    lacks = [
        f"{count:g} {kind} for {cluster.fewest_workers} worker(s), and there are "
        f"{have.get(kind, 0.0):g}"
        for kind, count in asked.items()
        if have.get(kind, 0.0) < count
    ]
    return f"waiting for the cluster to grow: {'; '.join(lacks)}" if lacks else None


def progress_line(status: dict[str, Any], num_epochs: int) -> str:
    """Says in one line how far a run is."""
    parts = [
        f"epoch {status['epoch'] + 1}/{num_epochs}",
        f"step {status['step']}/{status['num_steps']}",
        f"{status['pairs_per_s']:.0f} objects/s",
        f"loss {status['loss']:.2f}",
    ]
    for key, word in (("pseudo/selected_image", "image"), ("pseudo/selected_point", "points")):
        if key in status:
            parts.append(f"{100 * status[key]:.0f} % confident by {word}")
    terms = [
        f"{name.removeprefix('loss/')} {value:.2f}"
        for name, value in status.items()
        if name.startswith("loss/")
    ]
    if status["eta_s"] is not None:
        minutes, seconds = divmod(round(status["eta_s"]), 60)
        parts.append(f"{minutes}:{seconds:02d} to go")
    return "  ".join(parts) + f"\n    {', '.join(terms)}"
