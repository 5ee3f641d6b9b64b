"""Predictions counted once, accuracies divided out at the end: counts of any split of the objects
add up to the counts of the whole. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of labelled objects.

    Attributes:
        confusion: (C, C) int64, objects of class `row` that were taken for class `column`.
        top5: (C,) int64, objects of each class whose label was among the five best classes.
    """

    confusion: npt.NDArray[np.int64]
    top5: npt.NDArray[np.int64]

    def __add__(self, other: Tally) -> Tally:
        """Counts the objects of both."""
        return Tally(self.confusion + other.confusion, self.top5 + other.top5)

    @property
    def num_objects(self) -> int:
        """Objects counted."""
        return int(self.confusion.sum())

    @property
    def top1_accuracy(self) -> float:
        """Share of objects whose best class is right, in percent; NaN without objects."""
        return _percent(np.trace(self.confusion), self.num_objects)

    @property
    def top5_accuracy(self) -> float:
        """Share of objects whose label is among the five best classes, in percent."""
        return _percent(self.top5.sum(), self.num_objects)

    @property
    def per_class(self) -> npt.NDArray[np.float64]:
        """(C,) top-1 accuracy of each class, in percent; NaN for a class without objects."""
        counts = self.confusion.sum(axis=1)
        hits = np.diag(self.confusion).astype(np.float64)
        rates = np.full(len(counts), np.nan)
        np.divide(100.0 * hits, counts, out=rates, where=counts > 0)
        return rates

    @property
    def class_mean(self) -> float:
        """Mean of the classes' accuracies, over classes that have objects, in percent."""
        return float(np.nanmean(self.per_class)) if self.num_objects else float("nan")


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
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (label, ranked[:, 0]), 1)
    among = (ranked[:, :5] == label[:, None]).any(axis=1)
    return Tally(confusion, np.bincount(label[among], minlength=num_classes).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference in percentage points and the range it is likely to lie in."""

    difference: float
    low: float
    high: float


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
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=num_resamples)
    means = 100 * (drawn @ sums) / (drawn @ counts)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(100 * sums.sum() / counts.sum()), float(low), float(high))
