"""The two towers under one roof: with a text tower as the model, with class embeddings as the
classifier that is adapted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.blocks import BlockRunner
from crossmost_ray.models.clip import build_clip
from crossmost_ray.models.image_tower import ImageTower, TowerOutput
from crossmost_ray.models.point_tower import PointTower
from crossmost_ray.models.text_tower import TextTower, Underscores
from crossmost_ray.ops.precision import mixed_precision
from crossmost_ray.schema import Prediction

MAX_LOGIT_SCALE = math.log(100.0)


@torch.no_grad()
def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Keeps the factor on cosines at 100 or below, as CLIP does: beyond it a softmax saturates."""
    logit_scale.clamp_(max=MAX_LOGIT_SCALE)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which modules a model is made of: names of variants, so that a card can hold them."""

    clip: str
    """Name that `clip_config` knows: ours, open_clip's, or `timm:` and an image tower of timm."""
    point_backbone: str
    """Name in POINT_BACKBONES."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """What the image tower expects images (0 to 1) to be normalised by; CLIP's by default."""
    up_axis: str = "y"
    """Up axis of the clouds that the point tower was trained on."""


class MaskedOutput(NamedTuple):
    """What the student makes of a masked batch."""

    prediction: Prediction
    image: TowerOutput
    point: TowerOutput
    logit_scale: Tensor
    """Scalar, the factor itself, not its log."""


class CrossModalModel(nn.Module):
    """Image, point and text tower with one learned scale: what a model folder holds."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        clip = build_clip(spec.clip)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        """Log of the factor on cosines."""
        self.image = ImageTower(clip.visual, spec.clip)
        self.text = TextTower(clip, spec.clip)
        self.point = PointTower(spec.point_backbone, self.image.embed_dim)


class CrossModalClassifier(nn.Module):
    """Two towers that share a scale and the embeddings of C classes.

    Args:
        model: Gives the towers and the scale; they are shared, not copied.
        class_embed: (C, D) float, unit length; becomes a parameter.
        unit_classes: Whether class embeddings are brought to unit length in every pass. Where they
            aren't, a class whose embedding grows wins everywhere.
    """

    def __init__(
        self, model: CrossModalModel, class_embed: Tensor, *, unit_classes: bool = True
    ) -> None:
        super().__init__()
        self.unit_classes = unit_classes
        self.precision = torch.float32
        """What the towers compute their matrix products in; all that follows is float32."""
        self.image = model.image
        self.point = model.point
        self.logit_scale = model.logit_scale
        self.class_embed = nn.Parameter(class_embed.clone())

    def logits(self, embed: Tensor) -> Tensor:
        """Scores (B, D) embeddings against the classes: (B, C), cosines times the scale."""
        classes = F.normalize(self.class_embed, dim=-1) if self.unit_classes else self.class_embed
        return self.logit_scale.exp() * embed @ classes.t()

    def predict(self, images: Tensor, points: Tensor) -> Prediction:
        """Classifies (B, 3, R, R) images and (B, N, 3) points; nothing is hidden."""
        with mixed_precision(images.device, self.precision):
            image_embed, point_embed = self.image.embed(images), self.point.embed(points)
        return Prediction(
            image_embed, point_embed, self.logits(image_embed), self.logits(point_embed)
        )

    def forward(
        self,
        images: Tensor,
        points: Tensor,
        image_mask: Tensor,
        *,
        most_hidden: int,
        point_ratio: tuple[float, float],
        generator: torch.Generator,
    ) -> MaskedOutput:
        """Classifies masked pairs, and keeps what the objective's terms need.

        Args:
            images: (B, 3, R, R) float.
            points: (B, N, 3) float.
            image_mask: (B, P) bool, True where hidden.
            most_hidden: How many patches of an image are hidden at most.
            point_ratio: Least and largest share of a cloud's groups to hide.
            generator: Draws which groups are hidden; they are known only once points are grouped.
        """
        with mixed_precision(images.device, self.precision):
            tokens = self.point.tokenize(points)
            point_mask = self.point.draw_mask(tokens, point_ratio, generator)
            image = self.image(images, image_mask, most_hidden)
            point = self.point(tokens, point_mask)
        return MaskedOutput(
            prediction=Prediction(
                image.embed, point.embed, self.logits(image.embed), self.logits(point.embed)
            ),
            image=image,
            point=point,
            logit_scale=self.logit_scale.exp(),
        )


def set_runner(towers: CrossModalModel | CrossModalClassifier, run: BlockRunner) -> None:
    """Says how the blocks of the towers are run, where a tower is made of blocks."""
    towers.image.trunk.run = run
    backbone = towers.point.backbone
    if isinstance(backbone, PointBert):
        backbone.blocks.run = run


def build_classifier(
    model: CrossModalModel,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    underscores: Underscores = "space",
) -> CrossModalClassifier:
    """Builds the zero-shot classifier of a model for a list of class names.

    The arguments are those of `TextTower.embed_classes`.
    """
    embeds = model.text.embed_classes(classes, templates, underscores=underscores)
    return CrossModalClassifier(model, embeds)
