"""Tries what may crash, in a process of its own: `python -m crossmost_ray.doctor.probes libraries`.

Prints one JSON object a line, `{"step": ..., ...}`, as soon as each step is done: when the process
dies, the lines before tell how far it came.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LIBRARIES = ("torch", "torchvision", "timm", "open_clip")

Probe = Literal["libraries", "render"]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe printed, and how it ended."""

    steps: dict[str, dict[str, Any]]
    """What each step said, by its name."""

    end: str
    """"", or why the process ended early: a signal, an exit code, or the time limit."""


def run_probe(probe: Probe, *, limit_s: float, env: Mapping[str, str] | None = None) -> ProbeResult:
    """Runs a probe in a process of its own.

    Args:
        probe: Which.
        limit_s: Seconds after which it is ended.
        env: Environment variables, added to this process's.
    """
    command = [sys.executable, "-m", "crossmost_ray.doctor.probes", probe]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=limit_s,
            check=False,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired as late:
        return ProbeResult(_steps(late.stdout or b""), f"did not end within {limit_s:g} s")
    end = ""
    if done.returncode < 0:
        end = f"crashed (signal {-done.returncode})"
    elif done.returncode > 0:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        end = f"ended with exit code {done.returncode} ({last})"
    return ProbeResult(_steps(done.stdout), end)


def _steps(stdout: bytes) -> dict[str, dict[str, Any]]:
    """Reads the lines of a probe; libraries may print in between, and the last may be torn."""
    steps = {}
    for line in stdout.decode(errors="replace").splitlines():
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(said, dict) and "step" in said:
            steps[str(said["step"])] = said
    return steps


def _say(step: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"step": step, **facts}) + "\n")
    sys.stdout.flush()


def probe_libraries() -> None:
    """Imports what a run imports, and runs the operator that tells whether two of them match."""
    for name in LIBRARIES:
        try:
            module = importlib.import_module(name)
            facts: dict[str, Any] = {"version": module.__version__}
            if name == "torch":
                facts |= _cuda()
            if name == "torchvision":
                _suppress_boxes()
        # A library built for another torch fails with whatever it likes.
        except Exception as broken:  # noqa: BLE001
            _say(name, error=f"{type(broken).__name__}: {broken}".partition("\n")[0])
        else:
            _say(name, **facts)


def _cuda() -> dict[str, Any]:
    import torch

    seen = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return {"cuda": torch.version.cuda, "devices": names if seen else []}


def _suppress_boxes() -> None:
    """Runs a compiled operator: of two boxes of which one covers the other, the surer one stays."""
    import torch

    ops = importlib.import_module("torchvision.ops")
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.1]])
    kept = ops.nms(boxes, torch.tensor([0.1, 0.9]), 0.5).tolist()
    if kept != [1]:
        raise RuntimeError(f"torchvision.ops.nms kept {kept} of two boxes, not the surer one")


def probe_render() -> None:
    """Draws one view of a tetrahedron, as the preparation draws."""
    try:
        import numpy as np

        from crossmost_ray.prepare.config import RenderConfig
        from crossmost_ray.prepare.mesh import Material, Mesh, Piece
        from crossmost_ray.prepare.render import RenderError, render_views
    except ModuleNotFoundError as missing:
        return _say("render", missing=missing.name)
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float64)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    try:
        render_views(
            Mesh((Piece(corners, faces, Material()),)), RenderConfig(resolution=32, num_views=1)
        )
    # RenderError: there is no renderer. Anything else: there is one, and it fails to draw.
    except RenderError as impossible:
        return _say("render", error=str(impossible))
    except Exception as broken:  # noqa: BLE001
        return _say("render", error=f"{type(broken).__name__}: {broken}")
    return _say("render", vtk=importlib.metadata.version("vtk"))


if __name__ == "__main__":
    {"libraries": probe_libraries, "render": probe_render}[sys.argv[1]]()
