"""Counts in, the metrics of `metrics.json` out: percentages, intervals, plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from crossmost_ray.evaluation.counts import Counts, OpinionCounts, compared
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.tally import Calibration, Tally

ZERO_SHOT = "zero-shot"
TEACHER = "teacher"
STUDENT = "student"
OPEN_SET = "open-set"


def summarize(
    counted: Mapping[str, Counts], classes: Mapping[str, Sequence[str]], models: Sequence[str]
) -> dict[str, Any]:
    """Divides counts out.

    Args:
        counted: By split, or variant of a split.
        classes: C names, by split.
        models: Names, in the order of the report.

    Returns:
        Under `splits`, by split and model: objects, and by opinion top-1, top-5, class mean and
        calibration error, in percent; the gain over zero-shot, where that is among the models, with
        its 95 % interval; under `label_free` what needs no label. Under `comparisons`, by split:
        differences of any two models with their intervals. Under `corruptions`, by split, model and
        kind: top-1 by opinion, averaged over the severities. Plain values, ready for JSON.
    """
    return {
        "models": list(models),
        "classes": {split: list(names) for split, names in classes.items()},
        "splits": {
            variant: {
                model: _model(counts, model, classes[split_of(variant)], open_set=_is_open(variant))
                for model in models
            }
            for variant, counts in counted.items()
        },
        "comparisons": {
            variant: _comparisons(counts, models)
            for variant, counts in counted.items()
            if counts.labelled and len(models) > 1 and not _is_open(variant)
        },
        "corruptions": {
            split: made_worse
            for split in classes
            if not _is_open(split) and (made_worse := _corruptions(counted, split, models))
        },
    }


def split_of(variant: str) -> str:
    """Gives the split that was made worse, or the name itself."""
    return variant.partition("+")[0]


def _is_open(variant: str) -> bool:
    return split_of(variant) == OPEN_SET


def _model(counts: Counts, model: str, classes: Sequence[str], *, open_set: bool) -> dict[str, Any]:
    by_opinion = {opinion: counts.opinions[model, opinion] for opinion in OPINIONS}
    label_free: dict[str, Any] = {
        "agreement": 100 * counts.agreement[model] / counts.objects if counts.objects else None,
        **{opinion: _label_free(part, classes) for opinion, part in by_opinion.items()},
    }
    metrics: dict[str, Any] = {"objects": counts.objects}
    if counts.left_out:
        metrics["left_out"] = counts.left_out
    if open_set:
        # Its objects are of none of the classes: there is nothing to be right about.
        metrics["confident_percent"] = label_free["fused"]["confident_percent"]
        return metrics | {"label_free": label_free}
    metrics |= {"labelled": counts.labelled, "other_labels": counts.other_labels}
    if counts.labelled:
        metrics |= {name: _accuracies(part, classes) for name, part in by_opinion.items()}
        if (ZERO_SHOT, model, OPINIONS[0]) in counts.pairs:
            metrics["gain"] = {
                opinion: vars(counts.pairs[ZERO_SHOT, model, opinion].interval)
                for opinion in OPINIONS
            }
    return metrics | {"label_free": label_free}


def _accuracies(part: OpinionCounts, classes: Sequence[str]) -> dict[str, Any]:
    counts = part.tally
    return {
        "top1": counts.top1_accuracy,
        "top5": counts.top5_accuracy,
        "class_mean": counts.class_mean,
        "ece": part.calibration.error,
        "per_class": {
            name: None if np.isnan(rate) else float(rate)
            for name, rate in zip(classes, counts.per_class, strict=True)
        },
        "calibration": _bins(part.calibration),
    }


def _bins(calibration: Calibration) -> dict[str, Any]:
    return {
        "objects": calibration.counts.tolist(),
        "right": calibration.right.tolist(),
        "confidence": calibration.confidence.tolist(),
    }


def _label_free(part: OpinionCounts, classes: Sequence[str]) -> dict[str, Any]:
    census = part.census
    if not census.objects:
        return {"confident_percent": None}
    return {
        "mean_confidence": census.mean_confidence,
        "mean_entropy": census.mean_entropy,
        "confident_percent": census.confident_percent,
        "balance": census.balance,
        "predicted": dict(zip(classes, census.predicted.tolist(), strict=True)),
    }


def _comparisons(counts: Counts, models: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "before": before,
            "after": after,
            **{
                opinion: vars(counts.pairs[before, after, opinion].interval) for opinion in OPINIONS
            },
        }
        for before, after in compared(models)
    ]


def _corruptions(
    counted: Mapping[str, Counts], split: str, models: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Averages top-1 over the severities of each kind."""
    by_kind: dict[str, list[Counts]] = {}
    for variant, counts in counted.items():
        name, plus, corruption = variant.partition("+")
        if plus and name == split and counts.labelled:
            by_kind.setdefault(corruption.rpartition("-")[0], []).append(counts)
    return {
        model: {
            kind: {
                opinion: float(
                    np.mean([part.opinions[model, opinion].tally.top1_accuracy for part in parts])
                )
                for opinion in OPINIONS
            }
            for kind, parts in by_kind.items()
        }
        for model in models
        if by_kind
    }


def confusion_table(
    counted: Mapping[str, Counts], classes: Mapping[str, Sequence[str]]
) -> pa.Table:
    """Lists which classes were taken for which: a row for each cell that is not 0."""
    parts = [CONFUSION_SCHEMA.empty_table()]
    for variant, counts in counted.items():
        names = pa.array(classes[split_of(variant)], pa.string())
        for (model, opinion), part in counts.opinions.items():
            parts.append(_cells(part.tally, names, (variant, model, opinion)))
    return pa.concat_tables(parts)


def _cells(counts: Tally, names: pa.Array, key: tuple[str, str, str]) -> pa.Table:
    label, predicted = np.divmod(counts.cells, counts.num_classes)
    told = [pa.array([value] * len(label), pa.string()) for value in key]
    columns = [names.take(pa.array(label)), names.take(pa.array(predicted))]
    return pa.table([*told, *columns, pa.array(counts.counts)], schema=CONFUSION_SCHEMA)


CONFUSION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("split", "model", "opinion", "label", "predicted")),
        ("objects", pa.int64()),
    ]
)
