"""Point operations against slow loops, and what moving a cloud does to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.data.augment import rotation_matrices
from crossmost_ray.ops.points import (
    farthest_point_sample,
    gather,
    group_points,
    nearest_neighbors,
    normalize_to_unit_sphere,
)

seeds = st.integers(0, 2**31 - 1)


def clouds(seed: int, batch: int = 2, num_points: int = 60) -> Tensor:
    return torch.rand(batch, num_points, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_fps(cloud: npt.NDArray[np.float64], num_samples: int) -> list[int]:
    picked = [0]
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
    "function", [normalize_to_unit_sphere, lambda x: farthest_point_sample(x, 1)]
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 8), (1, 2, 4, 3)])
def test_what_is_no_batch_of_clouds_is_refused(function: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, N, 3\); .* points\.transpose\(1, 2\)"):
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
