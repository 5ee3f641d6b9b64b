"""ModelNet's four forms: what is listed, what is loaded, and what is said of what is missing."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import (
    ModelNetHdf5,
    ModelNetOff,
    ModelNetPickle,
    ModelNetText,
    PrepareConfig,
)
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.sources.modelnet import (
    list_hdf5,
    list_off,
    list_pickle,
    list_text,
    load_hdf5,
    load_off,
    load_pickle,
    load_text,
)

from .layouts_modelnet import (
    cloud,
    picture,
    red_of,
    write,
    write_h5,
    write_hdf5,
    write_off,
    write_pickle,
    write_text,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "prepare"


def off_config(path: Path, images: Path | None = None) -> ModelNetOff:
    stated = None if images is None else str(images)
    return ModelNetOff(kind="modelnet_off", name="mn", path=str(path), images=stated)


def text_config(path: Path) -> ModelNetText:
    return ModelNetText(kind="modelnet_text", name="mn", path=str(path))


def hdf5_config(path: Path) -> ModelNetHdf5:
    return ModelNetHdf5(kind="modelnet_hdf5", name="mn", path=str(path))


def pickle_config(path: Path) -> ModelNetPickle:
    return ModelNetPickle(kind="modelnet_pickle", name="mn", path=str(path))


def test_meshes_are_listed_by_class_and_split(tmp_path: Path) -> None:
    objects = list(list_off(off_config(write_off(tmp_path))))
    assert [(item.object_id, item.split, item.label) for item in objects] == [
        ("mn/chair_0890", "test", "chair"),
        ("mn/chair_0001", "train", "chair"),
        ("mn/night_stand_0001", "train", "night stand"),
        ("mn/night_stand_0002", "train", "night stand"),
    ]
    assert objects[0].captions == ("chair 0890",)
    assert objects[0].source == "mn"
    assert pickle.loads(pickle.dumps(objects)) == objects


def test_a_mesh_is_loaded_with_its_views_by_number(tmp_path: Path) -> None:
    config = off_config(write_off(tmp_path / "off", tmp_path / "views"), tmp_path / "views")
    content = {item.object_id: load_off(item, config) for item in list_off(config)}
    chair = content["mn/chair_0001"]
    assert chair.points is None
    # In the file's own axes: 2 along x, 3 along y, 5 along z.
    np.testing.assert_array_equal(chair.mesh.bounds, [[0, 0, 0], [2, 3, 5]])
    assert [red_of(photo) for photo in chair.photos] == [1, 2, 10]
    assert content["mn/chair_0890"].photos == ()


def test_views_of_a_longer_name_are_not_taken(tmp_path: Path) -> None:
    images = tmp_path / "views"
    config = off_config(write_off(tmp_path / "off"), images)
    write(images / "train" / "chair" / "chair_0001_left_3.png", picture(3))
    (item,) = (item for item in list_off(config) if item.object_id == "mn/chair_0001")
    assert load_off(item, config).photos == ()


def test_a_damaged_or_lost_mesh_costs_its_object_only(tmp_path: Path) -> None:
    config = off_config(write_off(tmp_path))
    first, second, *rest = list_off(config)
    (tmp_path / "chair/test/chair_0890.off").write_text("OFF\n1000 1000 0\n0 0 0\n")
    (tmp_path / "chair/train/chair_0001.off").unlink()
    with pytest.raises(ObjectError, match=r"chair_0890\.off is too short"):
        load_off(first, config)
    with pytest.raises(ObjectError, match=r"the file .*chair_0001\.off is missing"):
        load_off(second, config)
    assert all(load_off(item, config).mesh is not None for item in rest)


def test_a_folder_without_meshes_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no <class>/<split>/<name>\.off; download Mod"):
        list(list_off(off_config(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"images of the source 'mn' is no folder: .*views"):
        list(list_off(off_config(write_off(tmp_path), tmp_path / "views")))


def test_text_clouds_are_those_of_the_lists(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path))
    objects = list(list_text(config))
    assert [(item.object_id, item.split, item.label, item.captions) for item in objects] == [
        ("mn/chair_0001", "train", "chair", ("chair 0001",)),
        ("mn/night_stand_0001", "train", "night stand", ("night stand 0001",)),
        ("mn/night_stand_0002", "train", "night stand", ("night stand 0002",)),
        ("mn/chair_0890", "test", "chair", ("chair 0890",)),
    ]
    for seed, item in enumerate(objects):
        content = load_text(item, config)
        assert (content.mesh, content.photos) == (None, ())
        assert content.points.dtype == np.float32
        np.testing.assert_allclose(content.points, cloud(seed, columns=6)[:, :3], atol=1e-6)


def test_ten_classes_have_their_own_lists(tmp_path: Path) -> None:
    folder = write_text(tmp_path, "modelnet10")
    config = ModelNetText(kind="modelnet_text", name="mn", path=str(folder), num_classes=10)
    assert len(list(list_text(config))) == 4
    with pytest.raises(ConfigError, match=r"modelnet40_shape_names\.txt is missing; download http"):
        list(list_text(text_config(folder)))


@pytest.mark.parametrize("name", ["sofa_0001", "chair", "../chair_0001", "chair/x_1", "chair_١"])
def test_a_name_without_a_class_is_named(tmp_path: Path, name: str) -> None:
    config = text_config(write_text(tmp_path))
    write(tmp_path / "modelnet40_train.txt", f"chair_0001\n\n{name}\n")
    message = r"line 3 of .*modelnet40_train\.txt is '.*', expected a name such as chair_0001"
    with pytest.raises(ConfigError, match=message):
        list(list_text(config))


def test_a_list_must_be_text(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path))
    write(tmp_path / "modelnet40_test.txt", b"chair_0001\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"modelnet40_test\.txt is not text in UTF-8"):
        list(list_text(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,0,0,0,1\n0,x,0,0,0,1\n", "does not hold lines of x,y,z,nx,ny,nz: .*'x'"),
        ("0,0\n", "does not hold lines of x,y,z,nx,ny,nz"),
        ("0 0 0 0 0 1\n", "does not hold lines of x,y,z,nx,ny,nz"),
        ("0,0,é\n", "does not hold lines of x,y,z,nx,ny,nz"),
        ("0,0,nan,0,0,1\n", "a coordinate that is not finite"),
    ],
)
def test_a_damaged_text_cloud_is_an_object_error(tmp_path: Path, text: str, message: str) -> None:
    config = text_config(write_text(tmp_path))
    item = next(list_text(config))
    write(tmp_path / "chair" / "chair_0001.txt", text)
    with pytest.raises(ObjectError, match=rf"chair_0001\.txt .*{message}"):
        load_text(item, config)


def test_rows_of_hdf5_are_found_under_another_machines_paths(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    objects = list(list_hdf5(config))
    assert [(item.object_id, item.split, item.label) for item in objects] == [
        ("mn/ply_data_train0/0", "train", "chair"),
        ("mn/ply_data_train0/1", "train", "night stand"),
        ("mn/ply_data_train0/2", "train", "night stand"),
        ("mn/ply_data_test0/0", "test", "chair"),
    ]
    # Nothing else is known of them.
    assert [item.captions for item in objects] == [(item.label,) for item in objects]
    for seed, item in zip([3, 4, 5, 1], objects, strict=True):
        np.testing.assert_array_equal(load_hdf5(item, config).points, cloud(seed))
    assert [red_of(photo) for photo in load_hdf5(objects[2], config).photos] == [0, 9, 10]
    assert load_hdf5(objects[0], config).photos == ()


def test_rows_take_their_captions_from_the_release(tmp_path: Path) -> None:
    folder = write_hdf5(tmp_path, names=True)
    captions = [item.captions for item in list_hdf5(hdf5_config(folder))]
    assert captions[1:] == [("night stand 0001",), ("night stand 0002",), ("chair 0890",)]
    write(folder / "ply_data_train_0_id2file.json", '["chair/chair_0001.ply"]')
    with pytest.raises(ConfigError, match="holds 3 rows, but the file of their names 1"):
        list(list_hdf5(hdf5_config(folder)))
    write(folder / "ply_data_train_0_id2file.json", "[" * 10_000)
    with pytest.raises(ConfigError, match=r"_id2file\.json is no list of names in JSON"):
        list(list_hdf5(hdf5_config(folder)))


def test_a_path_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    write_h5(tmp_path / "deep" / "ply_data_train0.h5", (1,))
    write(tmp_path / "train_files.txt", "deep/ply_data_train0.h5\n")
    assert [item.label for item in list_hdf5(config)] == ["night stand", "chair"]
    write(tmp_path / "train_files.txt", f"{tmp_path}/deep/ply_data_train0.h5\n")
    assert [item.label for item in list_hdf5(config)] == ["night stand", "chair"]


@pytest.mark.parametrize("line", ["../secret.h5", "{parent}/secret.h5", "a\0b", "x" * 300, ".."])
def test_files_outside_the_folder_are_not_followed(tmp_path: Path, line: str) -> None:
    write_h5(tmp_path / "secret.h5", (0,))
    config = hdf5_config(write_hdf5(tmp_path / "mn"))
    write(tmp_path / "mn" / "train_files.txt", "\n" + line.format(parent=tmp_path))
    with pytest.raises(ConfigError, match=r"line 2 of .*train_files\.txt names .* no file below"):
        list(list_hdf5(config))


def test_hdf5_files_take_nothing_from_other_files(tmp_path: Path) -> None:
    secret = write_h5(tmp_path / "secret.h5", (0, 0, 0))
    config = hdf5_config(write_hdf5(tmp_path / "mn"))
    path = tmp_path / "mn" / "ply_data_train0.h5"
    layout = h5py.VirtualLayout((3, 32, 3), np.float32)
    layout[:] = h5py.VirtualSource(secret, "data", (3, 32, 3))

    with h5py.File(path, "a") as file:
        del file["data"]
        file["data"] = h5py.ExternalLink(str(secret), "data")
    with pytest.raises(ConfigError, match=r"train0\.h5 is no HDF5 .* 'data' is a link"):
        list(list_hdf5(config))
    with h5py.File(path, "a") as file:
        del file["data"]
        file.create_virtual_dataset("data", layout)
    with pytest.raises(ConfigError, match="'data' takes its numbers from other files"):
        list(list_hdf5(config))
    with h5py.File(path, "a") as file:
        del file["data"]
        file.create_dataset("data", (3, 32, 3), np.float32, external=[(str(secret), 0, 2000)])
    with pytest.raises(ConfigError, match="'data' takes its numbers from other files"):
        list(list_hdf5(config))


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        ("data", (3, 32), np.float32, r"'data' has shape \(3, 32\)"),
        ("data", (3, 32, 6), np.float32, r"'data' has shape \(3, 32, 6\)"),
        ("data", (3, 32, 3), np.int32, "'data' has .* type int32"),
        ("data", (2_000_000, 32, 3), np.float32, "more than 1000000 clouds"),
        ("data", (3, 2_000_000, 3), np.float32, "or 1000000 points"),
        ("label", (2,), np.int32, r"'label' has shape \(2,\) .* expected \(3,\) or \(3, 1\)"),
        ("label", (3,), np.float32, "'label' has .* type float32"),
    ],
)
def test_datasets_of_another_shape_are_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], kind: type, message: str
) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    with h5py.File(tmp_path / "ply_data_train0.h5", "a") as file:
        del file[name]
        # In chunks that nothing was ever written to, a file of 2 kB promises any size.
        file.create_dataset(name, shape, kind, chunks=shape if len(shape) < 3 else (1, *shape[1:]))
    with pytest.raises(ConfigError, match=rf"train0\.h5 is no HDF5 file of clouds: .*{message}"):
        list(list_hdf5(config))


def test_a_bomb_of_a_chunk_is_not_unpacked(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    with h5py.File(tmp_path / "ply_data_train0.h5", "a") as file:
        del file["data"]
        shape = (3, 1_000_000, 3)
        file.create_dataset(
            "data", shape, np.float64, chunks=(30, *shape[1:]), maxshape=(None,) * 3
        )
    with pytest.raises(ConfigError, match="the chunks of its dataset 'data' are above 512000000"):
        list(list_hdf5(config))


def test_damaged_hdf5_is_named(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    objects = list(list_hdf5(config))
    path = tmp_path / "ply_data_train0.h5"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"train0\.h5 is no HDF5 .*truncated file.*fetch it anew"):
        list(list_hdf5(config))
    with pytest.raises(ObjectError, match=r"row 1 of .*train0\.h5 cannot be read: .*fetch it anew"):
        load_hdf5(objects[1], config)
    path.write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"train0\.h5 is no HDF5 file of clouds"):
        list(list_hdf5(config))


def test_a_flipped_byte_costs_its_object_only(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    path = tmp_path / "ply_data_train0.h5"
    with h5py.File(path, "a") as file:
        del file["data"]
        chunks = {"chunks": (1, 32, 3), "compression": "gzip", "fletcher32": True}
        data = file.create_dataset("data", data=np.ones((3, 32, 3), np.float32), **chunks)
        place = data.id.get_chunk_info(1).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 255
    path.write_bytes(content)
    objects = list(list_hdf5(config))
    with pytest.raises(ObjectError, match=r"row 1 of .*train0\.h5 cannot be read"):
        load_hdf5(objects[1], config)
    assert load_hdf5(objects[2], config).points.shape == (32, 3)


def test_a_cloud_that_is_not_finite_is_an_object_error(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    with h5py.File(tmp_path / "ply_data_train0.h5", "a") as file:
        file["data"][1, 5, 2] = np.nan
    objects = list(list_hdf5(config))
    with pytest.raises(ObjectError, match=r"row 1 of .* a coordinate that is not finite"):
        load_hdf5(objects[1], config)
    assert np.isfinite(load_hdf5(objects[0], config).points).all()


def test_a_label_without_a_class_is_named(tmp_path: Path) -> None:
    config = hdf5_config(write_hdf5(tmp_path))
    write_h5(tmp_path / "ply_data_test0.h5", (0, 1, 2))
    with pytest.raises(ConfigError, match=r"row 2 of .*test0\.h5 has label 2, but there are 2 cl"):
        list(list_hdf5(config))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_rows_of_a_pickle_are_those_of_the_lists(tmp_path: Path, protocol: int) -> None:
    config = pickle_config(write_pickle(tmp_path, protocol))
    objects = list(list_pickle(config))
    assert [item.object_id for item in objects] == [
        *("mn/chair_0001", "mn/night_stand_0001", "mn/night_stand_0002", "mn/chair_0890")
    ]
    assert [item.label for item in objects] == ["chair", "night stand", "night stand", "chair"]
    for row, item in zip([0, 1, 2, 0], objects, strict=True):
        points = load_pickle(item, config).points
        np.testing.assert_array_equal(points, cloud(row, columns=6)[:, :3])
        assert points.dtype == np.float32


def test_a_pickle_is_read_once(tmp_path: Path) -> None:
    config = pickle_config(write_pickle(tmp_path))
    objects = [item for item in list_pickle(config) if item.split == "train"]
    load_pickle(objects[0], config)
    (tmp_path / "modelnet40_train_8192pts_fps.dat").unlink()
    assert load_pickle(objects[1], config).points.shape == (32, 3)


def test_one_split_is_enough(tmp_path: Path) -> None:
    config = pickle_config(write_pickle(tmp_path))
    (tmp_path / "modelnet40_train_8192pts_fps.dat").unlink()
    assert [item.split for item in list_pickle(config)] == ["test"]
    (tmp_path / "modelnet40_test_8192pts_fps.dat").unlink()
    with pytest.raises(ConfigError, match=r"holds neither .*train.* nor .*test.*\.dat; download"):
        list(list_pickle(config))


def test_a_pickle_that_does_not_belong_to_its_list_is_noticed(tmp_path: Path) -> None:
    config = pickle_config(write_pickle(tmp_path))
    objects = list(list_pickle(config))
    broken = cloud(1, columns=6)
    broken[3, 1] = np.inf
    columns = [[cloud(0), broken], [np.array([1]), 1]]
    write(tmp_path / "modelnet40_train_8192pts_fps.dat", pickle.dumps(columns))
    with pytest.raises(ObjectError, match=r"row 0 of .* has label 1, but its list says chair_0001"):
        load_pickle(objects[0], config)
    with pytest.raises(ObjectError, match=r"row 1 of .* is no cloud of .* finite numbers"):
        load_pickle(objects[1], config)
    with pytest.raises(ObjectError, match="holds 2 clouds, fewer than its list has names"):
        load_pickle(objects[2], config)


def test_a_pickle_that_runs_code_is_refused_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pickle_config(write_pickle(tmp_path))
    objects = list(list_pickle(config))
    path = write(tmp_path / "modelnet40_train_8192pts_fps.dat", pickle.dumps([[eval], [0]]))
    with pytest.raises(ObjectError, match=r"asks for 'builtins\.eval'"):
        load_pickle(objects[0], config)
    # The file may take minutes to read: its other objects do not try again.
    path.unlink()
    with pytest.raises(ObjectError, match=r"asks for 'builtins\.eval'"):
        load_pickle(objects[1], config)


@pytest.mark.parametrize(
    ("file", "kind", "classes"),
    [
        ("modelnet40_off", ModelNetOff, 40),
        ("modelnet10_off", ModelNetOff, 10),
        ("modelnet40_text", ModelNetText, 40),
        ("modelnet40_hdf5", ModelNetHdf5, 40),
        ("modelnet40_pickle", ModelNetPickle, 40),
    ],
)
def test_the_configs_are_valid(file: str, kind: type, classes: int) -> None:
    config = load_config(PrepareConfig, CONFIGS / f"{file}.yaml")
    (source,) = config.sources
    assert type(source) is kind
    assert len(config.classes) == classes
    first = (CONFIGS / f"{file}.yaml").read_text().splitlines()[:6]
    assert any(f"python jobs/prepare.py configs/prepare/{file}.yaml" in line for line in first)
