"""Clouds in, centres and neighbourhoods out: the point operations, each over a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DISTANCES = 2**22
"""Distances that a search holds in memory at once: 16 MB, which a CPU's cache can hold."""


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


def farthest_point_sample(
    points: Tensor, num_samples: int, *, start: Tensor | None = None
) -> Tensor:
    """Picks points one by one, each the farthest from those picked before.

    The first k of them are what a sample of k points would be.

    Args:
        points: (B, N, 3) float.
        num_samples: How many to pick; at most N.
        start: (B,) int64, the point of each cloud that is picked first; None for point 0.

    Returns:
        (B, num_samples) int64 indices.

    Raises:
        ValueError: If a shape is another, or N is below `num_samples`.

    Source:
        PointNet++ (Qi et al., 2017), section 3.2. It starts at a random point; we start at the
        first, so that evaluation is deterministic (clouds are in random order anyway).
    """
    check_points(points)
    B, N, _ = points.shape
    if num_samples > N:
        raise ValueError(f"{num_samples} points can't be picked out of {N}")
    if start is not None and start.shape != (B,):
        raise ValueError(
            f"start has shape {tuple(start.shape)}, expected ({B},): one point a cloud"
        )
    # One contiguous row per coordinate: three streams of N floats are read at each pick, and a
    # (B, N, 3) layout would make each of them strided.
    x, y, z = points.detach().float().permute(2, 0, 1).contiguous()
    picked = torch.zeros(B, num_samples, dtype=torch.int64, device=points.device)
    if start is not None:
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
        ValueError: If a shape is another.

    Source:
        PointNet++ (Qi et al., 2017), section 3.3.
    """
    check_points(queries)
    check_points(points)
    B, N, _ = points.shape
    columns = points.detach().float().permute(2, 0, 1).contiguous()
    limit = radius * radius
    place = torch.arange(1, num_neighbors + 1, dtype=torch.int32, device=points.device)
    found = []
    for part in queries.detach().float().split(max(1, MAX_DISTANCES // (B * N)), dim=1):
        # Not |a|^2 + |b|^2 - 2ab: what it rounds off decides about points near the surface.
        x, y, z = (part[..., k, None] - columns[k][:, None] for k in range(3))
        distance = x.square_().add_(y.square_()).add_(z.square_())
        within = distance <= limit if inclusive else distance < limit
        # How many are within up to each point: the k-th stands where that count reaches k.
        count = within.cumsum(dim=-1, dtype=torch.int32)
        found.append(torch.searchsorted(count, place.repeat(*part.shape[:2], 1)))
    index = torch.cat(found, dim=1)
    return torch.where(index < N, index, index[..., :1]) % N


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
        Patches (B, G, group_size, 3), relative to their centres, and the centres (B, G, 3).

    Source:
        Point-BERT (Yu et al., 2022), section 3.1.
    """
    centers = gather(points, farthest_point_sample(points, num_groups, start=start))
    neighbors = gather(points, nearest_neighbors(centers, points, group_size))
    return neighbors - centers[:, :, None], centers
