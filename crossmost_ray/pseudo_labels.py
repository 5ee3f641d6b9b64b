"""The teacher's two opinions in, targets for the student out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crossmost_ray.config import PseudoLabelConfig, Tower
from crossmost_ray.schema import PseudoLabels

Tie = Literal["image", "point", "sum"]


@torch.no_grad()
def joint_pseudo_labels(
    image_logits: Tensor,
    point_logits: Tensor,
    config: PseudoLabelConfig,
    *,
    tie: Tie = "image",
    ease: Tensor | None = None,
) -> PseudoLabels:
    """Takes, object by object, the class of whichever tower is the surer.

    Args:
        image_logits: (B, C) of the teacher's image tower on the weak views.
        point_logits: (B, C) of the teacher's point tower on the weak clouds.
        config: Threshold, and the factor on the point tower's confidence.
        tie: Whose class counts where both are equally sure. "sum" is the reference's mistake,
            which adds the two class indices: the result may be no class at all.
        ease: As in `pseudo_labels`.

    Source:
        CrossMoST (Dharmasiri et al., 2024), joint pseudo-labels.
    """
    image_conf, image_class = image_logits.softmax(dim=-1).max(dim=-1)
    point_conf, point_class = point_logits.softmax(dim=-1).max(dim=-1)
    point_conf = point_conf * config.point_weight

    # A tie goes to one of them. Masking and adding, as in
    # `a * (best == a_conf) + b * (best == b_conf)`, sums two class indices on a tie.
    point_wins = point_conf >= image_conf if tie == "point" else point_conf > image_conf
    target = torch.where(point_wins, point_class, image_class)
    if tie == "sum":
        target = torch.where(point_conf == image_conf, image_class + point_class, target)
    confidence = torch.maximum(point_conf, image_conf)
    least = _least(config.threshold, target, ease)
    return PseudoLabels(target=target, confidence=confidence, selected=confidence > least)


def _least(threshold: float, target: Tensor, ease: Tensor | None) -> Tensor | float:
    """Gives the least confidence of each object's class."""
    # The reference's sum of two class indices may lie beyond the last class.
    return threshold if ease is None else threshold * ease[target.clamp(max=len(ease) - 1)]


@torch.no_grad()
def coin_pseudo_labels(
    image_logits: Tensor,
    point_logits: Tensor,
    point_drawn: Tensor,
    config: PseudoLabelConfig,
    *,
    ease: Tensor | None = None,
) -> PseudoLabels:
    """Takes, object by object, the class and the confidence of a tower drawn by a coin.

    Args:
        image_logits: (B, C) of the teacher's image tower on the weak views.
        point_logits: (B, C) of the teacher's point tower on the weak clouds.
        point_drawn: (B,) bool, True where the coin says points.
        config: Threshold, and the factor on the point tower's confidence.
        ease: As in `pseudo_labels`.

    Source:
        CrossMoST (Dharmasiri et al., 2024), the naive joint label of its ablation.
    """
    image_conf, image_class = image_logits.softmax(dim=-1).max(dim=-1)
    point_conf, point_class = point_logits.softmax(dim=-1).max(dim=-1)
    confidence = torch.where(point_drawn, point_conf * config.point_weight, image_conf)
    target = torch.where(point_drawn, point_class, image_class)
    least = _least(config.threshold, target, ease)
    return PseudoLabels(target=target, confidence=confidence, selected=confidence > least)


@torch.no_grad()
def agreed_pseudo_labels(
    image_logits: Tensor,
    point_logits: Tensor,
    config: PseudoLabelConfig,
    *,
    ease: Tensor | None = None,
) -> PseudoLabels:
    """Selects the objects that both towers put into one class, neither of them too unsure.

    Args:
        image_logits: (B, C) of the teacher's image tower on the weak views.
        point_logits: (B, C) of the teacher's point tower on the weak clouds.
        config: The threshold of agreement, and the factor on the point tower's confidence.
        ease: As in `pseudo_labels`.

    Source:
        CrossMoST (Dharmasiri et al., 2024), agreement pseudo-labels.
    """
    image_conf, image_class = image_logits.softmax(dim=-1).max(dim=-1)
    point_conf, point_class = point_logits.softmax(dim=-1).max(dim=-1)
    confidence = torch.minimum(point_conf * config.point_weight, image_conf)
    agreed = image_class == point_class
    return PseudoLabels(
        target=image_class,
        confidence=confidence,
        selected=agreed & (confidence > _least(config.threshold_agreement, image_class, ease)),
    )


@torch.no_grad()
def separate_pseudo_labels(
    logits: Tensor, threshold: float, *, ease: Tensor | None = None
) -> PseudoLabels:
    """Takes one tower's own opinion: single-modality self-training.

    Args:
        logits: (B, C) of the teacher's tower on the weak augmentation.
        threshold: Least confidence to be selected.
        ease: As in `pseudo_labels`.

    Source:
        FixMatch (Sohn et al., 2020); MUST (Li et al., 2022).
    """
    confidence, target = logits.softmax(dim=-1).max(dim=-1)
    least = _least(threshold, target, ease)
    return PseudoLabels(target=target, confidence=confidence, selected=confidence > least)


def pseudo_labels(
    image_logits: Tensor,
    point_logits: Tensor,
    config: PseudoLabelConfig,
    *,
    joint: bool,
    point_drawn: Tensor,
    tie: Tie = "image",
    ease: Tensor | None = None,
) -> dict[Tower, PseudoLabels]:
    """Gives each tower its labels, by the rule of the config.

    Args:
        image_logits: (B, C) of the teacher's image tower on the weak views.
        point_logits: (B, C) of the teacher's point tower on the weak clouds.
        config: Rule, thresholds and factor.
        joint: Which rule stands in where the config names none: joint by confidence, or separate.
        point_drawn: (B,) bool, the coins of the rule "coin".
        tie: As in `joint_pseudo_labels`.
        ease: (C,) factors on the thresholds, class by class; None for 1.

    Source:
        CrossMoST (Dharmasiri et al., 2024), its rules and their ablations.
    """
    rule = config.rule or ("confidence" if joint else "separate")
    if rule == "confidence":
        both = joint_pseudo_labels(image_logits, point_logits, config, tie=tie, ease=ease)
    elif rule == "coin":
        both = coin_pseudo_labels(image_logits, point_logits, point_drawn, config, ease=ease)
    elif rule == "agreement":
        both = agreed_pseudo_labels(image_logits, point_logits, config, ease=ease)
    else:
        image = separate_pseudo_labels(image_logits, config.threshold_image, ease=ease)
        point = separate_pseudo_labels(point_logits, config.threshold_point, ease=ease)
        return {
            "image": point if rule == "points_to_image" else image,
            "point": image if rule == "image_to_points" else point,
        }
    return {"image": both, "point": both}
