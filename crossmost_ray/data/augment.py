"""Raw views and clouds in, weak and strong ones out: batched on the device, pure functions of
the batch and a generator, so that one seed gives one result whatever the loader's threads do.

What is random is drawn here. What takes long on a CPU is done there by compiled loops (`loops`).
Other devices take tensor operations throughout, and nothing that the host would have to wait for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmost_ray.config import ImageAugmentConfig, PointAugmentConfig
from crossmost_ray.data.loops import (
    crop_images,
    equalize_channels,
    roughen_points,
    take_points,
    warp_images,
)
from crossmost_ray.ops.points import gather, nearest_neighbors

FILL = (0.48145466, 0.4578275, 0.40821073)
"""Colour (0 to 1) of what a rotated image uncovers: CLIP's mean, which normalises to 0."""


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng, device=rng.device)


def _clipped_normal(shape: tuple[int, ...], std: float, cut: float, rng: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=rng, device=rng.device) * std).clamp(-cut, cut)


def _has_loops(device: torch.device) -> bool:
    return device.type == "cpu"


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers for each channel, (K, 1, 1): kept, since each copy to a GPU would wait for it."""
    return torch.tensor(values, device=device)[:, None, None]


# Images ------------------------------------------------------------------------------------------


def to_float(images: Tensor) -> Tensor:
    """Turns (..., 3, S, S) uint8 into float32 from 0 to 1."""
    return images.float() / 255


def normalize_images(
    images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """Normalises (..., 3, R, R) images of 0 to 1 by channel."""
    return normalize_images_(images.clone(), mean, std)


def normalize_images_(
    images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """Does the same to the images themselves: fresh memory costs more than the arithmetic."""
    return images.sub_(_constant(mean, images.device)).div_(_constant(std, images.device))


def resize_images(images: Tensor, size: int) -> Tensor:
    """Resizes (B, 3, S, S) floats to (B, 3, size, size), whole, with antialiasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _warp(images: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Samples (B, 3, S, S) at the places that (B, 2, 3) affine maps give; outside lies FILL."""
    if images.dtype == torch.uint8:
        images = to_float(images)
    grid = F.affine_grid(matrix, [len(images), 3, size, size], align_corners=False)
    fill = _constant(FILL, images.device)
    # Subtracting and adding the fill may leave -3e-8 for a 0, and posterising that gives -0.5.
    return (F.grid_sample(images - fill, grid, align_corners=False) + fill).clamp(0, 1)


def random_crop(
    images: Tensor,
    size: int,
    *,
    scale: float,
    aspect: float,
    flip: float,
    generator: torch.Generator,
) -> Tensor:
    """Crops each image at random and resizes the crop.

    Args:
        images: (B, 3, S, S) uint8, or float from 0 to 1.
        size: R, side of the result.
        scale: Least share of the area; the share is uniform up to 1.
        aspect: Largest ratio of the crop's sides; log-uniform.
        flip: Chance of a left-right flip.
        generator: Source of randomness.

    Returns:
        (B, 3, R, R) float32, 0 to 1.

    Source:
        Inception (Szegedy et al., 2015), random resized crop.
    """
    B, device = len(images), images.device
    area = _uniform((B,), scale, 1.0, generator)
    stretch = _uniform((B,), -math.log(aspect), math.log(aspect), generator).exp().sqrt()
    width = (area.sqrt() * stretch).clamp(max=1.0)
    height = (area.sqrt() / stretch).clamp(max=1.0)
    left = (1 - width) * _uniform((B,), -1.0, 1.0, generator)
    top = (1 - height) * _uniform((B,), -1.0, 1.0, generator)
    flipped = torch.rand(B, generator=generator, device=device) < flip
    matrix = torch.zeros(B, 2, 3, device=device)
    matrix[:, 0, 0] = torch.where(flipped, -width, width)
    matrix[:, 0, 2] = left
    matrix[:, 1, 1] = height
    matrix[:, 1, 2] = top
    if _has_loops(device):
        return crop_images(images, matrix, size, FILL)
    return _warp(images, matrix, size)


def _gray(images: Tensor) -> Tensor:
    return (images * _constant((0.299, 0.587, 0.114), images.device)).sum(dim=1, keepdim=True)


def _blend(base: Tensor, images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Moves away from `base` or towards it by a factor of up to 1 +- 0.9."""
    factor = (1 + sign * 0.9 * level).clamp(min=0.1)[:, None, None, None]
    return (base + factor * (images - base)).clamp(0, 1)


def _auto_contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    # Of one value for each channel, not of the pixels: `where` is the slowest thing a CPU is asked.
    plain = high <= low
    return (images - low.masked_fill(plain, 0)) / (high - low).clamp(min=1e-6).masked_fill(plain, 1)


def _equalize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    equalize = equalize_channels if _has_loops(images.device) else _rank_values
    return equalize(images)


def _rank_values(images: Tensor) -> Tensor:
    """Puts in the place of each value of 256 its rank in its channel."""
    B, channels, height, width = images.shape
    value = (images * 255).round().long().flatten(2)
    counts = torch.zeros(B, channels, 256, device=images.device)
    counts.scatter_add_(2, value, torch.ones_like(value, dtype=counts.dtype))
    rank = (counts.cumsum(dim=2) - counts / 2) / (height * width)
    return rank.gather(2, value).reshape(images.shape)


def _invert(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return 1 - images


def _posterize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    steps = 2 ** (4 - (4 * level).floor()).clamp(min=1)[:, None, None, None]
    return (images * steps).floor().clamp(max=steps - 1) / steps


def _solarize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    # Of 256 values, not of 255 steps: at no strength, white must stay white.
    bright = images >= (256 / 255 * (1 - level))[:, None, None, None]
    return (bright.float() - images).abs()  # 1 - value, or the value itself


def _solarize_add(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return (images + (images < 0.5) * (110 / 255 * level[:, None, None, None])).clamp(max=1)


def _color(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(_gray(images), images, level, sign)


def _contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(_gray(images).mean(dim=(2, 3), keepdim=True), images, level, sign)


def _brightness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, level, sign)


def _sharpness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    # Of the nine weights the middle one is 5, the others 1; as sums of lines, a third of the work.
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    lines = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    box = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
    return _blend((box + 4 * images) / 13, images, level, sign)


@dataclass(frozen=True)
class Warp:
    """An operation that moves pixels: by an affine map, from the result's places to the image's."""

    matrix: Callable[[Tensor, Tensor], Tensor]
    """(B,) levels and signs to (B, 2, 3)."""

    def __call__(self, images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        """Warps (B, 3, S, S) images."""
        return _move(images, self.matrix(level, sign))


def _move(images: Tensor, matrix: Tensor) -> Tensor:
    if _has_loops(images.device):
        return warp_images(images, matrix, FILL)
    return _warp(images, matrix, images.shape[-1])


def _affine(xx: float, xy: float, yx: float, dx: float, dy: float) -> Warp:
    """Builds a warp whose map leaves the identity by these amounts at full level."""

    def matrix(level: Tensor, sign: Tensor) -> Tensor:
        amount = level * sign
        maps = torch.eye(2, 3, device=level.device).repeat(len(level), 1, 1)
        for row, column, change in ((0, 0, xx), (0, 1, xy), (1, 0, yx), (0, 2, dx), (1, 2, dy)):
            if change:
                maps[:, row, column] += change * amount
        return maps

    return Warp(matrix)


def _rotation(level: Tensor, sign: Tensor) -> Tensor:
    angle = level * sign * math.radians(30)
    maps = torch.zeros(len(angle), 2, 3, device=angle.device)
    maps[:, 0, 0] = maps[:, 1, 1] = angle.cos()
    maps[:, 0, 1], maps[:, 1, 0] = -angle.sin(), angle.sin()
    return maps


ImageOp = Callable[[Tensor, Tensor, Tensor], Tensor]

IMAGE_OPS: tuple[ImageOp, ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    Warp(_rotation),
    _posterize,
    _solarize,
    _solarize_add,
    _color,
    _contrast,
    _brightness,
    _sharpness,
    _affine(0, 0.3, 0, 0, 0),  # shear along x
    _affine(0, 0, 0.3, 0, 0),  # shear along y
    _affine(0, 0, 0, 0.9, 0),  # move along x by up to 45 % of the width
    _affine(0, 0, 0, 0, 0.9),  # move along y
)
"""(B, 3, S, S) images of 0 to 1, (B,) levels of 0 to 1, (B,) signs -> images of 0 to 1."""


def rand_augment(
    images: Tensor,
    *,
    num_ops: int,
    magnitude: float,
    chance: float,
    generator: torch.Generator,
) -> Tensor:
    """Applies random colour and shape changes to each image.

    Args:
        images: (B, 3, S, S) float, 0 to 1.
        num_ops: Operations drawn for each image, with repeats.
        magnitude: Mean strength, of 10; its deviation is 0.5.
        chance: That a drawn operation is applied.
        generator: Source of randomness.

    Returns:
        (B, 3, S, S) float, 0 to 1.

    Source:
        RandAugment (Cubuk et al., 2020), in the form `rand-m9-mstd0.5-inc1` names.
    """
    images = images.clone()
    _rand_augment(images, num_ops, magnitude, chance, generator)
    return images


def _rand_augment(
    images: Tensor, num_ops: int, magnitude: float, chance: float, generator: torch.Generator
) -> None:
    """Changes the images themselves."""
    B, device = len(images), images.device
    replace = _replace_rows if _has_loops(device) else _replace_where
    for _ in range(num_ops):
        choice = (torch.rand(B, generator=generator, device=device) * len(IMAGE_OPS)).long()
        applied = torch.rand(B, generator=generator, device=device) < chance
        level = torch.randn(B, generator=generator, device=device) * 0.5 + magnitude
        level = level.clamp(0, 10) / 10
        sign = (torch.rand(B, generator=generator, device=device) < 0.5).float() * 2 - 1
        # All that move pixels at once: an image has one operation at a time.
        matrix = torch.eye(2, 3, device=device).expand(B, 2, 3)
        moved = torch.zeros(B, dtype=torch.bool, device=device)
        for place, operation in enumerate(IMAGE_OPS):
            chosen = (choice == place) & applied
            if isinstance(operation, Warp):
                map_of = operation.matrix(level, sign)
                matrix = torch.where(chosen[:, None, None], map_of, matrix)
                moved |= chosen
            else:
                replace(images, chosen, operation, level, sign)
        replace(images, moved, _move, matrix)


def _replace_rows(
    images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *arguments: Tensor
) -> None:
    """Puts in the place of the chosen images what becomes of them."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        images[rows] = change(images[rows], *(argument[rows] for argument in arguments))


def _replace_where(
    images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *arguments: Tensor
) -> None:
    """Does the same without asking the device which images are chosen: it changes all of them.

    To ask would be to wait for all that was queued before, thirty times a batch.
    """
    changed = change(images, *arguments)
    torch.where(chosen[:, None, None, None], changed, images, out=images)


def weak_images(
    images: Tensor, size: int, config: ImageAugmentConfig, generator: torch.Generator
) -> Tensor:
    """Crops (B, 3, S, S) uint8 lightly to (B, 3, size, size) floats: what the teacher sees."""
    return random_crop(
        images, size, scale=config.weak_scale, aspect=1.0, flip=0.0, generator=generator
    )


def strong_images(
    images: Tensor, size: int, config: ImageAugmentConfig, generator: torch.Generator
) -> Tensor:
    """Crops, flips and distorts (B, 3, S, S) uint8 to (B, 3, size, size) for the student."""
    cropped = random_crop(
        images,
        size,
        scale=config.strong_scale,
        aspect=4 / 3,
        flip=config.flip,
        generator=generator,
    )
    _rand_augment(cropped, config.rand_ops, config.rand_magnitude, config.rand_chance, generator)
    return cropped


# Points ------------------------------------------------------------------------------------------


def sample_points(
    points: Tensor, num_points: int, generator: torch.Generator, repeats: int = 1
) -> Tensor:
    """Draws points of each cloud without repeats.

    Args:
        points: (B, N, 3).
        num_points: At most N.
        generator: Source of randomness.
        repeats: T, samples of each cloud.

    Returns:
        (B * T, num_points, 3), in random order; the samples of a cloud follow one another.
    """
    B, N, _ = points.shape
    noise = torch.rand((B * repeats, N), generator=generator, device=points.device)
    if _has_loops(points.device):
        return take_points(points, noise, num_points)
    index = noise.topk(num_points, dim=1).indices.reshape(B, repeats * num_points, 1)
    return points.gather(1, index.expand(-1, -1, 3)).reshape(B * repeats, num_points, 3)


def rotation_matrices(angles: Tensor) -> Tensor:
    """Turns (B, 3) angles about x, y and z, in radians, into (B, 3, 3): Rz Ry Rx."""
    B = len(angles)
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.eye(3, device=angles.device).expand(B, 3, 3)
    for axis in range(3):
        j, k = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, device=angles.device).repeat(B, 1, 1)
        turn[:, j, j] = turn[:, k, k] = cos[:, axis]
        turn[:, j, k], turn[:, k, j] = -sin[:, axis], sin[:, axis]
        matrices = turn @ matrices
    return matrices


def weak_points(points: Tensor, config: PointAugmentConfig, generator: torch.Generator) -> Tensor:
    """Scales and tilts (B, N, 3) clouds a little: what the teacher sees."""
    B = len(points)
    scale = _uniform((B, 1, 1), 1 - config.weak_scale, 1 + config.weak_scale, generator)
    angles = _clipped_normal((B, 3), config.weak_angle, 3 * config.weak_angle, generator)
    return points * scale @ rotation_matrices(angles).transpose(1, 2)


def strong_points(
    points: Tensor, config: PointAugmentConfig, generator: torch.Generator, up_axis: str = "y"
) -> Tensor:
    """Scales, turns, moves, roughens and thins (B, N, 3) clouds for the student.

    Args:
        points: In the unit sphere.
        config: How much of each; the order is that of its fields.
        generator: Source of randomness.
        up_axis: Axis that the clouds are turned about.

    Source:
        The strong transform of CrossMoST (Dharmasiri et al., 2024), less its crop, which its
        released code never applies.
    """
    B, N, _ = points.shape
    device = points.device
    scale = _uniform((B, 1, 1), config.scale_low, config.scale_high, generator)
    angles = torch.zeros(B, 3, device=device)
    angles[:, "xyz".index(up_axis)] = _uniform((B,), 0, 2 * math.pi * config.turn, generator)
    turn = scale * rotation_matrices(angles)
    shift = _uniform((B, 1, 3), -config.shift, config.shift, generator)
    noise = torch.randn((B, N, 3), generator=generator, device=device)
    ratio = _uniform((B, 1), 0, config.dropout, generator)
    draws = torch.rand((B, N), generator=generator, device=device)
    roughen = roughen_points if _has_loops(device) else _roughen_points
    return roughen(points, turn, shift, noise, config.jitter, draws, ratio)


def _roughen_points(
    points: Tensor,
    turn: Tensor,
    shift: Tensor,
    noise: Tensor,
    jitter: float,
    draws: Tensor,
    ratio: Tensor,
) -> Tensor:
    """Turns (B, N, 3) clouds, moves them by a share of their extent, roughens and thins them."""
    points = points @ turn.transpose(1, 2)
    extent = points.amax(dim=1, keepdim=True) - points.amin(dim=1, keepdim=True)
    points = points + extent * shift + (noise * jitter).clamp(-5 * jitter, 5 * jitter)
    return torch.where((draws < ratio)[..., None], points[:, :1], points)


def fill_up_points(points: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """Adds to each cloud averages of neighbours: of a random point and the nine nearest to it.

    Args:
        points: (B, N, 3).
        num_points: How many there shall be; a cloud that has as many comes back as it is.
        generator: Source of randomness.

    Returns:
        (B, max(N, num_points), 3), the given points first.

    Source:
        The strong transform of CrossMoST (Dharmasiri et al., 2024).
    """
    B, N, _ = points.shape
    if num_points <= N:
        return points
    draws = torch.rand((B, num_points - N), generator=generator, device=points.device)
    centers = gather(points, (draws * N).long().clamp(max=N - 1))
    neighbors = gather(points, nearest_neighbors(centers, points, min(10, N)))
    return torch.cat([points, neighbors.mean(dim=2)], dim=1)
