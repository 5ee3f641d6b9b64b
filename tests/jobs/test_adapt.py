"""The main job on real Ray processes, on four easy shapes."""

from __future__ import annotations

import json
import os
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
from safetensors.torch import load_file

from crossmost_ray.config import AdaptConfig, ConfigError, PretrainConfig, load_config, parse_config
from crossmost_ray.evaluation.adaptation import adapt_and_evaluate
from crossmost_ray.evaluation.oracle import oracle_checkpoint
from crossmost_ray.evaluation.predictor import Predictor
from crossmost_ray.evaluation.pretraining import pretrain_and_evaluate
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.pretrained import load_model, save_model
from crossmost_ray.storage import Store
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import last_checkpoint, list_checkpoints, load_state
from crossmost_ray.training.events import read_events
from crossmost_ray.training.export import export_adapted
from crossmost_ray.training.trainer import check_cluster, train
from crossmost_ray.training.worker import PROGRESS_NAME
from tests.conftest import ObjectStore
from tests.jobs.runs import (
    adapt_config,
    assert_same,
    processes_of_cluster,
    values,
    weights,
    write_inputs,
)
from tests.synthetic import CLASSES, Fault, write_shards

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path)


FAULTS: dict[int, Fault] = {1: "nan", 6: "few_points", 11: "bad_view"}


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
    "keep_checkpoints": 3,
    "optim": {"epochs": 3},
    "cluster": {"num_workers": 2, "cpus_per_worker": 0.5},
}
"""Sections of the run that several tests share: two workers, three epochs."""


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
    for name in list_checkpoints(whole.run):
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
    assert len(right) == 3
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
    while json.loads(run.read(PROGRESS_NAME) or b'{"step": 0}')["step"] < step:
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
    assert [event["event"] for event in read_events(run)] == ["started", "workers lost", "started"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    ray_cluster: None, inputs: Path
) -> None:
    # A cloud so far away that its squares overflow; every number of it is finite.
    write_shards(inputs / "shards", num_objects=32, num_files=4)
    file = inputs / "shards/part-00003.parquet"
    table = pq.read_table(file)
    points = table["points"].to_pylist()
    points[-1] = [[value * 1e30 for value in point] for point in points[-1]]
    place, field = table.schema.get_field_index("points"), table.schema.field("points")
    pq.write_table(table.set_column(place, field, pa.array(points, field.type)), file)
    config = adapt_config(
        inputs,
        data={"shuffle_buffer": 8},
        cluster={"num_workers": 2, "cpus_per_worker": 0.5, "checkpoint_steps": 1},
    )
    said = r"step \d+: the loss is not finite \(.* on worker \d.*The last good checkpoint is"
    with pytest.raises(ConfigError, match=said) as stopped:
        train(config)
    run = Store(config.output).child(config.name)
    assert f"{run}/{list_checkpoints(run)[-1]}" in str(stopped.value)
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    # To try again would meet the same.
    assert [event["event"] for event in read_events(run)] == ["started"]


def test_pretraining_writes_a_model_that_adaptation_takes(ray_cluster: None, inputs: Path) -> None:
    settings = values(
        inputs,
        name="pre",
        model={},
        optim={"epochs": 1},
        report={"train": str(inputs / "shards")},
    )
    folder = pretrain_and_evaluate(
        parse_config(PretrainConfig, settings, "the test"), command="the test"
    )
    assert folder.local is not None
    card = (folder.read("README.md") or b"").decode()
    assert "the test" in card
    assert "| train | 16 |" in card
    stored = load_file(folder.local / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {
        torch.float16
    }
    task = build_task(adapt_config(inputs, model=folder.address), CLASSES)
    assert_same(
        dict(task.student.image.state_dict()), dict(load_model(folder).model.image.state_dict())
    )


def test_a_run_says_which_terms_and_which_rows_it_leaves_out(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A backbone without tokens, and three rows that can't be used.
    write_shards(tmp_path / "shards", num_points=600, corrupt=FAULTS)
    model = CrossModalModel(ModelSpec("vit_small_64", "pointnet2_ssg"))
    save_model(tmp_path / "model", model, card="# without tokens\n")
    data = {"num_points": 512, "num_views": 2, "bad_rows": "skip", "batch_size": 13}
    run = train(adapt_config(tmp_path, data=data, optim={"epochs": 1}))
    state = load_state(last_checkpoint(run))

    assert state["history"][0]["step"] == 2, "13 objects with two views each"
    terms = {name for name in state["history"][-1] if name.startswith("loss/")}
    assert "loss/self_training_point" in terms
    assert not terms & {"loss/masked_point", "loss/global_local_point"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "masked_point and global_local_point are left out" in printed
    assert "13 objects in 2 shards, 3 left out" in printed
    assert "left out: part-00001.parquet, row 3 (synthetic/0-11)" in printed


def refuse(config: AdaptConfig, *parts: str, resume: bool = False) -> None:
    with pytest.raises(ConfigError) as refusal:
        train(config, resume=resume)
    for part in parts:
        assert part in str(refusal.value)
    assert not (Path(config.output) / config.name).exists()


def test_a_missing_shards_folder_is_refused(inputs: Path) -> None:
    data = {"shards": str(inputs / "none"), "classes": list(CLASSES)}
    refuse(adapt_config(inputs, data=data), "there is no folder of shards", "none", "prepare.py")


def test_a_missing_model_folder_is_refused(inputs: Path) -> None:
    refuse(adapt_config(inputs, model=str(inputs / "none")), "there is no model folder", "none")


def test_rows_that_cannot_be_used_are_named(ray_cluster: None, inputs: Path) -> None:
    write_shards(inputs / "shards", num_objects=16, corrupt=FAULTS)
    refuse(
        adapt_config(inputs),
        "3 of 16 rows",
        "part-00000.parquet, row 1 (synthetic/0-1): 1 of 128 points are NaN or infinite",
        "part-00000.parquet, row 6 (synthetic/0-6): 7 points, data.num_points asks for 128",
        "part-00001.parquet, row 3 (synthetic/0-11): view 3 can't be decoded",
        "data.bad_rows=skip",
    )


def test_a_batch_larger_than_the_data_is_refused(ray_cluster: None, inputs: Path) -> None:
    refuse(adapt_config(inputs, data={"batch_size": 65}), "data.batch_size 65", "64 pairs")


def test_a_batch_that_workers_cannot_share_is_refused(ray_cluster: None, inputs: Path) -> None:
    config = adapt_config(inputs, data={"batch_size": 15}, cluster={"num_workers": 2})
    refuse(config, "data.batch_size 15", "multiple of 2")


@pytest.mark.parametrize(("num_workers", "cpus"), [(4, 1.0), (9, 1.0), (2, 2.0)])
def test_a_run_that_would_leave_no_cpu_for_the_stream_is_refused(
    ray_cluster: None, inputs: Path, num_workers: int, cpus: float
) -> None:
    cluster = {"num_workers": num_workers, "cpus_per_worker": cpus}
    refuse(
        adapt_config(inputs, cluster=cluster),
        f"cluster.num_workers {num_workers}",
        "the cluster has 4",
    )


def test_what_the_refusal_proposes_is_accepted(ray_cluster: None, inputs: Path) -> None:
    config = adapt_config(inputs, cluster={"num_workers": 4}).cluster
    with pytest.raises(ConfigError, match=r"try cluster.num_workers=3 or cluster.cpus_per_worker"):
        check_cluster(config)
    check_cluster(adapt_config(inputs, cluster={"num_workers": 3}).cluster)
    share = {"num_workers": 4, "cpus_per_worker": 0.75}
    check_cluster(adapt_config(inputs, cluster=share).cluster)


def test_more_gpus_than_there_are_are_refused(ray_cluster: None, inputs: Path) -> None:
    refuse(adapt_config(inputs, cluster={"use_gpu": True}), "cluster.use_gpu asks for 1 GPUs")


def test_an_output_that_cannot_be_written_is_refused(ray_cluster: None, inputs: Path) -> None:
    (inputs / "file").write_text("in the way")
    config = adapt_config(inputs, output=str(inputs / "file/runs"))
    with pytest.raises(ConfigError, match=r"can't be written .*; mend `output`"):
        train(config)


def test_resuming_what_never_was_is_refused(ray_cluster: None, inputs: Path) -> None:
    refuse(adapt_config(inputs), "there is no run 'run'", resume=True)


def test_resuming_what_was_another_run_is_refused(whole: Finished) -> None:
    with pytest.raises(ConfigError, match=r"other values of optim.epochs, seed "):
        train(
            replace(whole.config, seed=3, optim=replace(whole.config.optim, epochs=4)), resume=True
        )


def test_the_job_reports_every_slip_and_exits_with_1(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nmodel: y\nsed: 1\ndata: {shards: z, bach_size: 3, num_views: none}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/adapt.py"), str(path), "pseudo_labels.threshold=84"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "sed: no such key; did you mean seed?" in done.stderr
    assert "data.bach_size: no such key; did you mean data.batch_size?" in done.stderr
    assert "data.num_views" in done.stderr
    assert "pseudo_labels.threshold" in done.stderr
    assert "Traceback" not in done.stderr
