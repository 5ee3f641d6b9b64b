"""Predictions to numbers, by hand."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.report import summarize, summary_table
from crossmost_ray.evaluation.reproduce import compare, markdown

CLASSES = ["chair", "lamp", "table"]


def rows(split: str, model: str, labels: list[str | None], **best: str) -> list[dict[str, Any]]:
    """One row per label; `best` gives each opinion's first class for each, as initials."""
    initial = {name[0]: name for name in CLASSES}
    out = []
    for place, label in enumerate(labels):
        row: dict[str, Any] = {"split": split, "object_id": f"{split}{place}", "label": label}
        row["model"] = model
        for opinion in OPINIONS:
            first = initial[best[opinion][place]]
            row[f"ranked_{opinion}"] = [first, *(name for name in CLASSES if name != first)]
            row[f"confidence_{opinion}"] = 0.9 if first == "chair" else 0.5
        out.append(row)
    return out


LABELS: list[str | None] = ["chair", "lamp", "table", "table", None]
ZERO = rows("test", "zero-shot", LABELS, image="ccccc", point="clccc", fused="clccc")
TEACHER = rows("test", "teacher", LABELS, image="cltcc", point="clctc", fused="clttc")


def test_accuracies_count_labelled_rows_only() -> None:
    summary = summarize(pa.Table.from_pylist(ZERO + TEACHER), CLASSES, confident=0.8)
    zero, teacher = (summary["splits"]["test"][name] for name in ("zero-shot", "teacher"))
    assert zero["objects"] == 5
    assert zero["labelled"] == 4
    assert zero["image"]["top1"] == 25
    assert zero["image"]["class_mean"] == pytest.approx(100 / 3)
    assert zero["image"]["per_class"] == {"chair": 100, "lamp": 0, "table": 0}
    assert teacher["image"]["top1"] == 75
    assert teacher["fused"]["top1"] == 100
    assert teacher["image"]["top5"] == 100
    gain = teacher["gain"]["image"]
    assert gain["difference"] == 50
    assert gain["low"] <= 50 <= gain["high"]
    assert "gain" not in zero


def test_the_open_set_is_asked_for_confidence_not_for_labels() -> None:
    unknown = rows("open-set", "teacher", [None] * 4, image="cccc", point="cccc", fused="ctlc")
    table = pa.Table.from_pylist(unknown)
    summary = summarize(table, CLASSES, confident=0.8)
    assert summary["splits"]["open-set"]["teacher"] == {"objects": 4, "confident_percent": 50}


def test_a_split_without_labels_has_no_accuracy_and_still_a_table() -> None:
    nothing: list[str | None] = [None, None]
    table = pa.Table.from_pylist(
        rows("transductive", "zero-shot", nothing, image="cc", point="cc", fused="cc")
        + rows("transductive", "teacher", nothing, image="cc", point="cc", fused="cc")
    )
    summary = summarize(table, CLASSES, confident=0.8)
    assert set(summary["splits"]["transductive"]["teacher"]) == {"objects", "labelled", "gain"}
    assert summary["splits"]["transductive"]["teacher"]["gain"] == {}
    Console(quiet=True).print(summary_table(summary))


def test_the_closing_table_shows_each_opinion_and_gain() -> None:
    summary = summarize(pa.Table.from_pylist(ZERO + TEACHER), CLASSES, confident=0.8)
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(summary))
    text = console.export_text()
    assert "test (4)" in text
    assert "+50.0 [" in text


def test_modes_are_compared_object_by_object() -> None:
    tables = {
        "crossmost": pa.Table.from_pylist(ZERO + TEACHER),
        "baseline": pa.Table.from_pylist(
            ZERO + rows("test", "teacher", LABELS, image="cctcc", point="clctc", fused="clctc")
        ),
    }
    result = compare(tables)
    assert result["objects"] == 4
    assert result["crossmost"]["top1"] == {"image": 75, "point": 75, "fused": 100, "towers": 75}
    assert result["crossmost"]["gain"]["towers"]["difference"] == pytest.approx(37.5)
    ahead = result["baseline"]["crossmost_ahead"]
    assert ahead["image"]["difference"] == 25
    assert ahead["point"] == {"difference": 0, "low": 0, "high": 0}
    text = markdown(result, ["crossmost", "baseline"])
    assert "| zero-shot | 25.0 | 50.0 | 50.0 | 37.5 |" in text
    assert "+25.0 [" in text
