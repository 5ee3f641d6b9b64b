"""The way to the cluster: what a killed cluster leaves behind does not stand in it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from crossmost_ray import cluster


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
