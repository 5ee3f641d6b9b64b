"""OpenAI's CLIP: a TorchScript archive in half precision, or its state dict."""

from __future__ import annotations

from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.foreign.clip_names import (
    OPENAI_CLIPS,
    SCALE_RULE,
    TEXT_RULES,
    clip_of_sizes,
)
from crossmost_ray.models.foreign.layout import (
    IMAGE_HEADS,
    Layout,
    Request,
    Rule,
    Tensors,
    left,
)

SIZES = ("input_resolution", "context_length", "vocab_size")
DEFAULT_BACKBONE = "pointbert"
NEXT_STEP = "python jobs/pretrain.py configs/pretrain/shapenet_crossmost.yaml model.start={folder}"


def _spec(tensors: Tensors, request: Request) -> ModelSpec:
    names = OPENAI_CLIPS if request.clip is None else (request.clip,)
    clip = clip_of_sizes(tensors, "visual.proj", names)
    return ModelSpec(clip, request.backbone or DEFAULT_BACKBONE)


OPENAI_CLIP = Layout(
    name="CLIP of OpenAI",
    # Only OpenAI's files say their sizes; beside those, open_clip's have the same names.
    matches=lambda names: {"visual.class_embedding", "visual.proj", *SIZES} <= set(names),
    rules=(
        *left("a size, which the name of the model says", *SIZES),
        *left("the causal mask, which is made anew", "*.attn_mask"),
        Rule("visual.", "image.visual."),
        SCALE_RULE,
        *TEXT_RULES,
    ),
    spec=_spec,
    may_lack=(*IMAGE_HEADS, "point."),
    takes=frozenset({"clip", "backbone"}),
    next_step=NEXT_STEP,
)
