"""What the driver does around a run, without Ray."""

from __future__ import annotations

import json
import math
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ClusterConfig, ConfigError, parse_config
from crossmost_ray.evaluation.selection import information
from crossmost_ray.storage import Store
from crossmost_ray.training import trainer
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.training.build import build_task, inspect_model
from crossmost_ray.training.checkpoint import (
    checkpoint_name,
    last_checkpoint,
    list_checkpoints,
    save_state,
)
from crossmost_ray.training.events import EVENTS_NAME, event_line
from crossmost_ray.training.trainer import (
    SNAPSHOT_NAME,
    check_space,
    open_run,
    size_text,
    tidy_run,
)
from crossmost_ray.training.votes import bytes_per_object
from crossmost_ray.training.watch import EventLog, last_words, read_progress, shown
from crossmost_ray.training.worker import PROGRESS_NAME
from tests.jobs.runs import adapt_config
from tests.synthetic import CLASSES, tiny_model


def make_checkpoints(folder: Path, *steps: int) -> Store:
    for step in steps:
        (folder / checkpoint_name(step)).mkdir(parents=True)
        save_state(folder / checkpoint_name(step), {"step": step})
    return Store(str(folder))


def register(run: Store, *steps: int) -> None:
    entries = [{"checkpoint_dir_name": checkpoint_name(step), "metrics": {}} for step in steps]
    run.write(SNAPSHOT_NAME, json.dumps({"checkpoint_results": entries}))


def test_half_a_checkpoint_is_never_picked_up(tmp_path: Path) -> None:
    run = make_checkpoints(tmp_path, 8, 100, 16)
    (tmp_path / "step-00000200").mkdir()
    (tmp_path / "step-00000200/.state.pt.new").write_bytes(b"half")
    assert list_checkpoints(run) == ["step-00000008", "step-00000016", "step-00000100"]
    assert last_checkpoint(run) == run.child("step-00000100")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        last_checkpoint(Store(str(tmp_path / "none")))


def test_going_on_removes_what_ray_had_not_taken_note_of(tmp_path: Path) -> None:
    run = make_checkpoints(tmp_path, 4, 8, 12)
    (tmp_path / "step-00000016").mkdir()
    register(run, 4, 8)
    assert tidy_run(run) is None, "Ray knows where to go on"
    assert [name for name in run.names() if name.startswith("step")] == [
        "step-00000004",
        "step-00000008",
    ]


@pytest.mark.parametrize("snapshot", [b"", b'{"checkpoint_results": [{"checkp', b"[]", b"{}"])
def test_a_list_that_was_being_written_costs_no_checkpoint(tmp_path: Path, snapshot: bytes) -> None:
    run = make_checkpoints(tmp_path, 4, 8)
    run.write(SNAPSHOT_NAME, snapshot)
    assert tidy_run(run) == "step-00000008"
    assert run.names() == ["step-00000008"]


def test_a_list_that_names_what_is_gone_is_not_believed(tmp_path: Path) -> None:
    run = make_checkpoints(tmp_path, 4)
    register(run, 4, 8)
    assert tidy_run(run) == "step-00000004"
    assert run.names() == ["step-00000004"]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    assert tidy_run(Store(str(tmp_path / "run"))) is None


def test_the_estimate_of_a_checkpoint_is_near_its_size(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    config = adapt_config(tmp_path)
    facts = inspect_model(config)
    task = build_task(config, CLASSES)
    optimizer = torch.optim.AdamW(task.student.parameters())
    for parameter in task.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_state(tmp_path, {"task": task.state_dict(), "optimizer": optimizer.state_dict()})
    size = (tmp_path / "state.pt").stat().st_size
    assert facts.checkpoint_bytes == pytest.approx(size, rel=0.1)


def test_a_disk_that_is_too_full_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "model")
    config = adapt_config(tmp_path)
    facts, run = inspect_model(config), Store(str(tmp_path))
    assert "of which 2 and the last are kept" in check_space(config, run, facts)
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
    with pytest.raises(ConfigError, match=r"has 1 MB free and the run may need .* MB; lower"):
        check_space(config, run, facts)
    # A checkpoint within an epoch holds the votes, too: of many objects they are the larger part.
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda path: usage(1, 1, 10**12))
    within = replace(config, cluster=replace(config.cluster, checkpoint_steps=10))
    votes = 100_000 * bytes_per_object(1000)
    assert "6.6 GB in all" in check_space(within, run, facts, votes_bytes=votes)
    assert "GB in all" not in check_space(config, run, facts, votes_bytes=votes)
    assert (size_text(2.5e9), size_text(41_600_000)) == ("2.5 GB", "42 MB")


def test_a_resumed_run_may_be_looked_at_otherwise_but_not_learn_otherwise(tmp_path: Path) -> None:
    config = replace(adapt_config(tmp_path), output=str(tmp_path))
    open_run(config, resume=False)
    looked_at = replace(config, data=replace(config.data, check="full"))
    assert open_run(looked_at, resume=True).has_file("config.yaml")
    with pytest.raises(ConfigError, match=r"other values of data\.batch_size"):
        open_run(replace(config, data=replace(config.data, batch_size=7)), resume=True)


def test_a_range_of_workers_names_the_fewest_first() -> None:
    config = parse_config(ClusterConfig, {"num_workers": [2, 8]}, "it")
    assert (config.fewest_workers, config.most_workers) == (2, 8)
    config = parse_config(ClusterConfig, {"num_workers": 3}, "it")
    assert (config.fewest_workers, config.most_workers) == (3, 3)
    for wrong in ([8, 2], [0, 2], [1, 2, 3]):
        with pytest.raises(ConfigError, match="num_workers"):
            parse_config(ClusterConfig, {"num_workers": wrong}, "it")


def test_what_befell_the_workers_is_written_down_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Store(str(tmp_path))
    traceback = "Traceback:\n  File [/x/y.py]\nRuntimeError: [/__w/gloo] closed. More words.\n"
    with shown(run, 2, ClusterConfig()):
        for rank in (1, 0):
            EventLog(run).after_exception(None, {rank: RuntimeError(traceback)})
        run.write(
            PROGRESS_NAME,
            json.dumps(
                {"epoch": 0, "step": 1, "num_steps": 8, "pairs_per_s": 3, "loss": 1, "eta_s": 90}
            ),
        )
        time.sleep(1.2)  # it looks twice a second
    first, second = map(json.loads, (tmp_path / EVENTS_NAME).read_text().splitlines())
    assert first["workers"] == {"1": "RuntimeError: [/__w/gloo] closed"}
    printed = capsys.readouterr().out
    assert event_line(second) in printed
    assert "epoch 1/2  step 1/8  3 objects/s  loss 1.00  1:30 to go" in printed
    assert last_words(RuntimeError()) == "RuntimeError"


def test_progress_that_cannot_be_read_at_this_moment_is_none(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    assert read_progress(run) is None
    run.write(PROGRESS_NAME, '{"step": 3}')
    assert read_progress(run) == {"step": 3}
    # The first half of one file, and the end of the longer one before it.
    run.write(PROGRESS_NAME, '{"step": 3}"loss": 2.5}')
    assert read_progress(run) is None


@given(st.integers(2, 12), st.integers(1, 40))
def test_the_score_lies_between_none_and_all_of_the_information(classes: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    probability = torch.randn(size, classes, generator=generator).softmax(dim=-1)
    assert -1e-6 <= information(probability).item() <= 1 + 1e-6


def test_the_score_rewards_being_sure_and_using_all_classes() -> None:
    sure = torch.eye(4)
    assert information(sure).item() == pytest.approx(1)
    assert information(sure[:1].expand(4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert information(torch.full((4, 4), 0.25)).item() == pytest.approx(0, abs=1e-6)
    # Two classes of four, each surely: half of the information.
    assert information(sure[:2]).item() == pytest.approx(math.log(2) / math.log(4))
    assert SCORE.startswith("selection/")
