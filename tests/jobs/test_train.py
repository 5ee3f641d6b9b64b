"""What ends a run early, what it leaves out, and what is refused before it begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from crossmost_ray.config import (
    AdaptConfig,
    ConfigError,
    PretrainConfig,
    load_config,
    parse_config,
)
from crossmost_ray.evaluation.pretraining import pretrain_and_evaluate
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.pretrained import load_model, save_model
from crossmost_ray.storage import Store
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import (
    checkpoint_name,
    last_checkpoint,
    list_checkpoints,
    load_state,
)
from crossmost_ray.training.events import event_line, read_events
from crossmost_ray.training.trainer import check_cluster, train
from tests.jobs.runs import (
    adapt_config,
    assert_same,
    values,
    weights,
)
from tests.synthetic import CLASSES, Fault, broken_pixels, replace_view, write_shards

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


FAULTS: dict[int, Fault] = {1: "nan", 6: "few_points", 11: "bad_view"}


def test_a_run_that_collapses_goes_back_to_its_healthy_teacher(
    ray_cluster: None, tmp_path: Path
) -> None:
    # No fairness, no threshold, and a learning rate far too high: everything becomes a lamp.
    config = load_config(
        AdaptConfig,
        ROOT / "configs/adapt/furniture.yaml",
        [
            *(f"output={tmp_path}", "name=lamps", "cluster.threads_per_worker=1"),
            *("data.num_views=1", "data.teacher_views=1", "data.num_points=512"),
            *("data.batch_size=16", "optim.epochs=3", "optim.lr=0.01", "optim.warmup_epochs=0"),
            *("optim.point_lr_scale=1", "weights.fairness_image=0", "weights.fairness_point=0"),
            *("pseudo_labels.threshold=0", "ema.start=0.5", "ema.end=0.9"),
            *("guard.collapse=rollback", "keep_checkpoints=3"),
        ],
    )
    run = train(config)
    acts = [event for event in read_events(run) if event["event"] == "health"]
    assert acts[0]["kind"] == "collapse"
    assert acts[0]["action"] == "rollback"
    after = acts[0]["epoch"]
    before = [json.loads(line) for line in (run.read("metrics.jsonl") or b"").splitlines()]
    assert before[after]["health/classes_used"] < before[0]["health/classes_used"] / 2
    # The checkpoint after the collapse holds the teacher of before it, for the student, too.
    state = load_state(run.child(checkpoint_name(int(before[after]["step"]))))
    healthy, task = state["task"]["healthy"], state["task"]
    for who in ("teacher", "student"):
        assert all(torch.equal(task[who][name], value) for name, value in healthy.items())
    assert state["lr_scale"] == 0.5
    assert not state["optimizer"]["state"]
    assert event_line(acts[0]).endswith("at half the learning rate")


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


def test_a_view_that_only_decoding_finds_broken_stops_the_run_by_name(
    ray_cluster: None, inputs: Path
) -> None:
    write_shards(inputs / "shards", num_objects=16)
    replace_view(inputs / "shards/part-00001.parquet", row=3, place=2, view=broken_pixels())
    broken = r"part-00001\.parquet, row 3: a view of the object 'synthetic/0-11' can't be decoded"
    once = {"max_failures": 0}
    with pytest.raises(ConfigError, match=rf"^{broken} .*data\.check=full and data\.bad_rows$"):
        train(adapt_config(inputs, cluster=once))
    # What it proposes names the row before anything starts.
    whole = adapt_config(inputs, name="whole", data={"check": "full"}, cluster=once)
    refuse(whole, "1 of 16 rows", "part-00001.parquet, row 3 (synthetic/0-11): view 2 can't be")


def test_a_batch_larger_than_the_data_is_refused(ray_cluster: None, inputs: Path) -> None:
    refuse(adapt_config(inputs, data={"batch_size": 65}), "data.batch_size 65", "64 pairs")


def test_a_batch_that_workers_cannot_share_is_refused(ray_cluster: None, inputs: Path) -> None:
    config = adapt_config(inputs, data={"batch_size": 15}, cluster={"num_workers": 2})
    refuse(config, "data.batch_size 15", "multiple of 2")


@pytest.mark.parametrize(("num_workers", "cpus"), [(5, 1.0), (9, 1.0), (2, 2.5)])
def test_a_run_that_the_cluster_cannot_hold_is_refused(
    ray_cluster: None, inputs: Path, num_workers: int, cpus: float
) -> None:
    cluster = {"num_workers": num_workers, "cpus_per_worker": cpus}
    refuse(
        adapt_config(inputs, cluster=cluster),
        f"cluster.num_workers {num_workers}",
        "the cluster has 4",
    )


def test_what_the_refusal_proposes_is_accepted(ray_cluster: None, inputs: Path) -> None:
    config = adapt_config(inputs, cluster={"num_workers": 5}).cluster
    with pytest.raises(ConfigError, match=r"try cluster.num_workers=4 or cluster.cpus_per_worker"):
        check_cluster(config)
    # All four CPUs: the stream asks for none.
    check_cluster(adapt_config(inputs, cluster={"num_workers": 4}).cluster)
    share = {"num_workers": 5, "cpus_per_worker": 0.8}
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
