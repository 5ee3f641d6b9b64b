"""What a run's folder tells of the run itself: what started it, and whether it still goes on."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import crossmost_ray
from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store

ABOUT_NAME = "run.json"
STATUS_NAME = "status.json"
CLASSES_NAME = "classes.json"

HEARTBEAT_S = 5.0

GONE_AFTER_S = 15.0
"""A driver that has said nothing for so long is gone, and its workers with it: Ray takes them down
within seconds, but in these they still write."""

DRIVER = uuid.uuid4().hex
"""Tells this process from any other, be it on another machine or in a container started anew."""


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def age(heartbeat: str) -> float:
    """Gives the seconds since an ISO time; without an offset it is UTC.

    Raises:
        ValueError: If it is none.
    """
    then = datetime.datetime.fromisoformat(heartbeat)
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()


def write_about(folder: Store, **facts: Any) -> None:
    """Writes down by what command the work in a folder was started, and with which versions."""
    about = {
        "command": ["python", *sys.argv],
        "started": _now(),
        "host": platform.node(),
        "versions": {
            "crossmost_ray": crossmost_ray.__version__,
            **{name: version(name) for name in ("ray", "torch")},
        },
        **facts,
    }
    folder.write(ABOUT_NAME, json.dumps(about, indent=1) + "\n")


def write_status(folder: Store, status: str, stage: str, error: str | None = None) -> None:
    """Writes down how the work in a folder stands.

    Args:
        folder: Of a run or a sweep.
        status: running, done, stopped or failed.
        stage: What is being done, such as training.
        error: One line, where it failed.
    """
    said = {
        "status": status,
        "stage": stage,
        "error": error,
        "heartbeat": _now(),
        "host": platform.node(),
        "driver": DRIVER,
    }
    folder.write(STATUS_NAME, json.dumps(said) + "\n")


def read_status(folder: Store) -> Mapping[str, Any] | None:
    """Reads what was last written down; None where nothing was."""
    stored = folder.read(STATUS_NAME)
    parsed: Mapping[str, Any] | None = None if stored is None else json.loads(stored)
    return parsed


def wait_for_silence(folder: Store, tell: Callable[[str], None]) -> None:
    """Makes sure that nobody else works in a folder, before its work is taken up again.

    Two at once would take each other's checkpoints away. Of a driver that was killed a moment ago
    the workers may still be writing, too: that is waited for.

    Args:
        folder: Of a run or a sweep.
        tell: Is told why it takes a while, if it does.

    Raises:
        ConfigError: If the work there goes on.
    """

    def sign_of_another() -> Mapping[str, Any] | None:
        said = read_status(folder) or {}
        alive = said.get("status") == "running" and said.get("driver") != DRIVER
        return said if alive else None

    first = sign_of_another()
    if first is None or (silent_s := age(first["heartbeat"])) > GONE_AFTER_S:
        return
    tell(f"{folder}: somebody worked here {silent_s:.0f} s ago; seeing whether they still do")
    deadline = time.monotonic() + GONE_AFTER_S
    while time.monotonic() < deadline:
        time.sleep(1)
        if (now := sign_of_another()) is None:
            return
        if now["heartbeat"] != first["heartbeat"]:
            raise ConfigError(
                f"{folder}: the work goes on already, driven from {now['host']}; wait for its end "
                "or stop it, or take another `name`"
            )


@contextmanager
def working(folder: Store, stage: str, *, last: bool = False) -> Iterator[None]:
    """Says every few seconds that the work goes on, and in the end how it ended.

    A driver that is killed says nothing in the end: whoever reads takes an old heartbeat for it.

    Args:
        folder: Of a run or a sweep.
        stage: What is being done.
        last: Whether the work is done when this stage is.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            write_status(folder, "running", stage)

    write_status(folder, "running", stage)
    heart = threading.Thread(target=beat, daemon=True)
    heart.start()

    def end(status: str, error: str | None = None) -> None:
        ended.set()
        heart.join()
        write_status(folder, status, stage, error)

    try:
        yield
    except KeyboardInterrupt:
        end("stopped")
        raise
    except BaseException as error:
        words = str(error).strip().splitlines()
        end("failed", f"{type(error).__name__}: {words[0]}" if words else type(error).__name__)
        raise
    end("done" if last else "running")
