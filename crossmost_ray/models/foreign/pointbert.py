"""Point-BERT's own weights: a part of a point tower, the group encoder or the transformer, or the
tokenizer that names groups."""

from __future__ import annotations

import dataclasses

from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.foreign.clip_names import from_convolution
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
DECODERS = ("dgcnn_2.", "decoder.")
TRANSFORMERS = ("transformer_q.", "base_model.")
NEXT_STEP = (
    "python jobs/pretrain.py configs/pretrain/shapenet_crossmost.yaml "
    "model.start={folder} model.fresh_point=false model.point_backbone={backbone}"
)

DECODER = left("makes groups of visual words, which nothing here does", "codebook", *DECODERS)


def _spec(tensors: Tensors, request: Request) -> ModelSpec:
    assert request.start is not None
    return request.start.model.spec


DVAE = Layout(
    name="the dVAE of Point-BERT",
    matches=lambda names: {"codebook", "encoder.first_conv.0.weight"} <= set(names),
    rules=(
        Rule("encoder.", ENCODER),
        *left("makes visual words of groups: take --as-tokenizer for those", "dgcnn_1."),
        *DECODER,
    ),
    spec=_spec,
    may_lack=(*NOT_POINTS, *TRUNK, *POINT_HEADS),
    takes=frozenset({"start"}),
    needs=frozenset({"start"}),
    next_step=NEXT_STEP,
)

TOKENIZER = dataclasses.replace(
    DVAE,
    rules=(
        Rule("encoder.", "encoder."),
        # Convolutions of width 1, which are linear layers.
        Rule("dgcnn_1.input_trans.", "input.", from_convolution),
        *(
            Rule(f"dgcnn_1.layer{k + 1}.{theirs}.", f"edges.{k}.{ours}.", from_convolution)
            for k in range(4)
            for theirs, ours in ((0, "linear"), (1, "norm"))
        ),
        Rule("dgcnn_1.layer5.0.", "output.", from_convolution),
        Rule("dgcnn_1.layer5.1.", "output_norm."),
        *DECODER,
    ),
    may_lack=(),
    takes=frozenset(),
    needs=frozenset(),
    next_step=(
        "python jobs/adapt.py configs/adapt/modelnet40_crossmost.yaml "
        "compat.mpm_target=token_ids point_tokenizer={folder}"
    ),
)
"""The same file, to become a tokenizer and no part of a model. It is never recognised: it has to
be asked for."""

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
