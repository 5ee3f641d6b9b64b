"""CO3D: how sequences are listed and spelled, and what is loaded of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crossmost_ray.config import ConfigError, load_config, read_list
from crossmost_ray.prepare.config import CO3D, PrepareConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.sources.co3d import list_objects, load

from .layouts_scans import cloud, picture, write, write_co3d


def test_the_config_is_one() -> None:
    config = load_config(PrepareConfig, "configs/prepare/co3d.yaml")
    assert isinstance(config.sources[0], CO3D)


def test_sequences_are_listed_and_their_classes_spelled(tmp_path: Path) -> None:
    bear, kite = list_objects(write_co3d(tmp_path))
    assert bear.object_id == "co3d/teddybear/34_1479_4753"
    assert (bear.split, bear.label) == ("train", "teddy bear")
    assert bear.captions == ("sequence 34_1479_4753",)
    # In no list of classes: its own name.
    assert (kite.object_id, kite.split) == ("co3d/kite/399_51022_100078", "test")
    assert kite.label == "kite"


def test_every_class_is_known_by_its_words_run_together(tmp_path: Path) -> None:
    config, classes = write_co3d(tmp_path), read_list("classes", "co3d")
    lines = [f"{name.replace(' ', '')}/1" for name in classes]
    write(tmp_path / "train_set_80.txt", "\n".join(lines))
    labels = {item.object_id: item.label for item in list_objects(config)}
    for line, name in zip(lines, classes, strict=True):
        assert labels[f"co3d/{line}"] == name


def test_a_sequence_holds_its_points_colors_and_frames(tmp_path: Path) -> None:
    config = write_co3d(tmp_path)
    bear, kite = list_objects(config)
    content = load(bear, config)
    # In the source's own axes: config.axes is applied later, to every source alike.
    np.testing.assert_array_equal(content.points, cloud(34, 6)[:, :3])
    assert content.colors is not None
    frames = [picture((30 * number, 0, 0), codec="JPEG") for number in range(7)]
    assert content.photos == tuple(frames)
    picked = load(bear, replace(config, max_views=3)).photos
    assert picked == (frames[0], frames[2], frames[4])
    # Without frames it stays.
    assert load(kite, config).photos == ()


def test_a_sequence_without_its_cloud_costs_its_object_only(tmp_path: Path) -> None:
    config = write_co3d(tmp_path)
    (tmp_path / "points" / "kite" / "399_51022_100078" / "pointcloud1.npy").unlink()
    _, kite = list_objects(config)
    with pytest.raises(ObjectError, match=r"kite/399_51022_100078/pointcloud1\.npy is missing"):
        load(kite, config)


@pytest.mark.parametrize("name", ["train_set_80.txt", "test_set_80.txt", "points", "images"])
def test_a_missing_file_says_where_to_look(tmp_path: Path, name: str) -> None:
    config = write_co3d(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{name} is missing; docs/sources/co3d\.md says"):
        list(list_objects(config))


@pytest.mark.parametrize("line", ["teddybear", "../teddybear/1", "teddybear/..", "a/b/c", "/a/b"])
def test_a_line_that_is_no_sequence_is_refused(tmp_path: Path, line: str) -> None:
    config = write_co3d(tmp_path)
    write(tmp_path / "train_set_80.txt", f"kite/1\n{line}\n")
    with pytest.raises(ConfigError, match=r"line 2 of .*train_set_80\.txt .*such as teddybear/34"):
        list(list_objects(config))
