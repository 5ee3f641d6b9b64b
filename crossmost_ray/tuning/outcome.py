"""A finished sweep in; its table, its best run as a config, and the command that trains it out.

Trials are ranked by the label-free score alone. Accuracies stand beside it where there are labels,
for the report only: nothing here is chosen by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console

from crossmost_ray.config import AdaptConfig, ConfigError, config_dict, parse_config
from crossmost_ray.data.shards import list_shards, open_shard
from crossmost_ray.evaluation.adaptation import splits_of
from crossmost_ray.evaluation.measure import measure
from crossmost_ray.evaluation.oracle import evaluation_config
from crossmost_ray.evaluation.report import Grid
from crossmost_ray.evaluation.summary import OPEN_SET, TEACHER, ZERO_SHOT
from crossmost_ray.storage import Store
from crossmost_ray.tuning.config import SweepConfig, with_settings
from crossmost_ray.tuning.ledger import Entry, Ledger, ranked
from crossmost_ray.tuning.space import settings_text
from crossmost_ray.tuning.trial import TRIALS_FOLDER

EVALUATION_FOLDER = "evaluation"
BEST_NAME = "best.yaml"
SUMMARY_NAME = "summary.json"
REPORT_NAME = "summary.md"

OPINION = "fused"
"""Whose accuracy the table shows."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep has come to."""

    folder: Store
    grid: Grid
    best: Entry
    command: str
    """What trains the best run."""


def conclude(sweep: SweepConfig, base: AdaptConfig, ledger: Ledger) -> Outcome:
    """Measures what has finished, and writes the tables and the best run.

    Raises:
        ConfigError: If no trial has finished, or the measurement meets what a user can cure.
    """
    metrics = measure_teachers(base, ledger) if sweep.evaluate else None
    listed = ranked(ledger.entries.values())
    accuracies = report_accuracies(metrics)
    grid = leaderboard(sweep, listed, accuracies)
    best = next(
        (entry for entry in listed if entry.status == "done" and entry.score is not None), None
    )
    summary = {
        "sweep": sweep.name,
        "metric": sweep.metric,
        "best": None if best is None else best.trial,
        "trials": [
            {
                "rank": place,
                "trial": entry.trial,
                "settings": entry.settings,
                "status": entry.status,
                "epochs": entry.epochs,
                "score": entry.score,
                "seconds": entry.seconds,
                "error": entry.error,
                "report_only": accuracies.get(entry.trial),
            }
            for place, entry in enumerate(listed, start=1)
        ],
        "zero_shot": {"report_only": accuracies.get(ZERO_SHOT)},
    }
    folder = ledger.folder
    folder.write(SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    if best is None:
        folder.write(REPORT_NAME, f"# {sweep.name}\n\n{grid.markdown()}\n")
        raise ConfigError(
            f"none of the {len(listed)} trials has finished with a {sweep.metric}: "
            f"{folder}/{REPORT_NAME} says why; mend it, and go on with --resume --retry-failed"
        )
    values = best_values(sweep, base, best)
    command = f"python jobs/adapt.py {folder}/{BEST_NAME}"
    folder.write(BEST_NAME, f"{best_header(sweep, best, command)}{yaml.safe_dump(values)}")
    folder.write(
        REPORT_NAME,
        f"# {sweep.name}\n\n{grid.markdown()}\n"
        f"Best by `{sweep.metric}`: {best.trial} ({settings_text(best.settings)}). "
        f"It is chosen without labels.\n\nTrain it:\n\n    {command}\n",
    )
    return Outcome(folder, grid, best, command)


def measure_teachers(base: AdaptConfig, ledger: Ledger) -> dict[str, Any] | None:
    """Measures the finished trials' teachers beside the model that they started from.

    Where trials start from different models, that is the base's.

    Returns:
        The metrics, as `evaluation/metrics.json` holds them; None if nothing is labelled or no
        trial has finished.
    """
    models = {
        entry.trial: ledger.folder.child(f"{TRIALS_FOLDER}/{entry.trial}/{TEACHER}").address
        for entry in ledger.with_status("done")
    }
    splits = {
        name: split
        for name, split in splits_of(base).items()
        if name != OPEN_SET and is_labelled(split.shards)
    }
    if not models or not splits:
        return None
    return measure(
        {ZERO_SHOT: base.model, **models},
        splits,
        ledger.folder.child(EVALUATION_FOLDER),
        config=evaluation_config(base),
        use_gpu=base.cluster.use_gpu,
        # What the folder holds is this sweep's own, of fewer trials or other settings.
        overwrite=True,
        env=base.cluster.env,
    )


def is_labelled(shards: str) -> bool:
    """Whether any object of a folder of shards has a label."""
    for name in list_shards(shards, ("label",)):
        with open_shard(shards, name) as shard:
            labels = shard.read(columns=["label"]).column("label")
        if labels.null_count < len(labels):
            return True
    return False


def report_accuracies(metrics: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Gives top-1 by model and split, in percent, for the report only."""
    told: dict[str, dict[str, float]] = {}
    for split, models in ({} if metrics is None else metrics["splits"]).items():
        for model, one in models.items():
            if OPINION in one:
                told.setdefault(model, {})[split] = one[OPINION]["top1"]
    return told


def leaderboard(
    sweep: SweepConfig, listed: Sequence[Entry], accuracies: Mapping[str, Mapping[str, float]]
) -> Grid:
    """Lays out the trials, best first, and last the model that they started from."""
    splits = list(dict.fromkeys(split for by_split in accuracies.values() for split in by_split))

    def percent(model: str) -> list[str]:
        told = accuracies.get(model, {})
        return [f"{told[split]:.1f}" if split in told else "" for split in splits]

    rows = [
        (
            *(entry.trial, entry.status, entry.error or settings_text(entry.settings)),
            "" if entry.score is None else f"{entry.score:.4f}",
            str(entry.epochs),
            f"{entry.seconds / 60:.1f}",
            *percent(entry.trial),
        )
        for entry in listed
    ]
    if ZERO_SHOT in accuracies:
        rows.append((ZERO_SHOT, "", "as it comes", "", "", "", *percent(ZERO_SHOT)))
    return Grid(
        f"{sweep.name}: {len(listed)} trials, ranked without labels",
        (
            *("trial", "status", "settings"),
            *(sweep.metric, "epochs", "minutes"),
            *(f"{split}, % (report only)" for split in splits),
        ),
        rows,
        words=3,
    )


def best_values(sweep: SweepConfig, base: AdaptConfig, best: Entry) -> dict[str, Any]:
    """Spells out the best trial as a run of its own, beside the base."""
    name = {"name": f"{sweep.name}-best"}
    values = with_settings(config_dict(base), {**best.settings, **name})
    # Through the cycle, so that what is written is known to be read.
    written = yaml.safe_dump(config_dict(parse_config(AdaptConfig, values, BEST_NAME)))
    parsed: dict[str, Any] = yaml.safe_load(written)
    return parsed


def best_header(sweep: SweepConfig, best: Entry, command: str) -> str:
    """Says in comments where the best run comes from."""
    return (
        f"# {best.trial} of the sweep {sweep.name}, best by {sweep.metric} ({best.score:.4f}), "
        "which reads no label.\n"
        f"# Settings: {settings_text(best.settings)}\n"
        f"#   {command}\n"
    )


def print_outcome(outcome: Outcome) -> None:
    """Prints the table, where the results lie and what to type next."""
    console = Console(width=max(120, Console().width))
    console.print(outcome.grid.rich())
    console.print(
        f"\nresults: {outcome.folder}\n"
        f"best without labels: {outcome.best.trial} ({settings_text(outcome.best.settings)})\n"
        f"next: {outcome.command}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
