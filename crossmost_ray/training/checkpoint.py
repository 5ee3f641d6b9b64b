"""The state of a run to a folder and back, such that going on equals never having stopped."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store

STATE_NAME = "state.pt"
PREFIX = "step-"


def checkpoint_name(step: int) -> str:
    """Names the checkpoint after `step` steps, so that names sort as steps do."""
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int:
    """Gives the steps before the checkpoint of this name."""
    return int(name.removeprefix(PREFIX))


def list_checkpoints(run: Store) -> list[str]:
    """Lists the names of a run's complete checkpoints in the order of the steps."""
    return [
        name
        for name in run.names()
        if name.startswith(PREFIX) and run.has_file(f"{name}/{STATE_NAME}")
    ]


def last_checkpoint(run: Store) -> Store:
    """Gives a run's newest complete checkpoint.

    Raises:
        ConfigError: If it has none.
    """
    names = list_checkpoints(run)
    if not names:
        raise ConfigError(f"the run at {run} has no checkpoint yet; start it, or go on with it")
    return run.child(names[-1])


def best_checkpoint(run: Store, scores: Mapping[int, float]) -> Store:
    """Gives the complete checkpoint of the highest score, the earliest of equals.

    Args:
        run: The run's folder.
        scores: By step, of whole epochs; checkpoints of other steps are not considered.

    Raises:
        ConfigError: If the run has no checkpoint that has a score.
    """
    scored = {
        name: score
        for name in list_checkpoints(run)
        if (score := scores.get(step_of(name))) is not None
    }
    if not scored:
        raise ConfigError(
            f"the run at {run} has no checkpoint with a label-free score; finish its first epoch, "
            "or set compat.select_on=last"
        )
    return run.child(max(scored, key=scored.__getitem__))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values, whole or not at all."""
    fresh = folder / f".{STATE_NAME}"
    torch.save(state, fresh)
    os.replace(fresh, folder / STATE_NAME)


def load_state(checkpoint: Store) -> dict[str, Any]:
    """Reads what `save_state` wrote, on the CPU; code in the file is never run.

    Raises:
        ConfigError: If the file is missing or damaged.
    """
    path = f"{checkpoint}/{STATE_NAME}"
    stored = checkpoint.read(STATE_NAME)
    if stored is None:
        raise ConfigError(f"the checkpoint '{checkpoint}' lacks its {STATE_NAME}; use another one")
    try:
        # torch does not look at the checksums: it would load a flipped bit, or fail in one of a
        # dozen ways.
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
        state: dict[str, Any] = torch.load(
            io.BytesIO(stored), map_location="cpu", weights_only=True
        )
    except (
        *(RuntimeError, EOFError, OSError, ValueError, zlib.error),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    ) as broken:
        reason = str(broken).partition("\n")[0] or type(broken).__name__
        raise ConfigError(
            f"{path} is damaged or cut short ({reason}); use another checkpoint"
        ) from None
    return state
