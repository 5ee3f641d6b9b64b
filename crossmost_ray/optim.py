"""Parameters in, an optimiser and its schedule out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from crossmost_ray.config import OptimConfig


def parameter_groups(
    module: nn.Module,
    *,
    layer_of: Callable[[str], tuple[int, int] | None],
    weight_decay: float,
    layer_decay: float,
    scale_of: Callable[[str], float] = lambda name: 1.0,
    decays: Callable[[str, nn.Parameter], bool] = lambda name, parameter: parameter.ndim > 1,
) -> list[dict[str, object]]:
    """Sorts trainable parameters by learning rate and weight decay.

    Args:
        module: Its parameters that need no gradient are left out.
        layer_of: From a parameter's name to (layer, last layer) in its tower; None for one that
            lies in no tower.
        weight_decay: Of the parameters that `decays` names.
        layer_decay: The factor from one layer to the layer below it; the last has 1.
        scale_of: From a parameter's name to a further factor on its rate.
        decays: Whether a parameter decays. By default matrices and larger: vectors and scalars
            have none, and the scale of the logits is a scalar: decay would pull the temperature.

    Returns:
        Groups for an optimiser, each with `lr_scale`, in a stable order.

    Source:
        BEiT (Bao et al., 2022), layer-wise learning rate decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        place = layer_of(name)
        lr_scale = 1.0 if place is None else layer_decay ** (place[1] - place[0])
        lr_scale *= scale_of(name)
        decay = weight_decay if decays(name, parameter) else 0.0
        groups.setdefault((lr_scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), parameters in groups.items()
    ]


def learning_rate(
    step: int, *, num_steps: int, warmup_steps: int, config: OptimConfig, from_zero: bool = False
) -> float:
    """Gives the rate of a step: a line up to `lr`, then a cosine down to `min_lr`.

    Step 0 already moves: the line passes through lr / warmup_steps there. With `from_zero` it
    stands still, and the line reaches `lr` at the last step of the warm-up.
    """
    if step < warmup_steps:
        if from_zero:
            return config.lr * step / max(warmup_steps - 1, 1)
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group its share of the step's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def build_optimizer(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.AdamW:
    """Builds AdamW over parameter groups, in its fused form."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
