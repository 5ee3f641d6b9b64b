"""What a run's folder tells of the run: that it goes on, how it ended, and what started it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training import status
from crossmost_ray.training.status import (
    ABOUT_NAME,
    read_status,
    wait_for_silence,
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


@contextmanager
def other_driver(folder: Store, beats: int) -> Iterator[None]:
    """A process that works in a folder, beats so often, and is killed."""
    code = (
        "import sys, time\n"
        "from crossmost_ray.storage import Store\n"
        "from crossmost_ray.training.status import write_status\n"
        "write_status(Store(sys.argv[1]), 'running', 'training')\n"
        "print('working', flush=True)\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    time.sleep(1)\n"
        "    write_status(Store(sys.argv[1]), 'running', 'training')\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, folder.address, str(beats)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        try:
            yield
        finally:
            process.kill()


def test_nobody_goes_on_with_work_that_goes_on(folder: Store) -> None:
    told: list[str] = []
    with (
        other_driver(folder, beats=1000),
        pytest.raises(ConfigError, match=f"goes on already, driven from {platform.node()}"),
    ):
        wait_for_silence(folder, told.append)
    assert len(told) == 1


def test_what_a_killed_driver_left_is_taken_up_once_its_workers_must_be_gone(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "GONE_AFTER_S", 4.0)
    with other_driver(folder, beats=0):
        pass
    told: list[str] = []
    start = time.monotonic()
    wait_for_silence(folder, told.append)
    assert time.monotonic() - start >= 4
    assert len(told) == 1
    # And one that fell silent long ago at once, as one that ended and one's own.
    wait_for_silence(folder, told.append)
    with other_driver(folder, beats=0):
        write_status(folder, "failed", "training", "a view is broken")
        wait_for_silence(folder, told.append)
        with working(folder, "training"):
            wait_for_silence(folder, told.append)
        wait_for_silence(folder, told.append)
    assert len(told) == 1


def test_a_run_tells_its_command_and_its_versions(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/adapt.py", "mine.yaml", "seed=1"])
    write_about(folder, num_objects=7)
    about = json.loads(folder.read(ABOUT_NAME) or b"")
    assert about["command"] == ["python", "jobs/adapt.py", "mine.yaml", "seed=1"]
    assert about["num_objects"] == 7
    assert {"crossmost_ray", "ray", "torch"} <= about["versions"].keys()
