"""Every kind of collection through the whole preparation, and out of the shards into a task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import trimesh

from crossmost_ray.config import DataConfig
from crossmost_ray.data.shards import check_file, list_shards
from crossmost_ray.data.stream import RawCollate, pair_rows
from crossmost_ray.prepare.config import (
    Folder,
    ModelNetHdf5,
    ModelNetOff,
    ModelNetPickle,
    ModelNetText,
    PrepareConfig,
    RenderConfig,
    ScanObjectNN,
    kind_of,
)
from crossmost_ray.prepare.pipeline import prepare
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.schema import SHARD_SCHEMA

from . import layouts_modelnet, layouts_scans
from .catalogue import catalogue_config, entry, model, write_catalogue

pytestmark = pytest.mark.ray


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    """One small collection of each kind."""
    mine = tmp_path / "mine/ball"
    mine.mkdir(parents=True)
    trimesh.creation.icosphere(2).export(mine / "Round thing.stl")
    np.save(mine / "cloud.npy", np.random.default_rng(0).normal(size=(99, 3)))
    (mine / "broken.ply").write_bytes(b"ply\nelement vertex 9999999999\nend_header\n")
    catalogue = write_catalogue(tmp_path / "c.sh3f", entry(1, "Chair", "chair"), model("chair"))
    off = layouts_modelnet.write_off(tmp_path / "off", tmp_path / "off-images")
    text = layouts_modelnet.write_text(tmp_path / "text")
    hdf5 = layouts_modelnet.write_hdf5(tmp_path / "hdf5")
    pickled = layouts_modelnet.write_pickle(tmp_path / "pickle")
    scans = layouts_modelnet.write_release(tmp_path / "scans")
    for name in ("shapenet", "redwood", "co3d"):
        (tmp_path / name).mkdir()
    return PrepareConfig(
        name="everything",
        output=str(tmp_path / "out"),
        num_points=32,
        render=RenderConfig(resolution=32, num_views=2),
        licenses={"CC0": "https://example.org/cc0"},
        sources=(
            ModelNetOff(
                kind="modelnet_off", name="off", path=str(off), images=str(tmp_path / "off-images")
            ),
            ModelNetText(kind="modelnet_text", name="text", path=str(text)),
            ModelNetHdf5(kind="modelnet_hdf5", name="hdf5", path=str(hdf5)),
            ModelNetPickle(kind="modelnet_pickle", name="pickle", path=str(pickled)),
            ScanObjectNN(kind="scanobjectnn", name="scans", path=str(scans)),
            layouts_scans.write_shapenet(tmp_path / "shapenet"),
            layouts_scans.write_redwood(tmp_path / "redwood"),
            layouts_scans.write_co3d(tmp_path / "co3d"),
            Folder(kind="folder", name="own", path=str(tmp_path / "mine"), class_folders=True),
            catalogue_config(catalogue, "shop"),
        ),
    )


def test_every_kind_becomes_rows_of_one_schema(ray_cluster: None, config: PrepareConfig) -> None:
    assert {kind_of(source) for source in config.sources} == SOURCES.keys()
    prepared = prepare(config)
    out = Path(config.output)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"train", "test", "all"}

    rows = []
    for split in ("train", "test", "all"):
        manifest = json.loads((out / split / "manifest.json").read_text())
        for source, facts in manifest["sources"].items():
            assert facts["axes"] == config.source(source).axes
        for name in list_shards(str(out / split), SHARD_SCHEMA.names):
            table = pq.read_table(out / split / name)
            assert table.schema.equals(SHARD_SCHEMA)
            check = check_file(
                str(out / split),
                name,
                SHARD_SCHEMA.names,
                num_points=32,
                num_views=1,
                view_size=48,
            )
            assert check.bad == ()
            # And on to what training reads of it.
            columns = ["object_id", "points", "views", "captions"]
            pairs = pair_rows(
                table.select(columns), num_views=1, teacher_views=1, left_out=frozenset()
            )
            batch = RawCollate(48)(pairs)
            assert batch.points.shape == (table.num_rows, 32, 3)
            assert batch.images.shape == (table.num_rows, 1, 3, 48, 48)
            rows += table.to_pylist()
    assert {row["source"] for row in rows} == {source.name for source in config.sources}
    for row in rows:
        points = np.array(row["points"])
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-3)
        assert row["captions"][0]
    by_id = {row["object_id"]: row for row in rows}
    assert by_id["own/ball/Round thing"]["label"] == "ball"
    assert len(by_id["own/ball/cloud"]["views"]) == 10
    # The faults that the layouts hold, and no others.
    assert {reject["object_id"].split("/")[0] for reject in prepared.rejects} <= {"own"}
    assert "own/ball/broken" in {reject["object_id"] for reject in prepared.rejects}
    sizes = DataConfig(shards=str(out / "train"), num_views=1, num_points=32)
    assert sizes.num_views == 1


def test_without_labels_no_class_is_anywhere(ray_cluster: None, config: PrepareConfig) -> None:
    few = tuple(source for source in config.sources if source.name in ("scans", "own"))
    prepare(replace(config, sources=few, ignore_labels=True))
    for file in Path(config.output).rglob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            assert row["label"] is None
            assert not {"chair", "toilet", "ball"} & set(row["captions"])
