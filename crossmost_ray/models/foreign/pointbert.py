"""Point-BERT's own weights, a part of a point tower: the group encoder, or the transformer."""

from __future__ import annotations

from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.foreign.layout import (
    POINT_HEADS,
    Layout,
    Request,
    Rule,
    Tensors,
    left,
)

ENCODER = "point.backbone.encoder."
TRUNK = tuple(
    f"point.backbone.{name}"
    for name in ("reduce_dim.", "cls_token", "cls_pos", "pos_embed.", "blocks.", "norm.")
)
NOT_POINTS = ("image.", "text.", "logit_scale", "point.projection")
TRANSFORMERS = ("transformer_q.", "base_model.")
NEXT_STEP = (
    "python jobs/pretrain.py configs/pretrain/shapenet_crossmost.yaml "
    "model.start={folder} model.fresh_point=false model.point_backbone={backbone}"
)


def _spec(tensors: Tensors, request: Request) -> ModelSpec:
    assert request.start is not None
    return request.start.model.spec


DVAE = Layout(
    name="the dVAE of Point-BERT",
    matches=lambda names: {"codebook", "encoder.first_conv.0.weight"} <= set(names),
    rules=(
        Rule("encoder.", ENCODER),
        *left(
            "makes visual words of groups and groups of words, which no model here does",
            *("codebook", "dgcnn_1.", "dgcnn_2.", "decoder."),
        ),
    ),
    spec=_spec,
    may_lack=(*NOT_POINTS, *TRUNK, *POINT_HEADS),
    takes=frozenset({"start"}),
    needs=frozenset({"start"}),
    next_step=NEXT_STEP,
)

POINT_BERT = Layout(
    name="the transformer of Point-BERT",
    matches=lambda names: any(f"{prefix}cls_token" in names for prefix in TRANSFORMERS),
    rules=(
        *left(
            "predicts visual words, and here tokens are predicted",
            *(f"{prefix}lm_head." for prefix in TRANSFORMERS),
        ),
        *left(
            "a head of its own pre-training or fine-tuning",
            *(f"{prefix}cls_head." for prefix in TRANSFORMERS),
            *(f"{prefix}cls_head_finetune." for prefix in TRANSFORMERS),
        ),
        *left(
            "made the targets of its own pre-training",
            *("transformer_k.", "dvae.", "queue", "queue_ptr"),
        ),
        *(Rule(prefix, "point.backbone.") for prefix in TRANSFORMERS),
    ),
    spec=_spec,
    may_lack=(*NOT_POINTS, ENCODER, *POINT_HEADS),
    takes=frozenset({"start"}),
    needs=frozenset({"start"}),
    next_step=NEXT_STEP,
)
