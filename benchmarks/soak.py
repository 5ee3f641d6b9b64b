"""Does a long training with restarts keep its memory bounded, on shards larger than Ray's store?

    python benchmarks/soak.py [--steps 600] [--restarts 3] [--store-mb 80] [--limit 5]

Trains the embedded model for so many steps with two workers, one of which is killed now and then,
and samples the memory of every process every two seconds. Prints a table and a curve for each role,
appends one line to benchmarks/results/soak.jsonl, and exits with 1 if a role's memory grows faster
than the limit. Takes about 8 minutes and 0.6 GB of disk on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray reads it: a cluster of our own, on loopback

import ray
from copies import write_copies
from measure import append_result
from memory import WORKER, Point, Sample, Sampler, Trend, curve, sparkline, trend

from crossmost_ray.cluster import ENVIRONMENT
from crossmost_ray.config import AdaptConfig, parse_config
from crossmost_ray.training.trainer import train
from crossmost_ray.training.worker import HISTORY_NAME, PROGRESS_NAME

NAME = "soak"
EPOCHS = 2
BATCH_SIZE = 16
NUM_WORKERS = 2
CHECKPOINTS = 12
"""In a run: what a restart repeats is less than a twelfth of it."""

SAMPLE_S = 2.0
CURVE_POINTS = 60
ALL = "all together"


@dataclass(frozen=True)
class Restart:
    """A worker that was killed, and what it took to go on."""

    step: int
    recovery_s: float
    """Until the new workers had taken their first step."""


class Breaker:
    """Follows a run, and kills a training worker at even distances.

    Args:
        run: The run's folder.
        steps: Of the run.
        restarts: How often to kill.
    """

    def __init__(self, run: Path, steps: int, restarts: int) -> None:
        self.restarts: list[Restart] = []
        self._progress = run / PROGRESS_NAME
        self._due = [steps * (k + 1) // (restarts + 1) for k in range(restarts)]
        self._shown = self._taken = 0
        self._killed: Sample | None = None
        self._stale: int | None = None

    def steps_taken(self) -> int:
        """Counts steps as they are taken, those that are taken again after a restart included."""
        step = self._shown
        if self._progress.is_file():
            step = json.loads(self._progress.read_text(encoding="utf-8"))["step"]
        self._taken += max(0, step - self._shown)
        self._shown = step
        return self._taken

    def look(self, sample: Sample) -> None:
        """Kills a worker if it is time, or notes that the run goes on."""
        workers = worker_pids(sample)
        if self._killed is None:
            if self._due and self._shown >= self._due[0] and len(workers) == NUM_WORKERS:
                del self._due[0]
                self._killed = sample
                # Each of them in turn.
                os.kill(workers[len(self.restarts) % NUM_WORKERS], signal.SIGKILL)
        elif len(workers) == NUM_WORKERS and not set(workers) & set(worker_pids(self._killed)):
            written = self._progress.stat().st_mtime_ns
            # The old workers' last word still stands where the new ones will write theirs.
            self._stale = written if self._stale is None else self._stale
            if written != self._stale:
                seconds = sample.seconds - self._killed.seconds
                self.restarts.append(Restart(self._killed.step, round(seconds, 1)))
                self._killed = self._stale = None


def worker_pids(sample: Sample) -> list[int]:
    """Lists the training workers by their ids."""
    return [
        pid for role, pids in sample.pids.items() if role.startswith(f"{WORKER} ") for pid in pids
    ]


def soak_config(folder: Path, steps: int, restarts: int) -> AdaptConfig:
    """A small run on the shards under a folder, which fails if a worker is lost once more."""
    values = {
        "name": NAME,
        "model": "assets:models/furniture-start",
        "output": str(folder / "runs"),
        "data": {
            "shards": str(folder / "shards"),
            "batch_size": BATCH_SIZE,
            "num_views": 1,
            "teacher_views": 1,
            "num_points": 512,
            "shuffle_buffer": 4 * BATCH_SIZE,
        },
        "optim": {"epochs": EPOCHS, "lr": 1e-4},
        "cluster": {
            "num_workers": NUM_WORKERS,
            "max_failures": restarts,
            "checkpoint_steps": max(1, steps // CHECKPOINTS),
        },
    }
    return parse_config(AdaptConfig, values, "the soak run")


def soak(folder: Path, steps: int, restarts: int) -> tuple[list[Sample], list[Restart]]:
    """Trains on the shards under a folder, and watches.

    Raises:
        RuntimeError: If the run is over before all steps were taken or all workers killed.
    """
    run = folder / "runs" / NAME
    breaker = Breaker(run, steps, restarts)
    with Sampler(SAMPLE_S, step=breaker.steps_taken, look=breaker.look) as sampler:
        train(soak_config(folder, steps, restarts))
    last = json.loads((run / HISTORY_NAME).read_text(encoding="utf-8").splitlines()[-1])
    if last["step"] != steps:
        raise RuntimeError(f"the run ended after {last['step']:.0f} of {steps} steps")
    if len(breaker.restarts) != restarts:
        raise RuntimeError(
            f"{len(breaker.restarts)} of {restarts} restarts were seen; take more --steps"
        )
    return sampler.samples, breaker.restarts


def curves(samples: Sequence[Sample]) -> dict[str, list[Point]]:
    """The memory of each role, and of all of them together."""
    found = {role: curve(samples, role) for role in sorted({r for s in samples for r in s.pss})}
    found[ALL] = [Point(sample.step, sum(sample.pss.values()), ()) for sample in samples]
    return found


def thinned(points: Sequence[Point]) -> list[int]:
    """A curve in at most `CURVE_POINTS` numbers, MB."""
    every = -(-len(points) // CURVE_POINTS)
    return [round(point.mb) for point in points[::every]]


def print_table(found: dict[str, list[Point]], trends: dict[str, Trend]) -> None:
    """One line for each role."""
    print(f"{'MB':12} {'start':>7} {'peak':>7} {'end':>7} {'per 100 steps':>14}")
    for role, seen in trends.items():
        slope = "too short" if seen.slope is None else f"{seen.slope:+.2f}"
        line = f"{role:12} {seen.start:7.0f} {seen.peak:7.0f} {seen.end:7.0f} {slope:>14}"
        print(f"{line}  {sparkline([point.mb for point in found[role]], CURVE_POINTS)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="an even number")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--store-mb", type=int, default=80, help="Ray takes no less than 75")
    parser.add_argument("--limit", type=float, default=5.0, help="MB of growth per 100 steps")
    args = parser.parse_args()
    if args.steps < EPOCHS or args.steps % EPOCHS:
        parser.error(f"--steps {args.steps} can't be split into {EPOCHS} epochs")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards_mb = write_copies(folder / "shards", args.steps // EPOCHS * BATCH_SIZE)
        ray.init(
            address="local",
            num_cpus=NUM_WORKERS + 2,
            object_store_memory=args.store_mb * 10**6,
            include_dashboard=False,
            log_to_driver=False,
        )
        began = time.monotonic()
        try:
            samples, restarts = soak(folder, args.steps, args.restarts)
        finally:
            ray.shutdown()
        seconds = time.monotonic() - began

    found = curves(samples)
    trends = {role: trend(points) for role, points in found.items()}
    spilled = samples[-1].store.spilled
    print_table(found, trends)
    print(
        f"{args.steps} steps in {seconds:.0f} s over {shards_mb:.0f} MB of shards in a store of "
        f"{args.store_mb} MB; {spilled:.0f} MB spilled"
    )
    for restart in restarts:
        print(f"killed a worker at step {restart.step}: {restart.recovery_s:.0f} s to the next one")
    growing = sorted(
        role for role, seen in trends.items() if seen.slope is None or seen.slope > args.limit
    )
    append_result(
        "soak",
        {
            "steps": args.steps,
            "batch_size": BATCH_SIZE,
            "workers": NUM_WORKERS,
            "seconds": round(seconds),
            "shards_mb": round(shards_mb),
            "store_mb": args.store_mb,
            "store_peak_mb": round(max(sample.store.used for sample in samples)),
            "spilled_mb": round(spilled),
            "restarts": [vars(restart) for restart in restarts],
            "limit_mb_per_100_steps": args.limit,
            "not_bounded": growing,
            "roles": {
                role: {
                    "start_mb": round(seen.start),
                    "peak_mb": round(seen.peak),
                    "end_mb": round(seen.end),
                    "mb_per_100_steps": None if seen.slope is None else round(seen.slope, 2),
                    "curve_mb": thinned(found[role]),
                }
                for role, seen in trends.items()
            },
        },
    )
    if growing:
        sys.exit(
            f"error: {', '.join(growing)}: grows by more than {args.limit:g} MB per 100 steps, or "
            "the run was too short to tell"
        )


if __name__ == "__main__":
    main()
