"""ULIP's four point checkpoints: a point tower, aligned with the image and text towers of SLIP."""

from __future__ import annotations

from collections.abc import Collection

from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.foreign.clip_names import SCALE_RULE, TEXT_RULES, transposed
from crossmost_ray.models.foreign.layout import (
    IMAGE_HEADS,
    POINT_HEADS,
    Layout,
    Request,
    Rule,
    Tensors,
)

SLIP = "slip_vit_b16"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A tensor that only this backbone has, below `point_encoder.`.
BACKBONES = {
    "cls_token": "pointbert_512",
    "sa1.mlp_convs.0.weight": "pointnet2_ssg",
    "embedding.net.0.weight": "pointmlp",
    "encoder.encoder.0.0.convs.0.0.weight": "pointnext_s",
}


def _backbones(names: Collection[str]) -> list[str]:
    return [name for mark, name in BACKBONES.items() if f"point_encoder.{mark}" in names]


def _spec(tensors: Tensors, request: Request) -> ModelSpec:
    backbone = request.backbone or _backbones(tensors)[0]
    return ModelSpec(request.clip or SLIP, backbone, IMAGENET_MEAN, IMAGENET_STD)


ULIP = Layout(
    name="a point checkpoint of ULIP, with SLIP's towers",
    matches=lambda names: (
        {"visual.cls_token", "pc_projection", "token_embedding.weight"} <= set(names)
        and bool(_backbones(names))
    ),
    rules=(
        Rule("visual.", "image.visual.trunk."),
        Rule("image_projection", "image.visual.head.proj.weight", transposed),
        Rule("pc_projection", "point.projection"),
        Rule("point_encoder.", "point.backbone."),
        SCALE_RULE,
        *TEXT_RULES,
    ),
    spec=_spec,
    may_lack=(*IMAGE_HEADS, *POINT_HEADS),
    takes=frozenset({"clip", "backbone"}),
    next_step=(
        'python jobs/evaluate.py configs/evaluate/modelnet40_ulip.yaml "models={{ulip: {folder}}}"'
    ),
)
