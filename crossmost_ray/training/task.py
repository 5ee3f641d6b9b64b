"""What the loop asks of an objective: one loop serves adaptation and pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor, nn

from crossmost_ray.schema import RawBatch


@dataclass(frozen=True)
class EpochEnd:
    """What an objective makes of an epoch that is over; the same on every worker but for the
    votes, which the first has."""

    metrics: dict[str, float] = field(default_factory=dict)
    votes: pa.Table | None = None
    """What was said of each object."""
    events: tuple[dict[str, Any], ...] = ()
    """Lines for the run's log."""
    stop: str | None = None
    """Why the run is over before its last epoch, if it is."""
    rolled_back: bool = False
    """Whether the weights are those of an earlier epoch again."""


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

    def finish_epoch(self) -> EpochEnd:
        """Looks back on the epoch. Workers meet here."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Gives everything that resuming needs, but for the optimiser: tensors and plain values; on
        workers but the first, some of it may be left out. Workers meet here."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...
