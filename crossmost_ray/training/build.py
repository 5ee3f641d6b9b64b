"""A config in, the task it asks for out: the one place that knows both objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from crossmost_ray.config import TOWERS, AdaptConfig, ModelConfig, PretrainConfig
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec, set_runner
from crossmost_ray.models.point_tokenizer import PointTokenizer, load_tokenizer
from crossmost_ray.models.point_tower import PointTower
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.training.adapt import TOWERS_OF_MODE, AdaptTask, set_masked_target
from crossmost_ray.training.execution import PLAIN, Execution
from crossmost_ray.training.pretrain import PretrainTask


def build_task(
    config: AdaptConfig | PretrainConfig,
    classes: Sequence[str],
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    device: torch.device | None = None,
    execution: Execution = PLAIN,
) -> AdaptTask | PretrainTask:
    """Builds the task of a run, at its first step.

    Args:
        config: Tells by its type which objective is meant.
        classes: C names; pre-training has none.
        wrap: Prepares the student for several workers.
        device: Where the task shall live; the CPU if None.
        execution: How the towers are computed.

    Raises:
        ConfigError: If the model folder, or the point tokenizer's, can't be loaded.
    """
    if isinstance(config, PretrainConfig):
        model = _fresh_model(config.model).to(device)
        set_runner(model, execution.run)
        return PretrainTask(model, config, wrap, execution.precision)
    start = load_model(config.model)
    classifier = start.classifier(
        classes, config.data.templates, underscores=config.compat.classname_underscores
    ).to(device)
    classifier.unit_classes = config.compat.class_embed == "unit"
    classifier.precision = execution.precision
    set_runner(classifier, execution.run)
    backbone = classifier.point.backbone
    if isinstance(backbone, PointBert) and config.compat.fps_start == "random":
        backbone.fps_start = "random"
    tokenizer = _point_tokenizer(config)
    if tokenizer is not None:
        tokenizer = tokenizer.to(device)
    return AdaptTask(classifier, start.model.spec, config, wrap, tokenizer, classes)


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What is known of a run's model before any worker starts."""

    image_size: int
    """Side of the images that it takes."""
    notes: list[str]
    """What a user should know of the run."""
    checkpoint_bytes: int
    """Size of a checkpoint, but for what is small."""
    exported_bytes: int
    """Size of the model folders that a finished run leaves."""


def inspect_model(config: AdaptConfig | PretrainConfig) -> ModelFacts:
    """Looks at the model of a run before any worker starts.

    Raises:
        ConfigError: If the model folder, or the point tokenizer's, can't be loaded, if the two
            don't go together, or if a name is unknown.
    """
    if isinstance(config, PretrainConfig):
        # Nothing of it is kept: weights from nothing need no memory.
        with torch.device("cpu" if config.model.start else "meta"):
            model = _fresh_model(config.model)
        trained = [name for name in ("image", "text", "point") if name not in config.freeze]
        # The model once, and of what is trained AdamW's two averages.
        checkpoint = _size_of(model) + 2 * sum(_size_of(getattr(model, name)) for name in trained)
        exported = _size_of(model) // 2
    else:
        # Loaded whole, not only its config: a damaged folder is refused here, not in a worker.
        model = load_model(config.model).model
        set_masked_target(model.point, config, _point_tokenizer(config))
        towers = [getattr(model, tower) for tower in TOWERS]
        trained = list(TOWERS_OF_MODE[config.mode])
        # Student, teacher and perhaps a healthy one, and of what is trained AdamW's two averages.
        copies = 3 if config.guard.collapse == "rollback" else 2
        checkpoint = copies * sum(map(_size_of, towers))
        checkpoint += 2 * sum(_size_of(getattr(model, name)) for name in trained)
        exported = 2 * _size_of(model)
    notes = []
    if not model.point.has_tokens:
        notes.append(
            "the point backbone has no tokens: masked_point and global_local_point are left out, "
            "and the masked pass hides neighbourhoods of points"
        )
    return ModelFacts(model.image.image_size, notes, checkpoint, exported)


def _size_of(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


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
