"""Clouds in, centres and neighbourhoods out: the point operations, each over a whole batch.

Sampling and searching measure in float32, whatever the points are, and agree to the last index
wherever they run: `kernels` holds what does the work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossmost_ray.ops.kernels import kernels_for


def check_points(points: Tensor, name: str = "points") -> None:
    """Refuses a tensor that is no batch of clouds.

    Raises:
        ValueError: If the shape is not (B, N, 3).
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(
            f"{name} has shape {tuple(points.shape)}, expected (B, N, 3); "
            f"for channels-first clouds pass {name}.transpose(1, 2)"
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


def _measurable(points: Tensor, name: str = "points") -> Tensor:
    """Turns a batch of clouds into what kernels take.

    Raises:
        ValueError: If the shape is not (B, N, 3), N is 0, or, on a CPU, a number is not finite.
    """
    check_points(points, name)
    if points.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}: there are no points")
    points = points.detach().float().contiguous()
    # On a GPU, looking would mean waiting for all that was queued before.
    if points.device.type == "cpu" and points.numel():
        low, high = points.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} holds NaN or infinity: a distance to it means nothing")
    return points


def _first_picks(points: Tensor, num_samples: int, start: Tensor | None) -> Tensor:
    """Gives the first point to pick of each cloud, (B,) int64.

    Raises:
        ValueError: If there are fewer points than samples, or `start` doesn't fit the clouds.
    """
    B, N, _ = points.shape
    if not 1 <= num_samples <= N:
        raise ValueError(f"{num_samples} points can't be picked out of {N}")
    if start is None:
        return torch.zeros(B, dtype=torch.int64, device=points.device)
    if start.shape != (B,):
        raise ValueError(
            f"start has shape {tuple(start.shape)}, expected ({B},): one point a cloud"
        )
    if start.device.type == "cpu" and ((start < 0) | (start >= N)).any():
        raise ValueError(f"start is {start.tolist()}, expected points from 0 to {N - 1}")
    return start.to(points.device, torch.int64)


def _check_search(queries: Tensor, points: Tensor) -> None:
    if len(queries) != len(points) or queries.device != points.device:
        raise ValueError(
            f"there are queries for {len(queries)} clouds on {queries.device} and "
            f"{len(points)} clouds on {points.device}: each needs its own, beside it"
        )


def _check_neighbors(num_neighbors: int, num_points: int) -> None:
    if not 1 <= num_neighbors <= num_points:
        raise ValueError(f"{num_neighbors} neighbours can't be found among {num_points} points")


def farthest_point_sample(
    points: Tensor, num_samples: int, *, start: Tensor | None = None
) -> Tensor:
    """Picks points one by one, each the farthest from those picked before; of several, the first.

    The first k of them are what a sample of k points would be.

    Args:
        points: (B, N, 3) float.
        num_samples: How many to pick; at most N.
        start: (B,) int64, the point of each cloud that is picked first; None for point 0.

    Returns:
        (B, num_samples) int64 indices.

    Raises:
        ValueError: If a shape is another, N is below `num_samples`, or a number is not finite.

    Source:
        PointNet++ (Qi et al., 2017), section 3.2. It starts at a random point; we start at the
        first, so that evaluation is deterministic (clouds are in random order anyway).
    """
    points = _measurable(points)
    first = _first_picks(points, num_samples, start)
    return kernels_for(points.device).farthest_point_sample(points, first, num_samples)


def nearest_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds the closest points of each query, itself included where it is one of them.

    Args:
        queries: (B, G, 3) float.
        points: (B, N, 3) float.
        num_neighbors: At most N.

    Returns:
        (B, G, num_neighbors) int64 indices into `points`, the nearest first; of equally near ones,
        the first.

    Raises:
        ValueError: If a shape is another, N is below `num_neighbors`, or a number is not finite.
    """
    queries, points = _measurable(queries, "queries"), _measurable(points)
    _check_search(queries, points)
    _check_neighbors(num_neighbors, points.shape[1])
    return kernels_for(points.device).nearest_neighbors(queries, points, num_neighbors)


def ball_query(
    queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
) -> Tensor:
    """Finds the points within a radius of each query, the first of them in the order of points.

    Args:
        queries: (B, S, 3) float, such as centres picked among the points.
        points: (B, N, 3) float.
        radius: In the unit of the points.
        num_neighbors: How many to take of a ball.
        inclusive: Whether a point at exactly the radius is within it. PointNet++ says yes,
            PointNeXt no.

    Returns:
        (B, S, num_neighbors) int64 indices into `points`, ascending; a ball of fewer points is
        filled up with its first, and an empty one, which no point of the cloud has, is point 0.

    Raises:
        ValueError: If a shape is another, the radius or `num_neighbors` is not above 0, or a
            number is not finite.

    Source:
        PointNet++ (Qi et al., 2017), section 3.3.
    """
    queries, points = _measurable(queries, "queries"), _measurable(points)
    _check_search(queries, points)
    if not (radius > 0 and num_neighbors > 0):
        raise ValueError(
            f"a ball of radius {radius} for {num_neighbors} points; expected both above 0"
        )
    kernels = kernels_for(points.device)
    return kernels.ball_query(queries, points, radius, num_neighbors, inclusive=inclusive)


def hide_points(points: Tensor, mask: Tensor) -> Tensor:
    """Puts visible points in the place of hidden ones, so that the number of points stays.

    Args:
        points: (B, N, 3) float.
        mask: (B, N) bool, True where hidden.

    Returns:
        (B, N, 3): the k-th hidden point of a cloud has become its k-th visible one, counted
        round and round. A cloud of which nothing is visible is all zeros.
    """
    num_visible = (~mask).sum(dim=1, keepdim=True)
    visible_first = mask.byte().argsort(dim=1, stable=True)
    turn = (mask.cumsum(dim=1) - 1) % num_visible.clamp(min=1)
    here = torch.arange(points.shape[1], device=points.device)
    shown = gather(points, torch.where(mask, visible_first.gather(1, turn), here))
    return torch.where(num_visible[..., None] > 0, shown, 0.0)


def group_points(
    points: Tensor, num_groups: int, group_size: int, *, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cuts each cloud into overlapping patches around farthest-point centres.

    Args:
        points: (B, N, 3) float.
        num_groups: G, patches of a cloud.
        group_size: Points of a patch.
        start: (B,) int64, the point of each cloud that is its first centre; None for point 0.

    Returns:
        Patches (B, G, group_size, 3), relative to their centres, and the centres (B, G, 3), both
        with the gradient of the points. The points of a patch are those of `nearest_neighbors`.

    Raises:
        ValueError: If a shape is another, N is below `num_groups` or `group_size`, or a number is
            not finite.

    Source:
        Point-BERT (Yu et al., 2022), section 3.1.
    """
    measured = _measurable(points)
    first = _first_picks(measured, num_groups, start)
    _check_neighbors(group_size, measured.shape[1])
    picked, near = kernels_for(points.device).sample_and_search(
        measured, first, num_groups, group_size
    )
    centers = gather(points, picked)
    return gather(points, near) - centers[:, :, None], centers
