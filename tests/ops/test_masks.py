"""Masks: how much they hide, and where."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.ops.masks import block_mask, neighborhood_mask, random_ranks

seeds = st.integers(0, 2**31 - 1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sixty_of_clips_196_patches_are_hidden_in_blocks_of_two() -> None:
    mask = block_mask(16, grid=14, cell=2, ratio=0.3, generator=rng())
    assert mask.shape == (16, 196)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [60] * 16
    cells = mask.reshape(16, 7, 2, 7, 2)
    assert (cells.amax(dim=(2, 4)) == cells.amin(dim=(2, 4))).all()
    assert len({tuple(row) for row in mask.tolist()}) == 16, "every image has a mask of its own"


@given(cells=st.integers(1, 9), cell=st.integers(1, 4), percent=st.integers(0, 100), seed=seeds)
def test_the_share_of_hidden_cells_is_rounded_up(
    cells: int, cell: int, percent: int, seed: int
) -> None:
    mask = block_mask(3, grid=cells * cell, cell=cell, ratio=percent / 100, generator=rng(seed))
    # In integers: a share such as 0.14 of 100 must not become 15 by rounding.
    hidden = -(-percent * cells**2 // 100)
    assert mask.sum(dim=1).tolist() == [hidden * cell**2] * 3


def test_a_grid_that_cells_do_not_divide_is_covered() -> None:
    mask = block_mask(4, grid=7, cell=2, ratio=1.0, generator=rng())
    assert mask.shape == (4, 49)
    assert mask.all()


def test_every_cell_is_hidden_equally_often() -> None:
    mask = block_mask(4000, grid=4, cell=2, ratio=0.5, generator=rng()).float().mean(dim=0)
    # The deviation of a share of 1/2 in 4000 draws is 0.008.
    assert (mask - 0.5).abs().max() < 0.04


def test_one_generator_state_gives_one_mask() -> None:
    masks = [block_mask(2, grid=8, cell=2, ratio=0.3, generator=rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(1, 9))
def test_ranks_are_an_order(seed: int, rows: int, columns: int) -> None:
    ranks = random_ranks((rows, columns), rng(seed))
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(columns).expand(rows, columns))


def centers(seed: int, batch: int = 8, groups: int = 64) -> torch.Tensor:
    return torch.randn(batch, groups, 3, generator=rng(seed))


def test_19_to_25_of_64_groups_are_hidden() -> None:
    mask = neighborhood_mask(centers(0, batch=400), ratio_low=0.3, ratio_high=0.4, generator=rng())
    assert set(mask.sum(dim=1).tolist()) == set(range(19, 26))


@given(seed=seeds, groups=st.integers(4, 40), share=st.floats(0, 1, width=32))
def test_a_fixed_share_is_rounded_down(seed: int, groups: int, share: float) -> None:
    mask = neighborhood_mask(
        centers(seed, 3, groups), ratio_low=share, ratio_high=share, generator=rng(seed)
    )
    expected = float(torch.tensor(share) * groups)
    assert mask.sum(dim=1).tolist() == [math.floor(expected)] * 3


@given(seed=seeds)
def test_hidden_groups_are_the_nearest_to_one_of_them(seed: int) -> None:
    places = centers(seed)
    mask = neighborhood_mask(places, ratio_low=0.3, ratio_high=0.4, generator=rng(seed))
    for cloud, hidden in zip(places, mask, strict=True):
        distance = torch.cdist(cloud[hidden], cloud, compute_mode="donot_use_mm_for_euclid_dist")
        contiguous = distance[:, hidden].amax(dim=1) <= distance[:, ~hidden].amin(dim=1)
        assert contiguous.any()


def test_the_hidden_piece_differs_from_cloud_to_cloud() -> None:
    same = centers(0, batch=1).expand(16, -1, -1)
    mask = neighborhood_mask(same, ratio_low=0.35, ratio_high=0.35, generator=rng())
    assert len({tuple(row) for row in mask.tolist()}) > 8


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_can_be_hidden(share: float) -> None:
    mask = neighborhood_mask(centers(0), ratio_low=share, ratio_high=share, generator=rng())
    assert mask.all() == (share == 1.0)
    assert mask.any() == (share == 1.0)
