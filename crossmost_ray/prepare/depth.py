"""Bare points in, ten grey views of them out, in which nearer is darker."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from crossmost_ray.prepare.config import DepthConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Floats, Indices, Pixels
from crossmost_ray.prepare.render import foreground_share

DEPTH_VIEWS = (
    *((azimuth, 20.0) for azimuth in (45.0, 135.0, 225.0, 315.0)),
    *((azimuth, 20.0) for azimuth in (0.0, 90.0, 180.0, 270.0)),
    (0.0, -78.0),
    (0.0, 102.0),
)
"""(azimuth, elevation) of each view in degrees: the corners, the sides, from below, from above.

The recipe gives Euler angles. Read as R = Rx Ry Rz on column vectors, with the image's rows along
x, its columns along y and the viewer at +z, they are these cameras: (a, 0, pi/2) and then
(0, pi/9, 0) is azimuth a at 20 degrees, (0, -+pi/2, pi/2) and then (0, pi/15, 0) is -90 + 12 and
90 + 12 degrees. The last is past the zenith: from above and a little from behind, the front down.
"""

FILL = 0.8
"""Part of the frame's side that the longest side of the cloud's box spans."""

DEPTH_BIAS = 0.2
"""Lifts what is farthest from white: depth in [0, 1] becomes (depth + bias) / (1 + bias)."""

POOL = 7
"""Cells along each side to which a point grows, so that the points close up to a surface."""

POOL_PADDING = 2
"""Empty cells around the grid while points grow; each side loses POOL - 1 - 2 * POOL_PADDING."""

BLUR = np.exp(-np.square([-1.0, 0.0, 1.0]) / (2 * 3.0**2))
"""One axis of the 3 x 3 Gaussian with a deviation of three cells, before it sums to one."""

BACKGROUND = 255
LEAST_FOREGROUND = 0.004
"""Least part of a view's pixels that must differ from the background, or it is blank."""

ROUNDING = 1e-6
"""Of a cell. A point on a border, as in the middle of a symmetric shape, would else fall to either
side by the last bit of its coordinates."""


def render_depth(points: NDArray[np.floating[Any]], config: DepthConfig) -> list[Pixels]:
    """Renders bare points from each camera of `DEPTH_VIEWS`.

    Where the recipe leaves it open: the box that centres and scales a cloud is taken anew in every
    view, along the camera's axes, so that with a grid of 50 cells or more no view is cut off (of
    fewer, the cells by which points grow fill the frame); cells are counted from their lower
    border, which keeps a symmetric shape in the middle of the frame; all slices are used, the
    nearest point falls into the last; pixels are interpolated about their centres.

    Args:
        points: (N, 3), y upwards and the front, if there is one, to +z, in any unit of length.
        config: Sizes of the grid and of the views.

    Returns:
        Ten images (R, R, 3) uint8 with three equal channels: black is nearest, white is nothing.

    Raises:
        ObjectError: If there are no points, they are not finite or all coincide, or a view is
            blank: hardly a pixel of it differs from the background.

    Source:
        PointCLIP V2 (Zhu et al., 2023), realistic projection; its grid, bias, pooling, blur and
        angles.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points has shape {points.shape}, expected (N, 3)")
    if len(points) == 0:
        raise ObjectError("it has no points")
    if not np.isfinite(points).all():
        raise ObjectError("some of its points are NaN or infinite")
    centred = points.astype(np.float64)
    centred -= _middle(centred)
    if not np.abs(centred).max() > 0:
        raise ObjectError("all its points coincide")
    views = []
    for azimuth, elevation in DEPTH_VIEWS:
        view = _project(centred @ view_axes(azimuth, elevation).T, config)
        share = foreground_share(view, BACKGROUND)
        if share < LEAST_FOREGROUND:
            raise ObjectError(
                f"its depth view at azimuth {azimuth:g}, elevation {elevation:g} is blank: "
                f"{100 * share:.2f} % of the pixels differ from the background"
            )
        views.append(view)
    return views


def depth_cameras(config: DepthConfig) -> dict[str, Any]:
    """Describes the views for the manifest, in plain values."""
    return {
        "kind": "depth",
        "projection": "orthographic",
        "resolution": config.resolution,
        "grid": config.grid,
        "num_slices": config.num_slices,
        "num_views": len(DEPTH_VIEWS),
        "fill": FILL,
        "depth_bias": DEPTH_BIAS,
        "background": BACKGROUND,
        "shading": "nearer is darker",
        "views": [
            {"azimuth": azimuth, "elevation": elevation} for azimuth, elevation in DEPTH_VIEWS
        ],
    }


def view_axes(azimuth: float, elevation: float) -> Floats:
    """Gives the axes of a camera that looks at the origin.

    Args:
        azimuth: Degrees; 0 looks at the front, +z, and 90 from +x.
        elevation: Degrees above the horizon. Past 90 the camera goes on backwards, head first.

    Returns:
        (3, 3): unit vectors to the camera's right, up, and from the object to the camera.
    """
    turn, rise = np.radians(azimuth), np.radians(elevation)
    level = np.array([np.sin(turn), 0.0, np.cos(turn)])
    upwards = np.array([0.0, 1.0, 0.0])
    return np.stack(
        [
            np.array([np.cos(turn), 0.0, -np.sin(turn)]),
            np.cos(rise) * upwards - np.sin(rise) * level,
            np.sin(rise) * upwards + np.cos(rise) * level,
        ]
    )


def _project(seen: Floats, config: DepthConfig) -> Pixels:
    """One view (R, R, 3) of points (N, 3) that stand along the camera's axes."""
    middle = _middle(seen)
    unit = (seen - middle) / np.abs(seen - middle).max()
    depth = ((1 + unit[:, 2]) / 2 + DEPTH_BIAS) / (1 + DEPTH_BIAS)
    cells = (
        _cell(depth, config.num_slices),
        _cell((1 - FILL * unit[:, 1]) / 2, config.grid),
        _cell((1 + FILL * unit[:, 0]) / 2, config.grid),
    )
    grid = np.zeros((config.num_slices, config.grid, config.grid))
    np.maximum.at(grid, cells, depth)

    border = (POOL - 1) // 2 - POOL_PADDING
    inner = slice(border, config.grid - border)
    grid = ndimage.maximum_filter(grid, size=(1, POOL, POOL), mode="constant")[:, inner, inner]
    for axis in (1, 2):
        grid = ndimage.correlate1d(grid, BLUR / BLUR.sum(), axis=axis, mode="constant")
    nearest = grid.max(axis=0)
    grey = Image.fromarray((1 - nearest / nearest.max()).astype(np.float32))
    side = config.resolution
    pixels = np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR))
    return np.repeat(np.round(255 * pixels.clip(0, 1)).astype(np.uint8)[..., None], 3, axis=-1)


def _middle(points: Floats) -> Floats:
    """(3,): of the box around the points."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def _cell(place: Floats, count: int) -> Indices:
    """Which of `count` equal cells of [0, 1] a place lies in."""
    return np.minimum((place * count + ROUNDING).astype(np.int64), count - 1)
