"""What transformers share: attention, and how their blocks are run: as they are, compiled, or
twice to save memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BlockForward = Callable[..., Tensor]
"""(block, tokens, ...) -> tokens."""


@dataclasses.dataclass(frozen=True)
class BlockRunner:
    """Runs one block after the other in the way that the run's config asks for."""

    compiled: bool = False
    """By torch.compile. All blocks of a kind share what is compiled: it takes one block's time."""

    recompute: bool = False
    """Keeps of a block what goes into it alone, and computes the rest again on the way back: a
    third more time for a fraction of the memory."""

    def __call__(self, forward: BlockForward, block: nn.Module, x: Tensor, *more: Any) -> Tensor:
        """Gives `forward(block, x, *more)`."""
        run = _compiled(forward) if self.compiled else forward
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, block, x, *more, use_reentrant=False)
        return run(block, x, *more)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mixes values by how far their keys go with the queries.

    Heads come after tokens, as one product for all three leaves them: unbound, and transposed no
    earlier than here. On the way back, the three gradients are then laid out side by side in one
    copy, as the product wants them.

    Args:
        query: (B, Q, heads, d).
        key: (B, L, heads, d).
        value: (B, L, heads, d).

    Returns:
        (B, Q, heads * d).

    Source:
        Vaswani et al. (2017), scaled dot-product attention.
    """
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return mixed.transpose(1, 2).flatten(2)


def call(block: nn.Module, x: Tensor, *more: Any) -> Tensor:
    """Runs a block by its own forward pass."""
    return block(x, *more)


@functools.cache
def _compiled(forward: BlockForward) -> BlockForward:
    # Not dynamic: batches and tokens have one size through a run, and fixed sizes run faster.
    return torch.compile(forward, dynamic=False)
