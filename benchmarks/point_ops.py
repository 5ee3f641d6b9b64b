"""How much faster are the point operations than the loops of torch that published code uses?

    python benchmarks/point_ops.py [--full] [--device cuda] [--batch-size 16] [--num-points 8192]

Times sampling, nearest neighbours, balls and whole groups in three ways, in turns: as published
code does it (`loop`: a Python loop over picks, distances by |a|^2 + |b|^2 - 2ab, balls by sorting
the indices of all points), as well as torch can (`torch`: the project's reference for sampling and
balls, cdist and topk for neighbours), and by the project's kernels for the device (`ours`). All get
the same points of a sphere; the share of rows for which they find the same is recorded. Prints
milliseconds of a batch, medians over the turns with the least and the most, and ratios; appends a
line to benchmarks/results/point_ops.jsonl. On a CPU: one thread, and the processor time of this
process; a minute on a core of its own, and four with --full, which adds sizes and turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measure import append_result, machine
from torch import Tensor

from crossmost_ray.ops.kernels import kernel_name, reference
from crossmost_ray.ops.points import (
    ball_query,
    farthest_point_sample,
    gather,
    group_points,
    nearest_neighbors,
)

Way = Callable[[], Tensor]
WAYS = ("loop", "torch", "ours")


def loop_sample(points: Tensor, num_samples: int) -> Tensor:
    """Samples farthest points as published code does."""
    B, N, _ = points.shape
    rows = torch.arange(B, device=points.device)
    picked = torch.zeros(B, num_samples, dtype=torch.int64, device=points.device)
    nearest = torch.full((B, N), 1e10, device=points.device)
    last = torch.zeros(B, dtype=torch.int64, device=points.device)
    for i in range(num_samples):
        picked[:, i] = last
        distance = ((points - points[rows, last][:, None]) ** 2).sum(dim=-1)
        nearest = torch.min(nearest, distance)
        last = nearest.max(dim=-1).indices
    return picked


def expanded_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Squares (B, S, N) distances by |a|^2 + |b|^2 - 2ab."""
    product = -2 * queries @ points.transpose(1, 2)
    product += (queries**2).sum(dim=-1)[..., None]
    return product + (points**2).sum(dim=-1)[:, None]


def loop_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds neighbours as published code does."""
    distance = expanded_distances(queries, points)
    return distance.topk(num_neighbors, dim=-1, largest=False, sorted=False).indices


def torch_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds neighbours as fast as torch does."""
    distance = torch.cdist(queries, points)
    return distance.topk(num_neighbors, dim=-1, largest=False, sorted=False).indices


def loop_balls(queries: Tensor, points: Tensor, radius: float, num_neighbors: int) -> Tensor:
    """Fills balls as published code does: the indices of all points, sorted for each query."""
    (B, S, _), N = queries.shape, points.shape[1]
    index = torch.arange(N, device=points.device).expand(B, S, N).clone()
    index[expanded_distances(queries, points) > radius**2] = N
    index = index.sort(dim=-1).values[..., :num_neighbors]
    return torch.where(index == N, index[..., :1], index)


def group(picked: Tensor, points: Tensor, near: Callable[[Tensor], Tensor]) -> Tensor:
    """Cuts out patches around the picked points, relative to them."""
    centers = gather(points, picked)
    return gather(points, near(centers)) - centers[:, :, None]


@dataclass(frozen=True)
class Question:
    """One operation at one size, in three ways."""

    name: str
    ways: dict[str, Way]
    in_order: bool = True
    """Whether the ways give neighbours in the same order."""


def questions(points: Tensor, *, full: bool) -> list[Question]:
    """Lists what is timed; the queries are farthest points."""
    B = len(points)
    start = torch.zeros(B, dtype=torch.int64, device=points.device)
    found = []
    for number in (64, 512):
        ways: dict[str, Way] = {
            "loop": partial(loop_sample, points, number),
            "torch": partial(reference.farthest_point_sample, points, start, number),
            "ours": partial(farthest_point_sample, points, number),
        }
        found.append(Question(f"sample {number}", ways))
    centers = gather(points, farthest_point_sample(points, 512))
    for groups, size in ((64, 32), (512, 32), (512, 64))[: 3 if full else 2]:
        queries = centers[:, :groups].contiguous()
        ways = {
            "loop": partial(loop_neighbors, queries, points, size),
            "torch": partial(torch_neighbors, queries, points, size),
            "ours": partial(nearest_neighbors, queries, points, size),
        }
        found.append(Question(f"neighbours {groups} x {size}", ways, in_order=False))
    for groups, size, radius in ((512, 32, 0.2), (128, 64, 0.4))[: 2 if full else 1]:
        queries = centers[:, :groups].contiguous()
        ways = {
            "loop": partial(loop_balls, queries, points, radius, size),
            "torch": partial(reference.ball_query, queries, points, radius, size, inclusive=True),
            "ours": partial(ball_query, queries, points, radius, size, inclusive=True),
        }
        found.append(Question(f"balls {groups} x {size}, r {radius}", ways))
    for groups, size in ((64, 32), (512, 32)):
        ways = {
            "loop": partial(loop_group, points, groups, size),
            "torch": partial(torch_group, points, start, groups, size),
            "ours": partial(our_group, points, groups, size),
        }
        found.append(Question(f"groups {groups} x {size}", ways, in_order=False))
    return found


def loop_group(points: Tensor, groups: int, size: int) -> Tensor:
    """Groups as published code does."""
    near = partial(loop_neighbors, points=points, num_neighbors=size)
    return group(loop_sample(points, groups), points, near)


def torch_group(points: Tensor, start: Tensor, groups: int, size: int) -> Tensor:
    """Groups as fast as torch does."""
    near = partial(torch_neighbors, points=points, num_neighbors=size)
    return group(reference.farthest_point_sample(points, start, groups), points, near)


def our_group(points: Tensor, groups: int, size: int) -> Tensor:
    """Groups by the project's kernels."""
    return group_points(points, groups, size)[0]


def agreement(question: Question, way: str) -> float:
    """Gives the share of rows that a way and ours have in common."""
    theirs, ours = question.ways[way](), question.ways["ours"]()
    if not question.in_order:
        theirs, ours = (x.sort(dim=2).values for x in (theirs, ours))
    return float((theirs == ours).flatten(2 if theirs.ndim > 2 else 1).all(dim=-1).float().mean())


def milliseconds(way: Way, device: torch.device) -> float:
    """Times one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        way()
        torch.cuda.synchronize()  # a CUDA call returns once it is queued, not done
        return 1e3 * (time.perf_counter() - began)
    began = time.process_time()
    way()
    return 1e3 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more sizes and turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-points", type=int, default=8192)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(args.batch_size, args.num_points, 3, generator=rng)
    points = (points / points.norm(dim=-1, keepdim=True)).to(device)

    kernels = kernel_name(device)
    print(f"{machine()}; {kernels} on {device}; {args.batch_size} clouds of {args.num_points}")
    print(
        f"{'ms of a batch':26}" + "".join(f"{way:>24}" for way in WAYS) + "   loop/ours torch/ours"
    )
    results = {}
    for question in questions(points, full=args.full):
        same = {way: agreement(question, way) for way in WAYS[:2]}  # and every way is warm
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(7 if args.full else 3):
            for way in WAYS:
                # Where a call is short, several in a row: the clock's noise is shared by them.
                for _ in range(3 if way == "ours" else 1):
                    times[way].append(milliseconds(question.ways[way], device))
        median = {way: statistics.median(values) for way, values in times.items()}
        ratios = {way: median[way] / median["ours"] for way in WAYS[:2]}
        cells = [f"{median[w]:.1f} ({min(times[w]):.1f}-{max(times[w]):.1f})" for w in WAYS]
        print(
            f"{question.name:26}" + "".join(f"{cell:>24}" for cell in cells),
            *(f"{ratio:10.1f}" for ratio in ratios.values()),
        )
        results[question.name] = {
            way: {
                "ms": round(median[way], 2),
                "from_to": [round(min(times[way]), 2), round(max(times[way]), 2)],
                **({"ratio": round(ratios[way], 1), "same": same[way]} if way != "ours" else {}),
            }
            for way in WAYS
        }
    sizes = {"batch_size": args.batch_size, "num_points": args.num_points}
    append_result("point_ops", {"kernels": kernels, "device": args.device, **sizes, **results})


if __name__ == "__main__":
    main()
