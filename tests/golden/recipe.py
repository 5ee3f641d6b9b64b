"""Weights and inputs of the golden numbers: each tensor follows from its name and its shape.

A hash of the name seeds a counter, SplitMix64 mixes it, and 24 bits of each word become a number in
[-1, 1) that float32 holds exactly. So the numbers can be had anywhere without storing a weight.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Array = npt.NDArray[np.generic]

# Constants of SplitMix64 (Steele et al., 2014): its increment, then its two multipliers.
INCREMENT = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))

# Matrices that are multiplied from the right, so that their fan-in is their first axis.
RIGHT_MULTIPLIED = {"image_projection", "text_projection", "pc_projection", "proj", "classifier"}


def unit(name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Draws float32 numbers in [-1, 1) that depend on `name` alone."""
    count = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        word = (count + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))) * INCREMENT
        for shift, multiplier in MULTIPLIERS:
            word = (word ^ (word >> np.uint64(shift))) * multiplier
    word ^= word >> np.uint64(31)
    return ((word >> np.uint64(40)) / 2.0**23 - 1.0).astype(np.float32).reshape(shape)


def fill(name: str, shape: Sequence[int]) -> Array:
    """Gives the tensor that a checkpoint holds under `name`, in the size that trained ones have."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "logit_scale":
        return np.full(shape, math.log(100.0), np.float32)
    noise = unit(name, shape)
    mean, spread = 0.0, 0.05
    if leaf == "running_mean":
        spread = 0.1
    elif leaf == "running_var":
        mean, spread = 1.0, 0.5
    elif leaf == "affine_alpha" or (leaf == "weight" and len(shape) <= 1):
        mean, spread = 1.0, 0.1
    elif leaf != "affine_beta" and len(shape) > 1:
        right = len(shape) == 2 and leaf in RIGHT_MULTIPLIED
        spread = math.sqrt(3 * (1 / shape[0] if right else shape[0] / math.prod(shape)))
    return np.float32(mean) + np.float32(spread) * noise


def fill_module(module: nn.Module, prefix: str = "") -> None:
    """Overwrites every tensor of a module by the one that `prefix` and its name stand for."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(fill(prefix + name, value.shape))))
