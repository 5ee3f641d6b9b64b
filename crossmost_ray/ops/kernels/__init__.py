"""A device in, the point kernels for it out: sampling and searching have one definition, in
`reference`, and several implementations that agree with it."""

from __future__ import annotations

import functools
import importlib
import os
from importlib.util import find_spec
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from crossmost_ray.config import ConfigError

KernelName = Literal["auto", "reference", "numba", "triton", "pointnet2"]

VARIABLE = "CROSSMOST_POINT_KERNELS"
"""Environment variable that names the kernels of this process and of those it starts."""

DEVICES = {"numba": "cpu", "triton": "cuda", "pointnet2": "cuda"}
"""The kind of device that kernels run on; those of `reference` run on all."""

MODULES = {
    "reference": "reference",
    "numba": "cpu",
    "triton": "cuda",
    "pointnet2": "pointnet2",
}


class PointKernels(Protocol):
    """What each module of kernels offers. Arguments have been checked; `reference` explains them.

    Points and queries are contiguous float32, without a gradient, on the kernels' device.
    """

    def farthest_point_sample(self, points: Tensor, start: Tensor, num_samples: int) -> Tensor:
        """Picks (B, num_samples) points."""
        ...

    def nearest_neighbors(self, queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
        """Finds (B, G, num_neighbors) points."""
        ...

    def ball_query(
        self, queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
    ) -> Tensor:
        """Finds (B, S, num_neighbors) points."""
        ...

    def sample_and_search(
        self, points: Tensor, start: Tensor, num_samples: int, num_neighbors: int
    ) -> tuple[Tensor, Tensor]:
        """Picks points, and finds the nearest neighbours of each."""
        ...


def use_kernels(name: KernelName) -> None:
    """Chooses the kernels of this process and of those it starts from here on.

    Args:
        name: "auto" for the fastest that agree with the reference. Those of another kind of device
            leave this one's choice to "auto": with "pointnet2", clouds on the CPU go to Numba.

    Raises:
        ConfigError: If there is no such name, or what it needs isn't installed.
    """
    _check(name, "use_kernels")
    os.environ[VARIABLE] = name


def kernel_name(device: torch.device) -> str:
    """Tells which kernels clouds on a device go to.

    Raises:
        ConfigError: If the environment variable names kernels that aren't there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    _check(asked, VARIABLE)
    if asked == "reference" or DEVICES.get(asked) == device.type:
        return asked
    return _fastest(device)


def _fastest(device: torch.device) -> str:
    """Names the fastest kernels that agree with the reference."""
    if device.type == "cpu":
        return "numba"
    # Triton comes with torch's builds for CUDA, except on Windows.
    return "triton" if device.type == "cuda" and _is_installed("triton") else "reference"


def kernels_for(device: torch.device) -> PointKernels:
    """Gives the kernels for a device, importing what they need at the first call.

    Raises:
        ConfigError: If the environment variable names kernels that aren't there.
    """
    return _load(kernel_name(device))


def automatic(device: torch.device) -> PointKernels:
    """Gives the kernels for a device that are used where nobody asks for others."""
    return _load(_fastest(device))


@functools.cache
def _load(name: str) -> PointKernels:
    return cast(PointKernels, importlib.import_module(f"{__name__}.{MODULES[name]}"))


@functools.cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _check(name: str, where: str) -> None:
    known = get_args(KernelName)
    if name not in known:
        raise ConfigError(f"{where}: there are no kernels '{name}'; choose {', '.join(known)}")
    needed = {"triton": "triton", "pointnet2": "pointnet2_ops"}.get(name)
    if needed is not None and not _is_installed(needed):
        raise ConfigError(f"{where}: '{name}' needs {needed}, which isn't installed; use 'auto'")
