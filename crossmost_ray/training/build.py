"""A config in, the task it asks for out: the one place that knows both objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from crossmost_ray.config import AdaptConfig, PretrainConfig
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.pretrain import PretrainTask


def build_task(
    config: AdaptConfig | PretrainConfig,
    classes: Sequence[str],
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    device: torch.device | None = None,
) -> AdaptTask | PretrainTask:
    """Builds the task of a run, at its first step.

    Args:
        config: Tells by its type which objective is meant.
        classes: C names; pre-training has none.
        wrap: Prepares the student for several workers.
        device: Where the task shall live; the CPU if None.

    Raises:
        ConfigError: If the model folder can't be loaded.
    """
    if isinstance(config, PretrainConfig):
        spec = ModelSpec(clip=config.model.clip, point_backbone=config.model.point_backbone)
        return PretrainTask(CrossModalModel(spec).to(device), config, wrap)
    start = load_model(config.model)
    classifier = start.classifier(classes, config.data.templates).to(device)
    return AdaptTask(classifier, start.model.spec, config, wrap)
