"""A config in, the task it asks for out: the one place that knows both objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from crossmost_ray.config import AdaptConfig, ModelConfig, PretrainConfig
from crossmost_ray.models.backbones import build_point_backbone
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.clip import clip_image_size
from crossmost_ray.models.point_tokenizer import PointTokenizer, load_tokenizer
from crossmost_ray.models.point_tower import PointTower
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.training.adapt import AdaptTask, set_masked_target
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
        ConfigError: If the model folder, or the point tokenizer's, can't be loaded.
    """
    if isinstance(config, PretrainConfig):
        return PretrainTask(_fresh_model(config.model).to(device), config, wrap)
    start = load_model(config.model)
    classifier = start.classifier(
        classes, config.data.templates, underscores=config.compat.classname_underscores
    ).to(device)
    classifier.unit_classes = config.compat.class_embed == "unit"
    backbone = classifier.point.backbone
    if isinstance(backbone, PointBert) and config.compat.fps_start == "random":
        backbone.fps_start = "random"
    tokenizer = _point_tokenizer(config)
    if tokenizer is not None:
        tokenizer = tokenizer.to(device)
    return AdaptTask(classifier, start.model.spec, config, wrap, tokenizer)


def inspect_model(config: AdaptConfig | PretrainConfig) -> tuple[int, list[str]]:
    """Looks at the model of a run before any worker starts.

    Returns:
        The side of the images that it takes, and what a user should know of the run.

    Raises:
        ConfigError: If the model folder, or the point tokenizer's, can't be loaded, if the two
            don't go together, or if a name is unknown.
    """
    notes = []
    if isinstance(config, PretrainConfig):
        has_tokens = build_point_backbone(config.model.point_backbone).token_width is not None
        start = config.model.start
        size = (
            clip_image_size(config.model.clip)
            if start is None
            else load_model(start).model.image.image_size
        )
    else:
        # Loaded whole, not only its config: a damaged folder is refused here, not in a worker.
        model = load_model(config.model).model
        has_tokens, size = model.point.has_tokens, model.image.image_size
        set_masked_target(model.point, config, _point_tokenizer(config))
    if not has_tokens:
        notes.append(
            "the point backbone has no tokens: masked_point and global_local_point are left out, "
            "and the masked pass hides neighbourhoods of points"
        )
    return size, notes


def _point_tokenizer(config: AdaptConfig) -> PointTokenizer | None:
    return None if config.point_tokenizer is None else load_tokenizer(config.point_tokenizer)


def _fresh_model(config: ModelConfig) -> CrossModalModel:
    """Builds a model to pre-train: from nothing, or around the towers of a given one."""
    if config.start is None:
        return CrossModalModel(ModelSpec(clip=config.clip, point_backbone=config.point_backbone))
    start = load_model(config.start).model
    spec = dataclasses.replace(start.spec, point_backbone=config.point_backbone)
    if config.fresh_point or spec != start.spec:
        start.point = PointTower(config.point_backbone, start.image.embed_dim)
        start.spec = spec
    return start
