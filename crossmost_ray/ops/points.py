"""Clouds in, centres and neighbourhoods out: the point operations, each over a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_points(points: Tensor) -> None:
    """Refuses a tensor that is no batch of clouds.

    Raises:
        ValueError: If the shape is not (B, N, 3).
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(
            f"points has shape {tuple(points.shape)}, expected (B, N, 3); "
            "for channels-first clouds pass points.transpose(1, 2)"
        )


def normalize_to_unit_sphere(points: Tensor) -> Tensor:
    """Centres each cloud on its centroid and scales its farthest point to radius 1.

    Args:
        points: (B, N, 3) float, x-y-z, in any unit of length.

    Returns:
        (B, N, 3), unitless. A cloud whose points all coincide comes back as zeros, not NaN:
        scanners do produce such clouds, and one of them must not poison a batch.

    Raises:
        ValueError: If the shape is not (B, N, 3).

    Source:
        PointNet (Qi et al., 2017): clouds are normalised into a unit sphere.
    """
    check_points(points)
    # Seen from its first point before it is averaged: the mean of equal numbers is not exactly that
    # number, and a coincident cloud's rounding error would be scaled up to radius 1.
    points = points - points[:, :1]
    centred = points - points.mean(dim=1, keepdim=True)
    radius = centred.norm(dim=-1).amax(dim=1).clamp(min=torch.finfo(points.dtype).tiny)
    return centred / radius[:, None, None]


def gather(points: Tensor, index: Tensor) -> Tensor:
    """Takes points by index, cloud by cloud.

    Args:
        points: (B, N, K) of any dtype.
        index: (B, ...) int64 below N.

    Returns:
        (B, ..., K).
    """
    batch = torch.arange(points.shape[0], device=points.device)
    return points[batch.reshape(-1, *[1] * (index.ndim - 1)), index]


def farthest_point_sample(points: Tensor, num_samples: int) -> Tensor:
    """Picks points one by one, each the farthest from those picked before, from point 0 on.

    Args:
        points: (B, N, 3) float.
        num_samples: How many to pick; at most N.

    Returns:
        (B, num_samples) int64 indices.

    Raises:
        ValueError: If the shape is not (B, N, 3), or N is below `num_samples`.

    Source:
        PointNet++ (Qi et al., 2017), section 3.2. It starts at a random point; we start at the
        first, so that evaluation is deterministic (clouds are in random order anyway).
    """
    check_points(points)
    B, N, _ = points.shape
    if num_samples > N:
        raise ValueError(f"{num_samples} points can't be picked out of {N}")
    # One contiguous row per coordinate: three streams of N floats are read at each pick, and a
    # (B, N, 3) layout would make each of them strided.
    x, y, z = points.detach().float().permute(2, 0, 1).contiguous()
    picked = torch.zeros(B, num_samples, dtype=torch.int64, device=points.device)
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
    """Finds the closest points of each query, itself included where it is one of them.

    Args:
        queries: (B, G, 3) float.
        points: (B, N, 3) float.
        num_neighbors: At most N.

    Returns:
        (B, G, num_neighbors) int64 indices into `points`, in no particular order.
    """
    distance = torch.cdist(queries.detach().float(), points.detach().float())
    return distance.topk(num_neighbors, dim=-1, largest=False, sorted=False).indices


def group_points(points: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Cuts each cloud into overlapping patches around farthest-point centres.

    Args:
        points: (B, N, 3) float.
        num_groups: G, patches of a cloud.
        group_size: Points of a patch.

    Returns:
        Patches (B, G, group_size, 3), relative to their centres, and the centres (B, G, 3).

    Source:
        Point-BERT (Yu et al., 2022), section 3.1.
    """
    centers = gather(points, farthest_point_sample(points, num_groups))
    neighbors = gather(points, nearest_neighbors(centers, points, group_size))
    return neighbors - centers[:, :, None], centers
