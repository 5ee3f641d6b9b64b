"""Depth views: where things land, how grey they are, and what cannot be drawn."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from crossmost_ray.prepare.config import DepthConfig
from crossmost_ray.prepare.depth import (
    BACKGROUND,
    DEPTH_VIEWS,
    FILL,
    depth_cameras,
    render_depth,
    view_axes,
)
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.render import foreground_share

Array = NDArray[Any]

QUICK = DepthConfig(resolution=56, grid=32)
SIDES = range(8)
BELOW, ABOVE = 8, 9


def greys(points: Array, config: DepthConfig = QUICK) -> list[Array]:
    views = render_depth(points, config)
    assert len(views) == len(DEPTH_VIEWS) == 10
    for view in views:
        assert view.dtype == np.uint8
        assert view.shape == (config.resolution, config.resolution, 3)
        assert (view == view[..., :1]).all()
    return [view[..., 0].astype(int) for view in views]


def foreground(grey: Array) -> Array:
    return grey < BACKGROUND - 8


def blob(seed: int, num_points: int = 400) -> Array:
    """No symmetry at all."""
    return np.random.default_rng(seed).normal(size=(num_points, 3)) * [1.0, 0.7, 0.4]


def sphere(num_points: int) -> Array:
    """Points at equal distances along a spiral from pole to pole."""
    place = np.arange(num_points) + 0.5
    z, angle = 1 - 2 * place / num_points, np.pi * (1 + 5**0.5) * place
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)


def panel(low: tuple[float, float], high: tuple[float, float], depth: float) -> Array:
    """A dense rectangle across the line of sight, along a camera's axes."""
    across, up = np.meshgrid(np.linspace(low[0], high[0], 200), np.linspace(low[1], high[1], 200))
    return np.stack([across.ravel(), up.ravel(), np.full(across.size, depth)], axis=1)


def test_the_angles_are_those_of_the_recipe() -> None:
    quarter = np.pi / 4
    recipe = [
        ((k * quarter, 0, np.pi / 2), (0, np.pi / 9, 0)) for k in (1, 3, 5, 7, 0, 2, 4, 6)
    ] + [((0, side * np.pi / 2, np.pi / 2), (0, np.pi / 15, 0)) for side in (-1, 1)]
    for (azimuth, elevation), (angles, bias) in zip(DEPTH_VIEWS, recipe, strict=True):
        first, then = (Rotation.from_euler("XYZ", each).as_matrix() for each in (angles, bias))
        rows, columns, towards = then @ first
        expected = np.stack([columns, -rows, towards])
        np.testing.assert_allclose(view_axes(azimuth, elevation), expected, atol=1e-12)


def test_a_sphere_is_a_disc_in_the_middle_of_every_view() -> None:
    config = DepthConfig()
    # Its radius, the three cells by which points grow, and at most one of blur.
    cell = config.resolution / (config.grid - 2)
    least, most = ((FILL * config.grid / 2 + more) * cell for more in (2.5, 4.5))
    centre = (config.resolution - 1) / 2
    rows, columns = np.indices((config.resolution, config.resolution)) - centre
    for grey in greys(sphere(40_000), config):
        seen = foreground(grey)
        for flipped in (seen[::-1], seen[:, ::-1], seen.T):
            assert (seen ^ flipped).sum() < 0.01 * seen.sum()
        distance = np.hypot(rows, columns)
        # Square windows grow a circle along its diagonals by the root of two more.
        assert seen[distance < least - 1].all()
        assert not seen[distance > most + 0.42 * 4 * cell + 1].any()
        middle_row = np.flatnonzero(seen[config.resolution // 2])
        assert 2 * least <= np.ptp(middle_row) + 1 <= 2 * most
        # Across the middle, a cell is as grey as the sphere is deep three cells further in.
        across = np.abs(columns[0]) / cell
        inside = across < FILL * config.grid / 2 - 2
        further_in = (across[inside] - 3).clip(0) / (FILL * config.grid / 2)
        depth = (np.sqrt(1 - further_in**2) + 1) / 2
        expected = 255 * (1 - (depth + 0.2) / 1.2)
        np.testing.assert_allclose(grey[config.resolution // 2][inside], expected, atol=4)


@pytest.mark.parametrize("index", range(10))
def test_grey_is_depth_and_nearer_is_darker(index: int) -> None:
    steps = [
        panel((-1, -1), (-0.4, 1), depth=1.0),
        panel((-0.3, -1), (0.3, 1), depth=0.1),
        panel((0.4, -1), (1, 1), depth=-1.0),
    ]
    points = np.concatenate(steps) @ view_axes(*DEPTH_VIEWS[index])
    grey = greys(points, DepthConfig())[index]
    side = len(grey)
    found = [grey[side // 2, round(side * (0.5 + across * FILL / 2))] for across in (-0.7, 0, 0.7)]
    expected = [255 * (1 - ((1 + depth) / 2 + 0.2) / 1.2) for depth in (1.0, 0.1, -1.0)]
    np.testing.assert_allclose(found, expected, atol=1)
    assert grey[0, 0] == BACKGROUND


@pytest.mark.parametrize("index", range(10))
def test_what_is_in_front_hides_what_is_behind(index: int) -> None:
    front, behind = panel((-0.5, -0.5), (0.5, 0.5), 1.0), panel((-1, -1), (1, 1), -1.0)
    axes = view_axes(*DEPTH_VIEWS[index])
    grey = greys(np.concatenate([behind, front]) @ axes, DepthConfig())[index]
    assert grey[112, 112] == 0
    # Beside the front panel the one behind is not lightened: slices are blurred on their own.
    assert grey[112, 40] == pytest.approx(212.5, abs=1)


def test_a_cone_points_up() -> None:
    rng = np.random.default_rng(0)
    radius, angle = np.sqrt(rng.random(6000)), rng.uniform(0, 2 * np.pi, 6000)
    cone = np.stack(
        [0.4 * radius * np.cos(angle), 1 - 2 * radius, 0.4 * radius * np.sin(angle)], axis=1
    )
    views = greys(cone, DepthConfig())
    for index in SIDES:
        width = foreground(views[index]).sum(axis=1)
        rows = np.flatnonzero(width)
        top, bottom = width[rows[:20]].mean(), width[rows[-40:-20]].mean()
        assert top < bottom / 2, DEPTH_VIEWS[index]


def test_nothing_is_mirrored() -> None:
    """A post with an arm to +x (right of the front) and a longer one to +z (the front)."""
    line = np.linspace(0, 1, 400)[:, None]
    points = np.concatenate([line * [0, 2, 0], line * [1, 0, 0], line * [0, 0, 1.5]])
    views = [foreground(grey) for grey in greys(points, DepthConfig())]

    def lean(index: int) -> tuple[float, float]:
        """Right and up: where the arms are from the post, which is seen almost end-on."""
        rows, columns = np.nonzero(views[index])
        post = np.array([0.0, 1.0, 0.0]) @ view_axes(*DEPTH_VIEWS[index]).T
        assert abs(post[0]) < 1e-12
        return float(columns.mean() - np.median(columns)), float(np.median(rows) - rows.mean())

    def reach(index: int) -> int:
        """Columns to the right of the post, the tallest column, less those to its left."""
        seen = views[index].any(axis=0)
        post = int(np.argmax(views[index].sum(axis=0)))
        return int(seen[post:].sum()) - int(seen[:post].sum())

    azimuths = [azimuth for azimuth, _ in DEPTH_VIEWS]
    # +x is to the right from the front and to the left from behind; from +x, the front is left.
    assert reach(azimuths.index(0.0)) > 20
    assert reach(azimuths.index(180.0)) < -20
    assert reach(azimuths.index(90.0)) < -20
    assert reach(azimuths.index(270.0)) > 20
    # The front arm goes down from above, and up from below; +x is to the right in both.
    for index, up in ((ABOVE, -1), (BELOW, 1)):
        right, upwards = lean(index)
        assert right > 0
        assert upwards * up > 0


@given(seed=st.integers(0, 1000))
def test_an_object_turned_by_a_right_angle_gives_the_next_view(seed: int) -> None:
    points = blob(seed)
    x, y, z = points.T
    turned = np.stack([z, y, -x], axis=1)  # by +90 degrees about y: the front, +z, goes to +x
    before, after = greys(points), greys(turned)
    for corner_or_side in (0, 4):
        for step in range(4):
            now, following = corner_or_side + step, corner_or_side + (step + 1) % 4
            np.testing.assert_allclose(after[following], before[now], atol=1)


@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_order_place_and_size_of_the_points_change_nothing(
    seed: int, size: float, shift: float
) -> None:
    points = blob(seed)
    other = np.random.default_rng(seed).permutation(points) * size + shift * size
    for one, two in zip(greys(points), greys(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1)


def test_the_same_points_give_the_same_bytes_and_stay_as_they_were() -> None:
    points = blob(0).astype(np.float32)
    kept = points.copy()
    once, again = render_depth(points, QUICK), render_depth(points, QUICK)
    assert [view.tobytes() for view in once] == [view.tobytes() for view in again]
    np.testing.assert_array_equal(points, kept)


def test_a_shape_of_planes_does_not_hang_on_the_last_bit() -> None:
    """Points on the middle plane lie on the border of two cells."""
    steps = np.linspace(-1, 1, 21)
    points = np.array(list(product(steps, steps, [-1.0, 0.0, 1.0])))
    shifted = points + 1e-9 * np.random.default_rng(0).uniform(-1, 1, points.shape)
    for one, two in zip(greys(points), greys(shifted), strict=True):
        np.testing.assert_allclose(one, two, atol=1)


def naive(points: Array, config: DepthConfig, azimuth: float, elevation: float) -> Array:
    """The recipe, cell by cell; the views are as large as what pooling leaves of the grid."""
    seen = points @ view_axes(azimuth, elevation).T
    low, high = seen.min(axis=0), seen.max(axis=0)
    unit = (seen - (low + high) / 2) / (high - low).max() * 2
    G, D = config.grid, config.num_slices
    grid = np.zeros((D, G, G))
    for x, y, z in unit:
        depth = ((z + 1) / 2 + 0.2) / 1.2
        cell = (depth * D, (1 - 0.8 * y) / 2 * G, (1 + 0.8 * x) / 2 * G)
        place = tuple(min(int(c + 1e-6), n - 1) for c, n in zip(cell, (D, G, G), strict=True))
        grid[place] = max(grid[place], depth)
    R = G - 2
    padded = np.pad(grid, ((0, 0), (2, 2), (2, 2)))
    pooled = np.zeros((D, R + 2, R + 2))
    for d, i, j in product(range(D), range(R), range(R)):
        pooled[d, i + 1, j + 1] = padded[d, i : i + 7, j : j + 7].max()
    offsets = list(product((-1, 0, 1), repeat=2))
    weights = np.exp([-(a * a + b * b) / 18 for a, b in offsets])
    blurred = np.zeros((D, R, R))
    for d, i, j in product(range(D), range(R), range(R)):
        around = [pooled[d, i + 1 + a, j + 1 + b] for a, b in offsets]
        blurred[d, i, j] = weights @ around / weights.sum()
    nearest = blurred.max(axis=0)
    return np.round(255 * (1 - nearest / nearest.max()))


@pytest.mark.parametrize("num_slices", [1, 5])
def test_views_are_those_of_a_naive_transcription(num_slices: int) -> None:
    config = DepthConfig(resolution=22, grid=24, num_slices=num_slices)
    points = blob(3, 60)
    views = greys(points, config)
    for index in (0, 5, BELOW, ABOVE):
        np.testing.assert_allclose(views[index], naive(points, config, *DEPTH_VIEWS[index]), atol=1)


def doubled(image: Array) -> Array:
    """Twice the rows, interpolated about their centres."""
    edged = np.pad(image.astype(float), ((1, 1), (0, 0)), mode="edge")
    here = 3 * edged[1:-1]
    return np.stack([here + edged[:-2], here + edged[2:]], axis=1).reshape(-1, image.shape[1]) / 4


def test_larger_views_are_interpolated_between_the_cells() -> None:
    small = greys(blob(4), DepthConfig(resolution=30, grid=32))
    large = greys(blob(4), DepthConfig(resolution=60, grid=32))
    for coarse, fine in zip(small, large, strict=True):
        np.testing.assert_allclose(fine, doubled(doubled(coarse).T).T, atol=1.5)


@pytest.mark.parametrize(
    ("resolution", "grid", "num_slices"), [(16, 8, 1), (64, 9, 2), (20, 64, 3)]
)
def test_every_size_gives_views(resolution: int, grid: int, num_slices: int) -> None:
    config = DepthConfig(resolution=resolution, grid=grid, num_slices=num_slices)
    for grey in greys(blob(1), config):
        assert grey.min() < 60
        assert foreground(grey).mean() > 0.05


def test_an_object_that_is_too_thin_from_one_side_is_named() -> None:
    needle = np.linspace(-1, 1, 500)[:, None] * view_axes(*DEPTH_VIEWS[1])[2]
    with pytest.raises(
        ObjectError, match=r"depth view at azimuth 135, elevation 20 is blank: 0\.\d\d % of"
    ):
        render_depth(needle, DepthConfig(grid=300))
    for view in render_depth(needle, DepthConfig()):
        assert foreground_share(view, BACKGROUND) > 0.004


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        (np.zeros((0, 3)), "no points"),
        (np.array([[0.0, 0, 0], [np.nan, 1, 1]]), "NaN or infinite"),
        (np.array([[0.0, 0, 0], [np.inf, 1, 1]]), "NaN or infinite"),
        (np.full((5, 3), 0.3), "coincide"),
    ],
)
def test_points_that_cannot_be_drawn_say_why(points: Array, problem: str) -> None:
    with pytest.raises(ObjectError, match=problem):
        render_depth(points, QUICK)


def test_points_of_a_wrong_shape_are_a_wrong_call() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\), expected \(N, 3\)"):
        render_depth(np.zeros((4, 2)), QUICK)


def test_the_manifest_describes_every_view_in_plain_values() -> None:
    cameras = depth_cameras(QUICK)
    assert json.loads(json.dumps(cameras)) == cameras
    assert cameras["kind"] == "depth"
    assert (cameras["resolution"], cameras["grid"], cameras["num_views"]) == (56, 32, 10)
    assert cameras["views"][0] == {"azimuth": 45.0, "elevation": 20.0}
    assert [(v["azimuth"], v["elevation"]) for v in cameras["views"]] == list(DEPTH_VIEWS)
