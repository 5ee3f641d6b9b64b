"""What the loop asks of an objective: one loop serves adaptation and pre-training."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crossmost_ray.schema import RawBatch


class Task(Protocol):
    """An objective with the state that belongs to it."""

    student: nn.Module
    """The module that the optimiser moves, as the loop must call it: wrapped where W > 1."""

    weights: dict[str, float]
    """Factor of each term."""

    def parameter_groups(self) -> list[dict[str, object]]:
        """Sorts the trainable parameters by learning rate and weight decay."""
        ...

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Computes the terms on one batch, unweighted; the keys are those of `weights`."""
        ...

    def diagnostics(self) -> dict[str, Tensor]:
        """Gives further scalars of the last batch, by name."""
        ...

    def after_step(self, step: int) -> None:
        """Follows the student, once the optimiser has moved it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Gives everything that resuming needs, but for the optimiser: tensors by name."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...
