"""Predictions counted once, accuracies divided out at the end: counts of any split of the objects
add up to the counts of the whole. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of labelled objects.

    Only cells of the confusion matrix that are not 0 are kept: of a thousand classes it has a
    million, and every model, opinion and variant of a split has a matrix of its own.

    Attributes:
        cells: (K,) int64 in ascending order, C times the class of the objects plus the class that
            they were taken for.
        counts: (K,) int64, objects in each cell.
        top5: (C,) int64, objects of each class whose label was among the five best classes.
    """

    cells: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    top5: npt.NDArray[np.int64]

    def __add__(self, other: Tally) -> Tally:
        """Counts the objects of both."""
        few, many = sorted((self, other), key=lambda part: len(part.cells))
        place = np.searchsorted(many.cells, few.cells)
        known = np.append(many.cells, -1)[place] == few.cells
        counts = many.counts.copy()
        counts[place[known]] += few.counts[known]
        return Tally(
            np.insert(many.cells, place[~known], few.cells[~known]),
            np.insert(counts, place[~known], few.counts[~known]),
            self.top5 + other.top5,
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.top5)

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """(C, C) int64, objects of class `row` that were taken for class `column`."""
        matrix = np.zeros(self.num_classes**2, np.int64)
        matrix[self.cells] = self.counts
        return matrix.reshape(self.num_classes, self.num_classes)

    @property
    def num_objects(self) -> int:
        """Objects counted."""
        return int(self.counts.sum())

    @property
    def right(self) -> npt.NDArray[np.int64]:
        """(C,) int64, objects of each class whose best class is right."""
        label, predicted = np.divmod(self.cells, self.num_classes)
        return _sums(label[label == predicted], self.counts[label == predicted], self.num_classes)

    @property
    def top1_accuracy(self) -> float:
        """Share of objects whose best class is right, in percent; NaN without objects."""
        return _percent(self.right.sum(), self.num_objects)

    @property
    def top5_accuracy(self) -> float:
        """Share of objects whose label is among the five best classes, in percent."""
        return _percent(self.top5.sum(), self.num_objects)

    @property
    def per_class(self) -> npt.NDArray[np.float64]:
        """(C,) top-1 accuracy of each class, in percent; NaN for a class without objects."""
        counts = _sums(self.cells // self.num_classes, self.counts, self.num_classes)
        rates = np.full(self.num_classes, np.nan)
        np.divide(100.0 * self.right, counts, out=rates, where=counts > 0)
        return rates

    @property
    def class_mean(self) -> float:
        """Mean of the classes' accuracies, over classes that have objects, in percent."""
        return float(np.nanmean(self.per_class)) if self.num_objects else float("nan")


def _sums(
    place: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], length: int
) -> npt.NDArray[np.int64]:
    """Adds counts up by place."""
    total = np.zeros(length, np.int64)
    np.add.at(total, place, counts)
    return total


def _percent(part: float, whole: int) -> float:
    return 100.0 * float(part) / whole if whole else float("nan")


def tally(label: npt.NDArray[np.int64], ranked: npt.NDArray[np.int64], num_classes: int) -> Tally:
    """Counts predictions.

    Args:
        label: (B,) int64 below C; objects of -1 have no label and are not counted.
        ranked: (B, K) int64, the best classes first; K is at least 1.
        num_classes: C.
    """
    known = label >= 0
    label, ranked = label[known], ranked[known]
    cells, counts = np.unique(num_classes * label + ranked[:, 0], return_counts=True)
    among = (ranked[:, :5] == label[:, None]).any(axis=1)
    top5 = np.bincount(label[among], minlength=num_classes).astype(np.int64)
    return Tally(cells, counts.astype(np.int64), top5)


NUM_BINS = 15

MOST_DRAWN = 1 << 22
"""Numbers that a bootstrap holds at a time."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Counts of labelled objects by how sure a model was of them.

    Bin m of M holds the confidences above m / M, up to and including (m + 1) / M.

    Attributes:
        counts: (M,) int64, objects in each bin.
        right: (M,) int64, those of them whose best class is right.
        confidence: (M,) float64, sum of their confidences.

    Source:
        Guo et al. (2017), On calibration of modern neural networks: 15 bins of equal width.
    """

    counts: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]

    def __add__(self, other: Calibration) -> Calibration:
        """Counts the objects of both."""
        return Calibration(
            self.counts + other.counts,
            self.right + other.right,
            self.confidence + other.confidence,
        )

    @property
    def error(self) -> float:
        """Expected calibration error, in percentage points; NaN without objects.

        The mean over the objects of their bin's |accuracy - mean confidence|. The sum of the bins'
        |right - confidence| over n is the same, without a division by an empty bin.
        """
        return _percent(np.abs(self.right - self.confidence).sum(), int(self.counts.sum()))


def calibrate(
    confidence: npt.NDArray[np.floating[Any]], right: npt.NDArray[np.bool_]
) -> Calibration:
    """Counts labelled objects by confidence.

    Args:
        confidence: (B,) probability of the best class.
        right: (B,) whether that class is the label.
    """
    place = np.ceil(confidence.astype(np.float64) * NUM_BINS).astype(np.int64) - 1
    # Rounding may take a softmax a little above 1.
    place = place.clip(0, NUM_BINS - 1)
    return Calibration(
        np.bincount(place, minlength=NUM_BINS).astype(np.int64),
        np.bincount(place[right], minlength=NUM_BINS).astype(np.int64),
        np.bincount(place, confidence, minlength=NUM_BINS).astype(np.float64),
    )


@dataclasses.dataclass(frozen=True)
class Census:
    """Sums over objects, with or without labels, of what a model says without being asked for one.

    Attributes:
        objects: Objects counted.
        confidence: Sum of the probabilities of the best class.
        entropy: Sum of the entropies of the probabilities, in nats.
        confident: Objects whose confidence is above the threshold.
        predicted: (C,) int64, objects whose best class each class is.
        probability: (C,) float64, sum of the probabilities of each class.
    """

    objects: int
    confidence: float
    entropy: float
    confident: int
    predicted: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]

    def __add__(self, other: Census) -> Census:
        """Sums over the objects of both."""
        return Census(
            self.objects + other.objects,
            self.confidence + other.confidence,
            self.entropy + other.entropy,
            self.confident + other.confident,
            self.predicted + other.predicted,
            self.probability + other.probability,
        )

    @property
    def mean_confidence(self) -> float:
        """Mean probability of the best class, in percent; NaN without objects."""
        return _percent(self.confidence, self.objects)

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of an answer, in nats: low where answers are sure."""
        return self.entropy / self.objects if self.objects else float("nan")

    @property
    def confident_percent(self) -> float:
        """Share of objects whose confidence is above the threshold, in percent."""
        return _percent(self.confident, self.objects)

    @property
    def balance(self) -> float:
        """Entropy of the mean probability in percent of log C, which only the uniform one has.

        A model that calls everything a chair has 0, whatever the truth is. Classes need not be
        equally frequent, so 100 is no aim; that it falls as training goes on is a warning.
        """
        if not self.objects:
            return float("nan")
        mean = self.probability / self.probability.sum()
        positive = mean[mean > 0]
        return 100 * float(-(positive * np.log(positive)).sum() / np.log(len(mean)))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference in percentage points and the range it is likely to lie in."""

    difference: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """Counts of labelled objects by which of two models names them rightly.

    Attributes:
        objects: Objects counted.
        only_before: Those that the first model alone is right about.
        only_after: Those that the second model alone is right about.
    """

    objects: int
    only_before: int
    only_after: int

    def __add__(self, other: Pair) -> Pair:
        """Counts the objects of both."""
        return Pair(
            self.objects + other.objects,
            self.only_before + other.only_before,
            self.only_after + other.only_after,
        )

    @property
    def interval(self) -> Interval:
        """What `paired_bootstrap` gives for the same objects: these counts are all it needs."""
        equal = self.objects - self.only_before - self.only_after
        gains, members = np.array([-1.0, 0.0, 1.0]), [self.only_before, equal, self.only_after]
        there = np.array(members) > 0
        return _resample(gains[there], np.ones(int(there.sum())), np.array(members)[there])


def compare(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Pair:
    """Counts whether two models, (n,) and (n,), are right about the same objects."""
    return Pair(len(before), int((before & ~after).sum()), int((after & ~before).sum()))


def paired_bootstrap(
    before: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    after: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
    *,
    clusters: Sequence[str] | None = None,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Resamples objects to see how far a difference of accuracies could be luck.

    Args:
        before: (n,) whether the first model is right, or a score from 0 to 1.
        after: (n,) whether the second is right about the same object.
        clusters: n names; rows of one name are drawn together, such as several seeds' opinions of
            one object. None: every row stands alone.
        num_resamples: Resamples drawn.
        confidence: Share of resamples that the interval holds.
        seed: One seed, one interval.

    Returns:
        The difference after - before, in percentage points, and its percentile interval.

    Source:
        Efron and Tibshirani (1993), percentile bootstrap, over objects.
    """
    gain = after.astype(np.float64) - before.astype(np.float64)
    if clusters is None:
        sums: npt.NDArray[np.float64] = gain
        counts: npt.NDArray[np.float64] = np.ones_like(gain)
    else:
        _, place = np.unique(np.asarray(clusters), return_inverse=True)
        sums = np.bincount(place, gain).astype(np.float64)
        counts = np.bincount(place).astype(np.float64)
    kinds, members = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    return _resample(
        kinds[:, 0],
        kinds[:, 1],
        members,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


def _resample(
    sums: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
    members: npt.NDArray[np.int64],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Resamples units of G kinds.

    How often each of n units is drawn is a multinomial of n kinds, and sums of its counts are a
    multinomial, too. So units that are alike may be drawn as one kind: the same distribution, in
    memory that does not grow with n.

    Args:
        sums: (G,) sum of the gains of a unit of each kind.
        counts: (G,) rows of such a unit.
        members: (G,) units of each kind; none is 0.
        num_resamples: Resamples drawn.
        confidence: Share of resamples that the interval holds.
        seed: One seed, one interval.
    """
    n = int(members.sum())
    rng = np.random.default_rng(seed)
    # A few at a time, which draws the same: of scores that are all different there are n kinds.
    at_once = max(1, MOST_DRAWN // len(members))
    means = np.empty(num_resamples)
    for first in range(0, num_resamples, at_once):
        drawn = rng.multinomial(n, members / n, size=min(at_once, num_resamples - first))
        means[first : first + at_once] = 100 * (drawn @ sums) / (drawn @ counts)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    total = 100 * float(members @ sums) / float(members @ counts)
    return Interval(total, float(low), float(high))
