"""A checkpoint in, model folders out: what a user takes away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossmost_ray.config import AdaptConfig, ConfigError, PretrainConfig, config_dict
from crossmost_ray.data.shards import class_names
from crossmost_ray.models.point_tower import TRAINING_HEADS
from crossmost_ray.models.pretrained import check_tensors, load_model, save_model
from crossmost_ray.storage import Store
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import load_state
from crossmost_ray.training.pretrain import PretrainTask


def export_adapted(config: AdaptConfig, checkpoint: Store, folder: Store) -> dict[str, Store]:
    """Writes teacher and student of a checkpoint as model folders.

    Args:
        config: The run's.
        checkpoint: Folder of a checkpoint.
        folder: Takes the subfolders `teacher` and `student`.

    Returns:
        The model folders by name.

    Raises:
        ConfigError: If the checkpoint is damaged or belongs to another model.
    """
    state = load_state(checkpoint)
    classes = class_names(config.data.classes, config.data.shards)
    written = {}
    for name in ("teacher", "student"):
        start = load_model(config.model)
        classifier = start.classifier(classes, config.data.templates)
        tensors = {
            key: value
            for key, value in _tensors(state, name, checkpoint).items()
            if not key.startswith(tuple(f"point.{head}" for head in TRAINING_HEADS))
        }
        check_tensors(tensors, classifier.state_dict(), f"the checkpoint '{checkpoint}'")
        classifier.load_state_dict(tensors)
        class_embed = classifier.class_embed.detach()
        unit_classes = config.compat.class_embed == "unit"
        written[name] = folder.child(name)
        save_model(
            written[name],
            # The classifier shares its towers with the model it was built from.
            start.model,
            classes=classes,
            class_embed=F.normalize(class_embed, dim=-1) if unit_classes else class_embed,
            unit_classes=unit_classes,
            training=_recipe(config),
            card=_adapted_card(config, name, state["history"]),
        )
    return written


def export_pretrained(config: PretrainConfig, checkpoint: Store, folder: Store) -> Store:
    """Writes the model of a pre-training checkpoint, in half precision to halve its size."""
    state = load_state(checkpoint)
    task = build_task(config, ())
    assert isinstance(task, PretrainTask)
    tensors = _tensors(state, "model", checkpoint)
    check_tensors(tensors, task.model.state_dict(), f"the checkpoint '{checkpoint}'")
    task.load_state_dict({"model": tensors})
    save_model(
        folder,
        task.model,
        card=f"# {config.name}\n",
        training=_recipe(config),
        dtype=torch.float16,
    )
    return folder


def _recipe(config: AdaptConfig | PretrainConfig) -> dict[str, Any]:
    """Spells out what made a model; where its files went is no part of that."""
    return {key: value for key, value in config_dict(config).items() if key != "output"}


def _tensors(state: Mapping[str, Any], name: str, checkpoint: Store) -> dict[str, Tensor]:
    if name not in state.get("task", {}):
        raise ConfigError(f"the checkpoint '{checkpoint}' holds no {name}; it is another task's")
    tensors: dict[str, Tensor] = state["task"][name]
    return tensors


def _adapted_card(config: AdaptConfig, name: str, history: list[dict[str, float]]) -> str:
    last = {key: round(value, 4) for key, value in history[-1].items()}
    return (
        f"# {config.name}: {name}\n\n"
        f"Adapted without labels from `{config.model}` to `{config.data.shards}` "
        f"(mode {config.mode}, seed {config.seed}, {config.optim.epochs} epochs) by "
        "`python jobs/adapt.py`. The resolved config is in `config.json` under `training`.\n\n"
        f"Last epoch: `{json.dumps(last)}`\n"
    )
