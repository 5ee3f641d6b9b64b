"""Notes when what happens in a run, from outside: in the driver and in its first worker.

    python benchmarks/marks.py SCRIPT [ARGUMENT ...]

Runs a job as `python SCRIPT ARGUMENT ...` would, in a process whose environment names the file that
the notes go to. Functions of the package are wrapped where the loop looks them up; nothing else is
changed.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FILE = "CROSSMOST_MARKS"
"""Environment variable; the workers inherit it from the Ray that the driver starts."""

DECODED = "CROSSMOST_DECODED_STEPS"
"""Environment variable: steps on batches that are decoded beforehand, after the run's own."""

OF_DRIVER = ("list_shards", "inspect_model", "connect", "check_shards")
OF_WORKER = (
    *("build_task", "_restore", "build_optimizer"),
    *("train_step", "_write_down", "_save_and_report"),
)


PARTS = {
    "python and config": ("spawn began", "config began"),
    "imports": ("config began", "imports began"),
    "list shards": ("list_shards began", "list_shards ended"),
    "load model, driver": ("inspect_model began", "inspect_model ended"),
    "ray.init": ("connect began", "connect ended"),
    "check shards": ("check_shards began", "check_shards ended"),
    "start worker": ("fit began", "worker began"),
    "build task, worker": ("build_task began", "build_task ended"),
    "optimiser, checkpoint": ("build_optimizer began", "_restore ended"),
    "first batch": ("_restore ended", "train_step began"),
    "first step": ("train_step began", "train_step ended"),
}
"""Where the time until the first step goes: from one moment to another, each of the first mark of a
name. The stream is set up while the task is built: the first batch is what is left to wait for."""


class Mark(NamedTuple):
    """Something that began or ended."""

    name: str
    began: float
    ended: float
    """Seconds of the machine's clock, which all its processes share."""


def note(name: str, began: float, ended: float) -> None:
    """Adds a line to the file."""
    with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([name, began, ended]) + "\n")


def read(path: Path) -> list[Mark]:
    """Reads the marks in the order in which they ended."""
    return [Mark(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def first(marks: Sequence[Mark], name: str) -> Mark:
    """Gives the first mark of a name."""
    return next(mark for mark in marks if mark.name == name)


def split_start(marks: Sequence[Mark]) -> dict[str, float]:
    """Splits the seconds from the command to the end of the first step; the rest is `other`."""

    def moment(said: str) -> float:
        name, which = said.split()
        mark = first(marks, name)
        return mark.began if which == "began" else mark.ended

    found = {part: moment(end) - moment(start) for part, (start, end) in PARTS.items()}
    whole = first(marks, "train_step").ended - first(marks, "spawn").began
    return found | {"other": whole - sum(found.values()), "whole": whole}


def split_epochs(marks: Sequence[Mark]) -> dict[str, float]:
    """Medians of what passes between the last step of an epoch and the first of the next one."""
    steps = [mark for mark in marks if mark.name == "train_step"]
    found: dict[str, list[float]] = {}
    for end in (mark for mark in marks if mark.name == "finish_epoch"):
        before = max((step for step in steps if step.ended <= end.began), key=lambda s: s.ended)
        after = min(
            (step for step in steps if step.began >= end.ended), key=lambda s: s.began, default=None
        )
        if after is None:
            continue
        parts = {"votes and health": end.ended - end.began}
        for part, name in (
            ("write votes", "_write_down"),
            ("checkpoint, report", "_save_and_report"),
        ):
            done = next(m for m in marks if m.name == name and m.began >= end.ended)
            parts[part] = done.ended - done.began
        whole = after.began - before.ended
        parts |= {"next batch": whole - sum(parts.values()), "whole": whole}
        for part, seconds in parts.items():
            found.setdefault(part, []).append(seconds)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


def periods(marks: Sequence[Mark], name: str) -> list[float]:
    """Seconds from the end of a step to the end of the next, within epochs, the first two left out
    of every epoch; of decoded steps, how long each took, the first left out."""
    if name == "decoded step":
        return [mark.ended - mark.began for mark in marks if mark.name == name][1:]
    found, here = [], list[Mark]()
    for mark in marks:
        if mark.name == name:
            here.append(mark)
        elif mark.name == "finish_epoch":
            found += [b.ended - a.ended for a, b in itertools.pairwise(here[1:])]
            here = []
    return found


def marked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function so that every call of it is noted."""

    @functools.wraps(work)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.time()
        try:
            return work(*args, **kwargs)
        finally:
            note(name, began, time.time())

    return wrapped


def mark_all(module: ModuleType | type, names: tuple[str, ...]) -> None:
    """Wraps functions where a module, or a class, looks them up."""
    for name in names:
        setattr(module, name, marked(name, getattr(module, name)))


def marked_worker(loop_config: dict[str, Any]) -> str | None:
    """Does what `run_worker` does, and notes it."""
    from crossmost_ray.training import worker
    from crossmost_ray.training.adapt import AdaptTask

    note("worker", time.time(), time.time())
    mark_all(worker, OF_WORKER)
    AdaptTask.finish_epoch = marked("finish_epoch", AdaptTask.finish_epoch)  # type: ignore[method-assign]
    stopped = worker.run_worker(loop_config)
    if DECODED in os.environ:
        from plain import decoded_steps

        plan = loop_config["plan"]
        for began, ended in decoded_steps(plan.config, int(os.environ[DECODED])):
            note("decoded step", began, ended)
    return stopped


def main() -> None:
    note("python", time.time(), time.time())
    import crossmost_ray.command_line
    import crossmost_ray.config

    assert crossmost_ray
    note("config", time.time(), time.time())
    # What the jobs import once their config is known to be good.
    from ray.train.torch import TorchTrainer

    from crossmost_ray.evaluation import adaptation
    from crossmost_ray.training import trainer

    note("imports", time.time(), time.time())
    mark_all(trainer, OF_DRIVER)
    setattr(trainer, "run_worker", marked_worker)  # noqa: B010
    mark_all(TorchTrainer, ("fit",))
    mark_all(adaptation, ("train", "export_run", "measure"))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    # As a module of its own name, which the workers can import.
    import marks

    marks.main()
