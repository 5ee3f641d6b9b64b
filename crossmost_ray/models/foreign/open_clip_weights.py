"""Weights of open_clip's models: a local file, or one of open_clip's pretrained tags."""

from __future__ import annotations

import difflib
import http.client
from pathlib import Path
from typing import NamedTuple

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.clip import clip_config
from crossmost_ray.models.foreign.clip_names import SCALE_RULE, TEXT_RULES
from crossmost_ray.models.foreign.layout import (
    IMAGE_HEADS,
    Layout,
    Request,
    Rule,
    Tensors,
    left,
)
from crossmost_ray.models.foreign.openai_clip import DEFAULT_BACKBONE, NEXT_STEP

Normalisation = tuple[float, float, float]


def _spec(tensors: Tensors, request: Request) -> ModelSpec:
    if request.clip is None:
        raise ConfigError(
            "the file holds an image-text model, but its tensors don't say which one: the "
            "activation leaves no trace in them. Name it: --clip ViT-B-16-quickgelu for OpenAI's "
            "weights, --clip ViT-B-16 for LAION's"
        )
    spec = ModelSpec(request.clip, request.backbone or DEFAULT_BACKBONE)
    return ModelSpec(
        spec.clip,
        spec.point_backbone,
        request.image_mean or spec.image_mean,
        request.image_std or spec.image_std,
    )


OPEN_CLIP = Layout(
    name="an image-text model of open_clip",
    matches=lambda names: (
        any(name.startswith("visual.") for name in names)
        and bool({"token_embedding.weight", "text.token_embedding.weight"} & set(names))
        and "pc_projection" not in names
    ),
    rules=(
        *left("the causal mask, which is made anew", "*.attn_mask"),
        *left("a bias on the logits, which moves no class before another", "logit_bias"),
        Rule("visual.", "image.visual."),
        SCALE_RULE,
        *TEXT_RULES,
        # Some of open_clip's models keep the text half below a name of its own.
        Rule("text.", "text.clip."),
    ),
    spec=_spec,
    may_lack=(*IMAGE_HEADS, "point."),
    takes=frozenset({"clip", "backbone"}),
    next_step=NEXT_STEP,
)


class Fetched(NamedTuple):
    """Weights that open_clip fetched."""

    path: Path
    image_mean: Normalisation | None
    image_std: Normalisation | None


def fetch(clip: str, tag: str) -> Fetched:
    """Fetches the weights that open_clip knows as `tag` of the model `clip`, from the net.

    Raises:
        ConfigError: If open_clip knows no such tag, if the tag's activation is another than the
            model's, or if the net can't be reached.
    """
    from open_clip import pretrained

    config = clip_config(clip)
    known = pretrained.list_pretrained_tags_by_model(clip)
    if tag not in known:
        near = difflib.get_close_matches(tag, known, n=3) or known
        raise ConfigError(
            f"open_clip has no weights '{tag}' of '{clip}'; it has: {', '.join(near) or 'none'}"
        )
    source = pretrained.get_pretrained_cfg(clip, tag)
    if bool(source.get("quick_gelu")) != bool(config.get("quick_gelu")):
        trained, other = (
            ("QuickGELU", f"{clip}-quickgelu")
            if source.get("quick_gelu")
            else ("GELU", clip.removesuffix("-quickgelu"))
        )
        raise ConfigError(f"the weights '{tag}' were trained with {trained}: take --clip {other}")
    try:
        path = Path(pretrained.download_pretrained(source))
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as unreachable:
        reason = str(unreachable).partition("\n")[0]
        raise ConfigError(
            f"the weights '{tag}' of '{clip}' can't be fetched ({reason}); this takes a net: fetch "
            f"the file elsewhere, and convert it with --clip {clip}"
        ) from None
    mean, std = source.get("mean"), source.get("std")
    return Fetched(path, tuple(mean) if mean else None, tuple(std) if std else None)
