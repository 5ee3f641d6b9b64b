"""From sources to dataset folders, as Ray Data tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from crossmost_ray.config import ConfigError
from crossmost_ray.data.shards import list_shards
from crossmost_ray.prepare import pipeline
from crossmost_ray.prepare.config import PrepareConfig, RenderConfig
from crossmost_ray.prepare.pipeline import prepare
from crossmost_ray.prepare.plan import Chunk
from crossmost_ray.prepare.render import RenderError
from crossmost_ray.prepare.rows import Built
from crossmost_ray.prepare.shards import half_of
from crossmost_ray.schema import UNFINISHED_NAME
from crossmost_ray.storage import Store

from .catalogue import BOX, NOTCHED, catalogue_config, entry, model, write_catalogue

ROOT = Path(__file__).parents[2]


def values(folder: Path) -> dict[str, Any]:
    """A config of two catalogues, and the catalogues."""
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
        folder / "s.sh3f",
        source,
        model("chair") | model("lamp", BOX.replace("v 0 0 0", "v 0 0 -1")),
    )
    write_catalogue(
        folder / "t.sh3f",
        target,
        model("chair")
        | model("chair2", NOTCHED)
        | model("chair3", NOTCHED.replace("v 0 1 1", "v 0 0.5 0.5"))
        | model("sculpture", wedge)
        | model("light", "v 0 0 0\n"),
    )
    mapping = {"classes": {"chair": {"s": ["Chair"], "t": ["Chair"]}, "lamp": {"s": ["Lamp"]}}}
    (folder / "classes.yaml").write_text(yaml.safe_dump(mapping))
    return {
        "name": "tiny",
        "sources": (
            catalogue_config(folder / "s.sh3f", "s", split="source", teach_labels=True),
            catalogue_config(folder / "t.sh3f", "t", split="target", halves=True),
        ),
        "licenses": {"CC0": "https://example.org/cc0"},
        "class_mapping": str(folder / "classes.yaml"),
        "output": str(folder / "out"),
        "num_points": 64,
        "render": RenderConfig(resolution=32, num_views=3),
    }


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(**values(tmp_path))


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    shards = sorted(folder.glob("*.parquet"))
    return {row["object_id"]: row for path in shards for row in pq.read_table(path).to_pylist()}


def files_of(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.ray
def test_catalogues_become_datasets(
    ray_cluster: None, config: PrepareConfig, tmp_path: Path, s3: str
) -> None:
    prepared = prepare(config)
    out = Path(config.output)

    source = rows_of(out / "source")
    assert {key: row["label"] for key, row in source.items()} == {
        "s/chair": "chair",
        "s/lamp": "lamp",
    }
    assert source["s/chair"]["captions"] == ["Chair", "chair"]
    halves = {key: half for half in "ab" for key in rows_of(out / f"target_{half}")}
    assert halves == {key: half_of(key) for key in ("t/chair2", "t/chair3")}
    assert list(rows_of(out / "target_other")) == ["t/sculpture"]
    assert [len(row["views"]) for row in source.values()] == [3, 3]

    reasons = {reject["object_id"]: reject["reason"] for reject in prepared.rejects}
    assert reasons == {
        "t/chair": "its mesh is that of s/chair, of another source",
        "t/light": "tiny/light/box.obj holds no face with an area",
    }
    assert json.loads((out / "rejects.json").read_text())["rejects"] == prepared.rejects
    manifest = json.loads((out / "source" / "manifest.json").read_text())
    assert manifest["classes"] == ["chair", "lamp"]
    assert manifest["counts"]["sources"] == {"s": 2}
    assert manifest["counts"]["views"] == {"renders": 2}
    assert manifest["sources"]["s"]["axes"] == "xyz"
    assert manifest["left_out"] == {}
    assert manifest["cameras"]["views"][1] == {"azimuth": 135.0, "elevation": 35.0}
    left_out = [
        json.loads((out / name / "manifest.json").read_text())["left_out"].get("t", 0)
        for name in prepared.manifests
    ]
    assert sum(left_out) == 2
    assert "ATTRIBUTION.md" in files_of(out)
    assert not list(out.rglob(UNFINISHED_NAME)) + list(out.rglob(".*"))

    # Finished: nothing is done again.
    before = files_of(out)
    assert prepare(config).num_built == 0
    # Stopped in its last moment, when some marks were gone and others not: nothing is lost.
    unfinished = json.dumps({"fingerprint": manifest["fingerprint"]})
    (out / "source" / UNFINISHED_NAME).write_text(unfinished)
    prepare(config)
    assert files_of(out) == before
    # Elsewhere, by other tasks, even on another kind of storage: the same bytes.
    store = Store(s3.format("tiny"))
    prepare(PrepareConfig(**{**values(tmp_path), "output": store.address}))
    assert before == {name: store.read(name) for name in before}
    assert sorted(name.split("/")[0] for name in before if name.count("/") == 1) == sorted(
        folder for folder in store.names() if "." not in folder for _ in store.names(folder)
    )

    other = PrepareConfig(**{**values(tmp_path), "num_points": 32})
    with pytest.raises(ConfigError, match=r"source holds another preparation; .*overwrite=true"):
        prepare(other)
    assert files_of(out) == before
    prepare(PrepareConfig(**{**values(tmp_path), "num_points": 32, "overwrite": True}))
    assert {len(row["points"]) for row in rows_of(out / "source").values()} == {32}


@pytest.mark.ray
def test_a_worker_that_cannot_render_stops_the_run(
    ray_cluster: None, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RenderError("apt-get install libegl1")

    # The task is sent to the workers by value, and takes this replacement with it.
    monkeypatch.setattr("crossmost_ray.prepare.pipeline.build_chunk", fail)
    with pytest.raises(ConfigError, match="a worker cannot render: apt-get install libegl1"):
        prepare(config)
    assert not list(Path(config.output).rglob("*.parquet"))


@pytest.mark.ray
def test_an_object_that_kills_its_process_costs_itself_alone(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(**{**values(tmp_path), "shard_mb": 100.0})
    real = pipeline.build_chunk

    def die_of_lamps(chunk: Chunk, config: PrepareConfig) -> list[Built]:
        if any(item.object_id == "s/lamp" for item in chunk.objects):
            os._exit(139)
        return real(chunk, config)

    monkeypatch.setattr("crossmost_ray.prepare.pipeline.build_chunk", die_of_lamps)
    prepared = prepare(config)
    assert prepared.manifests["source"]["counts"]["rows"] == 1, (
        "the chair of the same shard is there"
    )
    reasons = {reject["object_id"]: reject["reason"] for reject in prepared.rejects}
    assert reasons["s/lamp"] == "its process died; see Ray's log"


@pytest.mark.ray
def test_if_every_object_fails_nothing_is_written(ray_cluster: None, tmp_path: Path) -> None:
    lines = entry(1, "Chair", "chair", depth="0") + entry(2, "Lamp", "lamp", depth="0")
    write_catalogue(tmp_path / "s.sh3f", lines, model("chair"))
    config = PrepareConfig(
        name="none",
        sources=(catalogue_config(tmp_path / "s.sh3f", "s"),),
        licenses={"CC0": "x"},
        output=str(tmp_path / "out"),
    )
    with pytest.raises(ConfigError, match="none of the 2 objects became a row"):
        prepare(config)
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.ray
def test_a_preparation_that_is_killed_goes_on_and_redoes_no_finished_shard(
    ray_cluster: None, tmp_path: Path
) -> None:
    number = 20
    bent = [BOX.replace("v 1 1 1", f"v 0.7 0.8 {0.5 + 0.01 * k:.2f}") for k in range(number)]
    lines = "".join(entry(k + 1, "Chair", f"o{k}") for k in range(number))
    files = {path: data for k in range(number) for path, data in model(f"o{k}", bent[k]).items()}
    write_catalogue(tmp_path / "s.sh3f", lines, files)
    written = {
        "name": "killed",
        "sources": [
            {
                "kind": "sweethome3d",
                "name": "s",
                "path": str(tmp_path / "s.sh3f"),
                "package": "none",
                "split": "all",
            }
        ],
        "output": str(tmp_path / "out"),
        "shard_mb": 0.001,
        "num_points": 64,
        "render": {"resolution": 32, "num_views": 3},
    }
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump(written))
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), str(path)]
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    records = tmp_path / "out/all/.records"
    deadline = time.monotonic() + 300
    while not records.is_dir() or len(list(records.glob("part-*.json"))) < 3:
        assert job.poll() is None, job.stderr.read() if job.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)  # Ray's own processes notice that their driver is gone
    done = {p.stem for p in records.glob("part-*.json")}
    assert 3 <= len(done) < number, "it was over before it could be killed"
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out/all").glob("*.parquet")}
    with pytest.raises(ConfigError, match=r"was not finished .* it goes on where it stopped"):
        list_shards(str(tmp_path / "out/all"), ["object_id"])

    config = PrepareConfig(**written)  # type: ignore[arg-type]
    prepared = prepare(config)
    assert prepared.manifests["all"]["counts"]["rows"] == number
    assert prepared.num_built < number
    for name in done:
        now = (tmp_path / "out/all" / f"{name}.parquet").stat().st_mtime_ns
        assert now == times[f"{name}.parquet"], "a finished shard was written again"
    prepare(PrepareConfig(**{**written, "output": str(tmp_path / "undisturbed")}))  # type: ignore[arg-type]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_the_job_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "jobs/prepare.py", "configs/prepare/furniture.yaml"),
            *(f"sources.0.path={tmp_path}/none.sh3f", f"output={tmp_path}/out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": "."},
        cwd=ROOT,
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines() == [
        f"error: the catalogue {tmp_path}/none.sh3f is missing; install it (apt-get install "
        "sweethome3d-furniture) or set the path of the catalogue 'scopia'"
    ]
