"""A model to a folder and back: safetensors, a config and a card. Nothing in it is unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import (
    CrossModalClassifier,
    CrossModalModel,
    ModelSpec,
    build_classifier,
)
from crossmost_ray.models.text_tower import Underscores
from crossmost_ray.storage import Store

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
CLASS_EMBED = "class_embed"
FORMAT = 1

MAX_NAMED_TENSORS = 5

Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds."""

    model: CrossModalModel
    classes: list[str] | None
    """Classes that the model was adapted to; None for a model that was not adapted."""
    class_embed: Tensor | None
    """(C, D) float32, the adapted embeddings of `classes`."""
    unit_classes: bool = True
    """Whether they are brought to unit length before they classify."""

    def classifier(
        self,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        underscores: Underscores = "space",
    ) -> CrossModalClassifier:
        """Builds a classifier: the adapted one for the adapted classes, else a zero-shot one."""
        if self.class_embed is not None and list(classes) == self.classes:
            return CrossModalClassifier(
                self.model, self.class_embed, unit_classes=self.unit_classes
            )
        return build_classifier(self.model, classes, templates, underscores=underscores)


def save_model(
    folder: Path | Store,
    model: CrossModalModel,
    *,
    card: str,
    classes: Sequence[str] | None = None,
    class_embed: Tensor | None = None,
    unit_classes: bool = True,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
        folder: Replaced if it exists; here or elsewhere.
        model: All three towers.
        card: Markdown.
        classes: Of an adapted model.
        class_embed: (C, D), their adapted embeddings.
        unit_classes: Whether they are to be brought to unit length before they classify.
        training: Resolved config of the run, for the record.
        dtype: That floating-point weights are stored in; they load as float32.
    """
    tensors = dict(model.state_dict())
    if class_embed is not None:
        tensors[CLASS_EMBED] = class_embed.detach()
    stored = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in tensors.items()
    }
    config = {
        "format": FORMAT,
        "spec": dataclasses.asdict(model.spec),
        "classes": list(classes) if classes is not None else None,
        "unit_classes": unit_classes,
        "training": dict(training or {}),
    }
    write_folder(folder, stored, config, card)


def write_folder(
    folder: Path | Store, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: str
) -> None:
    """Writes tensors, a config and a card as one folder, whole or not at all.

    Args:
        folder: Replaced if it exists; here or elsewhere.
        tensors: Contiguous, on the CPU.
        config: Plain values, for JSON.
        card: Markdown.
    """
    local = folder if isinstance(folder, Path) else folder.local
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(
        tempfile.mkdtemp()
        if local is None
        else tempfile.mkdtemp(prefix=f".{local.name}-", dir=local.parent)
    )
    try:
        save_file(dict(tensors), fresh / WEIGHTS_NAME)
        (fresh / CARD_NAME).write_text(card, encoding="utf-8")
        (fresh / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if local is not None:
            fresh.chmod(0o755)
            if local.exists():
                shutil.rmtree(local)
            os.replace(fresh, local)
            return
        assert isinstance(folder, Store)
        # A store of objects moves no folders. Without its config it is none, so that comes last.
        folder.remove(CONFIG_NAME)
        for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
            folder.upload(fresh / name, name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_folder(
    path: str | Path | Store, kind: str, hint: str, parse: Callable[[dict[str, Any]], Parsed]
) -> tuple[Parsed, dict[str, Tensor], str]:
    """Reads what `write_folder` wrote.

    Args:
        path: The folder, or its address such as `s3://bucket/model`.
        kind: What errors call it: "model".
        hint: What to do where there is none.
        parse: Makes of the config what is wanted of it.

    Returns:
        What `parse` made, the tensors as stored, and the name of the file that holds them.

    Raises:
        ConfigError: If the folder or a file of it is missing or damaged, or `parse` fails.
    """
    store = path if isinstance(path, Store) else Store(str(path), key=kind)
    if not store.is_folder():
        raise ConfigError(f"there is no {kind} folder '{path}' ({store}); {hint}")
    if store.local is None:
        with tempfile.TemporaryDirectory() as copy:
            store.download(Path(copy))
            return _read_local(Path(copy), str(store), kind, parse)
    return _read_local(store.local, str(path), kind, parse)


def _read_local(
    folder: Path, shown: str, kind: str, parse: Callable[[dict[str, Any]], Parsed]
) -> tuple[Parsed, dict[str, Tensor], str]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ConfigError(f"the {kind} folder '{shown}' lacks its {name}; copy it whole")
    try:
        parsed = parse(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as broken:
        raise ConfigError(
            f"{shown}/{CONFIG_NAME} is not a {kind}'s config ({broken}); copy the folder anew"
        ) from None
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError) as broken:
        raise ConfigError(
            f"{shown}/{WEIGHTS_NAME} is damaged or cut short ({broken}); copy it anew"
        ) from None
    return parsed, tensors, f"{shown}/{WEIGHTS_NAME}"


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns lists back into tuples, which JSON has none of."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in dict(values).items()
    }


def load_model(path: str | Path | Store) -> ModelFolder:
    """Loads a model folder.

    Raises:
        ConfigError: If the folder or a file of it is missing or damaged, or if its tensors are
            not those of the model that it claims to be; the first differing ones are named.
    """

    def parse(config: dict[str, Any]) -> tuple[ModelSpec, list[str] | None, bool]:
        spec = ModelSpec(**with_tuples(config["spec"]))
        return spec, config["classes"], bool(config.get("unit_classes", True))

    hint = "train one with `python jobs/pretrain.py`, or mend `model`"
    (spec, classes, unit_classes), tensors, weights = read_folder(path, "model", hint, parse)
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    class_embed = tensors.pop(CLASS_EMBED, None)
    model = CrossModalModel(spec)
    check_tensors(tensors, model.state_dict(), weights)
    model.load_state_dict(tensors)
    return ModelFolder(model.eval(), classes, class_embed, unit_classes)


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compares names and shapes of tensors.

    Raises:
        ConfigError: Naming the first tensors that are missing, unknown or of another shape.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if not problems:
        return
    named = "\n".join(f"  {problem}" for problem in problems[:MAX_NAMED_TENSORS])
    more = len(problems) - MAX_NAMED_TENSORS
    raise ConfigError(
        f"{source} does not fit the model that is to be loaded:\n{named}"
        + (f"\n  ... and {more} more" if more > 0 else "")
        + "\nuse the folder's own config.json, or a checkpoint of the same variants"
    )
