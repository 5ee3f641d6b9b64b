"""Point operations against slow loops, and what moving a cloud does to them."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.data.augment import rotation_matrices
from crossmost_ray.ops.kernels import reference
from crossmost_ray.ops.points import (
    ball_query,
    farthest_point_sample,
    gather,
    group_points,
    hide_points,
    nearest_neighbors,
    normalize_to_unit_sphere,
)

seeds = st.integers(0, 2**31 - 1)


def clouds(seed: int, batch: int = 2, num_points: int = 60) -> Tensor:
    return torch.rand(batch, num_points, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def grid(seed: int, num_points: int, side: int = 4) -> Tensor:
    """Two clouds on a grid of integers, where distances are exact and coincide."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-side, side + 1, (2, num_points, 3), generator=rng).float()


def naive_fps(cloud: npt.NDArray[np.float64], num_samples: int, start: int = 0) -> list[int]:
    picked = [start]
    while len(picked) < num_samples:
        nearest = [min(((p - cloud[k]) ** 2).sum() for k in picked) for p in cloud]
        picked.append(int(np.argmax(nearest)))
    return picked


@given(seed=seeds, num_samples=st.integers(1, 20))
def test_farthest_points_are_those_of_a_naive_loop(seed: int, num_samples: int) -> None:
    # On a grid of integers the distances are exact, so that ties break alike: to the first.
    points = torch.randint(-9, 10, (2, 20, 3), generator=torch.Generator().manual_seed(seed))
    picked = farthest_point_sample(points.float(), num_samples)
    assert picked.dtype == torch.int64
    for cloud, ours in zip(points.double().numpy(), picked.tolist(), strict=True):
        assert ours == naive_fps(cloud, num_samples)


@given(seed=seeds, start=st.tuples(st.integers(0, 19), st.integers(0, 19)))
def test_farthest_points_start_where_they_are_told_to(seed: int, start: tuple[int, int]) -> None:
    points = grid(seed, 20, side=9)
    picked = farthest_point_sample(points, 7, start=torch.tensor(start))
    for cloud, first, ours in zip(points.double().numpy(), start, picked.tolist(), strict=True):
        assert ours == naive_fps(cloud, 7, first)


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start has shape \(1,\), expected \(2,\)"):
        farthest_point_sample(torch.zeros(2, 8, 3), 3, start=torch.zeros(1, dtype=torch.int64))


@given(seed=seeds, num_samples=st.integers(1, 30), share=st.floats(0, 1), side=st.integers(1, 9))
def test_the_beginning_of_a_sample_is_a_sample_of_the_sample(
    seed: int, num_samples: int, share: float, side: int
) -> None:
    # What lets the stages of a backbone share one sampling. Small grids hold coincident points.
    points = grid(seed, 30, side)
    sampled = gather(points, farthest_point_sample(points, num_samples))
    fewer = max(1, int(share * num_samples))
    again = gather(sampled, farthest_point_sample(sampled, fewer))
    assert torch.equal(again, sampled[:, :fewer])
    assert torch.equal(again, gather(points, farthest_point_sample(points, fewer)))


def test_farthest_points_of_a_line() -> None:
    line = torch.tensor([4.0, 0.0, 1.0, 9.0, 10.0])
    cloud = torch.stack([line, torch.zeros(5), torch.zeros(5)], dim=1)[None]
    # From 4: 10 is farthest, then 0, then of 1 and 9 (both 1 away) the first.
    assert farthest_point_sample(cloud, 4).tolist() == [[0, 4, 1, 2]]


@given(seed=seeds)
def test_farthest_points_do_not_repeat_and_do_not_turn_with_the_cloud(seed: int) -> None:
    points = clouds(seed).double()
    turned = points @ rotation_matrices(torch.tensor([[0.3, -1.1, 2.0]])).double()[0] * 3 + 0.5
    picked = farthest_point_sample(points, 12)
    assert all(len(set(row)) == 12 for row in picked.tolist())
    assert torch.equal(picked, farthest_point_sample(turned, 12))


def test_more_samples_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="9 points can't be picked out of 8"):
        farthest_point_sample(torch.zeros(1, 8, 3), 9)


@pytest.mark.parametrize(
    "function",
    [
        normalize_to_unit_sphere,
        lambda x: farthest_point_sample(x, 1),
        lambda x: ball_query(x, torch.zeros(1, 2, 3), 1.0, 1, inclusive=True),
        lambda x: ball_query(torch.zeros(1, 2, 3), x, 1.0, 1, inclusive=True),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 8), (1, 2, 4, 3)])
def test_what_is_no_batch_of_clouds_is_refused(function: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"expected \(B, N, 3\); .* (points|queries)\.transpose\(1, 2\)"
    ):
        function(torch.zeros(shape))  # type: ignore[operator]


@given(seed=seeds, num_neighbors=st.integers(1, 30))
def test_nearest_neighbours_are_those_of_a_naive_search(seed: int, num_neighbors: int) -> None:
    points, queries = clouds(seed), clouds(seed + 1, num_points=5)
    found = nearest_neighbors(queries, points, num_neighbors)
    for b in range(2):
        for g in range(5):
            distance = (points[b] - queries[b, g]).double().norm(dim=-1)
            ours = distance[found[b, g]].sort().values
            assert len(set(found[b, g].tolist())) == num_neighbors
            torch.testing.assert_close(
                ours, distance.sort().values[:num_neighbors], atol=1e-4, rtol=0
            )


def test_nearest_neighbours_of_a_line() -> None:
    line = torch.stack([torch.arange(6.0) ** 2, torch.zeros(6), torch.zeros(6)], dim=1)[None]
    found = nearest_neighbors(torch.tensor([[[5.0, 0.0, 0.0]]]), line, 3)
    assert set(found.flatten().tolist()) == {1, 2, 3}  # of 0, 1, 4, 9, 16, 25


def naive_ball(
    query: npt.NDArray[np.float64],
    cloud: npt.NDArray[np.float64],
    radius: float,
    num_neighbors: int,
    inclusive: bool,
) -> list[int]:
    found = []
    for place, point in enumerate(cloud):
        squared = ((point - query) ** 2).sum()
        if squared < radius**2 or (inclusive and squared == radius**2):
            found.append(place)
    first = found[0] if found else 0
    return (found + [first] * num_neighbors)[:num_neighbors]


@given(
    seed=seeds,
    num_points=st.integers(1, 40),
    radius=st.integers(1, 5),
    num_neighbors=st.integers(1, 12),
    inclusive=st.booleans(),
    at_once=st.sampled_from([1, 100, 2**22]),
)
def test_balls_are_those_of_a_naive_search(
    seed: int, num_points: int, radius: int, num_neighbors: int, inclusive: bool, at_once: int
) -> None:
    # On a grid, many points lie at exactly the radius; and some queries have none within.
    points, queries = grid(seed, num_points), grid(seed + 1, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_DISTANCES", at_once)
        found = ball_query(queries, points, radius, num_neighbors, inclusive=inclusive)
    assert found.dtype == torch.int64
    for b, (cloud, centres) in enumerate(zip(points.numpy(), queries.numpy(), strict=True)):
        expected = [naive_ball(q, cloud, radius, num_neighbors, inclusive) for q in centres]
        assert found[b].tolist() == expected


def test_a_ball_on_a_line() -> None:
    line = torch.stack([torch.arange(6.0), torch.zeros(6), torch.zeros(6)], dim=1)[None]
    query = torch.tensor([[[3.0, 0.0, 0.0]]])
    assert ball_query(query, line, 1.0, 4, inclusive=True).tolist() == [[[2, 3, 4, 2]]]
    assert ball_query(query, line, 1.0, 4, inclusive=False).tolist() == [[[3, 3, 3, 3]]]
    assert ball_query(query, line, 2.0, 2, inclusive=True).tolist() == [[[1, 2]]]


@given(seed=seeds, num_points=st.integers(1, 20), share=st.floats(0, 1))
def test_visible_points_take_the_place_of_hidden_ones(
    seed: int, num_points: int, share: float
) -> None:
    points = clouds(seed, num_points=num_points)
    mask = torch.rand(2, num_points, generator=torch.Generator().manual_seed(seed)) < share
    seen = points.clone()
    seen[mask] = torch.nan
    result = hide_points(seen, mask)
    for cloud, hidden, ours in zip(points, mask.tolist(), result, strict=True):
        visible = [k for k in range(num_points) if not hidden[k]]
        turn = itertools.cycle(visible)
        expected = [next(turn) if h else k for k, h in enumerate(hidden)] if visible else None
        assert torch.equal(ours, torch.zeros(num_points, 3) if not visible else cloud[expected])


def test_the_hidden_points_of_a_short_cloud() -> None:
    points = torch.arange(5.0).reshape(1, 5, 1).expand(-1, -1, 3)
    mask = torch.tensor([[False, True, False, True, True]])
    assert hide_points(points, mask)[0, :, 0].tolist() == [0, 0, 2, 2, 0]


@given(seed=seeds)
def test_patches_start_where_they_are_told_to(seed: int) -> None:
    points = clouds(seed)
    start = torch.tensor([7, 3])
    _, centers = group_points(points, 5, 4, start=start)
    assert torch.equal(centers[:, 0], points[torch.arange(2), start])
    assert torch.equal(centers, gather(points, farthest_point_sample(points, 5, start=start)))


@given(seed=seeds)
def test_patches_are_relative_and_hold_their_centre(seed: int) -> None:
    points = clouds(seed)
    patches, centers = group_points(points, 7, 9)
    assert patches.shape == (2, 7, 9, 3)
    assert centers.shape == (2, 7, 3)
    assert torch.equal(centers[:, 0], points[:, 0])
    # The centre is a point of the cloud, so it is its own nearest neighbour, at 0.
    assert (patches.norm(dim=-1).amin(dim=-1) == 0).all()
    back = patches + centers[:, :, None]
    for b in range(2):
        distance = torch.cdist(back[b].reshape(-1, 3), points[b]).amin(dim=1)
        assert distance.max() < 1e-3


@given(seed=seeds)
def test_patches_do_not_move_with_the_cloud(seed: int) -> None:
    points = clouds(seed)
    patches, centers = group_points(points, 5, 8)
    shift = torch.tensor([0.25, -0.5, 0.125])
    moved, moved_centers = group_points(points + shift, 5, 8)
    torch.testing.assert_close(moved_centers, centers + shift)
    torch.testing.assert_close(
        moved.norm(dim=-1).sort().values, patches.norm(dim=-1).sort().values, atol=1e-3, rtol=0
    )


@given(seed=seeds)
def test_the_order_of_points_behind_the_first_does_not_matter(seed: int) -> None:
    points = clouds(seed, batch=1)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(59)])
    patches, centers = group_points(points, 6, 8)
    shuffled, same_centers = group_points(points[:, order], 6, 8)
    assert torch.equal(centers, same_centers)
    for ours, theirs in zip(patches[0], shuffled[0], strict=True):
        assert {tuple(p) for p in ours.tolist()} == {tuple(p) for p in theirs.tolist()}


@given(seed=seeds, scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_normalised_clouds_are_centred_and_reach_the_sphere(
    seed: int, scale: float, offset: float
) -> None:
    points = clouds(seed) * scale + offset * scale
    result = normalize_to_unit_sphere(points)
    torch.testing.assert_close(result.mean(dim=1), torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.norm(dim=-1).amax(dim=1), torch.ones(2))
    torch.testing.assert_close(result, normalize_to_unit_sphere(clouds(seed)), atol=1e-4, rtol=0)


@given(place=st.tuples(*[st.floats(-100, 100, width=32)] * 3), num_points=st.integers(1, 200))
def test_coincident_points_become_zeros(place: tuple[float, float, float], num_points: int) -> None:
    points = torch.tensor(place).expand(1, num_points, 3)
    assert torch.equal(normalize_to_unit_sphere(points), torch.zeros(1, num_points, 3))


def test_normalising_leaves_its_input_alone() -> None:
    points = clouds(0)
    before = points.clone()
    normalize_to_unit_sphere(points)
    assert torch.equal(points, before)


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 4, 5)])
def test_gather_takes_points_cloud_by_cloud(shape: tuple[int, ...]) -> None:
    points = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    index = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0))
    taken = gather(points, index)
    assert taken.shape == (*shape, 3)
    for place in np.ndindex(shape):
        assert torch.equal(taken[place], points[place[0], index[place]])
