"""Collectives that gradients flow through, and that are the identity on one worker."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def num_workers() -> int:
    """Counts the workers of the running process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    """Gives this worker's place among the workers; 0 where there is no process group."""
    return dist.get_rank() if num_workers() > 1 else 0


class _MeanOverWorkers(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total / num_workers()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every worker's loss depends on this worker's share, so the gradients are summed; DDP
        # then averages over workers, which together is the gradient of the mean loss.
        total = gradient.clone()
        dist.all_reduce(total)
        return total / num_workers()


def mean_over_workers(tensor: Tensor) -> Tensor:
    """Averages a tensor over the workers, gradients included.

    Args:
        tensor: Any shape, the same on every worker.

    Returns:
        The mean, the same on every worker.
    """
    return _MeanOverWorkers.apply(tensor) if num_workers() > 1 else tensor


def gather_objects(mine: T) -> list[T]:
    """Gives every worker's value, in the order of their ranks; for what happens once an epoch."""
    if num_workers() == 1:
        return [mine]
    parts = [mine] * num_workers()
    dist.all_gather_object(parts, mine)
    return parts


def gather_on_first(mine: T) -> list[T]:
    """Gives the first worker every worker's value, in the order of their ranks, and the others
    nothing; for what happens once an epoch."""
    if num_workers() == 1:
        return [mine]
    parts = [mine] * num_workers() if worker_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


def from_first_worker(value: T) -> T:
    """Gives every worker the first worker's value; for what happens once an epoch."""
    if num_workers() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]


def most_of_workers(value: float) -> float:
    """Gives the largest of the workers' values, on all of them; for what happens once an epoch."""
    return max(gather_objects(value))


class _GatherFromWorkers(torch.autograd.Function):
    """All-gather whose backward returns to each worker the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(num_workers())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = tensor.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        first = worker_rank() * ctx.rows
        return total[first : first + ctx.rows]


def gather_from_workers(tensor: Tensor) -> Tensor:
    """Stacks the rows of all workers in the order of their ranks, gradients included.

    Args:
        tensor: (B, ...), the same shape on every worker.

    Returns:
        (W * B, ...).
    """
    return _GatherFromWorkers.apply(tensor) if num_workers() > 1 else tensor
