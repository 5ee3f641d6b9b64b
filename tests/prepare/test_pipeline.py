"""From a catalogue to dataset folders, as Ray Data tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from crossmost_ray.config import ConfigError
from crossmost_ray.prepare.config import PrepareConfig, RenderConfig
from crossmost_ray.prepare.pipeline import prepare, sort_out
from crossmost_ray.prepare.render import RenderError
from crossmost_ray.prepare.rows import build_row
from crossmost_ray.prepare.shards import half_of
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.prepare.sources.base import Object

from .catalogue import (
    BOX,
    NOTCHED,
    catalogue_config,
    entry,
    model,
    write_catalogue,
)


@pytest.fixture(scope="module")
def ray_on_two_cpus() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    if started:
        ray.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    source = entry(1, "Chair", "chair") + entry(2, "Lamp", "lamp")
    target = (
        entry(1, "Chair", "chair")  # a copy of the source's chair
        + entry(2, "Chair", "chair2")
        + entry(3, "Chair", "chair3")
        + entry(4, "Sculpture", "sculpture")
        + entry(5, "Light", "light")
    )
    wedge = BOX.replace("v 1 1 0\n", "v 0.2 0.5 0\n")
    write_catalogue(
        tmp_path / "s.sh3f",
        source,
        model("chair") | model("lamp", BOX.replace("v 0 0 0", "v 0 0 -1")),
    )
    write_catalogue(
        tmp_path / "t.sh3f",
        target,
        model("chair")
        | model("chair2", NOTCHED)
        | model("chair3", NOTCHED.replace("v 0 1 1", "v 0 0.5 0.5"))
        | model("sculpture", wedge)
        | model("light", "v 0 0 0\n"),
    )
    mapping = {"classes": {"chair": {"s": ["Chair"], "t": ["Chair"]}, "lamp": {"s": ["Lamp"]}}}
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(mapping))
    return PrepareConfig(
        name="tiny",
        catalogues=(
            catalogue_config(tmp_path / "s.sh3f", "s"),
            catalogue_config(tmp_path / "t.sh3f", "t", "target"),
        ),
        licenses={"CC0": "https://example.org/cc0"},
        classes=str(tmp_path / "classes.yaml"),
        output=str(tmp_path / "out"),
        num_points=64,
        render=RenderConfig(resolution=32, num_views=3),
    )


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    shards = sorted(folder.glob("*.parquet"))
    return {row["object_id"]: row for path in shards for row in pq.read_table(path).to_pylist()}


@pytest.mark.ray
def test_catalogues_become_datasets(ray_on_two_cpus: None, config: PrepareConfig) -> None:
    prepared = prepare(config)
    out = Path(config.output)

    source = rows_of(out / "source")
    assert {key: row["label"] for key, row in source.items()} == {
        "s/chair": "chair",
        "s/lamp": "lamp",
    }
    halves = {key: half for half in "ab" for key in rows_of(out / f"target_{half}")}
    assert halves == {key: half_of(key) for key in ("t/chair2", "t/chair3")}
    assert list(rows_of(out / "target_other")) == ["t/sculpture"]
    assert [len(row["views"]) for row in source.values()] == [3, 3]

    reasons = {reject["object_id"]: reject["reason"] for reject in prepared.rejects}
    assert reasons == {
        "t/chair": "its mesh is that of s/chair, a source object",
        "t/light": "tiny/light/box.obj holds no face with an area",
    }
    assert json.loads((out / "rejects.json").read_text())["rejects"] == prepared.rejects
    manifest = json.loads((out / "source" / "manifest.json").read_text())
    assert manifest["classes"] == ["chair", "lamp"]
    assert manifest["counts"]["sources"] == {"s": 2}
    assert manifest["left_out"] == {"s": 0}
    halves_manifest = json.loads((out / "target_a" / "manifest.json").read_text())
    assert halves_manifest["left_out"] == {"t": 2}
    assert manifest["cameras"]["views"][1] == {"azimuth": 135.0, "elevation": 35.0}

    # Again, with the tasks in whatever order they finish: the same bytes.
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    prepare(config)
    assert before == {path: path.read_bytes() for path in out.rglob("*.parquet")}


@pytest.mark.ray
def test_a_worker_that_cannot_render_stops_the_run(
    ray_on_two_cpus: None, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RenderError("apt-get install libegl1")

    # The task is sent to the workers by value, and takes this replacement with it.
    monkeypatch.setattr("crossmost_ray.prepare.pipeline.build_row", fail)
    with pytest.raises(ConfigError, match="a worker cannot render: apt-get install libegl1"):
        prepare(config)
    assert not Path(config.output).exists()


@pytest.mark.ray
def test_an_object_that_crashes_its_task_does_not_stop_the_rest(
    ray_on_two_cpus: None, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_on_lamps(item: Object, config: PrepareConfig) -> dict[str, Any]:
        if item.caption == "Lamp":
            raise RecursionError("a bug")
        return build_row(item, config)

    monkeypatch.setattr("crossmost_ray.prepare.pipeline.build_row", crash_on_lamps)
    prepared = prepare(config)
    assert prepared.num_rows["source"] == 1
    assert "s/lamp" in {reject["object_id"] for reject in prepared.rejects}


@pytest.mark.ray
def test_if_every_object_fails_nothing_is_written(
    ray_on_two_cpus: None, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(item: Object, config: PrepareConfig) -> dict[str, Any]:
        raise RecursionError("a bug")

    monkeypatch.setattr("crossmost_ray.prepare.pipeline.build_row", crash)
    with pytest.raises(ConfigError, match="none of the 7 objects became a row"):
        prepare(config)
    assert not Path(config.output).exists()


def test_an_object_whose_task_died_is_reported(config: PrepareConfig) -> None:
    objects = list(SOURCES["sweethome3d"].read_objects(config.catalogues[0]))
    built = {"s/chair": {"row": {"object_id": "s/chair"}, "mesh_sha256": "1"}}
    rows, rejects = sort_out(
        objects, built, {"s/chair": "chair", "s/lamp": None}, config.catalogues
    )
    # A source object's class teaches as a second caption.
    assert rows == [{"object_id": "s/chair", "label": "chair", "captions": ["Chair", "chair"]}]
    assert rejects == [
        {
            "object_id": "s/lamp",
            "caption": "Lamp",
            "reason": "its task failed; see Ray's log",
        }
    ]


def test_the_job_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    text = Path("configs/prepare/furniture.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    values["catalogues"][0]["path"] = str(tmp_path / "none.sh3f")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    run = subprocess.run(
        [sys.executable, "jobs/prepare.py", str(tmp_path / "c.yaml"), f"output={tmp_path}/out"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines() == [
        f"error: the catalogue {tmp_path}/none.sh3f is missing; install it (apt-get install "
        "sweethome3d-furniture) or set the path of the catalogue 'scopia'"
    ]
