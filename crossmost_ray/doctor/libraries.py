"""The libraries of this machine, the GPUs that torch sees, and drawing off screen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from crossmost_ray.doctor.finding import Case, Finding, fail, ok, warn
from crossmost_ray.doctor.probes import LIBRARIES, ProbeResult, run_probe

LIBRARIES_LIMIT_S = 90.0
RENDER_LIMIT_S = 60.0
DRIVER_FILE = "/proc/driver/nvidia/version"


def check_libraries(case: Case) -> Iterator[Finding]:
    """Imports torch, torchvision, timm and open_clip together."""
    yield from library_findings(run_probe("libraries", limit_s=LIBRARIES_LIMIT_S))


def library_findings(result: ProbeResult) -> Iterator[Finding]:
    """Judges what the probe of libraries said."""
    torch = result.steps.get("torch", {})
    for name in LIBRARIES:
        said = result.steps.get(name)
        if said is None:
            yield fail(
                name,
                f"its import {result.end or 'ended without a word'}",
                f"run `python -c 'import {name}'`, and install it anew if that fails, too",
            )
            return  # What comes after it was not tried.
        if "error" in said:
            cure = f"install it anew: pip install --force-reinstall {_package(name)}"
            if name == "torchvision" and "version" in torch:
                cure = (
                    f"install the torchvision that was built for torch {torch['version']}, both "
                    "from one index: pip install --force-reinstall torch torchvision"
                )
            yield fail(name, said["error"], cure)
        elif name == "torchvision":
            yield ok(
                name, f"{said['version']}, its operators run with torch {torch.get('version')}"
            )
        else:
            yield ok(name, said["version"])
        if name == "torch" and "version" in said:
            yield cuda_finding(said["cuda"], said["devices"], _driver(), os.environ)


def _package(module: str) -> str:
    return {"open_clip": "open_clip_torch"}.get(module, module)


def _driver() -> str | None:
    """Reads the NVIDIA driver's own line; None where none is loaded."""
    try:
        return Path(DRIVER_FILE).read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return None


def cuda_finding(
    build: str | None, devices: list[str], driver: str | None, environ: Mapping[str, str]
) -> Finding:
    """Judges whether torch sees the GPUs that there are.

    Args:
        build: CUDA version that torch was built for; None for a build without.
        devices: Names of the GPUs that torch sees.
        driver: What the driver says of itself; None if there is none.
        environ: For CUDA_VISIBLE_DEVICES.
    """
    if devices:
        names = ", ".join(sorted(set(devices)))
        return ok("cuda", f"torch sees {len(devices)} GPU(s), {names}, by CUDA {build}")
    if driver is None:
        return ok("cuda", "no NVIDIA driver on this machine: torch computes on the CPU here")
    if build is None:
        return warn(
            "cuda",
            f"there is a driver ({driver}), but this torch was built without CUDA",
            "install torch and torchvision from an index with CUDA builds, as pytorch.org lists",
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return warn(
            "cuda",
            f"there is a driver ({driver}), but CUDA_VISIBLE_DEVICES is '{visible}'",
            "unset CUDA_VISIBLE_DEVICES, or name GPUs that exist (nvidia-smi -L lists them)",
        )
    return warn(
        "cuda",
        f"there is a driver ({driver}), but torch, built for CUDA {build}, sees no GPU",
        f"install a driver for CUDA {build} or newer (nvidia-smi names its CUDA version), or a "
        "torch built for an older CUDA; in a container, start it with --gpus all",
    )


def check_render(case: Case) -> Iterator[Finding]:
    """Draws a view off screen."""
    yield render_finding(
        run_probe("render", limit_s=RENDER_LIMIT_S), for_training=case.config is not None
    )


def render_finding(result: ProbeResult, *, for_training: bool) -> Finding:
    """Judges what the probe of rendering said.

    Args:
        result: What it said.
        for_training: Whether a run of training is meant, which draws nothing.
    """
    said = result.steps.get("render", {})
    if "missing" in said:
        return warn(
            "rendering",
            f"{said['missing']} is not installed: views can't be drawn on this machine",
            "pip install 'crossmost_ray[prepare]' where jobs/prepare.py is to run",
        )
    if "vtk" in said:
        return ok("rendering", f"VTK {said['vtk']} draws off screen")
    problem = said.get("error") or f"VTK {result.end or 'ended without a word'}"
    return Finding(
        "rendering",
        "warn" if for_training else "fail",
        problem,
        "install a software renderer, on Debian: apt-get install libegl1 libgl1-mesa-dri",
    )
