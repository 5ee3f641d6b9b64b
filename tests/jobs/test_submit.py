"""`ray job submit` to a cluster that asks for a token, as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.jobs.runs import values, write_inputs

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")

pytestmark = [pytest.mark.ray, pytest.mark.cluster]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a second terminal, beside a head that was started in a first."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        # As in an activated environment, whose `python` the job then finds.
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(
        [RAY, "get-auth-token", "--generate"], env=environment, capture_output=True, check=True
    )
    (home / ".ray/auth_token").chmod(0o600)
    port, dashboard = free_port(), free_port()
    # Names of sockets may not be long.
    short = tempfile.mkdtemp(prefix="ray-")
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={dashboard}", f"--temp-dir={short}"),
            # Not the default, on which the agent of another cluster of these tests may answer.
            f"--dashboard-agent-listen-port={free_port()}",
            "--object-store-memory=200000000",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    terminal = {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    deadline = time.monotonic() + 300  # ten times what it takes on an idle machine
    # Jobs are taken a little later than they are listed.
    hello = [RAY, "job", "submit", "--", "python", "-V"]
    try:
        while (said := subprocess.run(hello, env=terminal, capture_output=True)).returncode:
            assert head.poll() is None, "the head has ended"
            assert time.monotonic() < deadline, f"the head did not start: {said.stderr.decode()}"
            time.sleep(1)
        yield terminal
    finally:
        # Also a head that came too late: it would stay, and take memory from what comes after.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)


def submit(terminal: dict[str, str], *command: str, name: str, wait: bool = True) -> str:
    done = subprocess.run(
        [
            *(RAY, "job", "submit", "--working-dir", ".", "--submission-id", name),
            *(() if wait else ("--no-wait",)),
            *("--", "python", *command),
        ],
        cwd=ROOT,
        env=terminal,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return f"{done.stdout}\n{done.stderr}\nexit {done.returncode}"


def ask(terminal: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [RAY, "job", *words], env=terminal, capture_output=True, text=True, check=False
    )
    return f"{done.stdout}\n{done.stderr}"


def test_a_job_is_submitted_stopped_and_continued(terminal: dict[str, str], tmp_path: Path) -> None:
    write_inputs(tmp_path)
    config = tmp_path / "config.yaml"
    sections = {"optim": {"epochs": 12}, "cluster": {"cpus_per_worker": 1}}
    config.write_text(yaml.safe_dump(values(tmp_path, **sections)))

    # Without the token there is no way in.
    assert submit({**terminal, "HOME": str(tmp_path)}, "-c", "1", name="stranger").endswith(
        "exit 1"
    )

    wrong = submit(terminal, "jobs/adapt.py", str(config), "sed=1", name="wrong")
    assert "sed: no such key; did you mean seed?" in wrong
    assert wrong.endswith("exit 1")

    submit(terminal, "jobs/adapt.py", str(config), name="first", wait=False)
    history = tmp_path / "runs/run/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not history.is_file():
        assert time.monotonic() < deadline, ask(terminal, "logs", "first")
        assert "FAILED" not in ask(terminal, "status", "first"), ask(terminal, "logs", "first")
    ask(terminal, "stop", "first")
    before = history.read_text()
    assert len(before.splitlines()) < 12, "it was over before it could be stopped"

    again = submit(terminal, "jobs/adapt.py", str(config), "--resume", name="second")
    assert again.endswith("exit 0"), again
    assert re.search(r"done: .*runs/run", again), again
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(12))
    assert history.read_text().startswith(before)
