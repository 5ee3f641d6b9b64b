"""A piece of work in, its seconds and its memory out, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

RESET_PEAK = "5"
"""Written to `clear_refs`, it takes the mark of the highest memory down to what is held."""

Arguments = ParamSpec("Arguments")


class Watch:
    """Measures parts of a piece of work.

    Attributes:
        found: By name of a part and kind: `s`, seconds of processor time of this process, and
            `MB`, the most that it held beyond what it had held when the first part began.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._before: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measures what is done within."""
        if self._before is None:
            self._before = held_mb("VmRSS")
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
        began = time.process_time()
        yield
        self.found[f"{name} s"] = time.process_time() - began
        self.found[f"{name} MB"] = held_mb("VmHWM") - self._before

    def note(self, name: str, value: float) -> None:
        """Adds a figure that is no time, such as the size of a file."""
        self.found[name] = value


def held_mb(kind: str) -> float:
    """Reads what this process holds, `VmRSS`, or has held at most, `VmHWM`."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{kind}:"))


def apart(
    work: Callable[Concatenate[Watch, Arguments], None],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> dict[str, float]:
    """Does a piece of work in a process that has imported what this one has, and nothing else.

    The caller must not have run anything of torch yet: a copy of its threads would wait for ever.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(partial(_watched, work, *args, **kwargs)).result()


def _watched(
    work: Callable[Concatenate[Watch, Arguments], None],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> dict[str, float]:
    watch = Watch()
    work(watch, *args, **kwargs)
    return watch.found
