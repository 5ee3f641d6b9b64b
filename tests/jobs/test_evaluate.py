"""Measuring model folders on real Ray processes, some of which are killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from crossmost_ray.config import ConfigError, EvaluateConfig, parse_config
from crossmost_ray.evaluation import cluster
from crossmost_ray.evaluation.actor import ShardPredictor
from crossmost_ray.evaluation.measure import evaluate
from crossmost_ray.evaluation.plan import Unit
from crossmost_ray.evaluation.predictor import EvaluationBatch, Predictor
from crossmost_ray.evaluation.report import print_evaluation
from tests.synthetic import CLASSES, tiny_model, write_shards

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray

NUM_OBJECTS = 20
NUM_FILES = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a labelled folder of ten shards, and an unlabelled one. Shared: only read."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("one", "two")):
        tiny_model(folder / name, seed=seed)
    write_shards(folder / "shards", num_objects=NUM_OBJECTS, num_files=NUM_FILES)
    write_shards(folder / "unknown", num_objects=3, num_files=1, seed=1, labels=False)
    return folder


def values(inputs: Path, output: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "both",
        "models": {name: str(inputs / name) for name in ("one", "two")},
        "splits": {"all": str(inputs / "shards")},
        "num_points": 128,
        "output": str(output),
        "evaluation": {"num_views": 2, "point_samples": 1, "batch_size": 1},
    }
    return base | changes


def config(inputs: Path, output: Path, **changes: Any) -> EvaluateConfig:
    return parse_config(EvaluateConfig, values(inputs, output, **changes), "the test")


def read_predictions(folder: Path) -> pa.Table:
    """All predictions below a folder, as DuckDB or pandas would read them."""
    files = sorted(folder.glob("predictions/*/*.parquet"))
    table = pa.concat_tables(pq.ParquetFile(file).read() for file in files)
    return table.sort_by([(name, "ascending") for name in ("split", "model", "object_id")])


@pytest.fixture(scope="module")
def whole(ray_cluster: None, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a measurement that nothing disturbed, on every CPU that there is."""
    output = tmp_path_factory.mktemp("whole")
    splits = {
        "all": str(inputs / "shards"),
        "unknown": {"shards": str(inputs / "unknown"), "classes": ["ball", "pipe", "ring"]},
    }
    evaluation = {"num_views": 2, "point_samples": 1, "corruptions": ["noise-5"], "num_actors": 4}
    evaluation |= {"store": ["embeddings"]}
    results, summary = evaluate(config(inputs, output, splits=splits, evaluation=evaluation))
    assert results.local is not None
    assert json.loads((results.local / "metrics.json").read_text()) == summary
    print_evaluation(summary, results)
    return results.local


def test_two_models_are_measured_side_by_side(whole: Path) -> None:
    summary = json.loads((whole / "metrics.json").read_text())
    assert summary["classes"] == {"all": list(CLASSES), "unknown": ["ball", "pipe", "ring"]}
    assert summary["splits"].keys() == {"all", "all+noise-5", "unknown", "unknown+noise-5"}
    table = read_predictions(whole)
    count = Counter((r["split"], r["model"], r["object_id"]) for r in table.to_pylist())
    assert set(count.values()) == {1}
    assert len(count) == 2 * 2 * (NUM_OBJECTS + 3)
    for name in ("one", "two"):
        metrics = summary["splits"]["all"][name]
        assert metrics["labelled"] == NUM_OBJECTS
        rows = [r for r in table.to_pylist() if (r["split"], r["model"]) == ("all", name)]
        right = sum(row["ranked_fused"][0] == row["label"] for row in rows)
        assert metrics["fused"]["top1"] == pytest.approx(100 * right / NUM_OBJECTS)
        assert "gain" not in metrics, "neither of them is the start of the other"
        unknown = summary["splits"]["unknown"][name]
        assert unknown["labelled"] == 0
        assert unknown["label_free"]["fused"]["predicted"].keys() == {"ball", "pipe", "ring"}
    (pair,) = summary["comparisons"]["all"]
    assert (pair["before"], pair["after"]) == ("one", "two")
    gain = summary["splits"]["all"]["two"]["point"]["top1"]
    gain -= summary["splits"]["all"]["one"]["point"]["top1"]
    assert pair["point"]["difference"] == pytest.approx(gain)
    assert summary["corruptions"]["all"]["one"]["noise"].keys() == {"image", "point", "fused"}
    assert "| model | top-1 | top-5 |" in (whole / "report.md").read_text()
    confusion = pq.read_table(whole / "confusion.parquet").to_pylist()
    cells = [
        r for r in confusion if (r["split"], r["model"], r["opinion"]) == ("all", "one", "fused")
    ]
    assert sum(row["objects"] for row in cells) == NUM_OBJECTS


class Mortal(ShardPredictor):
    """Its process is killed in the middle of a shard, the first time that it comes there."""

    def _batches(self, unit: Unit, predictor: Predictor) -> Iterator[EvaluationBatch]:
        mark = Path(str(self.results)) / "killed"
        for place, batch in enumerate(super()._batches(unit, predictor)):
            if unit.name == "part-00004.parquet" and place == 1 and not mark.exists():
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def assert_same_answers(whole: Path, folder: Path) -> None:
    """Exactly one row per object and model, and what an undisturbed measurement says."""
    expected = read_predictions(whole)
    expected = expected.filter(pa.compute.field("split") == "all")
    found = read_predictions(folder)
    for name in ("object_id", "model", "label", "ranked_image", "ranked_point", "ranked_fused"):
        assert found[name] == expected[name]


def test_an_actor_killed_in_the_middle_of_a_shard_costs_and_doubles_nothing(
    whole: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ShardPredictor", Mortal)
    evaluate(config(inputs, tmp_path))
    assert int((tmp_path / "both/killed").read_text()) != os.getpid()
    assert_same_answers(whole, tmp_path / "both")


class Doomed(ShardPredictor):
    """One of its shards kills every process that takes it."""

    def run(self, unit: Unit) -> int:
        if unit.name == "part-00001.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(unit)


def test_a_shard_that_kills_every_process_ends_the_job_with_a_sentence(
    ray_cluster: None, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ShardPredictor", Doomed)
    monkeypatch.setattr(cluster, "MAX_ROUNDS", 1)
    shards = write_shards(tmp_path / "shards", num_objects=2)
    changes = {"splits": {"all": str(shards)}, "evaluation": {"num_views": 2, "num_actors": 2}}
    with pytest.raises(ConfigError, match=r"a shard's process died again .*the same command") as no:
        evaluate(config(inputs, tmp_path, **changes))
    assert len(list((tmp_path / "both/predictions/all").glob("*.parquet"))) <= 1
    # No actor is left, though the error that remembers them all is still here.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, (no, ray.available_resources())
        time.sleep(0.2)


@pytest.mark.cluster
def test_a_killed_driver_is_gone_on_with(whole: Path, inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(inputs, tmp_path)))
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/evaluate.py"), str(path)],
        env={**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    done = tmp_path / "both/predictions/all"
    deadline = time.monotonic() + 600
    while not list(done.glob("*.parquet")):
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        assert time.monotonic() < deadline, "the first shard took ten minutes"
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    # Its actors end with it, but not at once.
    time.sleep(3)
    before = {file.name: file.stat().st_mtime_ns for file in done.glob("*.parquet")}
    assert len(before) < NUM_FILES, "it was over before it could be killed"

    evaluate(config(inputs, tmp_path))
    after = {file.name: file.stat().st_mtime_ns for file in done.glob("*.parquet")}
    assert len(after) == NUM_FILES
    assert after | before == after, "what was there was not made anew"
    assert_same_answers(whole, tmp_path / "both")


def test_a_row_that_cannot_be_used_is_one_sentence(
    whole: Path, inputs: Path, tmp_path: Path
) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=4, corrupt={3: "bad_view"})
    changes = {"splits": {"all": str(shards)}, "evaluation": {"num_views": 4, "point_samples": 1}}
    with pytest.raises(ConfigError, match=r"^all: part-00001.parquet, row 1 \(synthetic/0-3\): vi"):
        evaluate(config(inputs, tmp_path, **changes))
    # What was done is kept, and goes on once it is said what to do with the row.
    skipping = config(inputs, tmp_path, **changes)
    skipping = replace(skipping, evaluation=replace(skipping.evaluation, bad_rows="skip"))
    _, summary = evaluate(skipping)
    metrics = summary["splits"]["all"]["one"]
    assert (metrics["objects"], metrics["left_out"]) == (3, 1)


def test_what_cannot_be_measured_is_refused(whole: Path, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model folder '.*no/such'"):
        evaluate(config(inputs, tmp_path, models={"one": "no/such"}))
    with pytest.raises(ConfigError, match=r"num_actors 5 takes 5 CPUs and the cluster has 4"):
        evaluate(config(inputs, tmp_path, evaluation={"num_actors": 5}))
    with pytest.raises(ConfigError, match=r"takes 1 GPUs and the cluster has 0"):
        evaluate(config(inputs, tmp_path, name="gpu", use_gpu=True))
    with pytest.raises(ConfigError, match=r"differs in .*splits.all.num_points.* another `name`"):
        evaluate(config(inputs, whole.parent, num_points=64))
