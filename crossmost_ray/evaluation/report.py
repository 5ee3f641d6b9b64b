"""Metrics in, tables out: for the terminal, and as the Markdown of `report.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.summary import OPEN_SET, STUDENT, TEACHER, ZERO_SHOT
from crossmost_ray.storage import Store
from crossmost_ray.tally import Interval


@dataclass(frozen=True)
class Grid:
    """A table, before it is laid out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    """Columns of words; those after them hold numbers."""

    def rich(self) -> Table:
        """Lays it out for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="left" if place < self.words else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Lays it out as Markdown, under a heading."""
        rule = ["---" if place < self.words else "---:" for place in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, ""])


def gain_text(gain: Mapping[str, float] | Interval) -> str:
    """Writes a gain with its interval, such as +5.2 [+1.0, +9.3]."""
    values = vars(gain) if isinstance(gain, Interval) else gain
    return f"{values['difference']:+.1f} [{values['low']:+.1f}, {values['high']:+.1f}]"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _labelled(summary: Mapping[str, Any], *, variants: bool = False) -> dict[str, Any]:
    """The splits that have accuracies; with their variants, if asked for."""
    return {
        split: models
        for split, models in summary["splits"].items()
        if (variants or "+" not in split) and any(OPINIONS[0] in one for one in models.values())
    }


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Lays the accuracies out as the table that a run ends with."""
    adapted = any(TEACHER in models for models in summary["splits"].values())
    title = "zero-shot → adapted, without a label" if adapted else "top-1, top-5 and class mean"
    table = Table(title=title, title_justify="left")
    for column in ("split", "model", "by", "top-1", "gain", "top-5", "class mean", "ECE"):
        table.add_column(column, justify="left" if column in ("split", "model", "by") else "right")
    for split, models in _labelled(summary).items():
        known = [name for name in (ZERO_SHOT, STUDENT, TEACHER) if name in models]
        for model in [*known, *(name for name in models if name not in known)]:
            metrics = models[model]
            for opinion in OPINIONS:
                scores = metrics[opinion]
                table.add_row(
                    f"{split} ({metrics['labelled']})",
                    model,
                    opinion,
                    f"{scores['top1']:.1f}",
                    gain_text(metrics["gain"][opinion]) if "gain" in metrics else "",
                    f"{scores['top5']:.1f}",
                    f"{scores['class_mean']:.1f}",
                    f"{scores['ece']:.1f}",
                    end_section=opinion == OPINIONS[-1],
                )
    return table


def rankings(summary: Mapping[str, Any]) -> Iterator[Grid]:
    """Gives a table of model, top-1 and top-5 for each split and opinion, as papers print it."""
    for split, models in _labelled(summary).items():
        for opinion in OPINIONS:
            yield Grid(
                f"{split}, by {opinion}",
                ("model", "top-1", "top-5"),
                [
                    (name, _number(one[opinion]["top1"]), _number(one[opinion]["top5"]))
                    for name, one in models.items()
                ],
            )


def side_by_side(summary: Mapping[str, Any]) -> Grid:
    """Sets the models' top-1 beside each other: a row for each split and opinion.

    Of one model alone there are none.
    """
    models = summary["models"]
    rows = [
        (split, opinion, *(_number(by_model[name][opinion]["top1"]) for name in models))
        for split, by_model in _labelled(summary).items()
        for opinion in OPINIONS
        if len(models) > 1
    ]
    return Grid("top-1, side by side", ("split", "by", *models), rows, words=2)


def label_free(summary: Mapping[str, Any]) -> Grid:
    """Lists what needs no label: how sure, how unanimous and how even-handed each model is."""
    rows = []
    for split, models in summary["splits"].items():
        for name, metrics in models.items():
            if not metrics["objects"]:
                continue
            told = metrics["label_free"]
            for opinion in OPINIONS:
                one = told[opinion]
                rows.append(
                    (
                        *(f"{split} ({metrics['objects']})", name, opinion),
                        _number(one["mean_confidence"]),
                        _number(one["mean_entropy"], 2),
                        _number(one["confident_percent"]),
                        _number(one["balance"]),
                        _number(told["agreement"]) if opinion == OPINIONS[-1] else "",
                    )
                )
    columns = ("split", "model", "by", "confidence", "entropy", "confident", "balance", "agreement")
    return Grid("without labels", columns, rows, words=3)


def comparisons(summary: Mapping[str, Any]) -> Grid:
    """Lists the differences of top-1 between any two models, with their 95 % intervals."""
    rows = [
        (split, one["after"], one["before"], *(gain_text(one[opinion]) for opinion in OPINIONS))
        for split, listed in summary["comparisons"].items()
        if "+" not in split
        for one in listed
    ]
    return Grid("any two models, top-1", ("split", "model", "ahead of", *OPINIONS), rows, words=3)


def corruptions(summary: Mapping[str, Any]) -> Grid:
    """Lists top-1 under each kind of corruption, averaged over the severities that were asked."""
    listed = summary["corruptions"]
    kinds = list(
        dict.fromkeys(kind for models in listed.values() for one in models.values() for kind in one)
    )
    rows = [
        (
            *(split, name, opinion),
            _number(summary["splits"][split][name][opinion]["top1"]),
            *(_number(by_kind[kind][opinion] if kind in by_kind else None) for kind in kinds),
        )
        for split, models in listed.items()
        for name, by_kind in models.items()
        for opinion in OPINIONS
    ]
    return Grid("corrupted, top-1", ("split", "model", "by", "as it is", *kinds), rows, words=3)


def markdown(summary: Mapping[str, Any]) -> str:
    """Lays everything out as Markdown, in percent; grids that would be empty are left out."""
    grids = [
        *rankings(summary),
        side_by_side(summary),
        comparisons(summary),
        corruptions(summary),
        label_free(summary),
    ]
    return "\n".join(grid.markdown() for grid in grids if grid.rows)


def print_evaluation(summary: Mapping[str, Any], results: Store) -> None:
    """Prints the tables of a measurement and where the rest lies."""
    console = Console(width=max(100, Console().width))
    if _labelled(summary):
        console.print(summary_table(summary))
    for grid in (side_by_side(summary), corruptions(summary), label_free(summary)):
        if grid.rows:
            console.print(grid.rich())
    console.print(
        f"results: {results}\nall tables, and differences of any two models: {results}/report.md",
        highlight=False,
        soft_wrap=True,
    )


def print_summary(summary: Mapping[str, Any], folder: Store) -> None:
    """Prints the closing table, the open-set line, where the results lie and what to type next."""
    console = Console(width=max(100, Console().width))
    if _labelled(summary):
        console.print(summary_table(summary))
    else:
        console.print(label_free(summary).rich())
    for model, metrics in summary["splits"].get(OPEN_SET, {}).items():
        if metrics["objects"]:
            console.print(
                f"open set: {model} is confident about {metrics['confident_percent']:.0f} % of "
                f"{metrics['objects']} objects of none of the classes",
                highlight=False,
            )
    console.print(
        f"\nresults: {folder}\n"
        f"the adapted model: {folder}/{TEACHER}\n"
        f"next: adapt it to your own shards with `model: {folder}/{TEACHER}`, or compare with "
        "the baseline: python jobs/adapt.py CONFIG name=baseline mode=baseline",
        highlight=False,
        soft_wrap=True,
    )
