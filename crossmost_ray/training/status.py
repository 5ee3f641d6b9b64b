"""What a run's folder tells of the run itself: what started it, and whether it still goes on."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import crossmost_ray
from crossmost_ray.storage import Store

ABOUT_NAME = "run.json"
STATUS_NAME = "status.json"
CLASSES_NAME = "classes.json"

HEARTBEAT_S = 10.0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
    said = {"status": status, "stage": stage, "error": error, "heartbeat": _now()}
    folder.write(STATUS_NAME, json.dumps(said) + "\n")


def read_status(folder: Store) -> Mapping[str, Any] | None:
    """Reads what was last written down; None where nothing was."""
    stored = folder.read(STATUS_NAME)
    parsed: Mapping[str, Any] | None = None if stored is None else json.loads(stored)
    return parsed


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
