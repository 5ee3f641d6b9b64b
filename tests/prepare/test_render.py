"""Views: nothing blank, nothing cut off, the same every time."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from crossmost_ray.prepare import render
from crossmost_ray.prepare.config import RenderConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Material, Mesh, Piece
from crossmost_ray.prepare.render import (
    RenderError,
    camera_ring,
    decode_view,
    encode_view,
    foreground_share,
    render_views,
)

SMALL = RenderConfig(resolution=48, num_views=4)


def cuboid(size: tuple[float, float, float], **material: Any) -> Mesh:
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([half for a, b, c, d in quads for half in ([a, b, c], [a, c, d])])
    return Mesh((Piece((corners - 0.5) * size, faces, Material(**material)),))


def foreground(view: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.abs(view.astype(int) - SMALL.background).max(axis=-1) > 8


@pytest.mark.parametrize(
    ("grey", "least_share"),
    # Of a cube as grey as the background, the faces that are lit as if they were it are lost.
    [(1.0, 0.2), (0.0, 0.2), (SMALL.background / 255, 0.05)],
)
def test_no_object_vanishes_into_the_background(grey: float, least_share: float) -> None:
    for view in render_views(cuboid((1, 1, 1), color=(grey, grey, grey)), SMALL):
        assert view.shape == (48, 48, 3)
        assert foreground_share(view, SMALL.background) > least_share


def test_the_object_fills_the_frame_and_is_not_cut_off() -> None:
    widest = 0
    for view in render_views(cuboid((3, 1, 1)), SMALL):
        rows, columns = np.nonzero(foreground(view))
        assert rows.min() > 0
        assert columns.min() > 0
        assert rows.max() < 47
        assert columns.max() < 47
        widest = max(widest, int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)
    assert widest == pytest.approx(SMALL.fill * 48, abs=2)


def test_the_first_camera_sees_the_front_and_y_is_up() -> None:
    red = cuboid((1, 1, 0.1), color=(1.0, 0.0, 0.0)).translated(np.array([0, 0, 1.0]))
    blue = cuboid((1, 0.3, 0.1), color=(0.0, 0.0, 1.0)).translated(np.array([0, 1.0, 1.0]))
    behind = cuboid((1, 1, 0.1), color=(0.0, 1.0, 0.0)).translated(np.array([0, 0, -1.0]))
    config = RenderConfig(resolution=48, num_views=2, first_azimuth=0, elevations=(0.0,))
    front, back = render_views(Mesh(red.pieces + blue.pieces + behind.pieces), config)
    is_red, is_blue, is_green = (
        (front[..., k] > 100) & (front[..., (k + 1) % 3] < 60) for k in (0, 2, 1)
    )
    assert is_red.sum() > 100
    assert is_green.sum() == 0
    assert np.nonzero(is_blue)[0].max() < np.nonzero(is_red)[0].min() + 2
    assert ((back[..., 1] > 100) & (back[..., 0] < 60)).sum() > 100


def test_a_texture_is_drawn() -> None:
    texture = np.zeros((2, 2, 4), np.uint8)
    texture[..., 3] = 255
    texture[0, :, 0] = texture[1, :, 1] = 255  # red above, green below
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    uv = square[:, :2]
    piece = Piece(square, np.array([[0, 1, 2], [0, 2, 3]]), Material(texture=texture), uv=uv)
    config = RenderConfig(resolution=48, num_views=1, first_azimuth=0, elevations=(0.0,))
    (view,) = render_views(Mesh((piece,)), config)
    assert view[10, 24, 0] > 150 > view[10, 24, 1]
    assert view[38, 24, 1] > 150 > view[38, 24, 0]


def test_colours_of_corners_are_drawn() -> None:
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    colors = np.array([[255, 0, 0], [255, 0, 0], [0, 255, 0], [0, 255, 0]], np.uint8)
    piece = Piece(square, np.array([[0, 1, 2], [0, 2, 3]]), Material(), colors=colors)
    config = RenderConfig(resolution=48, num_views=1, first_azimuth=0, elevations=(0.0,))
    (view,) = render_views(Mesh((piece,)), config)
    assert view[8, 24, 1] > 150 > view[8, 24, 0]
    assert view[40, 24, 0] > 150 > view[40, 24, 1]


def test_more_light_gives_a_brighter_view_of_the_same_shape() -> None:
    mesh = cuboid((1, 1, 1), color=(0.3, 0.3, 0.3))
    dim, bright = (
        render_views(mesh, RenderConfig(resolution=48, num_views=1, light=light))[0].astype(int)
        for light in (0.5, 1.5)
    )
    shape = np.abs(dim - 144).max(axis=-1) > 8
    assert (bright[shape] > dim[shape]).mean() > 0.95
    np.testing.assert_array_equal(dim[0, 0], bright[0, 0])


def test_rendering_again_gives_the_same_pixels() -> None:
    mesh = cuboid((1, 2, 3), color=(0.9, 0.5, 0.1))
    first = render_views(mesh, SMALL)
    render_views(cuboid((5, 1, 1), opacity=0.5), SMALL)  # nothing of it may stay
    for view, again in zip(first, render_views(mesh, SMALL), strict=True):
        np.testing.assert_array_equal(view, again)


def test_window_panes_are_seen_through() -> None:
    solid = cuboid((1, 1, 0.01), color=(1.0, 0.0, 0.0)).translated(np.array([0, 0, -0.5]))
    pane = cuboid((1, 1, 0.01), color=(1.0, 1.0, 1.0), opacity=0.2)
    config = RenderConfig(resolution=48, num_views=1, first_azimuth=0, elevations=(0.0,))
    (view,) = render_views(Mesh(solid.pieces + pane.pieces), config)
    red, green, _ = view[24, 24].astype(int)
    assert red - green > 60


def test_an_invisible_mesh_is_refused() -> None:
    with pytest.raises(ObjectError, match="it has no visible surface"):
        render_views(cuboid((1, 1, 1), opacity=0.0), SMALL)


def test_a_view_that_shows_nothing_is_refused() -> None:
    needle = cuboid((0.001, 1, 0.001))
    with pytest.raises(
        ObjectError, match=r"its view at azimuth 15, elevation 15 is blank: 0\.\d+ %"
    ):
        render_views(needle, SMALL)


def test_the_ring_turns_in_equal_steps_with_alternating_elevation() -> None:
    ring = camera_ring(RenderConfig(num_views=4, first_azimuth=350, elevations=(10.0, 30.0)))
    assert ring == [(350.0, 10.0), (80.0, 30.0), (170.0, 10.0), (260.0, 30.0)]


def test_a_view_survives_its_codec() -> None:
    (view,) = render_views(cuboid((1, 1, 1)), RenderConfig(resolution=48, num_views=1))
    decoded = decode_view(encode_view(view, 90))
    assert np.abs(decoded.astype(int) - view).mean() < 4


def test_without_a_renderer_the_message_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(render.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RenderError, match="apt-get install libegl1 libgl1-mesa-dri"):
        render._require_renderer()
