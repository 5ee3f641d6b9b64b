"""Augmentations: shapes, ranges, where their chance comes from, and each effect on its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.config import ImageAugmentConfig, PointAugmentConfig
from crossmost_ray.data.augment import (
    IMAGE_OPS,
    normalize_images,
    rand_augment,
    random_crop,
    resize_images,
    rotation_matrices,
    sample_points,
    strong_images,
    strong_points,
    to_float,
    weak_images,
    weak_points,
)

seeds = st.integers(0, 2**31 - 1)
SIZE = 24
STILL = PointAugmentConfig(
    weak_scale=0,
    weak_angle=0,
    scale_low=1,
    scale_high=1,
    turn=0,
    shift=0,
    jitter=0,
    dropout=0,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 0, batch: int = 4, size: int = SIZE) -> Tensor:
    """Smooth random images that use the whole range."""
    coarse = torch.rand(batch, 3, 6, 6, generator=rng(seed))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    low, high = fine.amin(dim=(1, 2, 3), keepdim=True), fine.amax(dim=(1, 2, 3), keepdim=True)
    return (fine - low) / (high - low)


def clouds(seed: int = 0, batch: int = 4, num_points: int = 50) -> Tensor:
    points = torch.randn(batch, num_points, 3, generator=rng(seed))
    return points / points.norm(dim=-1).amax(dim=1)[:, None, None]


AUGMENTATIONS: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {
    "weak images": lambda g: (
        inputs := images(),
        weak_images(inputs, 16, ImageAugmentConfig(), g),
    ),
    "strong images": lambda g: (
        inputs := images(),
        strong_images(inputs, 16, ImageAugmentConfig(rand_chance=1.0), g),
    ),
    "rand_augment": lambda g: (
        inputs := images(),
        rand_augment(inputs, num_ops=6, magnitude=9, chance=1.0, generator=g),
    ),
    "weak points": lambda g: (inputs := clouds(), weak_points(inputs, PointAugmentConfig(), g)),
    "strong points": lambda g: (
        inputs := clouds(),
        strong_points(inputs, PointAugmentConfig(), g),
    ),
    "sample": lambda g: (inputs := clouds(), sample_points(inputs, 20, g)),
}
INPUTS = {
    name: images() if "image" in name or "rand" in name else clouds() for name in AUGMENTATIONS
}
SHAPES = {
    "weak images": (4, 3, 16, 16),
    "strong images": (4, 3, 16, 16),
    "rand_augment": (4, 3, SIZE, SIZE),
    "weak points": (4, 50, 3),
    "strong points": (4, 50, 3),
    "sample": (4, 20, 3),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_alone_decides(name: str) -> None:
    augment = AUGMENTATIONS[name]
    before = torch.get_rng_state()
    (_, first), (_, again), (_, other) = (augment(rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(123)
    (_, elsewhere) = augment(rng(1))
    assert torch.equal(first, again)
    assert torch.equal(first, elsewhere)
    assert not torch.equal(first, other)
    assert first.shape == SHAPES[name]
    assert first.isfinite().all()
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_inputs_are_not_written_to(name: str) -> None:
    inputs, _ = AUGMENTATIONS[name](rng(3))
    assert torch.equal(inputs, INPUTS[name])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "sample"])
def test_objects_of_a_batch_are_augmented_apart(name: str) -> None:
    same = INPUTS[name][:1].expand(4, *INPUTS[name].shape[1:])
    config = ImageAugmentConfig(rand_chance=1.0)
    result = {
        "weak images": lambda: weak_images(same, 16, config, rng()),
        "strong images": lambda: strong_images(same, 16, config, rng()),
        "rand_augment": lambda: rand_augment(
            same, num_ops=6, magnitude=9, chance=1.0, generator=rng()
        ),
        "weak points": lambda: weak_points(same, PointAugmentConfig(), rng()),
        "strong points": lambda: strong_points(same, PointAugmentConfig(), rng()),
    }[name]()
    assert not any(torch.equal(result[0], other) for other in result[1:])


# Images


def test_bytes_become_shares() -> None:
    floats = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(floats, torch.tensor([0.0, 0.2, 1.0]))


def test_images_are_normalised_by_channel() -> None:
    image = torch.full((2, 3, 2, 2), 0.5)
    result = normalize_images(image, (0.5, 0.3, 0.1), (0.1, 0.2, 0.4))
    torch.testing.assert_close(result[1, :, 0, 0], torch.tensor([0.0, 1.0, 1.0]))


def test_resizing_keeps_the_whole_image() -> None:
    image = images()
    assert resize_images(image, SIZE) is image
    small = resize_images(image, SIZE // 2)
    assert small.shape == (4, 3, SIZE // 2, SIZE // 2)
    torch.testing.assert_close(small.mean(), image.mean(), atol=0.02, rtol=0)
    # Antialiased: a pattern finer than the new pixels becomes its mean, not one of its values.
    stripes = (torch.arange(SIZE) % 2).float().expand(1, 3, SIZE, SIZE)
    middle = resize_images(stripes, SIZE // 4)[..., 1:-1]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), atol=0.13, rtol=0)


def test_a_crop_of_everything_is_the_image() -> None:
    image = images()
    result = random_crop(image, SIZE, scale=1.0, aspect=1.0, flip=0.0, generator=rng())
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)


def test_a_certain_flip_mirrors() -> None:
    image = images()
    result = random_crop(image, SIZE, scale=1.0, aspect=1.0, flip=1.0, generator=rng())
    torch.testing.assert_close(result, image.flip(-1), atol=1e-5, rtol=0)


def test_flips_come_as_often_as_asked() -> None:
    image = images(batch=1).expand(600, 3, SIZE, SIZE)
    result = random_crop(image, SIZE, scale=1.0, aspect=1.0, flip=0.25, generator=rng())
    flipped = torch.isclose(result, image.flip(-1), atol=1e-4).flatten(1).all(dim=1)
    assert 0.18 < flipped.float().mean() < 0.32  # 4 deviations of 0.018


@given(seed=seeds, scale=st.floats(0.1, 1.0), aspect=st.floats(1.0, 2.0))
def test_a_crop_lies_inside_the_image_and_is_as_large_as_asked(
    seed: int, scale: float, aspect: float
) -> None:
    # An image whose red is x and whose green is y shows where the crop was taken.
    line = (torch.arange(64) + 0.5) / 64
    x, y = line.expand(64, 64), line[:, None].expand(64, 64)
    image = torch.stack([x, y, x])[None].expand(6, 3, 64, 64)
    result = random_crop(image, 32, scale=scale, aspect=aspect, flip=0.0, generator=rng(seed))
    middle = result[:, :, 8:24, 8:24]  # away from the border, where no padding mixes in
    width = (middle[:, 0, :, -1] - middle[:, 0, :, 0]).mean(dim=1) * 32 / 15
    height = (middle[:, 1, -1] - middle[:, 1, 0]).mean(dim=1) * 32 / 15
    tolerance = 0.02
    assert (width * height > scale - tolerance - 0.35 * (aspect - 1)).all()
    assert (width <= 1 + tolerance).all()
    assert (height <= 1 + tolerance).all()
    inside = (width < 0.99) & (height < 0.99)
    ratio = (width / height)[inside]
    assert (ratio <= aspect * 1.05).all()
    assert (ratio >= 0.95 / aspect).all()
    center = result[:, :2, 15:17, 15:17].mean(dim=(2, 3))
    half = torch.stack([width, height], dim=1) / 2
    assert (center - half >= -tolerance).all()
    assert (center + half <= 1 + tolerance).all()


def test_crops_span_the_scale() -> None:
    image = torch.linspace(0, 1, 64).expand(400, 3, 64, 64)
    result = random_crop(image, 32, scale=0.25, aspect=1.0, flip=0.0, generator=rng())
    share = ((result[:, 0, 16, 24] - result[:, 0, 16, 8]) * 2) ** 2
    assert share.min() < 0.3
    assert share.max() > 0.95
    # Uniform from 1/4 to 1: a mean of 0.625, of deviation 0.217 / 20.
    assert share.mean().item() == pytest.approx(0.625, abs=0.05)


# The order of IMAGE_OPS: those whose zero strength changes nothing.
GRADUAL = {
    "rotate": 3,
    "solarize": 5,
    "solarize_add": 6,
    "color": 7,
    "contrast": 8,
    "brightness": 9,
    "sharpness": 10,
    "shear_x": 11,
    "shear_y": 12,
    "move_x": 13,
    "move_y": 14,
}


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", GRADUAL)
def test_an_operation_of_no_strength_changes_nothing(name: str, sign: float) -> None:
    image = images()
    result = IMAGE_OPS[GRADUAL[name]](image, torch.zeros(4), torch.full((4,), sign))
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("place", range(len(IMAGE_OPS)))
def test_every_operation_stays_in_range(place: int, level: float) -> None:
    plain = torch.stack([torch.zeros(3, SIZE, SIZE), torch.ones(3, SIZE, SIZE)])
    image = torch.cat([images(batch=2), plain])
    for sign in (-1.0, 1.0):
        result = IMAGE_OPS[place](image, torch.full((4,), level), torch.full((4,), sign))
        assert result.shape == image.shape
        assert result.isfinite().all()
        assert result.min() >= -1e-6
        assert result.max() <= 1 + 1e-6


@pytest.mark.parametrize("place", range(len(IMAGE_OPS)))
def test_every_operation_does_something(place: int) -> None:
    image = images() * 0.5 + 0.2
    result = IMAGE_OPS[place](image, torch.full((4,), 0.9), torch.ones(4))
    assert (result - image).abs().amax(dim=(1, 2, 3)).min() > 0.01


def value_of(place: int, value: float, level: float, sign: float = 1.0) -> float:
    """What an operation makes of one grey value in a grey image."""
    image = torch.full((1, 3, 4, 4), value)
    return IMAGE_OPS[place](image, torch.tensor([level]), torch.tensor([sign])).flatten()[0].item()


def test_operations_by_hand() -> None:
    assert value_of(2, 0.3, 0.5) == pytest.approx(0.7)  # invert
    assert value_of(5, 0.6, 0.5) == pytest.approx(0.4)  # solarize: inverts above 1 - level
    assert value_of(5, 0.4, 0.5) == pytest.approx(0.4)
    assert value_of(6, 0.4, 1.0) == pytest.approx(0.4 + 110 / 255)  # adds below a half
    assert value_of(6, 0.6, 1.0) == pytest.approx(0.6)
    assert value_of(9, 0.4, 0.5) == pytest.approx(0.4 * 1.45)  # brightness
    assert value_of(9, 0.4, 0.5, -1.0) == pytest.approx(0.4 * 0.55)
    assert value_of(4, 0.6, 0.5) == pytest.approx(0.5)  # posterize to 2 bits: 0, 1/4, 1/2, 3/4
    assert value_of(4, 0.99, 1.0) == pytest.approx(0.5)  # to one bit
    assert value_of(4, 0.49, 1.0) == 0.0


def test_auto_contrast_stretches_each_channel() -> None:
    image = images() * torch.tensor([0.5, 0.3, 0.2])[:, None, None] + 0.1
    result = IMAGE_OPS[0](image, torch.zeros(4), torch.ones(4))
    assert result.amin(dim=(2, 3)).abs().max() < 1e-5
    assert (result.amax(dim=(2, 3)) - 1).abs().max() < 1e-5
    plain = torch.full((1, 3, 4, 4), 0.3)
    assert torch.equal(IMAGE_OPS[0](plain, torch.zeros(1), torch.ones(1)), plain)


def test_equalised_values_are_spread_evenly() -> None:
    image = (images(size=64) ** 3).clamp(0, 1)
    result = IMAGE_OPS[1](image, torch.zeros(4), torch.ones(4))
    for channel in result.flatten(0, 1).flatten(1):
        quantiles = torch.quantile(channel, torch.tensor([0.25, 0.5, 0.75]))
        torch.testing.assert_close(quantiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.04, rtol=0)


def test_a_turned_and_moved_image_is_filled_with_the_mean_colour() -> None:
    white = torch.ones(1, 3, 21, 21)
    turned = IMAGE_OPS[3](white, torch.ones(1), torch.ones(1))
    torch.testing.assert_close(turned[0, :, 10, 10], torch.ones(3))
    fill = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # CLIP's mean
    torch.testing.assert_close(turned[0, :, 0, 0], fill)
    moved = IMAGE_OPS[13](white, torch.ones(1), torch.ones(1))
    columns = (moved[0, 0, 10] - fill[0]).abs() < 1e-4
    assert columns.float().mean().item() == pytest.approx(0.45, abs=0.05)


@given(seed=seeds, magnitude=st.floats(0, 10), num_ops=st.integers(0, 5))
def test_rand_augment_stays_in_range(seed: int, magnitude: float, num_ops: int) -> None:
    result = rand_augment(
        images(seed), num_ops=num_ops, magnitude=magnitude, chance=1.0, generator=rng(seed)
    )
    assert result.min() >= -1e-6
    assert result.max() <= 1 + 1e-6


def test_no_operation_and_no_chance_change_nothing() -> None:
    image = images()
    for num_ops, chance in ((0, 1.0), (3, 0.0)):
        result = rand_augment(image, num_ops=num_ops, magnitude=9, chance=chance, generator=rng())
        assert torch.equal(result, image)


def test_operations_are_applied_as_often_as_asked() -> None:
    image = (images(batch=1) * 0.5 + 0.2).expand(800, 3, SIZE, SIZE)
    result = rand_augment(image, num_ops=1, magnitude=9, chance=0.5, generator=rng())
    changed = (result != image).flatten(1).any(dim=1).float().mean()
    assert 0.43 < changed < 0.57  # 4 deviations of 0.018


# Points


@given(angles=st.tuples(*[st.floats(-7, 7)] * 3))
def test_rotations_are_rotations_about_x_then_y_then_z(
    angles: tuple[float, float, float],
) -> None:
    (matrix,) = rotation_matrices(torch.tensor([angles], dtype=torch.float32)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3).double(), atol=1e-5, rtol=0)
    assert torch.det(matrix).item() == pytest.approx(1.0, abs=1e-5)
    a, b, c = angles
    rx = [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
    ry = [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    rz = [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
    x, y, z = (torch.tensor(m, dtype=torch.float64) for m in (rx, ry, rz))
    torch.testing.assert_close(matrix, z @ y @ x, atol=1e-5, rtol=0)


def test_without_strength_clouds_stay() -> None:
    points = clouds()
    torch.testing.assert_close(weak_points(points, STILL, rng()), points)
    torch.testing.assert_close(strong_points(points, STILL, rng()), points)


@given(seed=seeds)
def test_weak_clouds_stay_near(seed: int) -> None:
    points = clouds(seed)
    result = weak_points(points, PointAugmentConfig(), rng(seed))
    ratio = result.norm(dim=-1) / points.norm(dim=-1)
    assert (ratio > 0.9 - 1e-4).all()
    assert (ratio < 1.1 + 1e-4).all()
    assert (ratio.amax(dim=1) - ratio.amin(dim=1)).max() < 1e-3, "one factor for a whole cloud"
    # Each of the three angles is cut at 0.18, so no point turns by more than their sum.
    cosine = torch.cosine_similarity(result, points, dim=-1).clamp(-1, 1)
    assert cosine.arccos().max() < 3 * 0.18 + 1e-3


def test_weak_angles_have_their_deviation() -> None:
    points = torch.eye(3).expand(3000, 3, 3)
    config = PointAugmentConfig(weak_scale=0)
    result = weak_points(points, config, rng())
    # For small angles x goes to y by the angle about z; cut at three deviations it loses 1.3 %.
    assert result[:, 0, 1].std().item() == pytest.approx(0.06, rel=0.07)
    # That y is sin(c) cos(b), and of 3000 angles some lie beyond three deviations.
    assert 0.175 < result[:, 0, 1].abs().max() <= math.sin(0.18) + 1e-6


@pytest.mark.parametrize(("up_axis", "up"), [("x", 0), ("y", 1), ("z", 2)])
def test_strong_clouds_turn_about_the_up_axis_only(up_axis: str, up: int) -> None:
    points = clouds(batch=64)
    config = PointAugmentConfig(scale_low=1, scale_high=1, shift=0, jitter=0, dropout=0)
    result = strong_points(points, config, rng(), up_axis)
    torch.testing.assert_close(result[..., up], points[..., up], atol=1e-6, rtol=0)
    torch.testing.assert_close(result.norm(dim=-1), points.norm(dim=-1), atol=1e-5, rtol=1e-5)
    j, k = (up + 1) % 3, (up + 2) % 3
    angle = torch.atan2(result[:, 0, k], result[:, 0, j]) - torch.atan2(
        points[:, 0, k], points[:, 0, j]
    )
    quarter = (angle.remainder(2 * math.pi) / (math.pi / 2)).long()
    assert set(quarter.tolist()) == {0, 1, 2, 3}, "a full turn"


def test_strong_clouds_are_scaled_by_one_factor() -> None:
    points = clouds(batch=200)
    config = PointAugmentConfig(turn=0, shift=0, jitter=0, dropout=0)
    factor = (strong_points(points, config, rng()) / points).flatten(1)
    assert (factor.std(dim=1) < 1e-4).all()
    mean = factor.mean(dim=1)
    assert 0.5 <= mean.min() < 0.6
    assert 1.9 < mean.max() <= 2.0 + 1e-5


def test_strong_clouds_move_by_a_share_of_their_extent() -> None:
    points = clouds(batch=200) * torch.tensor([1.0, 0.1, 0.0])
    config = PointAugmentConfig(scale_low=1, scale_high=1, turn=0, jitter=0, dropout=0)
    shift = (strong_points(points, config, rng()) - points).mean(dim=1)
    extent = points.amax(dim=1) - points.amin(dim=1)
    assert (shift.abs() <= 0.5 * extent + 1e-5).all()
    assert (shift[:, 2] == 0).all()
    assert (shift[:, 0].abs() / extent[:, 0]).max() > 0.45


def test_jitter_has_its_deviation_and_is_cut() -> None:
    # Of nine million draws some five lie beyond five deviations.
    points = torch.zeros(1, 3_000_000, 3)
    config = PointAugmentConfig(scale_low=1, scale_high=1, turn=0, shift=0, dropout=0, jitter=0.01)
    noise = strong_points(points, config, rng())
    assert noise.std().item() == pytest.approx(0.01, rel=0.01)
    assert noise.abs().max().item() == pytest.approx(0.05, rel=1e-5)


def test_dropped_points_become_copies_of_the_first() -> None:
    points = clouds(batch=200, num_points=100)
    config = PointAugmentConfig(scale_low=1, scale_high=1, turn=0, shift=0, jitter=0, dropout=0.875)
    result = strong_points(points, config, rng())
    copied = (result == result[:, :1]).all(dim=-1)
    torch.testing.assert_close(result[~copied], points[~copied], atol=1e-6, rtol=0)
    torch.testing.assert_close(result[:, 0], points[:, 0], atol=1e-6, rtol=0)
    share = copied.float().mean(dim=1)
    assert share.min() < 0.1
    assert 0.75 < share.max() < 0.98
    # The ratio is uniform up to 0.875.
    assert share.mean().item() == pytest.approx(0.4375, abs=0.06)


@given(seed=seeds, num_points=st.integers(1, 50))
def test_sampled_points_are_points_without_repeats(seed: int, num_points: int) -> None:
    points = clouds(seed, batch=3)
    result = sample_points(points, num_points, rng(seed))
    for cloud, sample in zip(points.tolist(), result.tolist(), strict=True):
        chosen = {tuple(point) for point in sample}
        assert len(chosen) == num_points
        assert chosen <= {tuple(point) for point in cloud}


def test_every_point_is_sampled_equally_often_and_in_random_order() -> None:
    points = torch.arange(10.0)[None, :, None].expand(4000, 10, 3)
    sample = sample_points(points, 5, rng())[..., 0]
    share = torch.bincount(sample.flatten().long(), minlength=10) / 4000
    assert (share - 0.5).abs().max() < 0.05
    first = torch.bincount(sample[:, 0].long(), minlength=10) / 4000
    assert (first - 0.1).abs().max() < 0.03
