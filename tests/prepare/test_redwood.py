"""Redwood: which scans are listed, which frames are taken, and what wrong files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import PrepareConfig, Redwood
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.sources.redwood import list_objects, load

from .layouts_scans import cloud, picture, write, write_redwood


def test_the_config_is_one() -> None:
    config = load_config(PrepareConfig, "configs/prepare/redwood.yaml")
    assert isinstance(config.sources[0], Redwood)


def test_scans_of_a_list_and_a_category_are_listed(tmp_path: Path) -> None:
    # 00099 is in a list only, 00002 and 05555 in a category only.
    chair, bin_ = list_objects(write_redwood(tmp_path))
    assert (chair.object_id, chair.split, chair.label) == ("redwood/00033", "train", "chair")
    assert chair.captions == ("scan 00033",)
    # "trash_container", spelled as the list of classes spells it.
    assert (bin_.object_id, bin_.split, bin_.label) == ("redwood/00071", "test", "trash container")


def test_a_scan_holds_its_points_colors_and_frames_by_name(tmp_path: Path) -> None:
    config = write_redwood(tmp_path)
    chair, bin_ = list_objects(config)
    content = load(chair, config)
    stored = cloud(33, 6)
    np.testing.assert_array_equal(content.points, stored[:, :3])
    np.testing.assert_array_equal(content.colors, np.round(stored[:, 3:].astype(float) * 255))
    frames = [picture((40 * number, 0, 0), codec="JPEG") for number in range(5)]
    assert content.photos == tuple(frames)
    # Two of five, in even steps.
    assert load(chair, replace(config, max_views=2)).photos == (frames[0], frames[2])
    plain = load(bin_, config)
    assert (plain.colors, plain.photos) == (None, ())


def test_a_scan_without_its_cloud_costs_its_object_only(tmp_path: Path) -> None:
    config = write_redwood(tmp_path)
    (tmp_path / "points" / "00071.npy").unlink()
    _, bin_ = list_objects(config)
    with pytest.raises(ObjectError, match=r"00071\.npy is missing"):
        load(bin_, config)


@pytest.mark.parametrize(
    "name", ["train_set80.txt", "test_set80.txt", "categories.json", "points", "images"]
)
def test_a_missing_file_says_where_to_look(tmp_path: Path, name: str) -> None:
    config = write_redwood(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{name} is missing; docs/sources/redwood\.md says"):
        list(list_objects(config))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"chair": ["00033"], "sofa": ["00071", "00033"]}, "00033 in 'chair' and in 'sofa'"),
        ({"chair": [33]}, r"'chair' of .*categories\.json must be a list of texts"),
        ({"chair": "00033"}, "'chair' of .* must be a list of texts"),
        (["00033"], "must hold ids by class"),
        ({"chair": ["33", "71"]}, r"categories\.json names none of the scans .* such as 00033"),
    ],
)
def test_wrong_categories_are_named(tmp_path: Path, table: object, reason: str) -> None:
    config = write_redwood(tmp_path)
    write(tmp_path / "categories.json", json.dumps(table))
    with pytest.raises(ConfigError, match=reason):
        list(list_objects(config))


@pytest.mark.parametrize("line", ["../00033", "/00033", "a/00033"])
def test_an_id_that_is_a_path_is_refused(tmp_path: Path, line: str) -> None:
    config = write_redwood(tmp_path)
    write(tmp_path / "test_set80.txt", line)
    with pytest.raises(ConfigError, match=r"line 1 of .*test_set80\.txt .*expected such as 00033"):
        list(list_objects(config))


def test_a_list_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    config = write_redwood(tmp_path)
    write(tmp_path / "train_set80.txt", b"00033\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*train_set80\.txt is not UTF-8"):
        list(list_objects(config))
