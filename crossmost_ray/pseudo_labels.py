"""The teacher's two opinions in, targets for the student out."""

from __future__ import annotations

import torch
from torch import Tensor

from crossmost_ray.config import PseudoLabelConfig
from crossmost_ray.schema import PseudoLabels


@torch.no_grad()
def joint_pseudo_labels(
    image_logits: Tensor, point_logits: Tensor, config: PseudoLabelConfig
) -> PseudoLabels:
    """Takes, object by object, the class of whichever tower is the surer.

    Args:
        image_logits: (B, C) of the teacher's image tower on the weak views.
        point_logits: (B, C) of the teacher's point tower on the weak clouds.
        config: Threshold, and the factor on the point tower's confidence.

    Source:
        CrossMoST (Dharmasiri et al., 2024), joint pseudo-labels.
    """
    image_conf, image_class = image_logits.softmax(dim=-1).max(dim=-1)
    point_conf, point_class = point_logits.softmax(dim=-1).max(dim=-1)
    point_conf = point_conf * config.point_weight

    # A tie goes to the image tower; it has to go to one of them. Masking and adding, as in
    # `a * (best == a_conf) + b * (best == b_conf)`, sums two class indices on a tie.
    point_wins = point_conf > image_conf
    confidence = torch.where(point_wins, point_conf, image_conf)
    return PseudoLabels(
        target=torch.where(point_wins, point_class, image_class),
        confidence=confidence,
        selected=confidence > config.threshold,
    )


@torch.no_grad()
def separate_pseudo_labels(logits: Tensor, threshold: float) -> PseudoLabels:
    """Takes one tower's own opinion: single-modality self-training.

    Args:
        logits: (B, C) of the teacher's tower on the weak augmentation.
        threshold: Least confidence to be selected.

    Source:
        FixMatch (Sohn et al., 2020); MUST (Li et al., 2022).
    """
    confidence, target = logits.softmax(dim=-1).max(dim=-1)
    return PseudoLabels(target=target, confidence=confidence, selected=confidence > threshold)
