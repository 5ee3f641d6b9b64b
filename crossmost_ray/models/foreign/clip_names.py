"""What CLIP's layouts share: where its tensors go, and which model their sizes belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from crossmost_ray.config import ConfigError
from crossmost_ray.models.clip import clip_config
from crossmost_ray.models.foreign.layout import Rule, Tensors

OPENAI_CLIPS = (
    "ViT-B-32-quickgelu",
    "ViT-B-16-quickgelu",
    "ViT-L-14-quickgelu",
    "ViT-L-14-336-quickgelu",
)

BLOCKS = "visual.transformer.resblocks."


def scalar(tensor: Tensor) -> Tensor:
    """Takes (1,) for a scalar."""
    return tensor.reshape(()) if tensor.numel() == 1 else tensor


def from_convolution(tensor: Tensor) -> Tensor:
    """Takes the (out, in, 1, 1) weight of a convolution for the (out, in) one of a linear layer."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def transposed(tensor: Tensor) -> Tensor:
    """Turns (in, out) into (out, in)."""
    return tensor.t() if tensor.ndim == 2 else tensor


SCALE_RULE = Rule("logit_scale", "logit_scale", scalar)

TEXT_RULES = (
    *(
        Rule(name, f"text.clip.{name}")
        for name in ("transformer.", "token_embedding.", "ln_final.", "text_projection.")
    ),
    Rule("positional_embedding", "text.clip.positional_embedding"),
    Rule("text_projection", "text.clip.text_projection"),
)


def clip_of_sizes(tensors: Tensors, projection: str, names: Sequence[str]) -> str:
    """Finds the model among `names` that an image tower of OpenAI's kind belongs to.

    Args:
        tensors: Of the file, the image tower's below `visual.`.
        projection: Name of the image tower's projection into the shared space.
        names: Names that `clip_config` knows.

    Raises:
        ConfigError: If none has the tower's sizes and its activation, which is not GELU but the
            quicker curve that OpenAI trained with.
    """
    found = _sizes_of(tensors, projection)
    wrong_curve = []
    for name in names:
        config = clip_config(name)
        if _sizes_in(config) == found:
            if config.get("quick_gelu"):
                return name
            wrong_curve.append(name)
    if wrong_curve:
        raise ConfigError(
            f"the file's weights were trained with QuickGELU, and '{wrong_curve[0]}' computes with "
            f"GELU; name a variant with QuickGELU, such as {wrong_curve[0]}-quickgelu"
        )
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    raise ConfigError(
        f"the file's image tower has {said}; that is none of {', '.join(names)}: "
        "name another model with --clip, or another --start"
    )


def _sizes_of(tensors: Tensors, projection: str) -> dict[str, int]:
    sizes = {
        name: tuple(tensors[name].shape) if name in tensors else None
        for name in ("visual.conv1.weight", "visual.positional_embedding", projection)
    }
    match [*sizes.values()]:
        case [(int(width), 3, int(patch), _), (int(places), _), (_, int(embed_dim))]:
            return {
                "width": width,
                "layers": len({name.split(".")[3] for name in tensors if name.startswith(BLOCKS)}),
                "patch_size": patch,
                "image_size": patch * math.isqrt(max(places - 1, 0)),
                "embed_dim": embed_dim,
            }
    said = ", ".join(f"{name} {shape or 'missing'}" for name, shape in sizes.items())
    raise ConfigError(f"the file's image tower is no vision transformer of CLIP's: {said}")


def _sizes_in(config: dict[str, Any]) -> dict[str, int | None]:
    vision = config["vision_cfg"]
    names = ("width", "layers", "patch_size", "image_size")
    return {name: vision.get(name) for name in names} | {"embed_dim": config["embed_dim"]}
