"""The point kernels of the package pointnet2_ops, for GPUs, where somebody asks for them.

They keep that package's own rules, which differ from the reference's in three ways: a point whose
squared distance from the origin is at most 0.001 is never sampled, of equally far points any may be
sampled, and no ball holds its surface.
"""

from __future__ import annotations

import torch
from pointnet2_ops import pointnet2_utils
from torch import Tensor

from crossmost_ray.ops.kernels import automatic


def farthest_point_sample(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
    """Picks farthest points, by the package's rules."""
    B, N, _ = points.shape
    # The package starts at the first point, so the one to start at changes places with it.
    place = torch.arange(N, device=points.device).expand(B, N).contiguous()
    place.scatter_(1, start[:, None], 0)
    place[:, 0] = start
    swapped = points.gather(1, place[..., None].expand(-1, -1, 3))
    picked = pointnet2_utils.furthest_point_sample(swapped, num_samples)
    return place.gather(1, picked.long())


def nearest_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds nearest neighbours, which the package can't; see `reference`."""
    return automatic(points.device).nearest_neighbors(queries, points, num_neighbors)


def ball_query(
    queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
) -> Tensor:
    """Finds what lies in balls, never their surface."""
    found: Tensor = pointnet2_utils.ball_query(radius, num_neighbors, points, queries)
    return found.long()


def sample_and_search(
    points: Tensor, start: Tensor, num_samples: int, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Picks farthest points, by the package's rules, and finds the nearest neighbours of each."""
    picked = farthest_point_sample(points, start, num_samples)
    samples = points.gather(1, picked[..., None].expand(-1, -1, 3))
    return picked, nearest_neighbors(samples, points, num_neighbors)
