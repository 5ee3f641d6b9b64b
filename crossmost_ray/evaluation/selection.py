"""Unlabelled predictions in, scores out that say how good a model may be: one number each, from 0
to 1, higher is better. Nothing here reads a label, and nothing here waits for a device.

All but `information` have a blind spot in common: a model that calls every object a chair agrees
with itself everywhere, and scores 1. None of them should choose a model alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

DEFAULT_WEIGHTS: Mapping[str, float] = {"agreement": 1.0, "information": 1.0}
"""What the default score is the weighted geometric mean of; where a score is missing, of the
others."""

FEWEST_NEIGHBOURS = 3
"""Objects from which on a neighbourhood can be dense or not: of two, each has the other alone."""


def agreement(image_prob: Tensor, point_prob: Tensor) -> Tensor:
    """Share of the objects that both towers put into one class.

    Args:
        image_prob: (N, C) of the image tower.
        point_prob: (N, C) of the point tower, of the same objects.

    Returns:
        Scalar from 0 to 1.

    Raises:
        ValueError: If the shapes differ, or there are no objects.

    Source:
        Blum and Mitchell (1998), Co-training, and Dasgupta, Littman and McAllester (2001): two
        classifiers that see different sides of an object are seldom wrong alike.
    """
    _check(image_prob, point_prob)
    return _share_equal(image_prob.argmax(dim=-1), point_prob.argmax(dim=-1))


def information(prob: Tensor) -> Tensor:
    """Measures how sure a classifier is of each object and how evenly it uses its classes.

    Args:
        prob: (N, C).

    Returns:
        Scalar from 0 to 1: entropy of the mean less mean of the entropies, over log C. 0 if every
        object gets one answer, sure or not; and with one class, where there is nothing to know.

    Raises:
        ValueError: If there are no objects.

    Source:
        Krause, Perona and Gomes (2010), regularised information maximisation.
    """
    _check(prob)
    prob = _precise(prob)
    mean = prob.mean(dim=0)
    gain = torch.special.entr(mean).sum() - torch.special.entr(prob).sum(dim=-1).mean()
    return gain / math.log(max(prob.shape[-1], 2))


def neighbourhood_density(prob: Tensor, temperature: float = 0.05, most: int = 4096) -> Tensor:
    """Measures whether each object has many others that are answered like it, or few.

    Answers of a good classifier lie in dense clusters. The similarities of an object with all
    others become, by a softmax, a distribution over them: its entropy is the logarithm of how many
    neighbours the object has.

    Args:
        prob: (N, C), N at least 3.
        temperature: Of that softmax.
        most: With more objects than that, so many of them are taken, evenly spaced; always the
            same ones. Memory grows with its square: a few times 64 MiB for 4,096.

    Returns:
        Scalar from 0 to 1: mean entropy over its greatest value, log(N - 1), so that runs on
        different numbers of objects are on one scale. A collapsed model has 1.

    Raises:
        ValueError: If there are fewer than 3 objects.

    Source:
        Saito et al. (2021), Tune it the right way: soft neighbourhood density, of softmax outputs.
        The division by log(N - 1) is not in it, and changes no order of runs on the same objects.
    """
    _check(prob, fewest=FEWEST_NEIGHBOURS)
    N = min(len(prob), max(most, FEWEST_NEIGHBOURS))
    chosen = torch.arange(N, device=prob.device) * len(prob) // N
    feature = torch.nn.functional.normalize(_precise(prob[chosen]), dim=-1)
    similarity = (feature @ feature.T).fill_diagonal_(-math.inf)
    neighbours = (similarity / temperature).softmax(dim=-1)
    return torch.special.entr(neighbours).sum(dim=-1).mean() / math.log(N - 1)


def stability(first_prob: Tensor, second_prob: Tensor) -> Tensor:
    """Share of the objects that keep their class under another weak augmentation.

    Args:
        first_prob: (N, C) of one weak view of each object.
        second_prob: (N, C) of another weak view of it, by the same model.

    Returns:
        Scalar from 0 to 1.

    Raises:
        ValueError: If the shapes differ, or there are no objects.

    Source:
        Bachman, Alsharif and Precup (2014), pseudo-ensemble agreement; as a criterion of choice
        the invariance of predictions to augmentation.
    """
    _check(first_prob, second_prob)
    return _share_equal(first_prob.argmax(dim=-1), second_prob.argmax(dim=-1))


def persistence(before_class: Tensor, now_class: Tensor) -> Tensor:
    """Share of the objects whose class is what it was an epoch before.

    Args:
        before_class: (N,) int; -1 where an object had none: it is not counted.
        now_class: (N,) int, of the same objects; -1 where one has none now.

    Returns:
        Scalar from 0 to 1; 0 if no object had a class before.

    Raises:
        ValueError: If the shapes differ, or there are no objects.

    Source:
        Laine and Aila (2017), temporal ensembling: predictions that settle over the epochs.
    """
    _check(before_class, now_class)
    return _share_equal(before_class, now_class)


def student_agreement(teacher_prob: Tensor, student_class: Tensor) -> Tensor:
    """Share of the objects for which the student, on the masked strong view, says what the teacher
    says on the weak one.

    Args:
        teacher_prob: (N, C).
        student_class: (N,) int, of the same objects; -1 where it was not asked: not counted.

    Returns:
        Scalar from 0 to 1; 0 if the student was asked about no object.

    Raises:
        ValueError: If the numbers of objects differ, or there are none.

    Source:
        Tarvainen and Valpola (2017), mean teachers: consistency of student and teacher.
    """
    teacher_class = teacher_prob.argmax(dim=-1)
    _check(teacher_class, student_class)
    return _share_equal(student_class, teacher_class)


def opinion(by_tower: Mapping[str, Tensor]) -> Tensor:
    """Averages the towers' probabilities, (N, C) each: the model's one answer, (N, C).

    Raises:
        ValueError: If there is no tower.
    """
    if not by_tower:
        raise ValueError("there is no tower's answer, expected at least one")
    return torch.stack([_precise(prob) for prob in by_tower.values()]).mean(dim=0)


def scores(
    teacher: Mapping[str, Tensor],
    *,
    steady: Tensor | None = None,
    before_class: Tensor | None = None,
    student_class: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gives every score that can be given.

    Args:
        teacher: By tower, "image" or "point": (N, C), the teacher's, over all weak views.
        steady: (N,) from 0 to 1, how often two weak views of an object were given one class; None
            where the teacher sees one view only.
        before_class: (N,) int class of the teacher's `opinion` an epoch before, -1 where unknown;
            None in the first epoch.
        student_class: By tower: (N,) int class that the student sees in the masked strong view,
            -1 where unknown.

    Returns:
        Scalars from 0 to 1 by name: "information"; "neighbourhood", of 3 objects or more;
        "agreement", of two towers; and "stability", "persistence" and "student" (mean over the
        towers) where their inputs are given.

    Raises:
        ValueError: If inputs don't fit together, or there are no objects.
    """
    answer = opinion(teacher)
    found = {"information": information(answer)}
    if "image" in teacher and "point" in teacher:
        found["agreement"] = agreement(teacher["image"], teacher["point"])
    if len(answer) >= FEWEST_NEIGHBOURS:
        found["neighbourhood"] = neighbourhood_density(answer)
    if steady is not None:
        _check(steady, answer[:, 0])
        found["stability"] = _precise(steady).mean()
    if before_class is not None:
        found["persistence"] = persistence(before_class, answer.argmax(dim=-1))
    if student_class:
        shares = [student_agreement(teacher[name], said) for name, said in student_class.items()]
        found["student"] = torch.stack(shares).mean()
    return found


def combined(found: Mapping[str, Tensor], weights: Mapping[str, float] = DEFAULT_WEIGHTS) -> Tensor:
    """Averages scores into the one by which runs and checkpoints are ranked.

    The mean is geometric: a collapsed model agrees with itself everywhere and knows nothing, and
    must not make up by the one for the other.

    Args:
        found: Scalars by name, as `scores` gives them.
        weights: By name, above 0. Scores without a weight have no say; where a score with a weight
            is missing, the others share what it would have had.

    Returns:
        Scalar from 0 to 1.

    Raises:
        ValueError: If none of the scores has a weight.
    """
    used = [name for name in weights if name in found]
    if not used:
        raise ValueError(f"there are {sorted(found)}, expected at least one of {sorted(weights)}")
    total = sum(weights[name] for name in used)
    # Rounding may take an information of 0 below it.
    parts = [found[name].clamp(min=0.0) ** (weights[name] / total) for name in used]
    return torch.stack(parts).prod()


def _share_equal(left: Tensor, right: Tensor) -> Tensor:
    """Share of equal entries of (N,) and (N,), among those where `left` is a class, not -1."""
    known = left >= 0
    # Not `(left == right)[known].mean()`: choosing rows by a mask waits for the device.
    return ((left == right) & known).sum() / known.sum().clamp(min=1)


def _precise(prob: Tensor) -> Tensor:
    """Leaves half precision: in it, logarithms and sums of small shares are off by percents."""
    return prob.to(torch.promote_types(prob.dtype, torch.float32))


def _check(first: Tensor, second: Tensor | None = None, fewest: int = 1) -> None:
    if second is not None and first.shape != second.shape:
        raise ValueError(
            f"the answers have the shapes {tuple(first.shape)} and {tuple(second.shape)}, "
            "expected those of the same objects twice"
        )
    if len(first) < fewest:
        raise ValueError(f"there are {len(first)} objects, expected at least {fewest}")
