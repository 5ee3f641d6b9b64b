"""A folder of one's own files: what is listed, how it is called, and what is loaded."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import Folder, PrepareConfig
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.sources.base import Object
from crossmost_ray.prepare.sources.folder import folder_reader, in_words, list_objects, load

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
RED = (255, 0, 0)


def folder(path: Path, **values: Any) -> Folder:
    return Folder(kind="folder", name="mine", path=str(path), **values)


def write(root: Path, *names: str, content: bytes | str = f"{TRIANGLE}f 1 2 3\n") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(data)


def image(color: tuple[int, ...] = RED) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(stored, "PNG")
    return stored.getvalue()


def listed(path: Path, **values: Any) -> dict[str, Object]:
    return {item.object_id: item for item in list_objects(folder(path, **values))}


def test_files_become_objects_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, "b/chair-01.OBJ", "a.ply", "b/office_lamp.v2.xyz", "c/d/e.npz")
    write(
        tmp_path,
        *("b/chair-01.mtl", "b/wood.png", "c/e.bin", ".hidden.obj", ".git/x.obj", "b/._a.obj"),
        *("README.txt", "b/LICENSE.txt"),
    )
    items = listed(tmp_path)
    assert list(items) == ["mine/a", "mine/b/chair-01", "mine/b/office_lamp.v2", "mine/c/d/e"]
    assert [item.captions for item in items.values()] == [
        ("a",),
        ("chair 01",),
        ("office lamp v2",),
        ("e",),
    ]
    assert {(item.split, item.label, item.source) for item in items.values()} == {
        ("all", None, "mine")
    }


def test_two_suffixes_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, "a.obj", "a.ply", "a.obj.stl", "b.obj")
    assert list(listed(tmp_path)) == ["mine/a.obj", "mine/a.obj.stl", "mine/a.ply", "mine/b"]


def test_folders_name_split_and_class(tmp_path: Path) -> None:
    write(tmp_path, "train/night_stand/a.obj", "test/chair/sub/b.obj", "val/c.obj", "lamp/d.obj")
    found = {
        name: (item.split, item.label)
        for name, item in listed(tmp_path, class_folders=True).items()
    }
    assert found == {
        "mine/train/night_stand/a": ("train", "night stand"),
        "mine/test/chair/sub/b": ("test", "chair"),
        "mine/val/c": ("val", None),
        "mine/lamp/d": ("all", "lamp"),
    }
    assert {item.label for item in listed(tmp_path).values()} == {None}


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "in", tmp_path / "out"
    write(root, "a.obj")
    write(outside, "secret.obj", "sub/b.obj")
    (root / "inner.obj").symlink_to(root / "a.obj")
    (root / "leak.obj").symlink_to(outside / "secret.obj")
    (root / "gone.obj").symlink_to(outside / "nothing.obj")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.obj")
    assert list(listed(root)) == ["mine/a", "mine/inner"]
    # The folder itself may be one.
    (tmp_path / "alias").symlink_to(root)
    assert list(listed(tmp_path / "alias")) == ["mine/a", "mine/inner"]


def test_a_name_that_is_no_utf8_is_listed_and_loaded(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/stuhl_gr\xfcn.obj"
    try:
        Path(os.fsdecode(name)).write_text(f"{TRIANGLE}f 1 2 9\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = listed(tmp_path).values()
    assert item.object_id == "mine/stuhl_gr\\xfcn"
    assert item.captions == ("stuhl gr\\xfcn",)
    str(item.place).encode("ascii")
    with pytest.raises(ObjectError, match="a face names a corner beyond") as refused:
        load(item, folder(tmp_path))
    str(refused.value).encode()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("office_chair-01", "office chair 01"),
        ("  a..b ", "a b"),
        ("___", "___"),
        ("Stühlchen", "Stühlchen"),
    ],
)
def test_names_in_words(name: str, words: str) -> None:
    assert in_words(name) == words


def test_the_table_of_labels_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "x/a.obj", "x/b.obj", "x/c.obj")
    table = tmp_path / "labels.csv"
    table.write_text(
        "\ufefffile,label,caption,split\nx/a.obj,armchair,A red armchair,test\nx\\b.obj,,,\n",
        encoding="utf-8",
    )
    items = listed(tmp_path, labels=str(table), class_folders=True)
    found = [(item.label, item.captions, item.split) for item in items.values()]
    # A row decides, even that there is no label; what has no row keeps its folder's.
    assert found == [
        ("armchair", ("A red armchair",), "test"),
        (None, ("b",), "all"),
        ("x", ("c",), "all"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,lable\n", "the columns of .* are file, lable; they must be file and label"),
        ("", "the columns of .* are missing"),
        ("file,label\nb.obj,x\n", "line 2 of .* names 'b.obj', which is no mesh or cloud there"),
        ("file,label\n../a.obj,x\n", "line 2 of .* names '../a.obj', which is no mesh"),
        ("file,label\na.obj,x\n./a.obj,y\n", "line 3 of .* names 'a.obj' again, after line 2"),
        ("file,label,split\na.obj,x,a/b\n", "line 2 of .* has the split 'a/b'"),
        ("file,label\na.obj,x,y\n", "line 2 of .* has more values than there are columns"),
        (b"file,label\na.obj,\xff\n", "is not UTF-8"),
    ],
)
def test_a_wrong_table_names_its_row(content: str | bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path, "a.obj")
    write(tmp_path, "l.csv", content=content)
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path, labels=str(tmp_path / "l.csv"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mine', .*/no, is missing: put meshes or clouds"):
        listed(tmp_path / "no")
    with pytest.raises(ConfigError, match=r"holds no mesh or cloud; it may hold \.3mf \.csv"):
        listed(tmp_path)
    write(tmp_path, "a.obj", "train/b.obj")
    with pytest.raises(ConfigError, match="has no class folders, as in"):
        listed(tmp_path, class_folders=True)
    with pytest.raises(ConfigError, match=r"the table of labels .*no\.csv is missing"):
        listed(tmp_path, labels=str(tmp_path / "no.csv"))
    with pytest.raises(ConfigError, match=r"the folder of photographs .* is missing"):
        listed(tmp_path, images=str(tmp_path / "no"))
    write(tmp_path / "photos", "other.png", content=image())
    with pytest.raises(ConfigError, match=r"none of the 1 photographs .* belongs to an object"):
        listed(tmp_path, images=str(tmp_path / "photos"))


def test_photographs_go_to_the_longest_name(tmp_path: Path) -> None:
    root, photos = tmp_path / "meshes", tmp_path / "photos"
    write(root, "k/chair.obj", "k/chair_2.obj", "k/lamp.obj")
    mine = {
        "k/chair": ["k/chair.jpg", "k/chair/1.WEBP", "k/chair_3.png", "k/chair_front_left.jpeg"],
        "k/chair_2": ["k/chair_2.png", "k/chair_2/x.png", "k/chair_2_1.png"],
        "k/lamp": [],
    }
    for number, name in enumerate(sorted(name for names in mine.values() for name in names)):
        write(photos, name, content=image((number, 0, 0)))
    write(photos, "k/chairs.png", "k/notes.txt", "chair.png", content=image())
    items = listed(root, images=str(photos))
    found = {name.removeprefix("mine/"): item.place["photos"] for name, item in items.items()}
    assert found == mine
    content = load(items["mine/k/chair"], folder(root, images=str(photos)))
    assert content.photos == tuple((photos / name).read_bytes() for name in mine["k/chair"])
    few = listed(root, images=str(photos), max_views=2)["mine/k/chair"]
    assert len(few.place["photos"]) == 2


def test_a_mesh_finds_its_files_and_nothing_outside(tmp_path: Path) -> None:
    root = tmp_path / "in"
    library = "newmtl t\nKd 0 1 0\nmap_Kd {}\n"
    body = f"{TRIANGLE}vt 0 0\nusemtl t\nf 1/1 2/1 3/1\n"
    write(root, "m/a.obj", content=f"mtllib ../lib/a.mtl\n{body}")
    write(root, "lib/a.mtl", content=library.format("../textures/t.png"))
    write(root, "textures/t.png", content=image())
    write(tmp_path, "t.png", content=image())
    (item,) = listed(root).values()
    mesh = load(item, folder(root)).mesh
    assert mesh is not None
    assert mesh.pieces[0].material.texture is not None
    for outside in ("../../t.png", str(tmp_path / "t.png"), "a\x00b", "a" * 5000):
        write(root, "lib/a.mtl", content=library.format(outside))
        mesh = load(item, folder(root)).mesh
        assert mesh is not None
        assert mesh.pieces[0].material.texture is None


def test_the_reader_never_leaves_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write(root, "a/b.txt", content="here")
    write(tmp_path, "secret", content="there")
    (root / "link").symlink_to(tmp_path / "secret")
    read = folder_reader(root)
    assert read("a/b.txt") == read("a/../a//b.txt") == b"here"
    for name in ("../secret", "a/../../secret", str(tmp_path / "secret"), "link", "a", "", "no"):
        assert read(name) is None


def test_a_ply_file_is_a_mesh_if_it_has_faces(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    trimesh.PointCloud(points).export(tmp_path / "cloud.ply")
    trimesh.creation.box().export(tmp_path / "mesh.ply")
    (tmp_path / "text.txt").write_text("\n".join(f"{x} {y} {z}" for x, y, z in points))
    items = listed(tmp_path)
    cloud = load(items["mine/cloud"], folder(tmp_path))
    assert cloud.mesh is None
    np.testing.assert_array_equal(cloud.points, points)
    assert load(items["mine/text"], folder(tmp_path)).points is not None
    mesh = load(items["mine/mesh"], folder(tmp_path))
    assert mesh.points is None
    assert mesh.mesh is not None
    (tmp_path / "mesh.ply").write_bytes(b"nothing")
    with pytest.raises(ObjectError, match=r"mesh\.ply is no PLY file: it has no PLY header"):
        load(items["mine/mesh"], folder(tmp_path))


def test_the_config_of_a_folder_takes_ones_own() -> None:
    config = load_config(
        PrepareConfig,
        Path("configs/prepare/my_folder.yaml"),
        ["sources.0.path=/my/meshes", "output=/my/shards"],
    )
    (source,) = config.sources
    assert isinstance(source, Folder)
    assert (source.path, config.output) == ("/my/meshes", "/my/shards")
