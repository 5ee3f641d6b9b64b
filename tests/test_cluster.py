"""The way to the cluster: what a killed one left does not stand in it; what workers are given."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crossmost_ray import cluster
from crossmost_ray.cluster import worker_environment


def remembered(address: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str | None:
    """What is found where Ray remembers an address."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    if address is not None:
        (tmp_path / "ray/ray_current_cluster").write_text(address)
    return cluster._gone_cluster()


def test_a_cluster_that_answers_is_not_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert remembered(address, monkeypatch, tmp_path) is None


def test_a_cluster_that_was_killed_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert remembered(address, monkeypatch, tmp_path) == address


def test_nothing_is_gone_where_nothing_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert remembered(None, monkeypatch, tmp_path) is None


FAULTS = """
import resource, sys, threading
import torch

def work():
    for _ in range(20):
        torch.ones(20_000_000).add(1)

work()
thread = threading.Thread(target=work)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread.start(); thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Counts the pages that the kernel hands to a thread which takes 160 MB twenty times. It is not the
main one, as in Ray's workers."""


def test_a_worker_keeps_the_memory_that_it_frees() -> None:
    def faults(env: dict[str, str]) -> int:
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults(worker_environment({})) < 300_000
    # And no other does: 20 times 160 MB, in pages of 4 kB.
    assert faults({}) > 600_000


def test_what_a_user_sets_wins() -> None:
    assert worker_environment({"MALLOC_ARENA_MAX": "4", "A": "b"})["MALLOC_ARENA_MAX"] == "4"
