"""The main job on real Ray processes, on four easy shapes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from crossmost_ray.config import AdaptConfig, ConfigError, load_config
from crossmost_ray.evaluation.adaptation import adapt_and_evaluate
from crossmost_ray.evaluation.oracle import oracle_checkpoint
from crossmost_ray.evaluation.predictor import Predictor
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.storage import Store
from crossmost_ray.training.checkpoint import checkpoint_name, list_checkpoints, load_state
from crossmost_ray.training.events import read_events
from crossmost_ray.training.export import export_adapted
from crossmost_ray.training.trainer import SNAPSHOT_NAME, train
from crossmost_ray.training.watch import read_progress
from tests.conftest import ObjectStore
from tests.jobs.runs import (
    adapt_config,
    assert_same,
    processes_of_cluster,
    values,
    weights,
    write_inputs,
)
from tests.synthetic import CLASSES, write_shards

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Finished:
    """A finished run, what it was made from, and its metrics."""

    inputs: Path
    config: AdaptConfig
    folder: Path
    summary: dict[str, Any]

    @property
    def run(self) -> Store:
        return Store(str(self.folder))

    def weights(self) -> dict[str, torch.Tensor]:
        return weights(self.run)


# Half a CPU each, so that they and the stream fit on two, which a driver of its own may have.
SHARED: dict[str, Any] = {
    "name": "whole",
    "keep_checkpoints": 6,
    "optim": {"epochs": 3},
    "cluster": {"num_workers": 2, "cpus_per_worker": 0.5, "checkpoint_steps": 2},
}
"""Sections of the run that several tests share: two workers, three epochs of four steps."""


@pytest.fixture(scope="module")
def whole(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nothing disturbed. Shared: tests only read it."""
    inputs = write_inputs(tmp_path_factory.mktemp("whole"))
    write_shards(inputs / "test", num_objects=8, seed=1)
    write_shards(inputs / "open", num_objects=4, seed=2, labels=False)
    data = {"test_shards": str(inputs / "test"), "open_set_shards": str(inputs / "open")}
    config = adapt_config(inputs, **SHARED, data=data)
    run, summary = adapt_and_evaluate(config)
    assert run.local is not None
    return Finished(inputs, config, run.local, summary)


def test_a_run_leaves_models_metrics_and_one_prediction_per_object_and_model(
    whole: Finished,
) -> None:
    folder, summary = whole.folder, whole.summary
    table = pq.read_table(folder / "predictions")
    keys = [(r["split"], r["model"], r["object_id"]) for r in table.to_pylist()]
    assert len(keys) == len(set(keys)) == 3 * (16 + 8 + 4)
    assert {key[0] for key in keys} == {"transductive", "test", "open-set"}
    assert summary == json.loads((folder / "metrics.json").read_text())
    assert summary["splits"]["test"]["teacher"]["labelled"] == 8
    assert set(summary["splits"]["test"]["teacher"]["gain"]) == {"image", "point", "fused"}
    assert 0 <= summary["splits"]["open-set"]["student"]["confident_percent"] <= 100

    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [4, 8, 12]
    # What was logged is what was optimised: the terms, each times its weight, sum to the loss.
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    for row in history:
        terms = {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss/")}
        assert terms.keys() == {name for name, weight in stored["weights"].items() if weight > 0}
        total = sum(stored["weights"][name] * term for name, term in terms.items())
        assert row["loss"] == pytest.approx(total, rel=1e-4)

    teacher, student = load_model(folder / "teacher"), load_model(folder / "student")
    assert teacher.classes == list(CLASSES)
    assert not torch.equal(teacher.model.image.visual.proj, student.model.image.visual.proj)
    start = load_model(whole.config.model)
    # The text tower stays as it was, so that the adapted model can be asked for new classes.
    for name, value in start.model.text.state_dict().items():
        assert torch.equal(value, teacher.model.text.state_dict()[name])


def test_the_oracle_finds_the_checkpoint_that_is_most_often_right(
    whole: Finished, tmp_path: Path
) -> None:
    compat = replace(whole.config.compat, select_on="oracle_test_points")
    chosen = oracle_checkpoint(replace(whole.config, compat=compat), whole.run)
    # The same by hand, without Ray.
    rows = pa.concat_tables(map(pq.read_table, (whole.inputs / "test").glob("*.parquet")))
    right = {}
    for name in map(checkpoint_name, (4, 8, 12)):
        student = export_adapted(whole.config, whole.run.child(name), Store(str(tmp_path)))
        data = whole.config.data
        ask = Predictor(
            {"it": load_model(student["student"])},
            CLASSES,
            data.templates,
            data.num_points,
            whole.config.evaluation,
        )
        answers = ask.ask(ask.decode(rows, shard="by hand")).table.to_pylist()
        right[name] = sum(row["ranked_point"][0] == row["label"] for row in answers)
    assert len(list_checkpoints(whole.run)) == 6, "there are others, within the epochs"
    assert right[chosen.address.rpartition("/")[2]] == max(right.values())


def lie(shards: Path) -> None:
    """Replaces every label and every caption."""
    for path in shards.glob("*.parquet"):
        table = pq.read_table(path)
        place, field = table.schema.get_field_index("label"), table.schema.field("label")
        table = table.set_column(place, field, [["ball"] * table.num_rows])
        place, field = table.schema.get_field_index("captions"), table.schema.field("captions")
        table = table.set_column(place, field, [[["a lie"]] * table.num_rows])
        pq.write_table(table, path)


def test_neither_other_labels_nor_a_killed_driver_change_a_bit_of_the_weights(
    whole: Finished, inputs: Path
) -> None:
    # Elsewhere on the disk, under another name, begun on one cluster and ended on another.
    lie(inputs / "shards")
    path = inputs / "config.yaml"
    path.write_text(yaml.safe_dump(values(inputs, **{**SHARED, "name": "killed"})))
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/adapt.py"), str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    history = inputs / "runs/killed/metrics.jsonl"
    deadline = time.monotonic() + 600
    while not history.is_file():
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        assert time.monotonic() < deadline, "the first epoch took ten minutes"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(history.read_text().splitlines()) < 3, "it was over before it could be killed"

    config = load_config(AdaptConfig, path)
    with pytest.raises(ConfigError, match=r"the run 'killed' exists .* --resume"):
        train(config)
    assert_same(whole.weights(), weights(train(config, resume=True)))


def kill_a_worker_after(run: Store, step: int, killed: list[int]) -> None:
    """Kills a training worker of this cluster, and no other's, once a run is so far."""
    while (read_progress(run) or {"step": 0})["step"] < step:
        time.sleep(0.05)
    killed.append(next(processes_of_cluster("ray::RayTrainWorker")))
    os.kill(killed[0], signal.SIGKILL)


def test_neither_a_killed_worker_nor_a_store_that_refuses_a_write_change_a_bit(
    whole: Finished, s3: str, object_store: ObjectStore
) -> None:
    # Shards, model and run all lie in a store that speaks S3.
    for name in ("shards", "model"):
        for file in (whole.inputs / name).iterdir():
            Store(s3.format(f"inputs/{name}")).upload(file, file.name)
    config = replace(
        whole.config,
        name="elsewhere",
        model=s3.format("inputs/model"),
        output=s3.format("runs"),
        keep_checkpoints=1,
        data=replace(whole.config.data, shards=s3.format("inputs/shards")),
    )
    run = Store(config.output).child("elsewhere")
    object_store.to_refuse.append("elsewhere/step-00000004/state.pt")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(run, 6, killed), daemon=True)
    killer.start()
    assert train(config) == run
    assert killed
    assert object_store.to_refuse == []
    assert_same(whole.weights(), weights(run))
    assert len(list_checkpoints(run)) <= 2
    # A fresh model is found to starve classes, which is not what this is about.
    befell = [event["event"] for event in read_events(run) if event["event"] != "health"]
    assert befell == ["started", "workers lost", "started"]


def stopped_within_an_epoch(whole: Finished, folder: Path) -> AdaptConfig:
    """Copies a run as it was after six of its steps: two of the second epoch's four."""
    shutil.copytree(whole.folder, folder / "runs/whole")
    run = Store(str(folder / "runs/whole"))
    run.remove(SNAPSHOT_NAME)
    for name in list_checkpoints(run):
        if name > checkpoint_name(6):
            run.remove(name)
    return replace(whole.config, output=str(folder / "runs"))


def last_start(run: Store) -> dict[str, Any]:
    return [event for event in read_events(run) if event["event"] == "started"][-1]


def rows_of(run: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.read("metrics.jsonl") or b"").splitlines()]


def test_a_run_that_stopped_within_an_epoch_goes_on_bit_for_bit(
    whole: Finished, tmp_path: Path
) -> None:
    run = train(stopped_within_an_epoch(whole, tmp_path), resume=True)
    assert (last_start(run)["step"], last_start(run)["num_workers"]) == (6, 2)
    assert_same(whole.weights(), weights(run))
    for row, expected in zip(rows_of(run), rows_of(whole.run), strict=True):
        for key in expected:
            if key.startswith(("loss", "pseudo/", "teacher/", "selection/")):
                assert row[key] == pytest.approx(expected[key], rel=1e-5), key


def test_a_run_that_stopped_within_an_epoch_goes_on_with_another_number_of_workers(
    whole: Finished, tmp_path: Path
) -> None:
    config = stopped_within_an_epoch(whole, tmp_path)
    alone = replace(config.cluster, num_workers=1, checkpoint_steps=1)
    run = train(replace(config, cluster=alone, keep_checkpoints=20), resume=True)
    assert (last_start(run)["step"], last_start(run)["num_workers"]) == (6, 1)
    rows = rows_of(run)
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 4), (1, 8), (2, 12)]
    assert [row["num_workers"] for row in rows] == [2, 1, 1]
    # A step is a step: as many votes as two workers cast together, each counted once.
    before, after = (load_state(run.child(checkpoint_name(step))) for step in (6, 7))
    assert (before["done"], after["done"]) == (2, 3)
    batch = config.data.batch_size
    counted = [state["task"]["votes"]["sums"][:, -1].sum().item() for state in (before, after)]
    assert counted == [2 * batch, 3 * batch]
    losses = [float(state["sums"]["loss"]) / state["done"] for state in (before, after)]
    assert losses[1] == pytest.approx(losses[0], rel=0.15)
    assert rows[1]["loss"] == pytest.approx(losses[1], rel=0.15)
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_resuming_what_was_another_run_is_refused(whole: Finished) -> None:
    with pytest.raises(ConfigError, match=r"other values of optim.epochs, seed "):
        train(
            replace(whole.config, seed=3, optim=replace(whole.config.optim, epochs=4)), resume=True
        )
