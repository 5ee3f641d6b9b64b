"""Runs on four easy shapes, for tests of the jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch

from crossmost_ray.config import AdaptConfig, parse_config
from crossmost_ray.storage import Store
from crossmost_ray.training.checkpoint import last_checkpoint, load_state
from tests.synthetic import tiny_model, write_shards


def values(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    """A run of two epochs of four steps."""
    base: dict[str, Any] = {
        "name": "run",
        "model": str(tmp_path / "model"),
        "output": str(tmp_path / "runs"),
        "data": {
            "shards": str(tmp_path / "shards"),
            "num_points": 128,
            "num_views": 4,
            "batch_size": 16,
        },
        "optim": {"epochs": 2, "lr": 1e-3},
        "evaluation": {"point_samples": 1},
    }
    for name, section in sections.items():
        old = base.get(name)
        merge = isinstance(section, dict) and isinstance(old, dict)
        base[name] = {**old, **section} if merge else section
    return base


def adapt_config(tmp_path: Path, **sections: Any) -> AdaptConfig:
    return parse_config(AdaptConfig, values(tmp_path, **sections), "the test")


def write_inputs(folder: Path) -> Path:
    write_shards(folder / "shards", num_objects=16)
    tiny_model(folder / "model")
    return folder


def weights(run: Store) -> dict[str, torch.Tensor]:
    state = load_state(last_checkpoint(run))["task"]
    learned = [who for who in ("student", "teacher", "model") if who in state]
    return {f"{who}.{name}": value for who in learned for name, value in state[who].items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def processes_of_cluster(title: str) -> Iterator[int]:
    """Finds processes by the title that Ray gives them: of this test's cluster, and of no other."""
    session = ray._private.worker.global_worker.node.get_session_dir_path()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            ours = session in Path(f"/proc/{parent}/cmdline").read_text()
            if ours and (folder / "cmdline").read_text().startswith(title):
                yield int(folder.name)
