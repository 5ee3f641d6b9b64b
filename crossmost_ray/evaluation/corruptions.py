"""One object's cloud and views in, the same made worse out: five kinds of corruption, each in five
severities and each for both modalities, the same on every machine and for every model."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from crossmost_ray.data.augment import FILL
from crossmost_ray.data.decode import hash_id

Points = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
Cloud = npt.NDArray[np.float64]
PointEffect = Callable[[Cloud, float, np.random.Generator], Cloud]
ImageEffect = Callable[[Images, float, np.random.Generator], Images]

CORRUPTIONS: tuple[str, ...] = ("noise", "dropout", "occlusion", "rotation", "density")

SEVERITIES = (1, 2, 3, 4, 5)

# The kinds follow ModelNet40-C (Sun et al., 2022) and PointCloud-C (Ren et al., 2022) for clouds
# and ImageNet-C (Hendrycks and Dietterich, 2019) for views. Where no benchmark is named beside a
# row, its numbers are this project's own: results are to be compared with each other, not with
# those benchmarks' tables.
POINT_LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.01, 0.02, 0.03, 0.04, 0.05),
    # Steep, because a model may see fewer points than are stored: with half of 2,048 lost, a sample
    # of 1,024 still holds about 768 different ones.
    "dropout": (0.5, 0.7, 0.8, 0.9, 0.95),
    "occlusion": (0.15, 0.3, 0.45, 0.6, 0.75),
    "rotation": (10.0, 20.0, 30.0, 45.0, 60.0),
    "density": (0.3, 0.1, 0.03, 0.01, 0.003),
}
"""By kind, for severities 1 to 5: deviation in radii of the cloud; share of the points lost; share
hidden; degrees; chance to keep the farthest point, where the nearest is kept for sure."""

IMAGE_LEVELS: dict[str, tuple[float, ...]] = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # ImageNet-C's Gaussian noise
    "dropout": (0.1, 0.2, 0.3, 0.4, 0.5),
    "occlusion": (0.1, 0.2, 0.3, 0.4, 0.5),
    "rotation": POINT_LEVELS["rotation"],
    # Below ImageNet-C's, which starts at 0.6: views are decoded half as large again as the towers
    # see them, and 0.6 of that would cost next to nothing.
    "density": (0.4, 0.3, 0.2, 0.15, 0.1),
}
"""By kind, for severities 1 to 5: deviation in units of the full range; share of the blocks lost;
share of the area hidden, at most a half; degrees; resolution left, as a share of the side."""

GRID = 16
"""Blocks along a view's side, of which dropout loses some."""

BLANK = np.rint(np.multiply(FILL, 255)).astype(np.uint8)[:, None, None]
"""(3, 1, 1): the colour of what a view has lost."""


def corrupt(
    points: Points, images: Images, kind: str, severity: int, object_id: str
) -> tuple[Points, Images]:
    """Corrupts one object as both towers would meet it, before any normalisation.

    | kind      | cloud                                        | views                            |
    |-----------|----------------------------------------------|----------------------------------|
    | noise     | Gaussian jitter, relative to the radius      | Gaussian noise on every value    |
    | dropout   | points lost at random                        | blocks of the picture blanked    |
    | occlusion | all beyond a plane across it lost            | a rectangle blanked              |
    | rotation  | turned about a random axis                   | turned in the plane, either way  |
    | density   | thins out exponentially along a direction    | resolution lowered and back      |

    Which points, blocks, directions and so on is drawn from `object_id`, `kind` and `severity`
    alone, and for the cloud apart from the views: other views leave the cloud's corruption as it
    is. Each view has its own draw.

    Args:
        points: (N, 3) float32, x-y-z, in any unit of length and about any origin, in random order.
        images: (V, 3, S, S) uint8.
        kind: One of `CORRUPTIONS`.
        severity: 1 to 5, as in `POINT_LEVELS` and `IMAGE_LEVELS`.
        object_id: The object's name, the source of randomness.

    Returns:
        (N, 3) float32 and (V, 3, S, S) uint8. Where points were lost, the M that survive fill N
        places evenly: each comes N // M times, and N % M of them, drawn without repeats, once
        more. The whole is shuffled, so that a prefix is a fair sample of the corrupted cloud as
        it was of the given one. Noise and rotation keep each point's place.

    Raises:
        ValueError: If the kind or the severity is unknown, or an array is not as above.

    Source:
        The idea of kinds by severities: ImageNet-C (Hendrycks and Dietterich, 2019); for clouds,
        ModelNet40-C (Sun et al., 2022) and PointCloud-C (Ren et al., 2022).
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"there is no corruption '{kind}'; there are: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}, expected a whole number from 1 to 5")
    if points.dtype != np.float32 or points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(
            f"points are {points.dtype} of shape {points.shape}, "
            "expected float32 of shape (N, 3) with at least one point"
        )
    square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
    if images.dtype != np.uint8 or not square:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}, "
            "expected uint8 of shape (V, 3, S, S)"
        )
    seed = hash_id(f"{kind}/{severity}/{object_id}")
    point_rng, image_rng = np.random.default_rng(seed).spawn(2)
    change_points, change_images = _EFFECTS[kind]
    # In double precision: scans lie kilometres from their origin.
    changed = change_points(points.astype(np.float64), POINT_LEVELS[kind][severity - 1], point_rng)
    if len(changed) < len(points):
        changed = _fill_up(changed, len(points), point_rng)
    return (
        changed.astype(np.float32),
        change_images(images, IMAGE_LEVELS[kind][severity - 1], image_rng),
    )


# Points ------------------------------------------------------------------------------------------


def _fill_up(points: Cloud, num_points: int, rng: np.random.Generator) -> Cloud:
    """Repeats (M, 3) points as evenly as can be to (num_points, 3), in random order."""
    M = len(points)
    # Not plain draws with replacement: those would miss some survivors, by chance and on top of
    # the corruption.
    whole = np.tile(np.arange(M), num_points // M)
    index = np.concatenate([whole, rng.permutation(M)[: num_points % M]])
    return points[rng.permutation(index)]


def _centre(points: Cloud) -> Cloud:
    # Seen from the first point: the mean of equal numbers is not exactly that number.
    return points[0] + (points - points[0]).mean(axis=0)


def _random_direction(rng: np.random.Generator) -> Cloud:
    """Draws a (3,) unit vector, uniform over the sphere."""
    direction = rng.standard_normal(3)
    return direction / np.linalg.norm(direction)


def _jitter_points(points: Cloud, deviation: float, rng: np.random.Generator) -> Cloud:
    radius = np.linalg.norm(points - _centre(points), axis=1).max()
    return points + rng.standard_normal(points.shape) * (deviation * radius)


def _drop_points(points: Cloud, share: float, rng: np.random.Generator) -> Cloud:
    return points[rng.permutation(len(points))[: _num_left(points, share)]]


def _occlude_points(points: Cloud, share: float, rng: np.random.Generator) -> Cloud:
    """Cuts the cloud by a plane across a random direction and loses what lies beyond."""
    depth = (points - _centre(points)) @ _random_direction(rng)
    last = _num_left(points, share) - 1
    # By depth, not by rank: points at one place are hidden together or not at all.
    return points[depth <= np.partition(depth, last)[last]]


def _num_left(points: Cloud, share: float) -> int:
    """Counts what a loss of `share` leaves: a point at the least, however small the cloud."""
    return max(1, round((1 - share) * len(points)))


def _rotate_points(points: Cloud, degrees: float, rng: np.random.Generator) -> Cloud:
    """Turns the cloud about its centroid, around a random axis (Rodrigues' formula)."""
    # By the whole angle, not by up to the angle: the table's severities would overlap.
    axis, angle, centre = _random_direction(rng), math.radians(degrees), _centre(points)
    centred = points - centre
    along = np.outer(centred @ axis, axis)
    turned = along + math.cos(angle) * (centred - along) + math.sin(angle) * np.cross(axis, centred)
    return turned + centre


def _thin_points(points: Cloud, ratio: float, rng: np.random.Generator) -> Cloud:
    """Keeps a point with chance ratio ** t, where t runs from 0 at the near end to 1 at the far."""
    depth = (points - _centre(points)) @ _random_direction(rng)
    depth -= depth.min()
    # A cloud without extent has no far end: all of it is near, and stays.
    t = depth / (depth.max() or 1.0)
    # Draws are below 1, so the nearest point always stays.
    return points[rng.random(len(points)) < ratio**t]


# Images ------------------------------------------------------------------------------------------


def _jitter_images(images: Images, deviation: float, rng: np.random.Generator) -> Images:
    noise = rng.standard_normal(images.shape, dtype=np.float32) * np.float32(255 * deviation)
    return np.rint(images + noise).clip(0, 255).astype(np.uint8)


def _drop_blocks(images: Images, share: float, rng: np.random.Generator) -> Images:
    V, _, S, _ = images.shape
    side = min(GRID, S)
    order = rng.permuted(np.tile(np.arange(side**2), (V, 1)), axis=1).reshape(V, side, side)
    block = np.arange(S) * side // S
    lost = (order < round(share * side**2))[:, block[:, None], block]
    return np.where(lost[:, None], BLANK, images)


def _blank_rectangle(images: Images, share: float, rng: np.random.Generator) -> Images:
    """Blanks a rectangle of up to twice its width's height, or the reverse, anywhere in a view."""
    V, _, S, _ = images.shape
    stretch = np.exp2(rng.uniform(-1, 1, V))
    area, place = share * S**2, np.arange(S)
    hidden = []
    for sides in (np.sqrt(area * stretch), np.sqrt(area / stretch)):
        length = np.rint(sides).clip(1, S).astype(np.int64)[:, None]
        start = rng.integers(0, S - length, endpoint=True)
        hidden.append((start <= place) & (place < start + length))
    rows, columns = hidden
    return np.where((rows[:, :, None] & columns[:, None])[:, None], BLANK, images)


def _rotate_images(images: Images, degrees: float, rng: np.random.Generator) -> Images:
    S = images.shape[-1]
    angles = degrees * rng.choice([-1.0, 1.0], len(images))
    # The border is drawn out to where the corners come from: blank corners would measure how a
    # tower bears corners, and renders stand on a plain background.
    margin = math.ceil(S * (math.sqrt(2) - 1) / 2) + 1
    padded = np.pad(images, ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="edge")
    turned = np.empty_like(padded)
    for place, angle in enumerate(angles):
        view = Image.fromarray(np.ascontiguousarray(padded[place].transpose(1, 2, 0)))
        view = view.rotate(float(angle), Image.Resampling.BICUBIC)
        turned[place] = np.asarray(view).transpose(2, 0, 1)
    return np.ascontiguousarray(turned[:, :, margin:-margin, margin:-margin])


def _coarsen_images(images: Images, scale: float, rng: np.random.Generator) -> Images:
    S = images.shape[-1]
    small = max(1, round(scale * S))
    coarse = np.empty_like(images)
    for place, pixels in enumerate(images):
        view = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        view = view.resize((small, small), Image.Resampling.BOX)
        view = view.resize((S, S), Image.Resampling.BOX)
        coarse[place] = np.asarray(view).transpose(2, 0, 1)
    return coarse


_EFFECTS: dict[str, tuple[PointEffect, ImageEffect]] = {
    "noise": (_jitter_points, _jitter_images),
    "dropout": (_drop_points, _drop_blocks),
    "occlusion": (_occlude_points, _blank_rectangle),
    "rotation": (_rotate_points, _rotate_images),
    "density": (_thin_points, _coarsen_images),
}
