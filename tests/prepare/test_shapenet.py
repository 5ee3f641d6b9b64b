"""ShapeNet-55: what is listed, what is loaded, and what a wrong list or taxonomy says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import PrepareConfig, ShapeNet55
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.sources.lists import read_splits, read_text
from crossmost_ray.prepare.sources.shapenet import RENAMED, list_objects, load

from .layouts_scans import (
    BIN,
    PLANE,
    SCREEN,
    TAXONOMY,
    cloud,
    picture,
    render_name,
    write,
    write_shapenet,
)


def test_the_config_is_one(tmp_path: Path) -> None:
    config = load_config(PrepareConfig, "configs/prepare/shapenet55.yaml")
    assert isinstance(config.sources[0], ShapeNet55)


def test_objects_are_listed_by_split_and_name(tmp_path: Path) -> None:
    left, right, bin_ = list_objects(write_shapenet(tmp_path))
    assert left.object_id == f"shapenet/{PLANE}-a1-left"
    assert (left.split, left.source) == ("train", "shapenet")
    assert left.captions == ("airplane", "aeroplane", "plane")
    assert left.label == "airplane"
    assert right.object_id == f"shapenet/{PLANE}-b2"
    assert (bin_.object_id, bin_.split) == (f"shapenet/{BIN}-c3", "test")
    # ashcan -> trashcan, which the synset names as well.
    assert (bin_.captions, bin_.label) == (("trashcan", "bin"), "trashcan")


def test_names_are_replaced_as_whole_words_only(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    write(tmp_path / "test.txt", f"{SCREEN}-d4.npy\r\n\r\n")
    *_, screen = list_objects(config)
    assert screen.captions == ("monitor", "video display")
    assert set(RENAMED.values()) == {"monitor", "ship", "trashcan"}


def test_images_are_thirty_in_color_then_thirty_of_depth(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    left, right, _ = list_objects(config)
    expected = [
        (tmp_path / "rendered_images" / f"{PLANE}-a1-left" / name).read_bytes()
        for depth in (False, True)
        for name in (render_name(f"{PLANE}-a1-left", d, depth=depth) for d in range(0, 360, 12))
    ]
    content = load(left, config)
    assert content.photos == tuple(expected)
    assert len(set(expected)) == 60
    assert load(left, replace(config, depth=False)).photos == tuple(expected[:30])
    assert content.mesh is None
    assert content.colors is None
    np.testing.assert_array_equal(content.points, cloud(1))
    # The other plane has no folder of images at all.
    assert load(right, config).photos == ()


def test_missing_images_are_fewer_and_others_are_not_taken(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    model = f"{PLANE}-b2"
    for degree in (24, 0, 13):
        name = render_name(model, degree)
        write(tmp_path / "rendered_images" / model / name, picture((degree, 0, 0)))
    _, right, _ = list_objects(config)
    assert load(right, config).photos == (picture((0, 0, 0)), picture((24, 0, 0)))


def test_folders_of_clouds_and_images_can_be_named(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    (tmp_path / "shapenet_pc").rename(tmp_path / "clouds")
    (tmp_path / "rendered_images").rename(tmp_path / "only_rgb_depth_images")
    with pytest.raises(ConfigError, match=r"folder .*shapenet_pc is missing; download"):
        list(list_objects(config))
    config = replace(
        config,
        clouds=str(tmp_path / "clouds"),
        images=str(tmp_path / "only_rgb_depth_images"),
    )
    left, _, _ = list_objects(config)
    assert len(load(left, config).photos) == 60
    with pytest.raises(ConfigError, match=r"folder .*nowhere is missing"):
        list(list_objects(replace(config, images=str(tmp_path / "nowhere"))))


def test_without_images_the_objects_stay(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    (tmp_path / "rendered_images").rename(tmp_path / "elsewhere")
    left, _, _ = list_objects(config)
    assert load(left, config).photos == ()


def test_a_missing_cloud_or_a_broken_image_costs_its_object_only(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    left, right, _ = list_objects(config)
    write(
        tmp_path / "rendered_images" / f"{PLANE}-a1-left" / render_name(f"{PLANE}-a1-left", 36), ""
    )
    with pytest.raises(ObjectError, match=r"a1-left_r_036\.png is no JPEG, PNG or WebP"):
        load(left, config)
    (tmp_path / "shapenet_pc" / f"{PLANE}-b2.npy").unlink()
    with pytest.raises(ObjectError, match=r"b2\.npy is missing"):
        load(right, config)


@pytest.mark.parametrize("name", ["train.txt", "test.txt", "taxonomy.json"])
def test_a_missing_file_says_what_to_download(tmp_path: Path, name: str) -> None:
    config = write_shapenet(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing; download the folder shapenet-55"):
        list(list_objects(config))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../../etc/passwd", "line 2 of .*train.txt leaves its folder: '../../etc/passwd'"),
        ("/etc/02691156-a.npy", "line 2 of .*train.txt leaves its folder"),
        ("..\\02691156-a.npy", "line 2 of .*train.txt leaves its folder"),
        ("02691156-a.npy\0", "line 2 of .*train.txt leaves its folder"),
        ("..", "line 2 of .*train.txt leaves its folder"),
        ("02691156/a.npy", "line 2 of .*train.txt is not of that form"),
        ("./02691156-a.npy", "line 2 of .*train.txt is not of that form"),
        ("02691156-a.ply", "line 2 of .*train.txt is '02691156-a.ply', expected such as 0269"),
        ("plane-a.npy", "line 2 of .*train.txt is 'plane-a.npy', expected such as 0269"),
        ("00000000-a.npy", "line 2 of .*train.txt is of synset 00000000, which .*json lacks"),
        (f"{PLANE}-b2.npy", "line 2 of .*train.txt repeats .*b2.npy, which line 1 of .*train"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    config = write_shapenet(tmp_path)
    write(tmp_path / "train.txt", f"{PLANE}-b2.npy\n{line}\n")
    with pytest.raises(ConfigError, match=reason):
        list(list_objects(config))


def test_a_model_to_train_and_to_test_on_is_named(tmp_path: Path) -> None:
    config = write_shapenet(tmp_path)
    write(tmp_path / "test.txt", f"\n{PLANE}-b2.npy")
    with pytest.raises(
        ConfigError, match=r"line 2 of .*test\.txt repeats .* line 1 of .*train\.txt"
    ):
        list(list_objects(config))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is no proper JSON"),
        ("[" * 100_000, "is no proper JSON"),
        ("{}", "must hold a list of synsets"),
        (json.dumps([*TAXONOMY, {"synsetId": "1"}]), "entry 5 of .* must have a synsetId"),
        (json.dumps([{"synsetId": "1", "name": " , "}]), "entry 1 of .* must have a synsetId"),
        (json.dumps([{"synsetId": 2691156, "name": "plane"}]), "entry 1 of .* such as '0269"),
        ('["plane"]', "entry 1 of"),
    ],
)
def test_a_wrong_taxonomy_is_named(tmp_path: Path, text: str, reason: str) -> None:
    config = write_shapenet(tmp_path)
    write(tmp_path / "taxonomy.json", text)
    with pytest.raises(ConfigError, match=reason):
        list(list_objects(config))


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "fine\nfine, too\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"line 3 of .*a\.txt is not UTF-8; save the file as"):
        read_text(path, "")
    assert read_text(write(tmp_path / "b.txt", b"\xef\xbb\xbfmarked"), "") == "marked"


def test_empty_lists_are_named(tmp_path: Path) -> None:
    lists = {split: write(tmp_path / f"{split}.txt", " \n\n") for split in ("train", "test")}
    with pytest.raises(ConfigError, match=r"train\.txt and .*test\.txt name nothing"):
        read_splits(lists, example="a/b", hint="")


@given(line=st.text("a/.\\ \0", min_size=1, max_size=8).filter(str.strip))
@example("a/a")
@example("a/..")
@example("/a/a")
def test_no_line_leads_out_of_its_folder(tmp_path: Path, line: str) -> None:
    root, path = tmp_path / "root", write(tmp_path / "a.txt", line)
    try:
        (listed,) = read_splits({"all": path}, example="a/b", hint="")
    except ConfigError:
        return
    # As the system would resolve it: two levels below the root, no more and no less.
    assert (root / listed.name).resolve().parent.parent == root.resolve()
