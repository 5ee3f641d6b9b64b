"""What a config asks of a device, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crossmost_ray.config import ClusterConfig
from crossmost_ray.models.blocks import BlockRunner
from crossmost_ray.training.events import event_line
from crossmost_ray.training.execution import PLAIN, resolve_execution

CPU = torch.device("cpu")


def test_a_cpu_computes_in_float32_and_compiles_nothing_unless_asked() -> None:
    assert resolve_execution(ClusterConfig(), CPU) == PLAIN
    asked = ClusterConfig(precision="bfloat16", recompute=True)
    found = resolve_execution(asked, CPU)
    assert (found.precision, found.run) == (torch.bfloat16, BlockRunner(recompute=True))


def test_a_machine_without_a_compiler_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = resolve_execution(ClusterConfig(compile="always"), CPU)
    assert not found.run.compiled
    assert found.note is not None
    assert "needs a C compiler and none of cc, gcc, clang, cl" in found.note
    line = event_line({"time": "now", "event": "uncompiled", "says": found.note})
    assert line.startswith("now  uncompiled: blocks run uncompiled: torch.compile needs")


def test_a_compiler_that_fails_is_found_out_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cc", "gcc", "g++"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    found = resolve_execution(ClusterConfig(compile="always"), CPU)
    assert not found.run.compiled
    assert found.note is not None
    assert "torch.compile does not work here" in found.note
