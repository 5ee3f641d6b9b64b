"""Metrics of an evaluation in, what the page says of accuracy out: for reports, never a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ZERO_SHOT, TEACHER, STUDENT = "zero-shot", "teacher", "student"
"""What an evaluation calls the models of a run."""

OPINIONS = ("fused", "image", "point")
"""Whose opinion a prediction is; both towers' together first, because it is the one to use."""

SPLITS = ("test", "transductive")
"""Whose accuracy is shown, the first that is labelled: objects never adapted to say more."""

NORMAL_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent and the range that it is likely to lie in."""

    top1: float
    low: float
    high: float
    objects: int


@dataclass(frozen=True)
class Gain:
    """Percentage points above zero-shot and the range that they are likely to lie in."""

    difference: float
    low: float
    high: float


def report_split(metrics: Mapping[str, Any] | None) -> str | None:
    """Names the split whose accuracy is shown; None where nothing is labelled."""
    splits = metrics.get("splits", {}) if metrics else {}
    return next((split for split in SPLITS if _is_labelled(splits.get(split))), None)


def labelled_splits(metrics: Mapping[str, Any] | None) -> list[str]:
    """Names the splits that have accuracies, without those whose objects were made worse."""
    splits = metrics.get("splits", {}) if metrics else {}
    return [split for split, one in splits.items() if "+" not in split and _is_labelled(one)]


def accuracy(
    metrics: Mapping[str, Any] | None, split: str | None, model: str, opinion: str
) -> Accuracy | None:
    """Looks a model's top-1 up, and gives it a 95 % interval; None where it was not measured."""
    one = _entry(metrics, split, model)
    scores, objects = one.get(opinion), one.get("labelled")
    if not isinstance(scores, Mapping) or not objects:
        return None
    low, high = wilson(scores["top1"], objects)
    return Accuracy(scores["top1"], low, high, objects)


def gain(
    metrics: Mapping[str, Any] | None, split: str | None, model: str, opinion: str
) -> Gain | None:
    """Looks up how far a model is above zero-shot; None where that was not measured."""
    said = _entry(metrics, split, model).get("gain", {}).get(opinion)
    return None if said is None else Gain(said["difference"], said["low"], said["high"])


def wilson(percent: float, objects: int) -> tuple[float, float]:
    """Gives the 95 % interval of a share.

    Args:
        percent: The share, in percent.
        objects: Objects that it was counted among; at least 1.

    Returns:
        Its ends, in percent, always within 0 and 100.

    Source:
        Wilson (1927), score interval; unlike the normal one it holds for few objects and for
        shares near 0 and 100.
    """
    share, spread = percent / 100, NORMAL_95**2 / objects
    middle = (share + spread / 2) / (1 + spread)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / objects + spread / (4 * objects))
    half /= 1 + spread
    return max(0.0, 100 * (middle - half)), min(100.0, 100 * (middle + half))


def part_of_evaluation(evaluation: Mapping[str, Any] | None, trial: str) -> dict[str, Any] | None:
    """Cuts one trial out of its sweep's metrics, in the form of a run's own.

    Args:
        evaluation: Metrics whose models are `zero-shot` and the trials.
        trial: Name of the trial; it becomes the teacher.

    Returns:
        Metrics of zero-shot and teacher; None where the trial was not measured.
    """
    splits = evaluation.get("splits", {}) if evaluation else {}
    if evaluation is None or not any(trial in models for models in splits.values()):
        return None
    names = {ZERO_SHOT: ZERO_SHOT, trial: TEACHER}

    def kept(models: Mapping[str, Any]) -> dict[str, Any]:
        return {name: models[model] for model, name in names.items() if model in models}

    cut = {split: kept(models) for split, models in splits.items()}
    return {
        "models": [ZERO_SHOT, TEACHER],
        "classes": evaluation.get("classes", {}),
        "splits": cut,
        # As the pairs of a sweep have them; among a thousand trials there are half a million pairs.
        "comparisons": {
            split: [{"before": ZERO_SHOT, "after": TEACHER, **models[TEACHER]["gain"]}]
            for split, models in cut.items()
            if "gain" in models.get(TEACHER, {})
        },
        "corruptions": {
            split: kept(models) for split, models in evaluation.get("corruptions", {}).items()
        },
    }


def _entry(metrics: Mapping[str, Any] | None, split: str | None, model: str) -> Mapping[str, Any]:
    splits: Mapping[str, Any] = metrics.get("splits", {}) if metrics else {}
    found: Mapping[str, Any] = splits.get(split or "", {}).get(model, {})
    return found


def _is_labelled(models: Mapping[str, Any] | None) -> bool:
    return any(OPINIONS[0] in one for one in (models or {}).values())
