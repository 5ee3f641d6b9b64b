"""The state of a run to a folder and back, such that going on equals never having stopped."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from crossmost_ray.config import ConfigError

STATE_NAME = "state.pt"


def checkpoint_name(epoch: int) -> str:
    """Names an epoch's checkpoint, so that names sort as epochs do."""
    return f"epoch-{epoch:05d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Lists a run's complete checkpoints in the order of the epochs."""
    return sorted(path.parent for path in run_folder.glob(f"epoch-*/{STATE_NAME}"))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values, whole or not at all."""
    fresh = folder / f".{STATE_NAME}"
    torch.save(state, fresh)
    os.replace(fresh, folder / STATE_NAME)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, on the CPU; code in the file is never run.

    Raises:
        ConfigError: If the file is missing or damaged.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        raise ConfigError(f"the checkpoint '{folder}' lacks its {STATE_NAME}; use another one")
    try:
        # torch does not look at the checksums: it would load a flipped bit, or fail in one of a
        # dozen ways.
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(RuntimeError, EOFError, OSError, ValueError, zlib.error),
        *(pickle.UnpicklingError, zipfile.BadZipFile),
    ) as broken:
        reason = str(broken).partition("\n")[0] or type(broken).__name__
        raise ConfigError(
            f"{path} is damaged or cut short ({reason}); use another checkpoint"
        ) from None
    return state
