"""Tensors in, one scalar out: the terms of the objectives. None of them gathers: whoever calls
passes the statistic of all workers, so that each can be tested on one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def self_training_loss(logits: Tensor, target: Tensor, selected: Tensor) -> Tensor:
    """Cross-entropy with the pseudo-labels, averaged over the selected objects.

    Args:
        logits: (B, C) of the student on the strong augmentation.
        target: (B,) int64 pseudo-labels.
        selected: (B,) bool.

    Returns:
        Scalar, in nats. Zero, with a gradient of zero, when nothing is selected.

    Source:
        FixMatch (Sohn et al., 2020).
    """
    per_object = F.cross_entropy(logits, target, reduction="none")
    # Not `cross_entropy(logits[selected], target[selected])`: early in adaptation a batch
    # may hold no confident object, and the mean over an empty set is NaN.
    return (per_object * selected).sum() / selected.sum().clamp(min=1)


def fairness_loss(mean_prob: Tensor) -> Tensor:
    """Penalises a student that avoids some classes: -1/C * sum_c log p_c.

    That is KL(uniform || p) + log C: its least value is log C, reached only where the
    batch uses every class equally.

    Args:
        mean_prob: (C,) softmax averaged over the *global* batch. Average over the workers
            first: the log of a mean is not the mean of the logs.

    Returns:
        Scalar, in nats.

    Source:
        MUST (Li et al., 2022), fairness regularisation.
    """
    return -mean_prob.clamp(min=torch.finfo(mean_prob.dtype).tiny).log().mean()


def masked_modelling_loss(reconstruction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over what was hidden.

    Args:
        reconstruction: (B, L, R) float.
        target: (B, L, R) float, without a gradient.
        mask: (B, L) bool, True where hidden.

    Returns:
        Scalar, in the unit of the target. Zero when nothing is hidden.

    Source:
        SimMIM (Xie et al., 2022), equation of the prediction loss; the mean runs over hidden
        elements, channels included.
    """
    error = (reconstruction - target).abs().mean(dim=-1)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def global_local_loss(global_embed: Tensor, local_embed: Tensor, mask: Tensor) -> Tensor:
    """Squared distance between an object's embedding and those of its hidden parts.

    For unit vectors that is 2 - 2 cos.

    Args:
        global_embed: (B, K) float, unit length.
        local_embed: (B, L, K) float, unit length.
        mask: (B, L) bool, True where hidden.

    Returns:
        Scalar in [0, 4]. Zero when nothing is hidden.

    Source:
        MUST (Li et al., 2022), global-local feature alignment.
    """
    distance = (local_embed - global_embed[:, None]).square().sum(dim=-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    first: int = 0,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """InfoNCE: each query has to find its own key among all keys.

    Args:
        queries: (B, D) float, unit length: this worker's.
        keys: (W * B, D) float, unit length: all workers', in the order of their ranks.
        scale: Scalar, inverse temperature (not its log).
        first: Row of `keys` that belongs to query 0.
        groups: (B,) and (W * B,) int64, equal where two rows show the same thing, such as two
            views of one object: such a key is not counted as a negative.

    Returns:
        Scalar, in nats.

    Source:
        CLIP (Radford et al., 2021), one direction of its symmetric loss.
    """
    logits = scale * queries @ keys.t()
    own = torch.arange(first, first + len(queries), device=queries.device)
    if groups is not None:
        same = groups[0][:, None] == groups[1][None, :]
        same[torch.arange(len(queries), device=queries.device), own] = False
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, own)


def alignment_loss(
    image_embed: Tensor,
    point_embed: Tensor,
    all_image_embed: Tensor,
    all_point_embed: Tensor,
    scale: Tensor,
    *,
    first: int = 0,
    groups: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Contrast in both directions, halved.

    Args:
        image_embed: (B, D) float, unit length; or any other modality.
        point_embed: (B, D) float, unit length.
        all_image_embed: (W * B, D), all workers'.
        all_point_embed: (W * B, D), all workers'.
        scale: Scalar, inverse temperature (not its log).
        first: Row of the gathered tensors that belongs to row 0.
        groups: See `contrastive_loss`.

    Returns:
        Scalar, in nats; log(W * B) where the embeddings tell nothing.

    Source:
        CLIP (Radford et al., 2021); between images and points as in ULIP (Xue et al., 2023).
    """
    to_points = contrastive_loss(image_embed, all_point_embed, scale, first=first, groups=groups)
    to_images = contrastive_loss(point_embed, all_image_embed, scale, first=first, groups=groups)
    return (to_points + to_images) / 2
