"""Loops for the CPU: compiled at their first call, and spread over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compiles a loop at its first call, and keeps the result on disk.

    Of what makes arithmetic faster and less exact, only "there is no NaN" and "zero has no sign"
    are granted, which let eight numbers be compared at once. Products and sums stay apart and in
    their order, so that what is compared with a reference is that reference's, bit for bit.
    """
    return cast(Loop, numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})(loop))


def on_threads(loop: Callable[..., None], most: int, *arrays: npt.NDArray[Any]) -> None:
    """Runs a loop over the first axis of arrays, on as many threads as torch may use.

    Threads of our own, started for this call: those of Numba can't be used by two callers at once,
    and would not be there in a process that was forked.

    Args:
        loop: Called with a part of each array; parts of one call are of one length.
        most: Threads at most: starting one costs 0.1 ms, which small work is not worth.
        arrays: Of one length; each row is worked on by one thread.
    """
    threads = min(torch.get_num_threads(), len(arrays[0]), most)
    if threads < 2:
        loop(*arrays)
        return
    parts = zip(*(np.array_split(array, threads) for array in arrays), strict=True)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: loop(*part), parts))
