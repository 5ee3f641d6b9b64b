"""A student in, its slower average out: the teacher."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from crossmost_ray.config import EmaConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def ema_decay(step: int, config: EmaConfig) -> float:
    """Ramps the decay linearly from `start` at step 0 to `end` at `ramp_steps` and after."""
    ramp = min(1.0, step / config.ramp_steps)
    return config.start + (config.end - config.start) * ramp


class EmaTeacher(Generic[ModuleT]):
    """An averaged copy of the student, moved once per optimiser step.

    Args:
        student: Copied as it is, before DDP wraps it.
        config: How slowly the copy follows.

    Source:
        Mean teacher (Tarvainen and Valpola, 2017), with the ramp of MUST (Li et al., 2022).
    """

    def __init__(self, student: ModuleT, config: EmaConfig) -> None:
        self.module: ModuleT = copy.deepcopy(student).eval().requires_grad_(False)
        self.config = config

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Moves towards the student: t <- d * t + (1 - d) * s, with d ramped over the steps."""
        ours, theirs = self.module.state_dict(), student.state_dict()
        averaged = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [ours[name] for name in averaged],
            [theirs[name] for name in averaged],
            1.0 - ema_decay(step, self.config),
        )
        for name in ours.keys() - set(averaged):
            # BatchNorm counts its batches in an int64; averaged, the count would be
            # truncated towards zero on every step.
            ours[name].copy_(theirs[name])
