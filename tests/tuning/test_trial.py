"""How a trial is asked to end, and what of its folder is kept, without a cluster."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.build import ModelFacts
from crossmost_ray.tuning import trial
from crossmost_ray.tuning.disk import check_space, free, is_complete


def test_a_trial_is_interrupted_when_asked_and_the_asker_waits_for_its_end(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    interrupted, ended = threading.Event(), threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    said: list[bool] = []
    try:
        threading.Thread(target=trial._heed, args=(run, ended), daemon=True).start()
        asker = threading.Thread(target=lambda: said.append(trial.stop_trial(run)), daemon=True)
        asker.start()
        deadline = time.monotonic() + 20
        while not interrupted.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert interrupted.is_set()
        assert asker.is_alive()
        run.remove(trial.STOP_NAME)
        asker.join(20)
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)
    assert said == [True]


def test_a_trial_that_does_not_end_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STOP_LIMIT_S", 0.1)
    assert not trial.stop_trial(Store(str(tmp_path)))


def test_rows_are_read_as_far_as_they_are_written(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    assert run.read_lines("metrics.jsonl") == []
    run.write("metrics.jsonl", '{"epoch": 0}\n{"epoch": 1}\n')
    assert run.read_lines("metrics.jsonl") == [{"epoch": 0}, {"epoch": 1}]


def test_an_ended_trial_keeps_its_teacher_and_its_history(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    for name in ("teacher/config.json", "student/config.json", "step-00000004/state.pt"):
        run.write(name, "{}")
    run.write("metrics.jsonl", "{}\n")
    assert not is_complete(run)
    free(run)
    assert run.names() == ["metrics.jsonl", "teacher"]
    assert is_complete(run)
    run.remove("teacher")
    assert not is_complete(run)


def test_the_room_a_sweep_needs_is_told_before_it_starts(tmp_path: Path) -> None:
    facts = [ModelFacts(64, [], checkpoint_bytes=30_000_000, exported_bytes=20_000_000)] * 4
    said = check_space(facts, at_once=2, folder=Store(str(tmp_path / "later")))
    # A model of 10 MB for each of 4; for each of 2, 3 checkpoints and both models.
    assert "leave 40 MB" in said
    assert "need 220 MB" in said
    huge = [ModelFacts(64, [], checkpoint_bytes=10**18, exported_bytes=10**18)]
    with pytest.raises(ConfigError, match="free and the sweep may need"):
        check_space(huge, at_once=1, folder=Store(str(tmp_path)))
