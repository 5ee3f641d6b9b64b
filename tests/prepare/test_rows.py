"""One object in, its row out: points, colours, views, and what has none."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossmost_ray.prepare.axes import axes_matrix
from crossmost_ray.prepare.config import DepthConfig, PrepareConfig, RenderConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Material, Mesh, Piece
from crossmost_ray.prepare.rows import (
    build_row,
    draw_points,
    has_colors,
    make_views,
    time_limit,
    turned,
)
from crossmost_ray.prepare.sources.base import Content
from crossmost_ray.prepare.sources.sweethome3d import list_objects

from .catalogue import catalogue_config, entry, model, write_catalogue

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
FACES = np.array([[0, 1, 2], [0, 2, 3]])


def mesh(**material: Any) -> Mesh:
    return Mesh((Piece(SQUARE, FACES, Material(**material)),))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def photo(color: tuple[int, int, int]) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(stored, "JPEG")
    return stored.getvalue()


def config(**more: Any) -> PrepareConfig:
    return PrepareConfig(
        name="x",
        output="x",
        sources=(catalogue_config(Path("x.sh3f")),),
        licenses={"CC0": "x"},
        num_points=64,
        render=RenderConfig(resolution=32, num_views=2),
        depth=DepthConfig(resolution=32),
        **more,
    )


def test_colours_are_those_that_the_object_states() -> None:
    texture = np.full((2, 2, 4), 200, np.uint8)
    textured = Mesh(
        (Piece(SQUARE, FACES, Material(texture=texture), uv=SQUARE[:, :2]), *mesh().pieces)
    )
    assert not has_colors(mesh())
    assert has_colors(mesh(color=(1.0, 0.0, 0.0)))
    assert has_colors(textured)
    assert draw_points(Content(mesh=mesh()), 16, rng())[1] is None
    _, colors = draw_points(Content(mesh=mesh(color=(1.0, 0.0, 0.0))), 16, rng())
    assert colors is not None
    assert (colors == (255, 0, 0)).all()


def test_a_cloud_keeps_its_points_in_random_order_and_each_its_colour() -> None:
    points = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float32)
    colors = np.arange(300).reshape(100, 3).astype(np.uint8)
    drawn, theirs = draw_points(Content(points=points, colors=colors), 1000, rng())
    assert drawn.shape == (100, 3)
    assert theirs is not None
    order = [int(np.nonzero((colors == color).all(axis=1))[0][0]) for color in theirs]
    assert sorted(order) == list(range(100)) != order
    centred = points - points.mean(axis=0)
    np.testing.assert_allclose(
        drawn, (centred / np.linalg.norm(centred, axis=1).max())[order], atol=1e-5
    )
    fewer, _ = draw_points(Content(points=points), 10, rng())
    assert fewer.shape == (10, 3)


def test_points_that_are_no_numbers_are_refused() -> None:
    points = np.ones((20, 3), np.float32)
    with pytest.raises(ObjectError, match="all its points coincide"):
        draw_points(Content(points=points), 16, rng())
    points[3, 1] = np.nan
    with pytest.raises(ObjectError, match="some of its points are NaN or infinite"):
        draw_points(Content(points=points), 16, rng())


def test_axes_turn_meshes_and_points_alike() -> None:
    points = SQUARE.astype(np.float32)
    content = turned(Content(mesh=mesh()), axes_matrix("yzx"))
    assert content.mesh is not None
    np.testing.assert_allclose(content.mesh.pieces[0].vertices, SQUARE[:, [1, 2, 0]])
    turned_points = turned(Content(points=points), axes_matrix("yzx")).points
    np.testing.assert_allclose(turned_points, points[:, [1, 2, 0]])


CLOUD = np.random.default_rng(2).normal(size=(500, 3)).astype(np.float32)
PHOTOS = (photo((255, 0, 0)), photo((0, 255, 0)))


@pytest.mark.parametrize(
    ("views", "content", "number", "kind"),
    [
        ("auto", Content(mesh=mesh(), photos=PHOTOS), 2, "photos"),
        ("auto", Content(mesh=mesh()), 2, "renders"),
        ("auto", Content(points=CLOUD), 10, "depth"),
        ("render", Content(mesh=mesh(), photos=PHOTOS), 2, "renders"),
        ("photos_and_render", Content(mesh=mesh(), photos=PHOTOS), 4, "photos and renders"),
        ("photos_and_render", Content(points=CLOUD, photos=PHOTOS), 12, "photos and depth"),
        ("photos_and_render", Content(mesh=mesh()), 2, "renders"),
        ("depth", Content(points=CLOUD, photos=PHOTOS), 10, "depth"),
    ],
)
def test_views_are_what_was_asked_for(views: Any, content: Content, number: int, kind: str) -> None:
    points, _ = draw_points(content, 500, rng())
    made, told = make_views(content, points, config(views=views))
    assert (len(made), told) == (number, kind)
    assert {Image.open(io.BytesIO(view)).format for view in made} == {"WEBP"}
    if kind.startswith("photos"):
        assert np.asarray(Image.open(io.BytesIO(made[0])))[15, 20, 0] > 200


def test_views_that_cannot_be_had_are_refused() -> None:
    points, _ = draw_points(Content(points=CLOUD), 64, rng())
    with pytest.raises(ObjectError, match="it has no photographs"):
        make_views(Content(points=CLOUD), points, config(views="photos"))
    with pytest.raises(ObjectError, match="it has no mesh to render; `views: depth`"):
        make_views(Content(points=CLOUD), points, config(views="render"))
    broken = Content(points=CLOUD, photos=(PHOTOS[0], PHOTOS[1][:200]))
    with pytest.raises(ObjectError, match="photograph 2"):
        make_views(broken, points, config())


def test_a_row_does_not_depend_on_the_order_of_the_tasks(tmp_path: Path) -> None:
    lines = entry(1, "Chair", "chair") + entry(2, "Box", "box")
    path = write_catalogue(tmp_path / "t.sh3f", lines, model("chair") | model("box"))
    source = catalogue_config(path)
    settings = PrepareConfig(**{**vars(config()), "sources": (source,)})
    chair, box = list_objects(source)
    first = build_row(chair, settings).row
    build_row(box, settings)
    again = build_row(chair, settings).row
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first["points"], again["points"])
    assert first["views"] == again["views"]
    rounded = first["points"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(first["points"], rounded)


def test_an_object_that_takes_too_long_is_refused() -> None:
    start = time.monotonic()
    with pytest.raises(ObjectError, match=r"it took longer than 0\.05 s"), time_limit(0.05):
        time.sleep(5)
    assert time.monotonic() - start < 2
    with time_limit(5):
        pass
