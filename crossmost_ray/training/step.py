"""One batch in, one step of the optimiser and its scalars out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crossmost_ray.ops.distributed import gather_objects, mean_over_workers
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.task import Task


class NonFiniteLossError(RuntimeError):
    """A term of the objective is NaN or infinite: the optimiser was not moved."""


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sums the terms, each times its weight.

    Raises:
        ValueError: If a term has no weight: it would be left out without a word.
    """
    unknown = sorted(set(losses) - set(weights))
    if unknown:
        raise ValueError(f"no weight is given for {', '.join(unknown)}")
    return torch.stack([weights[name] * term for name, term in losses.items()]).sum()


def train_step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    batch: RawBatch,
    *,
    step: int,
    generator: torch.Generator,
    clip_norm: float,
    precision: torch.dtype,
) -> dict[str, Tensor]:
    """Forward, backward, update.

    Args:
        task: The objective.
        optimizer: Over the parameters of `task.student`.
        batch: This worker's share of the step.
        step: Number of the step, from 0.
        generator: Of the augmentations, on the batch's device.
        clip_norm: Gradients longer than this are shortened to it.
        precision: float32, or the dtype of mixed precision.

    Returns:
        Detached scalars by name: `loss/<term>` for each term exactly as it was optimised,
        `loss` for their weighted sum, and the task's diagnostics.

    Raises:
        NonFiniteLossError: On every worker alike, naming the terms by worker, before anything
            moves.
    """
    device = batch.points.device.type
    with torch.autocast(device, dtype=precision, enabled=precision != torch.float32):
        losses = task.losses(batch, generator)
    losses = {name: term.float() for name, term in losses.items()}
    total = weighted_sum(losses, task.weights)
    # Averaged first, so that all workers stop together: one that stopped alone would leave the
    # others waiting in their next collective.
    if not torch.isfinite(mean_over_workers(total.detach())):
        broken = gather_objects([name for name, term in losses.items() if not torch.isfinite(term)])
        where = "; ".join(
            f"{', '.join(names)} on worker {rank}" for rank, names in enumerate(broken) if names
        )
        raise NonFiniteLossError(
            f"step {step}: the loss is not finite ({where or 'the sum of its terms overflows'}); "
            "lower optim.lr, or look at the shards"
        )

    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(task.student.parameters(), clip_norm)
    optimizer.step()
    task.after_step(step)

    scalars = {"loss": total, **{f"loss/{name}": term for name, term in losses.items()}}
    return {name: value.detach().float() for name, value in (scalars | task.diagnostics()).items()}
