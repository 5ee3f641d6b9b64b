"""Where mixed precision begins and ends: the towers' insides, and nothing before or after them."""

from __future__ import annotations

import torch


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Has matrix products computed in `dtype`; float32 leaves them as they are."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def full_precision(device: torch.device) -> torch.autocast:
    """Ends mixed precision for a while.

    A cosine is multiplied by up to 100 before a softmax: bfloat16, which tells numbers near 25
    apart by steps of 0.125, would move confidences across thresholds.
    """
    return torch.autocast(device.type, enabled=False)
