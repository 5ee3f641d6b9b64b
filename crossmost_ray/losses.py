"""Tensors in, one scalar out: the terms of the objectives. None of them gathers: whoever calls
passes the statistic of all workers, so that each can be tested on one.

Terms that average over chosen rows or hidden places take a `count`: how many were chosen, averaged
over the workers. With it the mean of the workers' losses is the loss of the whole batch on one;
without it a worker with few chosen rows would weigh them more. None stands for the own count."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _chosen_mean(values: Tensor, chosen: Tensor, count: Tensor | None) -> Tensor:
    """Averages where chosen; 0, with a gradient of 0, where nothing is."""
    if count is None:
        count = chosen.sum()
    # Not `values[chosen].mean()`: the mean over an empty set is NaN. The bound is below any count
    # but 0: one row chosen on one of many workers is less than 1 on average.
    return (values * chosen).sum() / count.to(values.dtype).clamp(min=1e-6)


def self_training_loss(
    logits: Tensor, target: Tensor, selected: Tensor, count: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the pseudo-labels, averaged over the selected objects.

    Args:
        logits: (B, C) of the student on the strong augmentation.
        target: (B,) int64 pseudo-labels.
        selected: (B,) bool.
        count: Scalar, selected objects averaged over the workers.

    Returns:
        Scalar, in nats. Zero, with a gradient of zero, when nothing is selected.

    Source:
        FixMatch (Sohn et al., 2020).
    """
    return _chosen_mean(F.cross_entropy(logits, target, reduction="none"), selected, count)


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


MANY_CLASSES = 512
"""From so many classes on, one batch can't hold them all, and its mean says little of each."""


def moving_fairness_loss(mean_prob: Tensor, previous: Tensor, momentum: float = 0.5) -> Tensor:
    """Fairness of a moving average over batches, for more classes than a batch holds.

    Args:
        mean_prob: (C,) softmax averaged over the global batch.
        previous: (C,) the moving average so far, without a gradient.
        momentum: Share of the past in the average.

    Returns:
        Scalar, in nats; divided by the present's share, so that the gradient keeps its size.

    Source:
        MUST (Li et al., 2022), for 512 classes and more.
    """
    average = momentum * previous.detach() + (1 - momentum) * mean_prob
    return fairness_loss(average) / (1 - momentum)


def masked_modelling_loss(
    reconstruction: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Mean absolute error over what was hidden.

    Args:
        reconstruction: (B, L, R) float.
        target: (B, L, R) float, without a gradient.
        mask: (B, L) bool, True where hidden.
        count: Scalar, hidden places averaged over the workers.

    Returns:
        Scalar, in the unit of the target. Zero when nothing is hidden.

    Source:
        SimMIM (Xie et al., 2022), equation of the prediction loss; the mean runs over hidden
        elements, channels included.
    """
    return _chosen_mean((reconstruction - target).abs().mean(dim=-1), mask, count)


def chamfer_loss(
    reconstruction: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Chamfer distance between hidden groups of points and what stands in for them.

    Each point's squared distance to the nearest of the other set, averaged over the points, both
    ways added, then averaged over the hidden groups.

    Args:
        reconstruction: (B, G, M, 3) float, relative to the groups' centres.
        target: (B, G, M', 3) float, without a gradient.
        mask: (B, G) bool, True where hidden.
        count: Scalar, hidden groups averaged over the workers.

    Returns:
        Scalar, in squared units of the cloud. Zero when nothing is hidden.

    Source:
        Fan et al. (2017), Chamfer distance; as a masked objective Point-MAE (Pang et al., 2022).
    """
    # The difference itself, not |a|^2 + |b|^2 - 2ab: groups are small, and near a perfect
    # reconstruction the latter is noise with an infinite slope under a root.
    squared = (reconstruction[:, :, :, None] - target[:, :, None]).square().sum(dim=-1)
    distance = squared.amin(dim=3).mean(dim=2) + squared.amin(dim=2).mean(dim=2)
    return _chosen_mean(distance, mask, count)


def token_id_loss(
    logits: Tensor, token_ids: Tensor, mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the vocabulary ids of the hidden groups, and of no others.

    Args:
        logits: (B, G, K) float over a vocabulary of K.
        token_ids: (B, G) int64, what a discrete autoencoder calls each group.
        mask: (B, G) bool, True where hidden.
        count: Scalar, hidden groups averaged over the workers.

    Returns:
        Scalar, in nats. Zero when nothing is hidden.

    Source:
        Point-BERT (Yu et al., 2022), masked point modelling.
    """
    per_group = F.cross_entropy(logits.transpose(1, 2), token_ids, reduction="none")
    return _chosen_mean(per_group, mask, count)


def entropy_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the student's own predictions.

    Args:
        logits: (B, C) of the student.

    Returns:
        Scalar, in nats, from 0 to log C.

    Source:
        Grandvalet and Bengio (2004), entropy minimisation.
    """
    log_prob = logits.log_softmax(dim=-1)
    return -(log_prob.exp() * log_prob).sum(dim=-1).mean()


def agreement_loss(image_logits: Tensor, point_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the two towers' predictions.

    Args:
        image_logits: (B, C) of the student.
        point_logits: (B, C) of the student.

    Returns:
        Scalar, in nats, from 0 (the same predictions) to log 2.

    Source:
        Lin (1991), the divergence; as an agreement term, our own choice: a count of agreeing
        labels has no gradient.
    """
    image_log, point_log = image_logits.log_softmax(dim=-1), point_logits.log_softmax(dim=-1)
    middle_log = torch.logaddexp(image_log, point_log) - math.log(2)
    image_part = (image_log.exp() * (image_log - middle_log)).sum(dim=-1)
    point_part = (point_log.exp() * (point_log - middle_log)).sum(dim=-1)
    return (image_part + point_part).mean() / 2


def global_local_loss(
    global_embed: Tensor, local_embed: Tensor, mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Squared distance between an object's embedding and those of its hidden parts.

    For unit vectors that is 2 - 2 cos.

    Args:
        global_embed: (B, K) float, unit length.
        local_embed: (B, L, K) float, unit length.
        mask: (B, L) bool, True where hidden.
        count: Scalar, hidden places averaged over the workers.

    Returns:
        Scalar in [0, 4]. Zero when nothing is hidden.

    Source:
        MUST (Li et al., 2022), global-local feature alignment.
    """
    distance = (local_embed - global_embed[:, None]).square().sum(dim=-1)
    return _chosen_mean(distance, mask, count)


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
