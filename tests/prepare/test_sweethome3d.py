"""Catalogues: what is listed, and how a model is turned and stretched."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.mesh import Mesh, sample_surface
from crossmost_ray.prepare.sources.sweethome3d import list_objects, load, parse_properties

from .catalogue import BOX, catalogue_config, entry, model, write_catalogue


def only_mesh(path: Path) -> Mesh:
    """The mesh of a catalogue's first object."""
    config = catalogue_config(path)
    mesh = load(next(list_objects(config)), config).mesh
    assert mesh is not None
    return mesh


def test_objects_carry_what_the_catalogue_says(tmp_path: Path) -> None:
    properties = "id=Tiny\n" + entry(1, "Caf\\u00e9 chair", "chair") + entry(2, "Box", "box")
    path = write_catalogue(tmp_path / "t.sh3f", properties, model("chair") | model("box"))
    chair, box = list_objects(catalogue_config(path))
    assert (chair.object_id, chair.captions[0], chair.author) == ("tiny/chair", "Café chair", "Ada")
    assert (chair.source, chair.split, chair.label) == ("tiny", "all", None)
    assert box.object_id == "tiny/box"


def test_a_model_is_stretched_to_the_size_in_the_catalogue(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path / "t.sh3f", entry(1, "Box", "box"), model("box"))
    # 100 wide, 200 high, 50 deep, around the origin.
    np.testing.assert_allclose(only_mesh(path).bounds, [[-50, -100, -25], [50, 100, 25]])


def test_a_model_is_turned_before_it_is_stretched(tmp_path: Path) -> None:
    # The matrix turns z upwards to y; the notch of the model, at z = 2, ends up on top.
    tip = BOX.replace("v 0 0 1", "v 0 0 2")
    lines = entry(1, "Box", "box", modelRotation="1 0 0 0 0 1 0 -1 0")
    path = write_catalogue(tmp_path / "t.sh3f", lines, model("box", tip))
    mesh = only_mesh(path)
    np.testing.assert_allclose(mesh.bounds, [[-50, -100, -25], [50, 100, 25]])
    (piece,) = mesh.pieces
    highest = piece.vertices[piece.vertices[:, 1].argmax()]
    np.testing.assert_allclose(highest, [-50, 100, 25])


def test_a_flat_model_stays_flat(tmp_path: Path) -> None:
    flat = "v 0 0 0\nv 1 0 0\nv 0 0 1\nf 1 2 3\n"
    path = write_catalogue(tmp_path / "t.sh3f", entry(1, "Rug", "rug"), model("rug", flat))
    mesh = only_mesh(path)
    np.testing.assert_allclose(mesh.bounds, [[-50, 0, -25], [50, 0, 25]])


def test_textures_with_backslashes_and_doubled_slashes_are_found(tmp_path: Path) -> None:
    lines = entry(1, "Box", "box", model="//tiny//box/box.obj")
    path = write_catalogue(tmp_path / "t.sh3f", lines, model("box"))
    mesh = only_mesh(path)
    _, colors = sample_surface(mesh, 32, np.random.default_rng(0))
    assert (colors == (150, 90, 30)).all()


def test_the_jar_knows_its_own_materials(tmp_path: Path) -> None:
    materials = b"newmtl amber\nKd 1 0 0\n"
    constant = b"\x01" + len(materials).to_bytes(2, "big") + materials + b"\x01\x00\x03abc"
    obj = "v 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl amber\nf 1 2 3\n"
    files = model("box", obj) | {
        "com/eteks/sweethome3d/j3d/OBJLoader.class": b"\xca\xfe\xba\xbe" + constant
    }
    path = write_catalogue(tmp_path / "t.jar", entry(1, "Box", "box"), files)
    mesh = only_mesh(path)
    assert mesh.pieces[0].material.color == (1.0, 0.0, 0.0)


def test_a_light_source_without_a_surface_is_a_mesh_error(tmp_path: Path) -> None:
    path = write_catalogue(
        tmp_path / "t.sh3f", entry(1, "Light", "light"), model("light", "v 0 0 0\n")
    )
    with pytest.raises(ObjectError, match="holds no face with an area"):
        only_mesh(path)


def test_properties_are_in_the_order_of_their_numbers() -> None:
    entries = parse_properties(b"name#10=Ten\r\n# name#3=No\nname#2 = Two \\: 2\nid=whole file\n")
    assert entries == [{"name": "Two : 2"}, {"name": "Ten"}]


def test_a_missing_catalogue_names_the_package(tmp_path: Path) -> None:
    config = catalogue_config(tmp_path / "none.sh3f")
    with pytest.raises(
        ConfigError, match=r"none.sh3f is missing; .*apt-get install tiny-furniture"
    ):
        list(list_objects(config))


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.sh3f"
    path.write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(ConfigError, match=r"t.sh3f is not a complete zip archive; fetch it anew"):
        list(list_objects(catalogue_config(path)))


def test_an_archive_without_furniture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConfigError, match=r"t.zip holds none of .* not a furniture catalogue"):
        list(list_objects(catalogue_config(path)))


def test_an_incomplete_entry_is_named(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path / "t.sh3f", entry(1, "Box", "box", width="wide"), {})
    with pytest.raises(ConfigError, match=r"entry 1 of .*t\.sh3f \(Tiny#box\) .*'wide'"):
        list(list_objects(catalogue_config(path)))


def test_a_damaged_file_costs_its_object_only(tmp_path: Path) -> None:
    path = write_catalogue(
        tmp_path / "t.sh3f",
        entry(1, "Chair", "chair") + entry(2, "Box", "box"),
        model("chair") | model("box"),
    )
    data = bytearray(path.read_bytes())
    first = data.index(b"mtllib box.mtl")
    data[data.index(b"mtllib box.mtl", first + 1)] ^= 255
    path.write_bytes(data)
    config = catalogue_config(path)
    chair, box = list_objects(config)
    assert load(chair, config).mesh is not None
    with pytest.raises(ObjectError, match=r"tiny/box/box\.obj in .* is damaged"):
        load(box, config)


def test_a_model_without_a_size_is_a_mesh_error(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path / "t.sh3f", entry(1, "Box", "box", depth="0"), model("box"))
    with pytest.raises(ObjectError, match="its size in the catalogue is"):
        only_mesh(path)
