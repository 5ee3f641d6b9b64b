"""Backbones without tokens: points in, one vector out; what is hidden is left out of the cloud."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crossmost_ray.models.backbones.base import PointFeatures, PointTokens, check_num_points
from crossmost_ray.ops.points import farthest_point_sample, gather, hide_points


class WholeCloudBackbone(nn.Module, ABC):
    """Base of the backbones that pool a whole cloud and know no tokens.

    A subclass sets `width`, `depth` and `min_points`, and defines `pool` and `layer_of`. It can
    take part in masked training: a neighbourhood of points is hidden instead of tokens. The terms
    that need tokens (masked modelling, global-local alignment) can't be had from it.
    """

    width: int
    """F, of the pooled feature."""
    depth: int
    """Layers between the earliest one and the heads."""
    min_points: int
    """Least number of points of a cloud that `pool` can read."""
    token_width: int | None = None

    @abstractmethod
    def pool(self, points: Tensor) -> Tensor:
        """Pools (B, N, 3) points of the unit sphere into (B, width)."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 to `depth`, and `depth` + 1 for the heads."""

    def frozen_modules(self) -> list[nn.Module]:
        """Lists nothing: without tokens there is no target to hold still."""
        return []

    def tokenize(self, points: Tensor) -> PointTokens:
        """Takes (B, N, 3) points as they are: each of them can be hidden.

        Raises:
            ConfigError: If N is below `min_points`.
        """
        check_num_points(points, self)
        return PointTokens(tokens=None, centers=points)

    def forward(self, seen: PointTokens, mask: Tensor | None = None) -> PointFeatures:
        """Pools a cloud.

        Args:
            seen: Output of `tokenize`.
            mask: (B, N) bool, True where a point is hidden; None hides none.
        """
        points = seen.centers if mask is None else hide_points(seen.centers, mask)
        return PointFeatures(self.pool(points))


class Cloud(NamedTuple):
    """Points with features, on their way through the stages of a hierarchical backbone."""

    points: Tensor
    """(B, N, 3) float."""
    features: Tensor
    """(B, N, C) float."""
    order: Tensor
    """(B, M) int64: points in the order of farthest-point sampling."""

    def centers(self, num_centers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples farthest points, at most M.

        Returns:
            Their indices (B, S), their coordinates (B, S, 3), and the `order` of these S points.
        """
        # Farthest points are found one after the other, so that the first S of M are those that
        # a sample of S would be, and among themselves they are in order already: one sampling
        # serves all stages.
        index = self.order[:, :num_centers]
        order = torch.arange(num_centers, device=index.device).expand(len(index), -1)
        return index, gather(self.points, index), order


def start_cloud(points: Tensor, features: Tensor, num_centers: int) -> Cloud:
    """Readies (B, N, 3) points for stages of which the first samples `num_centers` of them."""
    return Cloud(points, features, farthest_point_sample(points, num_centers))
