"""A config and a device in, the way in which the towers are computed out."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

import torch

from crossmost_ray.config import ClusterConfig
from crossmost_ray.models.blocks import BlockRunner

C_COMPILERS = ("cc", "gcc", "clang", "cl")
"""Programs of which torch.compile needs one, for a GPU as well."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a worker computes."""

    precision: torch.dtype
    """What the towers' matrix products are computed in."""
    run: BlockRunner
    """How their blocks are run."""
    note: str | None = None
    """Why it is not as the config asks, if it isn't."""


def exchange_options(accumulate: int) -> dict[str, bool]:
    """Says how DistributedDataParallel exchanges the workers' gradients of a step in parts."""
    return {
        # Each step uses the same parameters: nothing is searched for unused ones. What is known
        # of a static graph comes from a first pass that exchanges, which that of a part does not.
        "static_graph": accumulate == 1,
        # Gradients lie where they are sent from: a copy less, in time and in memory.
        "gradient_as_bucket_view": True,
    }


PLAIN = Execution(torch.float32, BlockRunner())


def resolve_execution(config: ClusterConfig, device: torch.device) -> Execution:
    """Finds out what a device can do of what a config asks for."""
    compiled, note = _resolve_compile(config, device)
    return Execution(
        resolve_precision(config, device), BlockRunner(compiled, config.recompute), note
    )


def resolve_precision(config: ClusterConfig, device: torch.device) -> torch.dtype:
    """Gives the dtype of mixed precision, or float32 where the device gains nothing by one."""
    if config.precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def _resolve_compile(config: ClusterConfig, device: torch.device) -> tuple[bool, str | None]:
    """Tells whether blocks are compiled, and why not where that was asked for."""
    if config.compile == "never" or (config.compile == "auto" and device.type != "cuda"):
        return False, None
    problem = _compile_problem(device)
    return problem is None, problem and f"blocks run uncompiled: {problem}"


def _compile_problem(device: torch.device) -> str | None:
    """Compiles something small, forwards and backwards, and says what kept it from running."""
    if not any(map(shutil.which, C_COMPILERS)):
        return (
            f"torch.compile needs a C compiler and none of {', '.join(C_COMPILERS)} is on the "
            "path; install one, or set cluster.compile=never"
        )
    try:
        x = torch.ones(8, 8, device=device, requires_grad=True)
        torch.compile(torch.nn.functional.gelu)(x).sum().backward()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as broken:
        reason = str(broken).partition("\n")[0]
        return f"torch.compile does not work here ({reason}); set cluster.compile=never"
    return None
