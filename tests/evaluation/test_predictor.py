"""The actor that asks models, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossmost_ray.config import EvaluationConfig
from crossmost_ray.evaluation.predictor import Predictor
from tests.synthetic import CLASSES, tiny_model, write_shards


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    shards = write_shards(tmp_path / "shards", num_files=1)
    rows = pq.read_table(shards / "part-00000.parquet")
    return rows.append_column("path", pa.array(["part-00000.parquet"] * rows.num_rows))


def image_confidence(model: Path, table: pa.Table, config: EvaluationConfig) -> list[float]:
    predictor = Predictor({"m": str(model)}, CLASSES, ["a {}."], 128, config)
    return list(predictor(table)["confidence_image"].to_pylist())


def only_view(table: pa.Table, place: int) -> pa.Table:
    views = pa.array([[row[place]] for row in table["views"].to_pylist()], pa.list_(pa.binary()))
    return table.set_column(table.schema.get_field_index("views"), "views", views)


def test_a_view_by_lot_is_one_of_the_views_and_always_the_same_one(
    tmp_path: Path, table: pa.Table
) -> None:
    model = tiny_model(tmp_path / "model")
    config = EvaluationConfig(num_views=4, point_samples=1, random_view=True)
    drawn = image_confidence(model, table, config)
    assert drawn == image_confidence(model, table, config)
    single = EvaluationConfig(num_views=1, point_samples=1)
    by_view = np.array([image_confidence(model, only_view(table, k), single) for k in range(4)])
    place = np.abs(by_view - drawn).argmin(axis=0)
    assert np.abs(by_view - drawn).min(axis=0).max() < 1e-6
    assert len(set(place.tolist())) > 1, "not the same place of every object"
    mean = image_confidence(model, table, EvaluationConfig(num_views=4, point_samples=1))
    assert mean != pytest.approx(drawn, abs=1e-6)
