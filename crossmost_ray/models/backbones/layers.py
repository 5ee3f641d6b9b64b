"""Layers over (..., channels), with the tensors of the convolutions that checkpoints hold."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Pointwise(nn.Linear):
    """A linear map whose weight is shaped like that of a convolution of width 1.

    The published networks lay points out channels first and convolve them. Channels last, the
    same map is one matrix product over all points; only the shape of the weight is left of it.

    Args:
        width_in: Channels in.
        width_out: Channels out.
        axes: Axes of the convolution: the weight is (width_out, width_in, 1 or 1, 1).
        bias: Whether there is one.
    """

    def __init__(self, width_in: int, width_out: int, *, axes: int, bias: bool = True) -> None:
        super().__init__(width_in, width_out, bias=bias)
        self.weight = nn.Parameter(self.weight.detach().reshape(*self.weight.shape, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width_in) to (..., width_out)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class PointwiseNorm(nn.BatchNorm1d):
    """BatchNorm over the last axis of a tensor; all other axes are its batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to the same shape."""
        return super().forward(x.flatten(0, -2)).reshape(x.shape)
