"""What a run's folder tells of the run: that it goes on, how it ended, and what started it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training import status
from crossmost_ray.training.status import (
    ABOUT_NAME,
    read_status,
    working,
    write_about,
    write_status,
)


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_nothing_is_said_of_a_run_that_never_began(folder: Store) -> None:
    assert read_status(folder) is None


def test_a_stage_that_is_not_the_last_leaves_the_run_running(folder: Store) -> None:
    for stage, last, after in (("training", False, "running"), ("evaluating", True, "done")):
        with working(folder, stage, last=last):
            said = read_status(folder)
            assert said is not None
            assert (said["status"], said["stage"]) == ("running", stage)
        said = read_status(folder)
        assert said is not None
        assert (said["status"], said["stage"], said["error"]) == (after, stage, None)


def test_the_heart_beats_while_the_work_goes_on(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "HEARTBEAT_S", 0.02)
    times = iter(f"beat {number}" for number in range(10**6))
    monkeypatch.setattr(status, "_now", lambda: next(times))
    beats = set()
    with working(folder, "training"):
        deadline = time.monotonic() + 20
        while len(beats) < 3 and time.monotonic() < deadline:
            said = read_status(folder)
            assert said is not None
            beats.add(said["heartbeat"])
    assert len(beats) >= 3
    last = read_status(folder)
    time.sleep(0.1)
    assert read_status(folder) == last


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ConfigError("a key is wrong\nand a second line"),
            ("failed", "ConfigError: a key is wrong"),
        ),
        (RuntimeError(), ("failed", "RuntimeError")),
        (KeyboardInterrupt(), ("stopped", None)),
    ],
)
def test_what_ended_the_work_is_written_down_and_passed_on(
    folder: Store, error: BaseException, expected: tuple[str, str | None]
) -> None:
    with pytest.raises(type(error)), working(folder, "training", last=True):
        raise error
    said = read_status(folder)
    assert said is not None
    assert (said["status"], said["error"]) == expected


def test_a_status_is_what_was_written(folder: Store) -> None:
    write_status(folder, "stopped", "trials", "by hand")
    said = read_status(folder)
    assert said is not None
    assert (said["status"], said["stage"], said["error"]) == ("stopped", "trials", "by hand")


def test_a_run_tells_its_command_and_its_versions(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/adapt.py", "mine.yaml", "seed=1"])
    write_about(folder, num_objects=7)
    about = json.loads(folder.read(ABOUT_NAME) or b"")
    assert about["command"] == ["python", "jobs/adapt.py", "mine.yaml", "seed=1"]
    assert about["num_objects"] == 7
    assert {"crossmost_ray", "ray", "torch"} <= about["versions"].keys()
