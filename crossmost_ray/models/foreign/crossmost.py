"""CrossMoST's own checkpoints: after its first stage, and adapted to a list of classes."""

from __future__ import annotations

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.foreign.clip_names import (
    OPENAI_CLIPS,
    SCALE_RULE,
    TEXT_RULES,
    clip_of_sizes,
    from_convolution,
    transposed,
)
from crossmost_ray.models.foreign.layout import Layout, Request, Rule, Tensors
from crossmost_ray.models.pretrained import CLASS_EMBED

BACKBONE = "pointbert"
MARKS = {"visual.mask_token_embedding", "image_projection", "point_encoder.proj", "pc_projection"}

TOWER_RULES = (
    Rule("visual.mask_token_embedding", "image.mask_token", lambda tensor: tensor.flatten()),
    Rule("visual.ln_patch.", "image.ln_patch."),
    # A convolution of width 1, whose channels were then spread over a patch: colour outermost,
    # then row, then column. A patch is laid out so here, too.
    Rule("visual.decoder.0.", "image.decoder.", from_convolution),
    Rule("visual.", "image.visual."),
    Rule("image_projection", "image.visual.proj"),
    Rule("point_encoder.proj", "point.local_projection"),
    Rule("point_encoder.", "point.backbone."),
    Rule("pc_projection", "point.projection"),
    SCALE_RULE,
)


def _first_stage_spec(tensors: Tensors, request: Request) -> ModelSpec:
    names = OPENAI_CLIPS if request.clip is None else (request.clip,)
    clip = clip_of_sizes(tensors, "image_projection", names)
    return ModelSpec(clip, request.backbone or BACKBONE)


def _adapted_spec(tensors: Tensors, request: Request) -> ModelSpec:
    assert request.start is not None
    assert request.classes is not None
    shape = tuple(tensors["classifier"].shape)
    if len(shape) != 2 or shape[1] != len(request.classes):
        raise ConfigError(
            f"the file's classifier has shape {shape}, expected (width, classes): --classes "
            f"lists {len(request.classes)}; name the list that it was adapted to, in its order"
        )
    clip = clip_of_sizes(tensors, "image_projection", (request.start.model.spec.clip,))
    return ModelSpec(clip, request.backbone or BACKBONE)


FIRST_STAGE = Layout(
    name="CrossMoST after its first stage, with CLIP's towers",
    matches=lambda names: MARKS | {"token_embedding.weight"} <= set(names),
    rules=(*TOWER_RULES, *TEXT_RULES),
    spec=_first_stage_spec,
    may_lack=(),
    takes=frozenset({"clip", "backbone"}),
    next_step="python jobs/adapt.py configs/adapt/modelnet40_crossmost.yaml model={folder}",
)

ADAPTED = Layout(
    name="CrossMoST adapted to a list of classes",
    matches=lambda names: MARKS | {"classifier"} <= set(names),
    rules=(Rule("classifier", CLASS_EMBED, transposed), *TOWER_RULES),
    spec=_adapted_spec,
    # The text tower was dropped once it had made the classifier.
    may_lack=("text.",),
    takes=frozenset({"backbone", "start", "weights", "classes"}),
    needs=frozenset({"start", "classes"}),
    next_step=(
        "python jobs/evaluate.py configs/evaluate/modelnet40_crossmost.yaml "
        '"models={{adapted: {folder}}}"'
    ),
)
