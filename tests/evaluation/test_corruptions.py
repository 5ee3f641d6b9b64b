"""Corruptions: what each does to a cloud and to views, by how much, and that nothing else moves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.evaluation.corruptions import (
    BLANK,
    CORRUPTIONS,
    GRID,
    IMAGE_LEVELS,
    POINT_LEVELS,
    SEVERITIES,
    Images,
    Points,
    corrupt,
)

LOSSY = ("dropout", "occlusion", "density")
ABSENT = np.zeros((0, 3, 8, 8), np.uint8)
ONE_POINT = np.zeros((1, 3), np.float32)

severities = st.sampled_from(SEVERITIES)
every_kind = pytest.mark.parametrize("kind", CORRUPTIONS)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


def ball(num_points: int, seed: int = 0, at: float = 0.0) -> Points:
    points = np.random.default_rng(seed).standard_normal((num_points, 3)) + at
    return points.astype(np.float32)


def line(num_points: int, axis: int) -> Points:
    """Evenly from 0 to 1 along an axis, in random order: every direction sees it from one end."""
    points = np.zeros((num_points, 3), np.float32)
    points[:, axis] = np.random.default_rng(0).permutation(num_points) / (num_points - 1)
    return points


def plain(value: int, num_views: int = 2, size: int = 64) -> Images:
    return np.full((num_views, 3, size, size), value, np.uint8)


def textured(num_views: int = 2, size: int = 48) -> Images:
    """A slope from left to right with a fine grain."""
    slope = np.linspace(60, 190, size)
    grain = np.random.default_rng(0).uniform(-20, 20, (num_views, 3, size, size))
    return (slope + grain).astype(np.uint8)


def cloud_of(points: Points, kind: str, severity: int, object_id: str = "chair/1") -> Points:
    return corrupt(points, ABSENT, kind, severity, object_id)[0]


def views_of(images: Images, kind: str, severity: int, object_id: str = "chair/1") -> Images:
    return corrupt(ONE_POINT, images, kind, severity, object_id)[1]


# Both modalities ---------------------------------------------------------------------------------


def test_the_tables_cover_every_kind_and_never_soften() -> None:
    assert set(POINT_LEVELS) == set(IMAGE_LEVELS) == set(CORRUPTIONS)
    for levels in (*POINT_LEVELS.values(), *IMAGE_LEVELS.values()):
        steps = np.diff(levels)
        assert len(levels) == len(SEVERITIES)
        assert (steps > 0).all() or (steps < 0).all()
    # Twice as wide as high, a rectangle of more than half the area would not fit into a view.
    assert max(IMAGE_LEVELS["occlusion"]) <= 0.5


@every_kind
@every_severity
def test_shapes_and_types_stay_and_the_inputs_too(kind: str, severity: int) -> None:
    points, images = ball(300), textured(3)
    kept = points.copy(), images.copy()
    points.flags.writeable = images.flags.writeable = False
    cloud, views = corrupt(points, images, kind, severity, "a")
    assert (cloud.shape, cloud.dtype) == (points.shape, np.float32)
    assert (views.shape, views.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(points, kept[0])
    np.testing.assert_array_equal(images, kept[1])
    assert not np.array_equal(cloud, points)
    assert not np.array_equal(views, images)


@every_kind
def test_the_draw_depends_on_the_object_and_the_severity_alone(kind: str) -> None:
    points, images = ball(200), textured(2)
    cloud, views = corrupt(points, images, kind, 3, "a")
    np.random.default_rng().random(10)
    again = corrupt(points.copy(), images.copy(), kind, 3, "a")
    np.testing.assert_array_equal(cloud, again[0])
    np.testing.assert_array_equal(views, again[1])
    np.testing.assert_array_equal(cloud, corrupt(points, textured(5), kind, 3, "a")[0])
    np.testing.assert_array_equal(views, corrupt(ball(90), images, kind, 3, "a")[1])
    others = [cloud_of(points, kind, 3, f"other {place}") for place in range(4)]
    assert not any(np.array_equal(cloud, other) for other in others)


@every_kind
def test_every_view_has_its_own_draw(kind: str) -> None:
    # Of the same picture, eight times: only lowering the resolution has nothing to draw.
    same = np.repeat(textured(1), 8, axis=0)
    views = views_of(same, kind, 2)
    assert len(np.unique(views.reshape(8, -1), axis=0)) > 1 or kind == "density"


@every_kind
def test_a_higher_severity_does_more(kind: str) -> None:
    points, images = ball(1000), textured(2)
    on_cloud, on_views = [], []
    for severity in SEVERITIES:
        pairs = [corrupt(points, images, kind, severity, str(place)) for place in range(5)]
        if kind in LOSSY:
            lost = [len(points) - len(np.unique(cloud, axis=0)) for cloud, _ in pairs]
            on_cloud.append(np.mean(lost))
        else:
            on_cloud.append(np.mean([np.abs(cloud - points).mean() for cloud, _ in pairs]))
        change = [np.abs(views - images.astype(float)).mean() for _, views in pairs]
        on_views.append(np.mean(change))
    assert (np.diff(on_cloud) > 0).all(), on_cloud
    assert (np.diff(on_views) > 0).all(), on_views


@given(
    kind=st.sampled_from(CORRUPTIONS),
    severity=severities,
    num_points=st.integers(1, 40),
    object_id=st.text(max_size=8),
    at=st.sampled_from([0.0, -3.5, 4e5]),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_any_cloud_keeps_its_number_of_points_and_stays_finite(
    kind: str, severity: int, num_points: int, object_id: str, at: float, spread: float
) -> None:
    points = (ball(num_points) * spread + at).astype(np.float32)
    cloud = cloud_of(points, kind, severity, object_id)
    assert cloud.shape == points.shape
    assert np.isfinite(cloud).all()
    if kind in LOSSY:
        assert set(map(tuple, cloud.tolist())) <= set(map(tuple, points.tolist()))
    if spread == 0:
        np.testing.assert_array_equal(cloud, points)


@pytest.mark.parametrize("kind", LOSSY)
@every_severity
def test_survivors_fill_the_places_of_the_lost_evenly_and_in_random_order(
    kind: str, severity: int
) -> None:
    points = ball(4000)
    cloud = cloud_of(points, kind, severity)
    _, times = np.unique(cloud, axis=0, return_counts=True)
    assert times.max() - times.min() <= 1
    # The mean of the first 1,000 lies off that of all by 1 / sqrt(1000) or less of the deviation.
    off = np.abs(cloud[:1000].mean(axis=0) - cloud.mean(axis=0)) / cloud.std(axis=0)
    assert off.max() < 5 / math.sqrt(1000)


def test_a_prefix_repeats_points_as_chance_has_it() -> None:
    # Half of the points are lost and the others come twice: half of the places hold a given one
    # of them with chance 1 - 1/2 * 1/2. Unshuffled, they would hold each of them once.
    num_points = 4000
    half = cloud_of(ball(num_points), "dropout", 1)[: num_points // 2]
    assert len(np.unique(half, axis=0)) == pytest.approx(0.75 * num_points / 2, rel=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "fog"}, r"no corruption 'fog'; there are: noise, dropout, .*density"),
        ({"severity": 0}, "severity is 0, expected a whole number from 1 to 5"),
        ({"severity": 6}, "severity is 6, expected"),
        ({"points": ball(4).astype(np.float64)}, r"points are float64 of shape \(4, 3\)"),
        ({"points": ball(4)[:, :2]}, r"shape \(4, 2\), expected float32 of shape \(N, 3\)"),
        ({"points": ball(0)}, "with at least one point"),
        ({"images": plain(0).astype(np.float32)}, "images are float32"),
        ({"images": plain(0)[0]}, r"shape \(3, 64, 64\), expected uint8 of shape \(V, 3, S, S\)"),
        ({"images": plain(0)[..., :9]}, r"shape \(2, 3, 64, 9\)"),
        ({"images": plain(0).transpose(0, 2, 3, 1)}, r"shape \(2, 64, 64, 3\)"),
    ],
)
def test_a_wrong_call_says_what_came_and_what_there_is(
    changes: dict[str, object], message: str
) -> None:
    call = {"points": ball(4), "images": plain(0), "kind": "noise", "severity": 1}
    with pytest.raises(ValueError, match=message):
        corrupt(**call | changes, object_id="a")


# Points ------------------------------------------------------------------------------------------


@every_severity
@pytest.mark.parametrize("scale", [0.01, 50.0])
def test_noise_is_gaussian_by_the_radius_and_keeps_the_middle(severity: int, scale: float) -> None:
    points = ball(20_000, at=2.0) * np.float32(scale)
    radius = np.linalg.norm(points - points.mean(axis=0), axis=1).max()
    noise = (cloud_of(points, "noise", severity) - points) / radius
    level = POINT_LEVELS["noise"][severity - 1]
    assert noise.std(axis=0) == pytest.approx(level, rel=0.03)
    assert np.abs(noise.mean(axis=0)).max() < 5 * level / math.sqrt(len(points))
    assert (np.abs(noise) < 2 * level).mean() == pytest.approx(math.erf(math.sqrt(2)), abs=0.005)


@every_severity
def test_dropout_leaves_the_stated_share_from_anywhere(severity: int) -> None:
    points = ball(4000)
    left = np.unique(cloud_of(points, "dropout", severity), axis=0)
    assert len(left) == round((1 - POINT_LEVELS["dropout"][severity - 1]) * len(points))
    off = np.abs(left.mean(axis=0) - points.mean(axis=0)) / points.std(axis=0)
    assert off.max() < 5 / math.sqrt(len(left))


@every_severity
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_occlusion_hides_one_end(severity: int, axis: int) -> None:
    points = line(1000, axis)
    num_left = round((1 - POINT_LEVELS["occlusion"][severity - 1]) * len(points))
    order = np.sort(points[:, axis])
    ends = {tuple(order[:num_left]), tuple(order[-num_left:])}
    seen = {
        tuple(np.unique(cloud_of(points, "occlusion", severity, str(place))[:, axis]))
        for place in range(12)
    }
    assert seen == ends


def test_occlusion_cuts_by_a_plane() -> None:
    # The mean of what is left of a round cloud lies off the centre against the cut's direction;
    # along it, hidden and left part but for the error of that estimate.
    points = ball(5000)
    left = np.unique(cloud_of(points, "occlusion", 3), axis=0)
    direction = points.mean(axis=0) - left.mean(axis=0)
    direction /= np.linalg.norm(direction)
    threshold = np.quantile(points @ direction, 1 - POINT_LEVELS["occlusion"][2])
    assert (left @ direction < threshold).mean() > 0.97


@given(
    severity=severities,
    object_id=st.text(max_size=8),
    at=st.floats(-50, 50),
    scale=st.floats(0.5, 100),
)
def test_rotation_turns_by_the_angle_about_the_centre(
    severity: int, object_id: str, at: float, scale: float
) -> None:
    points = (ball(30) * scale + at).astype(np.float32)
    cloud = cloud_of(points, "rotation", severity, object_id)
    before, after = (x - x.mean(axis=0, dtype=np.float64) for x in (points, cloud))
    tolerance = 1e-5 * (scale + abs(at))
    np.testing.assert_allclose(cloud.mean(axis=0), points.mean(axis=0), atol=tolerance)
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=tolerance * 10 * scale)
    # after = before R, and a rotation by the angle a has the trace 1 + 2 cos a.
    rotation = np.linalg.lstsq(before, after, rcond=None)[0]
    degrees = POINT_LEVELS["rotation"][severity - 1]
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-3)
    assert np.trace(rotation) == pytest.approx(1 + 2 * math.cos(math.radians(degrees)), abs=1e-3)


@every_severity
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_density_falls_exponentially_towards_one_end(severity: int, axis: int) -> None:
    # Of a slice from a to b of the line, (r^a - r^b) / ((b - a) ln(1 / r)) is left.
    num_points, num_slices = 20_000, 8
    points, ratio = line(num_points, axis), POINT_LEVELS["density"][severity - 1]
    edges = np.linspace(0, 1, num_slices + 1)
    expected = -np.diff(ratio**edges) * num_slices / math.log(1 / ratio)
    left = np.unique(cloud_of(points, "density", severity)[:, axis])
    kept = np.histogram(left, edges)[0] / (num_points / num_slices)
    if kept[0] < kept[-1]:
        kept = kept[::-1]
    error = np.sqrt(expected * (1 - expected) * num_slices / num_points)
    assert (np.abs(kept - expected) < 5 * error + 1e-3).all(), (kept, expected)


def test_density_falls_along_any_direction() -> None:
    points = line(500, 0)
    near = {cloud_of(points, "density", 5, str(place)).mean() < 1 / 6 for place in range(12)}
    assert near == {True, False}


# Images ------------------------------------------------------------------------------------------


@every_severity
def test_noise_of_a_view_has_the_stated_deviation(severity: int) -> None:
    noise = views_of(plain(128, num_views=8), "noise", severity) - 128.0
    level = 255 * IMAGE_LEVELS["noise"][severity - 1]
    # What exceeds the range is cut off: the quartiles of a normal lie at 0.6745 deviations.
    low, high = np.quantile(noise, [0.25, 0.75])
    assert (high - low) / (2 * 0.6745) == pytest.approx(level, rel=0.05)
    assert abs(noise.mean()) < 5 * level / math.sqrt(noise.size) + 0.5
    if severity == 1:
        assert noise.std() == pytest.approx(level, rel=0.02)
        assert abs(noise.mean()) < 0.3  # rounded to the nearest: cut off, it would lose a half


@every_severity
def test_dropout_blanks_the_stated_share_of_blocks(severity: int) -> None:
    views = views_of(plain(0, size=4 * GRID), "dropout", severity)
    lost = (views == BLANK).all(axis=1)
    np.testing.assert_array_equal(lost, (views != 0).any(axis=1))
    blocks = lost.reshape(2, GRID, 4, GRID, 4).mean(axis=(2, 4))
    assert set(np.unique(blocks)) == {0.0, 1.0}
    count = round(IMAGE_LEVELS["dropout"][severity - 1] * GRID**2)
    assert (blocks.sum(axis=(1, 2)) == count).all()


@every_severity
def test_occlusion_blanks_one_rectangle_of_the_stated_area(severity: int) -> None:
    size = 120
    views = views_of(plain(0, num_views=12, size=size), "occlusion", severity)
    lost = (views == BLANK).all(axis=1)
    np.testing.assert_array_equal(lost, (views != 0).any(axis=1))
    corners = []
    for mask in lost:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        share = IMAGE_LEVELS["occlusion"][severity - 1]
        assert height * width / size**2 == pytest.approx(share, rel=0.04)
        assert 0.47 < width / height < 2.1
        corners.append((rows[0], columns[0]))
    assert len(set(corners)) > 6


@every_severity
def test_rotation_turns_a_view_by_the_angle_either_way(severity: int) -> None:
    size, reach = 121, 40
    images = plain(255, num_views=12, size=size)
    middle = size // 2
    images[:, :, middle - 3 : middle + 4, middle + reach - 3 : middle + reach + 4] = 0
    dark = 255.0 - views_of(images, "rotation", severity).mean(axis=1)
    places = np.arange(size) - middle
    total = dark.sum(axis=(1, 2))
    x = (dark.sum(axis=1) * places).sum(axis=1) / total
    y = (dark.sum(axis=2) * places).sum(axis=1) / total
    angles = np.degrees(np.arctan2(y, x))
    degrees = IMAGE_LEVELS["rotation"][severity - 1]
    np.testing.assert_allclose(np.hypot(x, y), reach, atol=0.5)
    np.testing.assert_allclose(np.abs(angles), degrees, atol=1)
    assert {bool(angle > 0) for angle in angles} == {True, False}


@every_severity
@pytest.mark.parametrize("kind", ["rotation", "density"])
def test_a_plain_view_stays_plain(kind: str, severity: int) -> None:
    # So no corner is blanked by turning, whatever the background.
    np.testing.assert_array_equal(views_of(plain(200), kind, severity), plain(200))


@every_severity
def test_density_leaves_the_stated_resolution_and_the_mean(severity: int) -> None:
    images = textured(2, size=120)
    views = views_of(images, "density", severity)
    num_columns = round(IMAGE_LEVELS["density"][severity - 1] * 120)
    for view, image in zip(views, images, strict=True):
        assert np.unique(view, axis=2).shape[2] == num_columns
        assert np.unique(view, axis=1).shape[1] == num_columns
        assert view.mean() == pytest.approx(image.mean(), abs=1)


@given(
    kind=st.sampled_from(CORRUPTIONS),
    severity=severities,
    num_views=st.integers(0, 2),
    size=st.integers(1, 2 * GRID + 1),
)
def test_views_of_any_size_and_number_keep_it(
    kind: str, severity: int, num_views: int, size: int
) -> None:
    views = views_of(plain(7, num_views, size), kind, severity)
    assert views.shape == (num_views, 3, size, size)
    assert views.dtype == np.uint8
