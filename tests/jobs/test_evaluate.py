"""Measuring model folders on real Ray processes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crossmost_ray.config import ConfigError, EvaluateConfig, parse_config
from crossmost_ray.evaluation.measure import evaluate
from crossmost_ray.evaluation.report import summary_table
from tests.synthetic import CLASSES, tiny_model, write_shards

pytestmark = pytest.mark.ray


def test_two_models_are_measured_side_by_side(ray_cluster: None, tmp_path: Path) -> None:
    values = {
        "name": "both",
        "models": {
            name: str(tiny_model(tmp_path / name, seed=seed))
            for seed, name in enumerate(("one", "two"))
        },
        "splits": {"all": str(write_shards(tmp_path / "shards", num_objects=8))},
        "num_points": 128,
        "output": str(tmp_path / "runs"),
        "evaluation": {"num_views": 2, "point_samples": 1},
    }
    folder, summary = evaluate(parse_config(EvaluateConfig, values, "the test"))
    assert json.loads((folder / "metrics.json").read_text()) == summary
    assert summary["classes"] == list(CLASSES)
    assert summary["splits"]["all"].keys() == {"one", "two"}
    predictions = pq.read_table(folder / "predictions.parquet")
    assert predictions.num_rows == 16
    for name in ("one", "two"):
        metrics = summary["splits"]["all"][name]
        assert metrics["labelled"] == 8
        rows = [row for row in predictions.to_pylist() if row["model"] == name]
        right = sum(row["ranked_fused"][0] == row["label"] for row in rows)
        assert metrics["fused"]["top1"] == pytest.approx(100 * right / 8)
        assert "gain" not in metrics, "neither of them is the start of the other"
    assert summary_table(summary).row_count == 6

    again = parse_config(EvaluateConfig, values | {"models": {"one": "no/such"}}, "the test")
    with pytest.raises(ConfigError, match="no model folder 'no/such'"):
        evaluate(again)
