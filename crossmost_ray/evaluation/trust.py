"""How far label-free scores may be trusted: runs in, the rank correlation of each score with true
accuracy out, and what choosing by it costs.

Accuracy is read here for the report alone: nothing in this file chooses a model that anyone is
given. NumPy only.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from crossmost_ray.config import ConfigError
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.report import Grid
from crossmost_ray.evaluation.summary import ZERO_SHOT
from crossmost_ray.storage import Store

Numbers = npt.NDArray[np.float64]

EVALUATION_NAME = "evaluation/metrics.json"
PREFIX = "selection/"
SCORE = "score"
"""The default score, by which runs and checkpoints are chosen."""

SPLITS = ("transductive", "test")
BOTH = "both"
"""The objects of both splits together."""

FEWEST_RUNS = 3
"""Two runs are ordered rightly or wrongly: half of all useless scores would look perfect."""

NUM_RESAMPLES = 2000

STATEMENT = (
    "Accuracy is read here for this report alone: no run, checkpoint or trial was chosen by it."
)


@dataclass(frozen=True)
class ScoredRun:
    """What is known of a run: without labels, and with them."""

    name: str
    scores: Mapping[str, float]
    """By name; higher is better."""
    oracle_accuracy: Mapping[str, float]
    """Percent, by what it is measured on, such as "test, fused"."""


@dataclass(frozen=True, kw_only=True)
class TrustRow:
    """How well one score tells one accuracy, over the runs that have both. Accuracies in percent,
    differences in percentage points."""

    accuracy: str
    score: str
    runs: int
    correlation: float | None
    """Spearman's; None where all runs have one score or one accuracy."""
    low: float | None
    """Lower end of its 95 % interval."""
    high: float | None
    regret: float
    """Accuracy lost by choosing with the score instead of with labels."""
    picked: float
    """Accuracy of the run that the score picks."""
    best: float
    median: float
    last: float
    """Accuracy of the last run: what one has who keeps what he tried last."""


@dataclass(frozen=True)
class Trust:
    """The evidence of one sweep."""

    rows: list[TrustRow]
    zero_shot: Mapping[str, float] = field(default_factory=dict)
    """Accuracy before adaptation, in percent, where it was measured."""


def average_ranks(values: Numbers) -> Numbers:
    """Ranks (..., n) numbers along the last axis, from 1; equal ones share their ranks' mean."""
    n = values.shape[-1]
    flat = values.reshape(-1, n)
    order = np.argsort(flat, axis=1, kind="stable")
    ordered = np.take_along_axis(flat, order, axis=1)
    is_new = np.ones(flat.shape, np.bool_)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = np.cumsum(is_new.ravel()) - 1  # each row begins with a group of its own
    place = np.tile(np.arange(1.0, n + 1), len(flat))
    shared = np.bincount(group, place) / np.bincount(group)
    ranks = np.empty(flat.shape)
    np.put_along_axis(ranks, order, shared[group].reshape(flat.shape), axis=1)
    return ranks.reshape(values.shape)


def spearman(a: Numbers, b: Numbers) -> float:
    """Gives the rank correlation of (n,) and (n,) numbers.

    Returns:
        From -1 to 1: Pearson's correlation of the ranks, equal values sharing theirs. NaN where all
        values of one side are equal.

    Raises:
        ValueError: If the lengths differ, a number is not finite, or there are fewer than 2.

    Source:
        Spearman (1904).
    """
    _check(a, b, fewest=2)
    return float(_correlation(average_ranks(a), average_ranks(b)))


def spearman_interval(
    a: Numbers,
    b: Numbers,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Resamples pairs to see how far a rank correlation could be luck.

    Args:
        a: (n,).
        b: (n,), of the same runs.
        num_resamples: Resamples drawn.
        confidence: Share of resamples that the interval holds.
        seed: One seed, one interval.

    Returns:
        Its ends, low and high. Resamples in which one side is constant have no correlation and are
        left out; NaN where all are so.

    Raises:
        ValueError: As `spearman`.

    Source:
        Efron and Tibshirani (1993), percentile bootstrap, over runs.
    """
    _check(a, b, fewest=2)
    drawn = np.random.default_rng(seed).integers(len(a), size=(num_resamples, len(a)))
    found = _correlation(average_ranks(a[drawn]), average_ranks(b[drawn]))
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def picked_accuracy(score: Numbers, oracle_accuracy: Numbers) -> float:
    """Gives the accuracy of the run with the highest score, of those tied for it the mean.

    Args:
        score: (n,).
        oracle_accuracy: (n,).

    Raises:
        ValueError: If the lengths differ, a number is not finite, or there is none.
    """
    _check(score, oracle_accuracy, fewest=1)
    return float(oracle_accuracy[score == score.max()].mean())


def regret(score: Numbers, oracle_accuracy: Numbers) -> float:
    """Gives what choosing by a score loses: best accuracy less that of the run it picks.

    Args:
        score: (n,).
        oracle_accuracy: (n,).

    Returns:
        At least 0, in the unit of the accuracy.

    Raises:
        ValueError: If the lengths differ, a number is not finite, or there is none.
    """
    return float(oracle_accuracy.max()) - picked_accuracy(score, oracle_accuracy)


def oracle_table(runs: Sequence[ScoredRun]) -> list[TrustRow]:
    """Sets every score against every accuracy.

    Args:
        runs: In the order in which they were started.

    Returns:
        A row for each pair that `FEWEST_RUNS` runs have, accuracy by accuracy, scores in the order
        of their names, the default before all.
    """
    accuracies = dict.fromkeys(name for run in runs for name in run.oracle_accuracy)
    names = sorted({name for run in runs for name in run.scores}, key=lambda it: (it != SCORE, it))
    rows = []
    for accuracy, name in itertools.product(accuracies, names):
        told = [one for one in runs if name in one.scores and accuracy in one.oracle_accuracy]
        if len(told) >= FEWEST_RUNS:
            rows.append(_row(accuracy, name, told))
    return rows


def trust_markdown(trust: Trust) -> str:
    """Lays the evidence out as Markdown: a table for each accuracy."""
    parts = [STATEMENT, ""]
    for accuracy in dict.fromkeys(row.accuracy for row in trust.rows):
        before = trust.zero_shot.get(accuracy)
        title = f"top-1 of {accuracy}" + ("" if before is None else f"; zero-shot {before:.1f}")
        rows = [_cells(row) for row in trust.rows if row.accuracy == accuracy]
        columns = ("score", "runs", "rank correlation [95 %]", "regret", "picked")
        parts.append(Grid(title, (*columns, "best", "median", "last"), rows).markdown())
    return "\n".join(parts)


def _row(accuracy: str, name: str, runs: Sequence[ScoredRun]) -> TrustRow:
    score = np.array([run.scores[name] for run in runs])
    truth = np.array([run.oracle_accuracy[accuracy] for run in runs])
    low, high = spearman_interval(score, truth)
    return TrustRow(
        accuracy=accuracy,
        score=name,
        runs=len(runs),
        correlation=_or_none(spearman(score, truth)),
        low=_or_none(low),
        high=_or_none(high),
        regret=regret(score, truth),
        picked=picked_accuracy(score, truth),
        best=float(truth.max()),
        median=float(np.median(truth)),
        last=float(truth[-1]),
    )


def _cells(row: TrustRow) -> tuple[str, ...]:
    correlation = "undefined"
    if row.correlation is not None:
        correlation = f"{row.correlation:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
    accuracies = (row.regret, row.picked, row.best, row.median, row.last)
    return (row.score, str(row.runs), correlation, *(f"{value:.1f}" for value in accuracies))


def _correlation(left: Numbers, right: Numbers) -> Numbers:
    """Pearson's correlation along the last axis, NaN where a side is constant."""
    left = left - left.mean(axis=-1, keepdims=True)
    right = right - right.mean(axis=-1, keepdims=True)
    scale = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    product = (left * right).sum(axis=-1)
    return np.divide(product, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def _check(a: Numbers, b: Numbers, *, fewest: int) -> None:
    if a.ndim != 1 or a.shape != b.shape or len(a) < fewest:
        raise ValueError(
            f"the numbers have the shapes {a.shape} and {b.shape}, expected (n,) twice, "
            f"with n at least {fewest}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a number is NaN or infinite, and has no rank; leave its run out")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


# The sweep's folder -------------------------------------------------------------------------------


def sweep_trust(sweep: Store) -> Trust:
    """Reads what a finished sweep says about its scores.

    Args:
        sweep: Its folder, with the measurement of its trials.

    Raises:
        ConfigError: If nothing labelled was measured, too few trials were, labels chose a trial's
            checkpoint, or a file is missing or broken.
    """
    stored = _read(sweep, EVALUATION_NAME)
    try:
        summary = json.loads(stored)
        accuracy = {model: _oracle_accuracy(summary, model) for model in summary["models"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _broken(sweep, EVALUATION_NAME, "the metrics of a measurement") from None
    zero_shot = accuracy.pop(ZERO_SHOT, {})
    if not any(accuracy.values()):
        raise ConfigError(
            f"{sweep}/{EVALUATION_NAME} holds no accuracy of a trial, expected labels in the "
            f"shards of {' or '.join(SPLITS)}: without them nobody can tell"
        )
    if len(accuracy) < FEWEST_RUNS:
        raise ConfigError(
            f"{sweep}/{EVALUATION_NAME} measures {len(accuracy)} trial(s), expected at least "
            f"{FEWEST_RUNS}: sweep over more settings"
        )
    runs = [ScoredRun(name, _scores(sweep, name), measured) for name, measured in accuracy.items()]
    return Trust(oracle_table(runs), zero_shot)


def _oracle_accuracy(summary: Mapping[str, Any], model: str) -> dict[str, float]:
    """Top-1 of a model in percent, of each split that has labels, and of both together."""
    measured = {
        split: one
        for split in SPLITS
        if (one := summary["splits"].get(split, {}).get(model, {})).get("labelled")
    }
    found = {
        f"{split}, {opinion}": float(one[opinion]["top1"])
        for split, one in measured.items()
        for opinion in OPINIONS
    }
    if len(measured) == len(SPLITS):
        objects = sum(one["labelled"] for one in measured.values())
        for opinion in OPINIONS:
            right = sum(one["labelled"] * one[opinion]["top1"] for one in measured.values())
            found[f"{BOTH}, {opinion}"] = float(right / objects)
    return found


def _scores(sweep: Store, trial: str) -> dict[str, float]:
    """Reads the scores of the epoch that a trial's model is of."""
    name = f"trials/{trial}/config.yaml"
    stored = _read(sweep, name)
    try:
        rule = str(yaml.safe_load(stored)["compat"]["select_on"])
    except (yaml.YAMLError, LookupError, TypeError):
        raise _broken(sweep, name, "compat.select_on in it") from None
    if rule.startswith("oracle"):
        raise ConfigError(
            f"{sweep}/{name}: compat.select_on is '{rule}', so labels chose the checkpoint, and no "
            "score can be judged by it; sweep with compat.select_on=score"
        )
    name = f"trials/{trial}/metrics.jsonl"
    stored = _read(sweep, name)
    try:
        epochs = [_parse_scores(line) for line in stored.splitlines()]
        return epochs[-1] if rule == "last" else max(epochs, key=operator.itemgetter(SCORE))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _broken(sweep, name, f"epochs with numbers for '{PREFIX}{SCORE}'") from None


def _parse_scores(line: bytes) -> dict[str, float]:
    """Gives an epoch's scores by name.

    Raises:
        ValueError: If one is no finite number.
    """
    row = json.loads(line)
    told = {key.removeprefix(PREFIX): row[key] for key in row if key.startswith(PREFIX)}
    if not all(map(math.isfinite, told.values())):
        raise ValueError
    return told


def _read(sweep: Store, name: str) -> bytes:
    stored = sweep.read(name)
    if stored is None:
        raise ConfigError(
            f"{sweep} lacks {name}, which a sweep of labelled data has at its end; "
            "let the sweep go on with --resume, or mend the folder's name"
        )
    return stored


def _broken(sweep: Store, name: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{sweep}/{name} is broken, expected {expected}; "
        "remove it and let the sweep write it anew with --resume"
    )
