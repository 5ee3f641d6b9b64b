"""One batch in, one step of the optimiser and its scalars out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """Forward, backward, update.

    Args:
        task: The objective.
        optimizer: Over the parameters of `task.student`.
        batch: This worker's share of the step.
        step: Number of the step, from 0.
        generator: Of the augmentations, on the batch's device.
        clip_norm: Gradients longer than this are shortened to it.
        accumulate: Parts that the share is cut into, one after the other; at most B.

    Returns:
        Detached scalars by name: `loss/<term>` for each term exactly as it was optimised,
        `loss` for their weighted sum, and the task's diagnostics; of several parts, their mean.

    Raises:
        NonFiniteLossError: On every worker alike, naming the terms by worker, before anything
            moves.
    """
    optimizer.zero_grad(set_to_none=True)
    scalars: dict[str, Tensor] = {}
    for part, share, last in _parts(batch, accumulate):
        # Workers exchange their gradients with the last part, once for all.
        with nullcontext() if last else _no_exchange(task.student):
            terms = _backward(task, part, share, step, generator)
        for name, value in (terms | task.diagnostics()).items():
            value = share * value.detach().float()
            scalars[name] = scalars[name] + value if name in scalars else value
    _clip(list(task.student.parameters()), clip_norm)
    optimizer.step()
    task.after_step(step)
    return scalars


def _parts(batch: RawBatch, number: int) -> Iterator[tuple[RawBatch, float, bool]]:
    """Cuts a batch into parts as equal as can be: each with its share, and whether it is the last.

    Raises:
        ValueError: If there are more parts than objects.
    """
    B = len(batch.object_id)
    if number > B:
        raise ValueError(f"a batch of {B} can't be cut into {number} parts; lower optim.accumulate")
    if number == 1:
        yield batch, 1.0, True
        return
    for place in range(number):
        rows = slice(B * place // number, B * (place + 1) // number)
        part = RawBatch._make(values[rows] for values in batch)
        yield part, len(part.object_id) / B, place == number - 1


def _clip(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Shortens the gradients together to a length of at most `limit`."""
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    # On a CPU to look is free, and to multiply all gradients by 1 is not; a GPU would be waited
    # for. The small number is torch's own, in the same place.
    if norm.device.type != "cpu" or norm + 1e-6 > limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _no_exchange(student: nn.Module) -> AbstractContextManager[None]:
    """Holds the exchange of gradients back, where the student is wrapped for several workers."""
    return student.no_sync() if isinstance(student, DistributedDataParallel) else nullcontext()


def _backward(
    task: Task, batch: RawBatch, share: float, step: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Adds the gradients of one part, and gives its terms and their weighted sum."""
    losses = {name: term.float() for name, term in task.losses(batch, generator).items()}
    total = weighted_sum(losses, task.weights)
    # Averaged first, so that all workers stop together: one that stopped alone would leave the
    # others waiting in their next collective. It is the one place of a step that waits for the
    # device: after it, nothing could be taken back.
    if not torch.isfinite(mean_over_workers(total.detach())):
        optimized = [name for name, term in losses.items() if not torch.isfinite(term)]
        where = "; ".join(
            f"{', '.join(names)} on worker {rank}"
            for rank, names in enumerate(gather_objects(optimized))
            if names
        )
        raise NonFiniteLossError(
            f"step {step}: the loss is not finite ({where or 'the sum of its terms overflows'}); "
            "lower optim.lr, or look at the shards"
        )
    (share * total).backward()
    return {"loss": total, **{f"loss/{name}": term for name, term in losses.items()}}
