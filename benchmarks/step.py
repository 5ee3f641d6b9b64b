"""How much faster is a training step than one in the style of the published code?

    python benchmarks/step.py [--quick] [--device cuda --batch-size 128] [--ways ours,published]

At the published setting (ViT-B/16 at 224 px, PointBERT of 12 blocks, 64 groups of 32 of 8,192
points, 40 classes), with fresh weights: one process for each way, each with the same weights and
the same augmented pairs, which take their steps in turns. The ways' terms are compared before.
Prints seconds of a step (of processor time, on one thread of a CPU), objects a second, the ratio to
the published style, the share of what the device's matrix product can do, and the peak of memory;
appends a line to benchmarks/results/step.jsonl. On a CPU about 6 minutes, 2 with --quick, and up to
14 GB; on a GPU `--device cuda --batch-size 128` takes the setting of the published code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from measure import append_result, machine
from published_style import PublishedStyleStep, without_chance
from torch.utils.flop_counter import FlopCounterMode

from crossmost_ray.cluster import KEEP_FREED_MEMORY
from crossmost_ray.config import AdaptConfig, parse_config
from crossmost_ray.models.classifier import (
    CrossModalClassifier,
    CrossModalModel,
    ModelSpec,
    set_runner,
)
from crossmost_ray.optim import build_optimizer
from crossmost_ray.schema import PairBatch, RawBatch
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.execution import resolve_execution
from crossmost_ray.training.step import train_step

NUM_CLASSES = 40
NUM_POINTS = 8192
VIEW_SIZE = 336

WAYS: dict[str, dict[str, Any]] = {
    "published": {},
    "ours": {"precision": "float32"},
    "ours-bf16": {"precision": "bfloat16"},
    "ours-compiled": {"precision": "float32", "compile": "always"},
    "ours-bf16-compiled": {"precision": "bfloat16", "compile": "always"},
    "ours-recompute": {"precision": "float32", "recompute": True},
    "ours-glibc": {"precision": "float32"},
}
"""Ways by name: what `cluster` says of each of ours."""

GLIBC = ("published", "ours-glibc")
"""Ways that give freed memory back as glibc does by itself; the others keep it, as workers do."""


@dataclasses.dataclass
class Setting:
    """A task with its inputs, the same in every process."""

    task: AdaptTask
    raw: RawBatch
    pairs: PairBatch
    rng: torch.Generator


def build_setting(way: str, batch_size: int, device: torch.device) -> Setting:
    """Builds the task of a way, and one batch of random pairs."""
    torch.manual_seed(0)
    values = {
        "name": "benchmark",
        "model": "fresh",
        "data": {"shards": "none", "batch_size": batch_size, "num_points": NUM_POINTS}
        | {"teacher_views": 1},
        "cluster": WAYS[way],
    }
    config = parse_config(AdaptConfig, values, "the benchmark's config")
    model = CrossModalModel(ModelSpec(clip="ViT-B-16-quickgelu", point_backbone="pointbert"))
    classes = F.normalize(torch.randn(NUM_CLASSES, model.image.embed_dim), dim=-1)
    classifier = CrossModalClassifier(model, classes).to(device)
    execution = resolve_execution(config.cluster, device)
    if execution.note is not None:
        raise RuntimeError(execution.note)
    classifier.precision = execution.precision
    set_runner(classifier, execution.run)
    task = AdaptTask(classifier, model.spec, config)
    rng = torch.Generator(device=device).manual_seed(0)
    size = (batch_size, 1, 3, VIEW_SIZE, VIEW_SIZE)
    points = torch.randn(batch_size, NUM_POINTS, 3, generator=rng, device=device)
    raw = RawBatch(
        images=torch.randint(0, 256, size, dtype=torch.uint8, generator=rng, device=device),
        points=F.normalize(points, dim=-1),
        object_id=torch.arange(batch_size, device=device),
        captions=(),
        names=tuple(map(str, range(batch_size))),
    )
    pairs = task.augment(raw, rng)
    # Pairs that are there already: published code makes them in its loader, ours on the device.
    task.augment = lambda batch, generator: pairs  # type: ignore[method-assign]
    return Setting(task, raw, pairs, rng)


def step_of(way: str, setting: Setting) -> Callable[[int], object]:
    """Gives a function that takes one step."""
    task, config = setting.task, setting.task.config.optim
    if way == "published":
        step = PublishedStyleStep(task)
        optimizer = step.build_optimizer(config)
        return lambda number: step(optimizer, setting.pairs, number, setting.rng)
    optimizer = build_optimizer(task.parameter_groups(), config)

    def ours(number: int) -> object:
        return train_step(
            task,
            optimizer,
            setting.raw,
            step=number,
            generator=setting.rng,
            clip_norm=config.clip_norm,
        )

    return ours


def terms_of(way: str, setting: Setting) -> dict[str, float]:
    """Computes the terms of one batch, without what chance does to them inside the model."""
    task = setting.task
    rates = {
        block: block.drop_path
        for block in task.bare_student.modules()
        if hasattr(block, "drop_path")
    }
    without_chance(task.bare_student)
    rng = torch.Generator(device=setting.raw.points.device).manual_seed(1)
    if way == "published":
        terms = PublishedStyleStep(task).losses(setting.pairs, rng)
    else:
        terms = task.losses(setting.raw, rng)
    for block, rate in rates.items():
        block.drop_path = rate
    return {name: float(term.detach()) for name, term in terms.items()}


def flops_of(setting: Setting) -> float:
    """Counts the floating point operations of one object's step, as the published code takes it."""
    counter = FlopCounterMode(display=False)
    with counter:
        step = step_of("published", setting)
        step(0)
    return counter.get_total_flops() / len(setting.raw.object_id)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU: its calls return once they are queued, not done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Gives the clock that a neighbour on this machine disturbs least."""
    alone = device.type == "cpu" and threads == 1
    return time.process_time if alone else time.perf_counter


def work(way: str, args: argparse.Namespace) -> None:
    """Answers the commands of the process that started this one, a line of JSON for each."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    setting = build_setting(way, args.batch_size, device)
    clock = clock_of(device, args.threads)
    step, number = step_of(way, setting), 0
    for line in sys.stdin:
        answer: dict[str, Any]
        if line.strip() == "terms":
            answer = terms_of(way, setting)
        elif line.strip() == "memory":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            answer = {
                "gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else peak
            }
        else:
            began = clock()
            step(number)
            synchronize(device)
            answer = {"seconds": clock() - began}
            number += 1
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that takes steps of one way when it is told to."""

    def __init__(self, way: str, args: argparse.Namespace) -> None:
        self.way = way
        command = [sys.executable, __file__, "--work", way, "--device", args.device]
        self.process = subprocess.Popen(
            [*command, f"--batch-size={args.batch_size}", f"--threads={args.threads}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ if way in GLIBC else {**os.environ, **KEEP_FREED_MEMORY},
        )

    def ask(self, what: str) -> dict[str, float]:
        """Sends a command and waits for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of '{self.way}' has ended; its last words are above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """Lets the process go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Measures what the device's matrix product does, in floating point operations per second."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    clock = clock_of(device, threads)
    best = float("inf")
    for _ in range(6):
        began = clock()
        a @ a
        synchronize(device)
        best = min(best, clock() - began)
    return 2 * n**3 / best


def furthest(ours: Mapping[str, float], published: Mapping[str, float]) -> float:
    """Gives the largest difference between terms, as a share of the published one's size."""
    if ours.keys() != published.keys():
        raise RuntimeError(f"other terms: {sorted(ours.keys() ^ published.keys())}")
    return max(abs(ours[k] - published[k]) / max(abs(published[k]), 1.0) for k in ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two ways, three turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="with more, by the wall's clock")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ways", default="published,ours,ours-bf16", help=", ".join(WAYS))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.work:
        work(args.work, args)
        return
    torch.set_num_threads(args.threads)
    ways = args.ways.split(",")
    turns = args.turns
    if args.quick:
        ways, turns = ["published", "ours"], 3
    if unknown := set(ways) - set(WAYS):
        parser.error(f"no ways are called {', '.join(sorted(unknown))}; choose from {list(WAYS)}")

    dtypes = (torch.float32, torch.bfloat16)
    rates = {str(dtype): matrix_rate(device, dtype, args.threads) for dtype in dtypes}
    setting = build_setting("published", 1, torch.device("cpu"))
    flops = flops_of(setting)
    del setting
    workers = [Worker(way, args) for way in ways]
    terms = {worker.way: worker.ask("terms") for worker in workers}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for worker in workers:
            seconds = worker.ask("step")["seconds"]
            if turn:  # the first step sets everything up
                times[worker.way].append(seconds)
    memory = {worker.way: worker.ask("memory")["gb"] for worker in workers}
    for worker in workers:
        worker.end()

    print(f"{machine()}; {device}; batch {args.batch_size}; {flops / 1e9:.1f} GFLOP an object")
    print(", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    base = statistics.median(times[ways[0]])
    print(f"{'way':20}{'seconds of a step':>26}{'objects/s':>11}{'ratio':>7}{'peak':>6}{'GB':>7}")
    results: dict[str, Any] = {}
    for way in ways:
        median = statistics.median(times[way])
        half = WAYS[way].get("precision") == "bfloat16"
        rate = rates[str(torch.bfloat16 if half else torch.float32)]
        results[way] = {
            "seconds": round(median, 4),
            "from_to": [round(min(times[way]), 4), round(max(times[way]), 4)],
            "objects_per_s": round(args.batch_size / median, 4),
            "ratio": round(base / median, 3),
            "peak_share": round(args.batch_size * flops / median / rate, 3),
            "gb": round(memory[way], 2),
            "terms_differ_by": furthest(terms[way], terms[ways[0]]),
        }
        seen = results[way]
        spread = "{:.3f} ({:.3f}-{:.3f})".format(median, *seen["from_to"])
        print(
            f"{way:20}{spread:>26}{seen['objects_per_s']:>11.3f}{seen['ratio']:>7.2f}"
            f"{seen['peak_share']:>6.0%}{seen['gb']:>7.2f}"
        )
    settings = {"device": args.device, "batch_size": args.batch_size, "threads": args.threads}
    settings["gflop"] = flops / 1e9
    append_result("step", {**settings, "rates": rates, **results})


if __name__ == "__main__":
    main()
