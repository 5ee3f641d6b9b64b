"""Predictions to counts, metrics and tables, by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from crossmost_ray.config import ConfigError, EvaluationConfig
from crossmost_ray.evaluation.actor import SUMS_KEY
from crossmost_ray.evaluation.counts import Counts, count_table, count_units
from crossmost_ray.evaluation.plan import Corruption, Split, Unit, make_plan
from crossmost_ray.evaluation.predictor import OPINIONS, prediction_schema
from crossmost_ray.evaluation.report import (
    comparisons,
    corruptions,
    label_free,
    markdown,
    rankings,
    side_by_side,
    summary_table,
)
from crossmost_ray.evaluation.reproduce import compare
from crossmost_ray.evaluation.reproduce import markdown as comparison_markdown
from crossmost_ray.evaluation.summary import confusion_table, summarize
from crossmost_ray.storage import Store

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
            row[f"entropy_{opinion}"] = 0.25
        out.append(row)
    return out


LABELS: list[str | None] = ["chair", "lamp", "table", "table", None]
ZERO = rows("test", "zero-shot", LABELS, image="ccccc", point="clccc", fused="clccc")
TEACHER = rows("test", "teacher", LABELS, image="cltcc", point="clctc", fused="clttc")


SCHEMA = prediction_schema(EvaluationConfig())


def counts(*tables: list[dict[str, Any]]) -> Counts:
    """Counts tables of rows, one for each model; every class is as probable as the others."""
    models = [rows[0]["model"] for rows in tables]
    uniform = [len(tables[0]) / 3] * 3
    return count_table(
        pa.Table.from_pylist([row for rows in tables for row in rows], schema=SCHEMA),
        models,
        CLASSES,
        probability={model: dict.fromkeys(OPINIONS, uniform) for model in models},
        confident=0.8,
    )


def summary_of(*models: str, **counted: Counts) -> dict[str, Any]:
    splits = {name.replace("_", "-"): value for name, value in counted.items()}
    return summarize(splits, dict.fromkeys(splits, CLASSES), models)


BOTH = summary_of("zero-shot", "teacher", test=counts(ZERO, TEACHER))


def test_accuracies_count_labelled_rows_only() -> None:
    zero, teacher = (BOTH["splits"]["test"][name] for name in ("zero-shot", "teacher"))
    assert zero["objects"] == 5
    assert zero["labelled"] == 4
    assert zero["image"]["top1"] == 25
    assert zero["image"]["class_mean"] == pytest.approx(100 / 3)
    assert zero["image"]["per_class"] == {"chair": 100, "lamp": 0, "table": 0}
    # All four at 0.9, in one bin, and one of them right.
    assert zero["image"]["ece"] == pytest.approx(65, abs=1e-4)
    assert teacher["image"]["top1"] == 75
    assert teacher["fused"]["top1"] == 100
    assert teacher["image"]["top5"] == 100
    gain = teacher["gain"]["image"]
    assert gain["difference"] == 50
    assert gain["low"] <= 50 <= gain["high"]
    assert "gain" not in zero
    assert json.loads(json.dumps(BOTH)) == BOTH


def test_labels_that_are_no_class_are_counted_apart() -> None:
    labels: list[str | None] = ["chair", "sofa", None]
    one = summary_of("m", s=counts(rows("s", "m", labels, image="ccc", point="ccc", fused="ccc")))
    metrics = one["splits"]["s"]["m"]
    assert (metrics["objects"], metrics["labelled"], metrics["other_labels"]) == (3, 1, 1)
    assert metrics["fused"]["top1"] == 100


def test_what_needs_no_label() -> None:
    told = BOTH["splits"]["test"]["teacher"]["label_free"]
    # Images say cltcc and points clctc: alike in three of five.
    assert told["agreement"] == 60
    image = told["image"]
    assert image["predicted"] == {"chair": 3, "lamp": 1, "table": 1}
    assert image["mean_confidence"] == pytest.approx(100 * (3 * 0.9 + 2 * 0.5) / 5, abs=1e-4)
    assert image["confident_percent"] == 60
    assert image["mean_entropy"] == pytest.approx(0.25)
    assert image["balance"] == pytest.approx(100)


def test_the_open_set_is_asked_for_confidence_not_for_labels() -> None:
    unknown = rows("open-set", "teacher", [None] * 4, image="cccc", point="cccc", fused="ctlc")
    summary = summary_of("teacher", open_set=counts(unknown))
    metrics = summary["splits"]["open-set"]["teacher"]
    assert metrics.keys() == {"objects", "confident_percent", "label_free"}
    assert (metrics["objects"], metrics["confident_percent"]) == (4, 50)


def test_a_split_without_labels_has_no_accuracy_and_still_a_report() -> None:
    nothing: list[str | None] = [None, None]
    summary = summary_of(
        "zero-shot",
        "teacher",
        transductive=counts(
            rows("s", "zero-shot", nothing, image="cc", point="cc", fused="cc"),
            rows("s", "teacher", nothing, image="ct", point="cc", fused="cc"),
        ),
    )
    metrics = summary["splits"]["transductive"]["teacher"]
    assert metrics.keys() == {"objects", "labelled", "other_labels", "label_free"}
    assert summary["comparisons"] == {}
    assert summary_table(summary).row_count == 0
    assert markdown(summary).startswith("## without labels")
    grid = label_free(summary)
    assert grid.rows[3][:2] == ("transductive (2)", "teacher")
    assert grid.rows[5][-1] == "50.0"


def test_parts_of_a_split_add_up() -> None:
    whole = counts(ZERO, TEACHER)
    parts = counts(ZERO[:2], TEACHER[:2]) + counts(ZERO[2:], TEACHER[2:])
    left, right = (summary_of("zero-shot", "teacher", test=one) for one in (whole, parts))
    assert left["comparisons"] == right["comparisons"]
    for name in ("zero-shot", "teacher"):
        one, other = (part["splits"]["test"][name] for part in (left, right))
        assert one["image"]["top1"] == other["image"]["top1"]
        assert one["image"]["ece"] == pytest.approx(other["image"]["ece"])
        assert one["label_free"]["fused"]["predicted"] == other["label_free"]["fused"]["predicted"]


def test_the_confusion_lists_what_was_taken_for_what() -> None:
    table = confusion_table({"test": counts(ZERO, TEACHER)}, {"test": CLASSES})
    cells = {
        (row["label"], row["predicted"]): row["objects"]
        for row in table.to_pylist()
        if (row["model"], row["opinion"]) == ("teacher", "image")
    }
    assert cells == {
        ("chair", "chair"): 1,
        ("lamp", "lamp"): 1,
        ("table", "table"): 1,
        ("table", "chair"): 1,
    }


def test_the_closing_table_shows_each_opinion_and_gain() -> None:
    console = Console(width=140, record=True, quiet=False, file=io.StringIO())
    console.print(summary_table(BOTH))
    text = console.export_text()
    assert "test (4)" in text
    assert "+50.0 [" in text


def test_the_report_ranks_models_and_sets_them_side_by_side() -> None:
    first = next(rankings(BOTH))
    assert first.markdown().splitlines() == [
        "## test, by image",
        "",
        "| model | top-1 | top-5 |",
        "| --- | ---: | ---: |",
        "| zero-shot | 25.0 | 100.0 |",
        "| teacher | 75.0 | 100.0 |",
    ]
    assert side_by_side(BOTH).columns == ("split", "by", "zero-shot", "teacher")
    assert side_by_side(BOTH).rows[2] == ("test", "fused", "50.0", "100.0")
    (row,) = comparisons(BOTH).rows
    assert row[:3] == ("test", "teacher", "zero-shot")
    assert row[3].startswith("+50.0 [")
    assert "## any two models, top-1" in markdown(BOTH)
    assert "corrupted" not in markdown(BOTH)


def test_corruptions_are_averaged_over_severities_and_stand_apart() -> None:
    counted = {"test": counts(TEACHER), "test+noise-1": counts(TEACHER)}
    worse = [{**row, "model": "teacher"} for row in ZERO]
    counted["test+noise-2"] = counts(worse)
    summary = summarize(counted, {"test": CLASSES}, ["teacher"])
    # 75 as it is and under the first severity, 25 under the second.
    assert summary["corruptions"]["test"]["teacher"]["noise"]["image"] == 50
    grid = corruptions(summary)
    assert grid.columns[-2:] == ("as it is", "noise")
    assert grid.rows[0] == ("test", "teacher", "image", "75.0", "50.0")
    assert summary_table(summary).row_count == 3, "the split as it is, and nothing else"


def write_predictions(folder: Path, table: list[dict[str, Any]], unit: Unit) -> Store:
    stream = pa.BufferOutputStream()
    told = json.dumps({"probability": {}, "left_out": ["a row"]})
    with pq.ParquetWriter(stream, pa.Table.from_pylist(table).schema) as writer:
        writer.write_table(pa.Table.from_pylist(table))
        writer.add_key_value_metadata({SUMS_KEY: told})
    results = Store(str(folder))
    results.write(unit.path, stream.getvalue().to_pybytes())
    return results


def test_files_are_counted_and_damaged_ones_named(tmp_path: Path) -> None:
    plan = make_plan(
        {"zero-shot": "z", "teacher": "t"},
        {"test": Split("s", tuple(CLASSES), ("{}",), 8)},
        EvaluationConfig(),
    )
    unit, worse = Unit("test", "a.parquet"), Unit("test", "a.parquet", Corruption("noise", 1))
    results = write_predictions(tmp_path, ZERO + TEACHER, unit)
    counted = count_units([unit, unit], plan, results, confident=0.8)["test"]
    assert (counted.objects, counted.labelled, counted.left_out) == (10, 8, 2)
    # An object that only one of the models was asked about.
    write_predictions(tmp_path, ZERO + TEACHER[1:], worse)
    with pytest.raises(ConfigError, match=r"test\+noise-1/a.parquet is damaged .*remove it"):
        count_units([worse], plan, results, confident=0.8)
    results.write(worse.path, b"no parquet")
    with pytest.raises(ConfigError, match="is damaged"):
        count_units([worse], plan, results, confident=0.8)


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
    text = comparison_markdown(result, ["crossmost", "baseline"])
    assert "| zero-shot | 25.0 | 50.0 | 50.0 | 37.5 |" in text
    assert "+25.0 [" in text
