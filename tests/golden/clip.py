"""A tiny model with the weights of the golden numbers, which have the published modules' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from crossmost_ray.models import backbones
from crossmost_ray.models import clip as clip_table
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from tests.golden.recipe import fill, unit

FOLDER = Path(__file__).parent
NAME = "crossmost_tiny"
CLASSES = ["airplane", "bathtub", "bed", "night_stand", "glass_box", "tv_stand"]
TEMPLATES = [
    "a point cloud model of {}.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
]
IMAGE_SIZE, PATCH_SIZE, NUM_POINTS, NUM_GROUPS, GROUP_SIZE = 96, 16, 512, 32, 16
BATCH_SIZE = 4

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "width": 128,
        "layers": 3,
        "head_width": 64,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
}

# Ours on the left; where only the beginning differs, further down.
PUBLISHED = {
    "logit_scale": "logit_scale",
    "image.visual.proj": "image_projection",
    "image.mask_token": "visual.mask_token_embedding",
    "image.decoder.weight": "visual.decoder.0.weight",
    "image.decoder.bias": "visual.decoder.0.bias",
    "point.projection": "pc_projection",
    "point.local_projection": "point_encoder.proj",
}
PUBLISHED_PREFIXES = {
    "image.visual.": "visual.",
    "image.": "visual.",
    "text.clip.": "",
    "point.backbone.": "point_encoder.",
}


def published_name(ours: str) -> str:
    """Turns the name of a tensor of our model into its name in a published checkpoint."""
    if ours in PUBLISHED:
        return PUBLISHED[ours]
    prefix = next(prefix for prefix in PUBLISHED_PREFIXES if ours.startswith(prefix))
    return PUBLISHED_PREFIXES[prefix] + ours.removeprefix(prefix)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a published checkpoint of the tiny size."""
    keys = json.loads((FOLDER / f"{NAME}_state_dict_keys.json").read_text(encoding="utf-8"))
    return {name: tuple(shape) for name, shape in keys["with_text_tower"].items()}


def load_golden() -> dict[str, npt.NDArray[Any]]:
    """Reads the golden numbers."""
    with np.load(FOLDER / f"{NAME}.npz") as stored:
        return dict(stored)


def tiny_model() -> CrossModalModel:
    """Builds the model whose numbers are golden, in evaluation mode."""
    backbone = PointBert(
        num_groups=NUM_GROUPS,
        group_size=GROUP_SIZE,
        width=384,
        depth=2,
        heads=6,
        group_width=256,
        drop_path=0.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip_table.CUSTOM_CLIP, NAME, TINY_CLIP)
        patch.setitem(backbones.POINT_BACKBONES, NAME, lambda: backbone)
        model = CrossModalModel(ModelSpec(NAME, NAME))
        # Read while the name is known: it is kept from then on.
        model.text.tokenize(CLASSES[:1])
    shapes = published_shapes()
    tensors = {
        ours: torch.from_numpy(np.asarray(fill(name, shapes[name]))).reshape(value.shape)
        for ours, value in model.state_dict().items()
        for name in [published_name(ours)]
    }
    model.load_state_dict(tensors)
    return model.eval()


def golden_images() -> Tensor:
    """(B, 3, R, R) float32: fine noise on coarse noise, one value of it to a patch."""
    size = (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    fine = unit(f"{NAME}.image", size)
    coarse = unit(f"{NAME}.image_low", (*size[:2], IMAGE_SIZE // 16, IMAGE_SIZE // 16))
    spread = np.kron(1.5 * coarse, np.ones((16, 16), np.float32))
    return torch.from_numpy((0.3 * 1.5 * fine + spread).astype(np.float32))


def golden_points() -> Tensor:
    """(B, N, 3) float32: points in a box of three different sides."""
    points = unit(f"{NAME}.points", (BATCH_SIZE, NUM_POINTS, 3))
    return torch.from_numpy(points * np.array([0.9, 0.7, 0.5], np.float32))
