"""A model's answers under several conventions in, the convention that suits it best out; no label
is read for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float64]
"""(n, C): of each object, what a tower holds of each class."""

SURE = 0.9
"""Least share of resamples that a convention must win for the verdict to name it."""

LEAST_OBJECTS = 16
"""With fewer, resamples of the same few objects agree with one another whatever the truth is."""

NUM_RESAMPLES = 1000

MARGIN = 0.05
"""What a convention must score above the stored one to win a resample. Under the mirror, say, a
model answers almost alike, and always a little better on one side: no reason to mend anything."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a tower answers under one convention."""

    confidence: float
    """Mean of the best class's probability, in percent."""
    entropy: float
    """Mean over the objects, in nats: low where answers are sure."""
    information: float
    """Entropy of the mean answer minus mean entropy, in percent of log C: high where answers are
    sure and differ from object to object."""
    agreement: float
    """Mean chance, in percent, that this tower and the other one, under the convention that the
    verdict chose for it, name the same class if each draws one by its probabilities."""
    oracle_top1: float | None
    """Accuracy by the labels, in percent; None without labels. The verdict does not know it."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The convention that scores best, and how far that is luck."""

    best: str
    shares: dict[str, float]
    """For each convention, the share of resamples of the objects that it wins. In those that none
    wins, one scores above the stored one, but not by `MARGIN`."""
    num_objects: int

    @property
    def is_sure(self) -> bool:
        """Whether the verdict may name it."""
        return self.num_objects >= LEAST_OBJECTS and self.shares[self.best] >= SURE

    @property
    def doubt(self) -> str:
        """Says why it is not sure."""
        if self.num_objects < LEAST_OBJECTS:
            return f"{self.num_objects} objects are too few, at least {LEAST_OBJECTS} are needed"
        ranked = sorted(self.shares, key=self.shares.__getitem__, reverse=True)
        first, second = (f"{name} wins {100 * self.shares[name]:.0f} %" for name in ranked[:2])
        return f"of {NUM_RESAMPLES} resamples, {first} and {second}; {100 * SURE:.0f} % are needed"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which conventions suit the model; the first of each kind is the stored one."""

    up: Choice
    """Which of the stored axes points up."""
    mirrored: Choice
    """Whether left and right are swapped besides: plain or mirrored."""
    images: Choice


def entropy(answers: Probabilities) -> Probabilities:
    """Gives the entropy of (..., C) probabilities in nats: (...)."""
    logs = np.log(answers.clip(min=np.finfo(np.float64).tiny))
    return -(answers * logs).sum(axis=-1)


def information(weights: Probabilities, answers: Probabilities) -> Probabilities:
    """Measures how much the answers tell of the objects: H(mean answer) - mean H(answer).

    It is high where answers are sure and differ from object to object, and 0 where all are the
    same, however sure.

    Args:
        weights: (R, n), of the objects in each of R resamples; rows sum to 1.
        answers: (K, n, C), under each of K conventions.

    Returns:
        (R, K), as a share of log C, its greatest value.

    Source:
        Bridle, Heading and MacKay (1991): mutual information of inputs and class decisions.
    """
    mean = np.tensordot(weights, answers, axes=(1, 1))
    return (entropy(mean) - weights @ entropy(answers).T) / math.log(answers.shape[-1])


def judge(
    plain: Mapping[str, Probabilities],
    mirrored: Mapping[str, Probabilities],
    images: Mapping[str, Probabilities],
) -> Verdict:
    """Chooses the conventions of points and images, without a label.

    A pair of conventions scores the information of the points' answers, plus that of the images'
    answers, plus their agreement: the mean chance that both towers name one class if each draws one
    by its probabilities. (The share of equal best classes says the same with more noise.) The pair
    that scores best is chosen. Only then the chosen axis is compared with its mirror image: most
    objects are so symmetric that the two would share the resamples, and neither win enough.

    Args:
        plain: (n, C) of the points by the axis taken for up; the stored one comes first.
        mirrored: The same, with left and right swapped.
        images: (n, C) of the images by their convention; the stored one comes first.
    """
    n = len(next(iter(images.values())))
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    # The objects as they are come first, then the resamples.
    weights = np.concatenate([np.ones((1, n)), drawn]) / n

    totals = _totals(weights, list(plain.values()), list(images.values()))
    pairs = totals.reshape(len(weights), -1).argmax(axis=1)
    best_up, best_kind = np.unravel_index(pairs, totals.shape[1:])
    resamples = np.arange(len(weights))
    up = _choice(list(plain), totals[resamples, :, best_kind], n)
    kind = _choice(list(images), totals[resamples, best_up], n)
    sides = _totals(weights, [plain[up.best], mirrored[up.best]], [images[kind.best]])
    return Verdict(up=up, mirrored=_choice(["plain", "mirrored"], sides[:, :, 0], n), images=kind)


def _totals(
    weights: Probabilities, points: Sequence[Probabilities], images: Sequence[Probabilities]
) -> Probabilities:
    """Scores (R, K, L) pairs of K conventions of points and L of images in R resamples."""
    by_points, by_images = np.stack(points), np.stack(images)
    agreement = np.einsum("knc,lnc->nkl", by_points, by_images)
    totals = (
        information(weights, by_points)[:, :, None]
        + information(weights, by_images)[:, None, :]
        + np.tensordot(weights, agreement, axes=1)
    )
    # Grey images are the same with their channels swapped: a tie, and not for rounding to decide.
    return totals.round(9)


def _choice(names: Sequence[str], totals: Probabilities, num_objects: int) -> Choice:
    """Counts what wins by (R, K) totals; the first of both are the whole and the stored one."""
    best = totals.argmax(axis=1)
    wins = (best == 0) | (totals.max(axis=1) - totals[:, 0] >= MARGIN)
    shares = {name: float(((best == place) & wins)[1:].mean()) for place, name in enumerate(names)}
    return Choice(best=names[best[0]], shares=shares, num_objects=num_objects)


def score(answers: Probabilities, others: Probabilities, labels: npt.NDArray[np.int64]) -> Scores:
    """Sums a tower's (n, C) answers up, beside the other tower's and (n,) labels, -1 for none."""
    n, known = len(answers), labels >= 0
    named = answers.argmax(axis=-1)
    return Scores(
        confidence=100 * float(answers.max(axis=-1).mean()),
        entropy=float(entropy(answers).mean()),
        information=100 * float(information(np.full((1, n), 1 / n), answers[None])[0, 0]),
        agreement=100 * float((answers * others).sum(axis=-1).mean()),
        oracle_top1=100 * float((named == labels)[known].mean()) if known.any() else None,
    )


# The report --------------------------------------------------------------------------------------
