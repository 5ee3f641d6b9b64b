"""The point kernels in plain torch, on any device: the definition that all others agree with.

A squared distance is (dx * dx + dy * dy) + dz * dz in float32, each step rounded. What all kernels
take is checked before: contiguous float32 points, indices within range, sizes of at least 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DISTANCES = 2**22
"""Distances that a search holds in memory at once: 16 MB, which a CPU's cache can hold."""


def _squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Measures (B, S, 3) queries against (B, N, 3) points: (B, S, N)."""
    # Not |a|^2 + |b|^2 - 2ab: what it rounds off decides about points near a ball's surface.
    x, y, z = (queries[..., k, None] - points[:, None, :, k] for k in range(3))
    return x.square_().add_(y.square_()).add_(z.square_())


def _parts(queries: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    """Cuts the queries into as many as are measured at once."""
    B, N, _ = points.shape
    return queries.split(max(1, MAX_DISTANCES // max(1, B * N)), dim=1)


def farthest_point_sample(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
    """Picks points one by one, each the farthest from those picked before; of several, the first.

    Args:
        points: (B, N, 3).
        start: (B,) int64, the first pick of each cloud.
        num_samples: 1 to N.

    Returns:
        (B, num_samples) int64.
    """
    B, N, _ = points.shape
    # One contiguous row per coordinate: three streams of N floats are read at each pick, and a
    # (B, N, 3) layout would make each of them strided.
    x, y, z = points.permute(2, 0, 1).contiguous()
    picked = torch.empty(B, num_samples, dtype=torch.int64, device=points.device)
    picked[:, 0] = start
    nearest = torch.full((B, N), torch.inf, device=points.device)
    last = picked[:, :1]
    for i in range(1, num_samples):
        distance = (x - x.gather(1, last)).square_()
        distance += (y - y.gather(1, last)).square_()
        distance += (z - z.gather(1, last)).square_()
        nearest = torch.minimum(nearest, distance)
        last = nearest.argmax(dim=1, keepdim=True)
        picked[:, i : i + 1] = last
    return picked


def nearest_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds the closest points of each query, the nearest first; of equally near ones, the first.

    Args:
        queries: (B, G, 3).
        points: (B, N, 3).
        num_neighbors: 1 to N.

    Returns:
        (B, G, num_neighbors) int64.
    """
    place = torch.arange(points.shape[1], device=points.device)
    found = []
    for part in _parts(queries, points):
        # Floats from 0 on are in the order of their bits; below them stands the index, so that no
        # two keys are equal.
        bits = _squared_distances(part, points).view(torch.int32).long()
        keys = bits.bitwise_left_shift_(32).bitwise_or_(place)
        least = keys.topk(num_neighbors, dim=-1, largest=False, sorted=True).values
        found.append(least.bitwise_and_(2**32 - 1))
    return torch.cat(found, dim=1)


def ball_query(
    queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
) -> Tensor:
    """Finds the points within a radius of each query, the first of them in the order of points.

    Args:
        queries: (B, S, 3).
        points: (B, N, 3).
        radius: Above 0; squared in double precision and then rounded.
        num_neighbors: At least 1.
        inclusive: Whether a point at exactly the radius is within it.

    Returns:
        (B, S, num_neighbors) int64, ascending; a ball of fewer points is filled up with its first,
        and an empty one is point 0.
    """
    N = points.shape[1]
    limit = radius * radius
    place = torch.arange(1, num_neighbors + 1, dtype=torch.int32, device=points.device)
    found = []
    for part in _parts(queries, points):
        distance = _squared_distances(part, points)
        within = distance <= limit if inclusive else distance < limit
        # How many are within up to each point: the k-th stands where that count reaches k.
        count = within.cumsum(dim=-1, dtype=torch.int32)
        found.append(torch.searchsorted(count, place.repeat(*part.shape[:2], 1)))
    index = torch.cat(found, dim=1)
    return torch.where(index < N, index, index[..., :1]) % N


def sample_and_search(
    points: Tensor, start: Tensor, num_samples: int, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Picks farthest points and finds the nearest neighbours of each.

    Returns:
        (B, num_samples) and (B, num_samples, num_neighbors) int64.
    """
    picked = farthest_point_sample(points, start, num_samples)
    samples = points.gather(1, picked[..., None].expand(-1, -1, 3))
    return picked, nearest_neighbors(samples, points, num_neighbors)
