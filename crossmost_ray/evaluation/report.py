"""A table of predictions in, accuracies with intervals out, as JSON and as the closing table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.tally import Interval, Tally, paired_bootstrap, tally

ZERO_SHOT = "zero-shot"
TEACHER = "teacher"
STUDENT = "student"
OPEN_SET = "open-set"


def tally_opinion(table: pa.Table, opinion: str, classes: Sequence[str]) -> Tally:
    """Counts one opinion's predictions against the labels.

    Args:
        table: Predictions of one model.
        opinion: image, point or fused.
        classes: C names; a row whose label is none of them is not counted.
    """
    place = {name: index for index, name in enumerate(classes)}
    label = np.array([place.get(name, -1) for name in table["label"].to_pylist()], np.int64)
    ranked = np.array(
        [[place[name] for name in row] for row in table[f"ranked_{opinion}"].to_pylist()], np.int64
    )
    if not len(label):
        ranked = ranked.reshape(0, 1)
    return tally(label, ranked, len(classes))


def is_right(table: pa.Table, opinion: str) -> npt.NDArray[np.bool_]:
    """Tells for each labelled row whether the best class is the label."""
    labelled = table.filter(pc.is_valid(pc.field("label")))
    best = pc.list_element(labelled[f"ranked_{opinion}"], 0)
    right: npt.NDArray[np.bool_] = pc.equal(best, labelled["label"]).to_numpy()
    return right.astype(bool)


def labelled_ids(table: pa.Table) -> list[str]:
    """Gives the ids of the labelled rows, in order."""
    ids: list[str] = table.filter(pc.is_valid(pc.field("label")))["object_id"].to_pylist()
    return ids


def _rows(table: pa.Table, split: str, model: str) -> pa.Table:
    return table.filter((pc.field("split") == split) & (pc.field("model") == model))


def summarize(table: pa.Table, classes: Sequence[str], *, confident: float) -> dict[str, Any]:
    """Counts predictions into metrics.

    Args:
        table: Output of `predict`.
        classes: C names.
        confident: A fused confidence above this counts as confident on the open set.

    Returns:
        By split and model: objects, and top-1, top-5 and class mean by opinion, in percent; the
        gain of each adapted model over zero-shot with its 95 % interval; on the open set the
        share of objects that a model is confident about. Plain values, ready for JSON.
    """
    summary: dict[str, Any] = {"classes": list(classes), "splits": {}}
    for split in sorted(set(table["split"].to_pylist())):
        models: dict[str, Any] = {}
        for model in sorted(set(table["model"].to_pylist())):
            rows = _rows(table, split, model)
            if split == OPEN_SET:
                sure = rows["confidence_fused"].to_numpy() > confident
                models[model] = {"objects": len(sure), "confident_percent": 100 * sure.mean()}
                continue
            models[model] = _accuracies(rows, classes)
            start = _rows(table, split, ZERO_SHOT)
            if model != ZERO_SHOT and start.num_rows:
                models[model]["gain"] = {
                    opinion: vars(
                        paired_bootstrap(is_right(start, opinion), is_right(rows, opinion))
                    )
                    for opinion in OPINIONS
                    if models[model]["labelled"]
                }
        summary["splits"][split] = models
    return summary


def _accuracies(rows: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    opinions = {}
    for opinion in OPINIONS:
        counts = tally_opinion(rows, opinion, classes)
        if counts.num_objects:
            opinions[opinion] = {
                "top1": counts.top1_accuracy,
                "top5": counts.top5_accuracy,
                "class_mean": counts.class_mean,
                "per_class": {
                    name: None if np.isnan(rate) else float(rate)
                    for name, rate in zip(classes, counts.per_class, strict=True)
                },
            }
    return {"objects": rows.num_rows, "labelled": len(labelled_ids(rows)), **opinions}


def gain_text(gain: Mapping[str, float] | Interval) -> str:
    """Writes a gain with its interval, such as +5.2 [+1.0, +9.3]."""
    values = vars(gain) if isinstance(gain, Interval) else gain
    return f"{values['difference']:+.1f} [{values['low']:+.1f}, {values['high']:+.1f}]"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Lays the metrics out as the table that a run ends with."""
    adapted = any(TEACHER in models for models in summary["splits"].values())
    title = "zero-shot → adapted, without a label" if adapted else "top-1, top-5 and class mean"
    table = Table(title=title, title_justify="left")
    for column in ("split", "model", "by", "top-1", "gain", "top-5", "class mean"):
        table.add_column(column, justify="left" if column in ("split", "model", "by") else "right")
    for split, models in summary["splits"].items():
        if split == OPEN_SET:
            continue
        known = [name for name in (ZERO_SHOT, STUDENT, TEACHER) if name in models]
        for model in [*known, *sorted(models.keys() - set(known))]:
            metrics = models[model]
            for opinion in OPINIONS:
                if opinion not in metrics:
                    continue
                scores = metrics[opinion]
                table.add_row(
                    f"{split} ({metrics['labelled']})",
                    model,
                    opinion,
                    f"{scores['top1']:.1f}",
                    gain_text(metrics["gain"][opinion]) if "gain" in metrics else "",
                    f"{scores['top5']:.1f}",
                    f"{scores['class_mean']:.1f}",
                    end_section=opinion == OPINIONS[-1],
                )
    return table


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Prints the closing table, the open-set line, where the results lie and what to type next."""
    console = Console(width=max(100, Console().width))
    console.print(summary_table(summary))
    for model, metrics in summary["splits"].get(OPEN_SET, {}).items():
        console.print(
            f"open set: {model} is confident about {metrics['confident_percent']:.0f} % of "
            f"{metrics['objects']} objects of none of the classes",
            highlight=False,
        )
    console.print(
        f"\nresults: {folder}\n"
        f"the adapted model: {folder / TEACHER}\n"
        f"next: adapt it to your own shards with `model: {folder / TEACHER}`, or compare with "
        "the baseline: python jobs/adapt.py CONFIG name=baseline mode=baseline",
        highlight=False,
        soft_wrap=True,
    )
