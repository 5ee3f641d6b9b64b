"""Masks, schedules, augmentation and the contrast against golden numbers of the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmost_ray.config import EmaConfig, OptimConfig, PointAugmentConfig
from crossmost_ray.data.augment import (
    fill_up_points,
    rotation_matrices,
    strong_points,
    weak_points,
)
from crossmost_ray.losses import alignment_loss
from crossmost_ray.ops.masks import block_mask
from crossmost_ray.ops.points import nearest_neighbors, normalize_to_unit_sphere
from crossmost_ray.optim import learning_rate
from crossmost_ray.teacher import ema_decay
from tests.data.test_augment import STILL, rng
from tests.golden.recipe import unit

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "functions.npz")
FACTS: dict[str, Any] = json.loads((FOLDER / "functions.json").read_text())


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


@pytest.mark.parametrize("name", FACTS["mask_generator"])
def test_as_many_patches_are_hidden_in_every_image(name: str) -> None:
    size, cell, patch, ratio = name.split("_")
    facts = FACTS["mask_generator"][name]
    grid = int(size) // int(patch)
    mask = block_mask(
        64, grid=grid, cell=int(cell) // int(patch), ratio=float(ratio), generator=rng(0)
    )
    assert mask.sum(dim=1).unique().tolist() == facts["masked_model_patches"]
    cells = mask.reshape(64, grid, grid)[:, :: facts["scale"], :: facts["scale"]]
    assert cells.flatten(1).sum(dim=1).unique().tolist() == [facts["mask_count"]]


@pytest.mark.parametrize("place", [0, 1])
def test_the_schedule_is_the_references_once_it_starts_from_zero(place: int) -> None:
    facts = FACTS["cosine_lr"][place]
    per_epoch, num_steps = facts["niter_per_ep"], facts["niter_per_ep"] * facts["epochs"]
    config = OptimConfig(lr=facts["base_value"], min_lr=facts["final_value"])
    found = [
        learning_rate(
            step,
            num_steps=num_steps,
            warmup_steps=facts["warmup_epochs"] * per_epoch,
            config=config,
            from_zero=True,
        )
        for step in range(num_steps)
    ]
    np.testing.assert_allclose(found, GOLDEN[f"cosine_lr/{place}"], rtol=1e-6)


def test_ours_does_not_waste_the_first_step() -> None:
    config = OptimConfig(lr=4e-5, min_lr=2e-6)
    ours, theirs = (
        [
            learning_rate(k, num_steps=28, warmup_steps=7, config=config, from_zero=from_zero)
            for k in range(28)
        ]
        for from_zero in (False, True)
    )
    assert theirs[0] == 0.0 < ours[0]
    assert theirs[6] == theirs[7] == ours[6] == ours[7] == 4e-5
    assert ours[7:] == theirs[7:]


def test_the_ramp_of_the_teacher() -> None:
    config = EmaConfig(start=0.99, end=0.9998, ramp_steps=400)
    found = [ema_decay(int(step), config) for step in GOLDEN["ema_ramp/iteration"]]
    np.testing.assert_allclose(found, GOLDEN["ema_ramp/decay"], rtol=1e-12)


def test_clouds_are_normalised_alike() -> None:
    found = normalize_to_unit_sphere(golden("pc_normalize/in")[None])[0]
    torch.testing.assert_close(found, golden("pc_normalize/out"), rtol=1e-5, atol=1e-6)


def test_the_contrast_is_ulips() -> None:
    embeds = {
        name: golden(f"ulip_loss/{name}_embed").requires_grad_() for name in ("pc", "text", "image")
    }
    unit_length = {
        name: torch.nn.functional.normalize(value, dim=-1) for name, value in embeds.items()
    }
    scale = torch.tensor(float(GOLDEN["ulip_loss/scale"]) if "ulip_loss/scale" in GOLDEN else 100.0)
    loss = torch.zeros(())
    for other in ("text", "image"):
        left, right = unit_length["pc"], unit_length[other]
        loss = loss + alignment_loss(left, right, left, right, scale)
    assert loss.item() == pytest.approx(float(GOLDEN["ulip_loss/loss"]), rel=1e-5)
    loss.backward()
    for name, value in embeds.items():
        torch.testing.assert_close(
            value.grad, golden(f"ulip_loss/grad/{name}_embed"), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turning_is_the_references(seed: int) -> None:
    points = golden("aug/points")
    about_y = torch.tensor([[0.0, float(GOLDEN[f"aug/rotate_y/{seed}/angle"]), 0.0]])
    turned = points @ rotation_matrices(about_y)[0].T
    torch.testing.assert_close(turned, golden(f"aug/rotate_y/{seed}/out"), rtol=1e-4, atol=1e-6)
    angles = golden(f"aug/rotate_perturb/{seed}/angles_xyz").float()[None]
    tilted = points @ rotation_matrices(angles)[0].T
    expected = golden(f"aug/rotate_perturb/{seed}/out")
    torch.testing.assert_close(tilted, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_filling_up_adds_means_of_ten_neighbours(seed: int) -> None:
    points, expected = golden("aug/points"), golden(f"aug/upsample_96/{seed}/out")
    # The reference's own picks, averaged by our neighbours.
    centers = points[golden(f"aug/upsample_96/{seed}/center_ids")]
    near = nearest_neighbors(centers[None], points[None], 10)[0]
    torch.testing.assert_close(points[near].mean(dim=1), expected[64:], rtol=1e-4, atol=1e-6)
    # And ours: the points themselves, then such means of points of its own choice.
    filled = fill_up_points(points[None], 96, rng(seed))[0]
    assert torch.equal(filled[:64], points)
    means = points[nearest_neighbors(points[None], points[None], 10)[0]].mean(dim=1)
    exact = "donot_use_mm_for_euclid_dist"
    nearest = torch.cdist(filled[64:], means, compute_mode=exact).amin(dim=1)
    assert nearest.max() < 1e-6
    assert fill_up_points(points[None], 64, rng(0)).shape == (1, 64, 3)


FULL = PointAugmentConfig()
MOMENTS: dict[str, tuple[PointAugmentConfig, Any]] = {
    "PointcloudScale(0.5,2)": (replace(STILL, scale_low=0.5, scale_high=2.0), strong_points),
    "PointcloudScale(0.9,1.1)": (replace(STILL, weak_scale=0.1), weak_points),
    "PointcloudRotate(y)": (replace(STILL, turn=1.0), strong_points),
    "PointcloudRotatePerturbation()": (replace(STILL, weak_angle=0.06), weak_points),
    "PointcloudTranslate(0.5)": (replace(STILL, shift=0.5), strong_points),
    "PointcloudJitter()": (replace(STILL, jitter=0.01), strong_points),
    "PointcloudRandomInputDropout()": (replace(STILL, dropout=0.875), strong_points),
    "weak pipeline on 2048": (FULL, weak_points),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_augmented_clouds_have_the_references_moments(name: str) -> None:
    config, augment = MOMENTS[name]
    draws = 300
    cloud = torch.from_numpy(unit("fn.aug_cloud", (2048, 3)) * np.float32([0.9, 0.7, 0.5]))
    cloud = normalize_to_unit_sphere(cloud[None])
    found = augment(cloud.expand(draws, -1, -1), config, rng(0)).double()
    statistics = {
        **{f"{axis}_mean": found[..., k].mean(dim=1) for k, axis in enumerate("xyz")},
        **{f"{axis}_std": found[..., k].std(dim=1, correction=0) for k, axis in enumerate("xyz")},
        "radius_max": found.norm(dim=-1).amax(dim=1),
        "radius_rms": found.square().sum(dim=-1).mean(dim=1).sqrt(),
    }
    for key, values in statistics.items():
        expected = FACTS["augmentation_moments"][name][key]
        # Five standard errors of a mean of 300 draws, theirs being of 600.
        error = 5 * max(expected["std"], values.std().item()) * (1 / 300 + 1 / 600) ** 0.5
        assert values.mean().item() == pytest.approx(expected["mean"], abs=error + 2e-5), key
        assert values.std().item() == pytest.approx(expected["std"], rel=0.25, abs=5e-4), key
