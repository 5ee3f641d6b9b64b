"""The point kernels in Triton, for GPUs: compiled when they first run, with no compiler installed.

Products and sums are not fused, so that distances are those of the reference, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossmost_ray.ops.kernels import reference

MAX_SAMPLED = 2**14
"""Points of a cloud that a program holds in registers, four numbers each, while it samples. Larger
clouds are sampled by the reference."""

SEARCHED_AT_ONCE = 1024
"""Points that a program measures at once when it looks for nearest neighbours."""

BALL_AT_ONCE = 256
"""Points that a program measures at once when it fills a ball; it stops once the ball is full."""

EXACT = {"enable_fp_fusion": False}

# Triton would look up what annotations name: its programs have none, but for constants.


@triton.jit
def _squared_distances(rows, inside, x, y, z):
    """Measures the points at `rows`; infinity outside."""
    dx = tl.load(rows, mask=inside, other=float("inf")) - x
    dy = tl.load(rows + 1, mask=inside, other=float("inf")) - y
    dz = tl.load(rows + 2, mask=inside, other=float("inf")) - z
    return (dx * dx + dy * dy) + dz * dz


@triton.jit
def _sample(points, start, picked, num_points, num_samples, BLOCK: tl.constexpr):
    """Samples one cloud: one program, which keeps all of its points."""
    cloud = tl.program_id(0).to(tl.int64)
    points += cloud * num_points * 3
    picked += cloud * num_samples
    place = tl.arange(0, BLOCK)
    inside = place < num_points
    px = tl.load(points + place * 3, mask=inside, other=0.0)
    py = tl.load(points + place * 3 + 1, mask=inside, other=0.0)
    pz = tl.load(points + place * 3 + 2, mask=inside, other=0.0)
    nearest = tl.where(inside, float("inf"), -1.0)
    last = tl.load(start + cloud).to(tl.int32)
    tl.store(picked, last.to(tl.int64))
    for i in range(1, num_samples):
        dx = px - tl.load(points + last * 3)
        dy = py - tl.load(points + last * 3 + 1)
        dz = pz - tl.load(points + last * 3 + 2)
        nearest = tl.minimum(nearest, (dx * dx + dy * dy) + dz * dz)
        last = tl.argmax(nearest, axis=0, tie_break_left=True)
        tl.store(picked + i, last.to(tl.int64))


@triton.jit
def _search(
    queries,
    points,
    found,
    num_queries,
    num_points,
    num_neighbors,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds one query's nearest neighbours: the least keys of distance and index."""
    row = tl.program_id(0).to(tl.int64)
    points += row // num_queries * num_points * 3
    queries += row * 3
    x, y, z = tl.load(queries), tl.load(queries + 1), tl.load(queries + 2)
    best = tl.full((KEPT,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for first in range(0, num_points, BLOCK):
        place = first + tl.arange(0, BLOCK)
        distance = _squared_distances(points + place * 3, place < num_points, x, y, z)
        # What is outside lies at infinity and has an index above all others: it comes last.
        bits = distance.to(tl.int32, bitcast=True).to(tl.int64)
        nearest = tl.topk((bits << 32) | place.to(tl.int64), KEPT, descending=False)
        best = tl.topk(tl.reshape(tl.join(best, nearest), (2 * KEPT,)), KEPT, descending=False)
    slot = tl.arange(0, KEPT)
    tl.store(found + row * num_neighbors + slot, best & 0xFFFFFFFF, mask=slot < num_neighbors)


@triton.jit
def _fill_ball(
    queries,
    points,
    found,
    num_queries,
    num_points,
    num_neighbors,
    limit,
    INCLUSIVE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fills one ball with points in their order, until it is full or there are no more."""
    row = tl.program_id(0).to(tl.int64)
    points += row // num_queries * num_points * 3
    queries += row * 3
    found += row * num_neighbors
    x, y, z = tl.load(queries), tl.load(queries + 1), tl.load(queries + 2)
    count, head, first = 0, num_points, 0
    while (first < num_points) & (count < num_neighbors):
        place = first + tl.arange(0, BLOCK)
        inside = place < num_points
        distance = _squared_distances(points + place * 3, inside, x, y, z)
        near = distance <= limit if INCLUSIVE else distance < limit
        within = inside & near
        slot = count + tl.cumsum(within.to(tl.int32), axis=0) - 1
        tl.store(found + slot, place.to(tl.int64), mask=within & (slot < num_neighbors))
        head = tl.minimum(head, tl.min(tl.where(within, place, num_points), axis=0))
        count += tl.sum(within.to(tl.int32), axis=0)
        first += BLOCK
    slot = tl.arange(0, SLOTS)
    head = tl.where(count > 0, head, 0).to(tl.int64)
    tl.store(found + slot, head, mask=(slot >= count) & (slot < num_neighbors))


def farthest_point_sample(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
    """Picks farthest points; see `reference`."""
    B, N, _ = points.shape
    if N > MAX_SAMPLED:
        return reference.farthest_point_sample(points, start, num_samples)
    picked = torch.empty(B, num_samples, dtype=torch.int64, device=points.device)
    block = triton.next_power_of_2(N)
    warps = min(16, max(1, block // 512))
    if B:
        _sample[(B,)](points, start, picked, N, num_samples, BLOCK=block, num_warps=warps, **EXACT)
    return picked


def nearest_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds nearest neighbours; see `reference`."""
    (B, G, _), N = queries.shape, points.shape[1]
    found = torch.empty(B, G, num_neighbors, dtype=torch.int64, device=points.device)
    kept = triton.next_power_of_2(num_neighbors)
    block = max(kept, min(SEARCHED_AT_ONCE, triton.next_power_of_2(N)))
    if B * G:
        _search[(B * G,)](
            queries, points, found, G, N, num_neighbors, KEPT=kept, BLOCK=block, **EXACT
        )
    return found


def ball_query(
    queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
) -> Tensor:
    """Finds what lies in balls; see `reference`."""
    (B, S, _), N = queries.shape, points.shape[1]
    found = torch.empty(B, S, num_neighbors, dtype=torch.int64, device=points.device)
    if B * S:
        _fill_ball[(B * S,)](
            queries,
            points,
            found,
            S,
            N,
            num_neighbors,
            float(torch.tensor(radius * radius, dtype=torch.float32)),
            INCLUSIVE=inclusive,
            SLOTS=triton.next_power_of_2(num_neighbors),
            BLOCK=min(BALL_AT_ONCE, triton.next_power_of_2(N)),
            **EXACT,
        )
    return found


def sample_and_search(
    points: Tensor, start: Tensor, num_samples: int, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Picks farthest points and finds their neighbours; see `reference`."""
    picked = farthest_point_sample(points, start, num_samples)
    samples = points.gather(1, picked[..., None].expand(-1, -1, 3))
    return picked, nearest_neighbors(samples, points, num_neighbors)
