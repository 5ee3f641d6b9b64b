"""How long from the command to the first step, per epoch, per trial; and what does Ray cost a step?

    python benchmarks/startup.py [start] [trials] [tiny] [spare] [full] [--quick] [--turns 2]

`start` runs jobs/adapt.py as a user would, in a fresh process with a Ray of its own, and splits
what passes until the first step is taken, and what an epoch costs beside its steps. `trials` runs
jobs/sweep.py, and tells what a trial costs beside its epochs. `tiny` and `full` take the same steps
in plain torch, with no Ray running, and in a worker of Ray Train, in turns, with a thread for each
of two cores: the embedded model on the embedded furniture; and ViT-B/16 at 224 pixels with
PointBERT on 8,192 points, 4 pairs a step, with fresh weights. `spare` is `tiny` with one thread, so
that a core is left for everything else. Appends a line for each to
benchmarks/results/startup.jsonl. About 15 minutes and 9 GB of memory on 2 cores; --quick takes
`start` and `tiny` once, and 2 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from copies import write_copies
from marks import DECODED, FILE, Mark, periods, read, split_epochs, split_start
from measure import append_result, machine

from crossmost_ray.cluster import KEEP_FREED_MEMORY

ROOT = Path(__file__).parents[1]
ADAPT, SWEEP = "jobs/adapt.py", "jobs/sweep.py"
CONFIG = "configs/adapt/furniture.yaml"

QUESTIONS = ("start", "trials", "tiny", "spare", "full")

SHORT = ("data.num_views=2", "evaluation.num_views=1", "evaluation.point_samples=1")
"""Of the furniture's run: what is asked about is what does not depend on how long it is."""

FULL_OBJECTS, FULL_BATCH, FULL_DECODED = 28, 4, 4
TINY_DECODED = 12


def run(
    command: Sequence[str], marks: Path, environment: Mapping[str, str] | None = None
) -> tuple[float, float]:
    """Runs a Python script with a file for its marks; tells when it began and ended.

    Raises:
        RuntimeError: With the end of its output, if it fails.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    given = {**outside, "PYTHONPATH": paths, FILE: str(marks), "RAY_AUTH_MODE": "disabled"}
    began = time.time()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=given | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{done.stdout[-500:]}{done.stderr[-3000:]}"
        )
    return began, time.time()


def ask_start(folder: Path, turns: int) -> None:
    """Runs the furniture job, and splits its time."""
    starts, epochs, ends = list[dict[str, float]](), list[dict[str, float]](), list[float]()
    for turn in range(turns):
        marks = folder / f"start-{turn}.jsonl"
        output = f"output={folder}/start-{turn}"
        command = ["benchmarks/marks.py", ADAPT, CONFIG, *SHORT, output, "optim.epochs=3"]
        began, ended = run(command, marks)
        seen = [Mark("spawn", began, began), *read(marks)]
        starts.append(split_start(seen))
        epochs.append(split_epochs(seen))
        last = max(mark.ended for mark in seen if mark.name == "_save_and_report")
        ends.append(ended - last)
    told = {"start": medians(starts), "epoch": medians(epochs)}
    told["after"] = {"whole, with evaluation": statistics.median(ends)}
    for title, found in told.items():
        print(f"\n| {title} | s |\n|---|---|")
        for part, seconds in found.items():
            print(f"| {part} | {seconds:.2f} |")
    whole = [one["whole"] for one in starts]
    print(f"first step after {min(whole):.1f} to {max(whole):.1f} s in {turns} run(s)")
    append_result(
        "startup", {"question": "start", "turns": turns, **{k: rounded(v) for k, v in told.items()}}
    )


def ask_trials(folder: Path) -> None:
    """Runs a sweep of three short trials one after the other, and tells what each cost."""
    sweep = {
        "name": "sweep",
        "base": str(ROOT / CONFIG),
        "output": str(folder),
        "max_concurrent": 1,
        "overrides": {
            **dict(one.split("=") for one in SHORT),
            "data.num_views": 2,
            "optim.epochs": 2,
            "evaluation.num_views": 1,
            "evaluation.point_samples": 1,
        },
        "space": {"pseudo_labels.threshold": {"grid": [0.6, 0.8, 0.95]}},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    began, ended = run([SWEEP, str(path)], folder / "unused.jsonl")
    trials = sorted((folder / "sweep" / "trials").glob("trial-*"))
    starts = [(trial / "run.json").stat().st_mtime for trial in trials]
    spent = [sum(row["seconds"] for row in rows(trial)) for trial in trials]
    beside = [later - start - s for start, later, s in zip(starts, starts[1:], spent, strict=False)]
    told = {
        "a trial's epochs": statistics.median(spent),
        "a trial beside its epochs": statistics.median(beside),
        "before the first trial's training": starts[0] - began,
        "after the last trial began": ended - starts[-1],
        "the whole sweep": ended - began,
    }
    print("\n| sweep of 3 trials, one at a time | s |\n|---|---|")
    for part, seconds in told.items():
        print(f"| {part} | {seconds:.1f} |")
    append_result("startup", {"question": "trials", **rounded(told)})


def rows(trial: Path) -> list[dict[str, float]]:
    """Reads what a run wrote down of its epochs."""
    text = (trial / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ask_overhead(folder: Path, setting: str, turns: int) -> None:
    """Takes the same steps in plain torch and in Ray's worker, in turns."""
    decoded = FULL_DECODED if setting == "full" else TINY_DECODED
    if setting == "full":
        told = full_settings(folder)
    else:
        threads = 1 if setting == "spare" else 2
        told = ["data.num_views=4", "optim.epochs=2", f"cluster.threads_per_worker={threads}"]
    seen: dict[tuple[str, str], list[float]] = {}
    busy = []
    for turn in range(turns):
        for way, script in (("plain", "benchmarks/plain.py"), ("ray", "benchmarks/train.py")):
            marks = folder / f"{setting}-{way}-{turn}.jsonl"
            output = f"output={folder}/{setting}-{turn}"
            busy.append(busy_share())
            run([script, CONFIG, *told, output], marks, {DECODED: str(decoded)} | KEEP_FREED_MEMORY)
            for kind in ("train_step", "decoded step"):
                seen.setdefault((kind, way), []).extend(periods(read(marks), kind))
    print(f"\n| {setting} | plain torch, s | in Ray's worker, s | ratio |\n|---|---|---|---|")
    found = {}
    for kind, title in (("decoded step", "decoded beforehand"), ("train_step", "read and decoded")):
        plain, with_ray = seen[kind, "plain"], seen[kind, "ray"]
        ratio = statistics.median(with_ray) / statistics.median(plain)
        print(f"| {title} | {spread(plain)} | {spread(with_ray)} | {ratio:.3f} |")
        found[title] = {
            "plain_s": statistics.median(plain),
            "ray_s": statistics.median(with_ray),
            "ratio": ratio,
            "steps": len(with_ray),
        }
    told_busy = ", ".join(f"{100 * share:.0f} %" for share in busy)
    print(f"busy with other work before each run: {told_busy} of the CPUs")
    facts = {"setting": setting, "turns": turns, "busy_before": busy}
    append_result("startup", {"question": "overhead", **facts, **found})


def busy_share(seconds: float = 3.0) -> float:
    """Measures how busy the machine's CPUs are with whatever else there is, from 0 to 1: steps that
    use all of them tell nothing where others do, too."""

    def times() -> tuple[int, int]:
        with Path("/proc/stat").open(encoding="ascii") as stat:
            values = [int(value) for value in stat.readline().split()[1:]]
        return sum(values), values[3] + values[4]

    whole, idle = times()
    time.sleep(seconds)
    later, later_idle = times()
    return round(1 - (later_idle - idle) / (later - whole), 3)


def full_settings(folder: Path) -> list[str]:
    """Makes shards and fresh weights of the published size, and tells how to take them."""
    import torch

    from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
    from crossmost_ray.models.pretrained import save_model

    write_copies(folder / "full-shards", FULL_OBJECTS)
    torch.manual_seed(0)
    model = CrossModalModel(ModelSpec("ViT-B-16-quickgelu", "pointbert"))
    save_model(folder / "full-model", model, card="fresh weights, for a benchmark\n")
    return [
        f"model={folder}/full-model",
        f"data.shards={folder}/full-shards",
        f"data.batch_size={FULL_BATCH}",
        *("data.num_points=8192", "data.num_views=1", "data.teacher_views=1", "optim.epochs=1"),
    ]


def spread(seconds: Sequence[float]) -> str:
    """Writes median, least and most."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Gives the median of each part."""
    return {part: statistics.median(one[part] for one in found) for part in found[0]}


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Leaves what can be believed."""
    return {part: round(seconds, 3) for part, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", help="all of them if none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, help="2, and 1 with --quick")
    args = parser.parse_args()
    known = ["start", "tiny"] if args.quick else list(QUESTIONS)
    asked = args.questions or known
    if unknown := sorted(set(asked) - set(QUESTIONS)):
        parser.error(f"no question {unknown}; there are {', '.join(QUESTIONS)}")
    turns = args.turns or (1 if args.quick else 2)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "start" in asked:
            ask_start(folder, turns)
        if "trials" in asked:
            ask_trials(folder)
        for setting in ("tiny", "spare", "full"):
            if setting in asked:
                ask_overhead(folder, setting, turns)


if __name__ == "__main__":
    main()
