"""ScanObjectNN: which file a variant is in, and whose names its labels are."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import PrepareConfig, ScanObjectNN
from crossmost_ray.prepare.sources.scanobjectnn import VARIANTS, list_objects, load

from .layouts_modelnet import cloud, picture, red_of, write, write_h5, write_release

CONFIGS = Path(__file__).parents[2] / "configs" / "prepare"


def config_of(path: Path, variant: str = "object_only") -> ScanObjectNN:
    return ScanObjectNN(kind="scanobjectnn", name="so", path=str(path), variant=variant)


@pytest.mark.parametrize(
    ("variant", "stem", "seed"),
    [
        ("object_only", "objectdataset", 0),
        ("with_background", "objectdataset", 100),
        ("hardest", "objectdataset_augmentedrot_scale75", 200),
    ],
)
def test_each_variant_is_in_its_own_file(
    tmp_path: Path, variant: str, stem: str, seed: int
) -> None:
    config = config_of(write_release(tmp_path), variant)
    objects = list(list_objects(config))
    assert [(item.object_id, item.split, item.label) for item in objects] == [
        (f"so/training_{stem}/0", "train", "chair"),
        (f"so/training_{stem}/1", "train", "toilet"),
        (f"so/test_{stem}/0", "test", "toilet"),
    ]
    assert objects[0].captions == ("chair",)
    for row_seed, item in zip([2, 3, 1], objects, strict=True):
        np.testing.assert_array_equal(load(item, config).points, cloud(seed + row_seed))


@pytest.mark.parametrize(
    ("variant", "suffix"),
    [("object_only", ""), ("with_background", "_withbg"), ("hardest", "_hardest")],
)
def test_lists_of_files_win_over_the_release(tmp_path: Path, variant: str, suffix: str) -> None:
    config = config_of(write_release(tmp_path), variant)
    write_h5(tmp_path / "mine" / "scans.h5", (0, 11), seed=50)
    write_h5(tmp_path / "more.h5", (8,), seed=60)
    write(tmp_path / f"train_files{suffix}.txt", "/home/ada/mine/../more.h5\nmine/scans.h5\n")
    write(tmp_path / f"test_files{suffix}.txt", "main_split/test_objectdataset.h5\n")
    for number in (1, 0):
        write(tmp_path / "mine" / "scansimage" / "1" / f"{number}.png", picture(number))

    objects = list(list_objects(config))
    assert [(item.object_id, item.label) for item in objects] == [
        ("so/more/0", "shelf"),
        ("so/scans/0", "bag"),
        ("so/scans/1", "pillow"),
        ("so/test_objectdataset/0", "toilet"),
    ]
    content = load(objects[2], config)
    np.testing.assert_array_equal(content.points, cloud(51))
    assert [red_of(photo) for photo in content.photos] == [0, 1]
    assert load(objects[1], config).photos == ()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = config_of(write_release(tmp_path))
    (tmp_path / "main_split_nobg" / "test_objectdataset.h5").unlink()
    message = (
        r"holds neither test_files\.txt nor main_split_nobg/test_objectdataset\.h5; "
        r"ask for h5_files\.zip"
    )
    with pytest.raises(ConfigError, match=message):
        list(list_objects(config))
    write(tmp_path / "train_files.txt", "main_split/training_objectdataset.h5\n")
    with pytest.raises(ConfigError, match=r"test_files\.txt is missing; ask for"):
        list(list_objects(config))


def test_a_label_beyond_the_fifteen_is_named(tmp_path: Path) -> None:
    config = config_of(write_release(tmp_path))
    write_h5(tmp_path / "main_split_nobg" / "training_objectdataset.h5", (14, 15))
    with pytest.raises(ConfigError, match=r"row 1 of .* has label 15, but there are 15 classes"):
        list(list_objects(config))


def test_every_variant_has_its_files() -> None:
    assert set(get_args(get_type_hints(ScanObjectNN)["variant"])) == set(VARIANTS)


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("scanobjectnn", "object_only"),
        ("scanobjectnn_withbg", "with_background"),
        ("scanobjectnn_hardest", "hardest"),
    ],
)
def test_the_configs_are_valid(file: str, variant: str) -> None:
    config = load_config(PrepareConfig, CONFIGS / f"{file}.yaml")
    (source,) = config.sources
    assert isinstance(source, ScanObjectNN)
    assert source.variant == variant
    assert len(config.classes) == 15
    first = (CONFIGS / f"{file}.yaml").read_text().splitlines()[:6]
    assert any(f"python jobs/prepare.py configs/prepare/{file}.yaml" in line for line in first)
