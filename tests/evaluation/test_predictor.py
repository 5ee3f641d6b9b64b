"""Asking models, in this process; and the actor that does it shard by shard, without a cluster."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from crossmost_ray.config import ConfigError, EvaluationConfig
from crossmost_ray.data.decode import hash_id
from crossmost_ray.evaluation.actor import SUMS_KEY, ShardPredictor, one_ahead, unit_row
from crossmost_ray.evaluation.plan import Corruption, Split, Unit, make_plan
from crossmost_ray.evaluation.predictor import OPINIONS, Predictor, sample_places
from crossmost_ray.models.classifier import CrossModalModel
from crossmost_ray.models.pretrained import ModelFolder
from crossmost_ray.storage import Store
from tests.synthetic import CLASSES, tiny_model, write_shards

TEMPLATES = ("a {}.",)


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    shards = write_shards(tmp_path / "shards", num_objects=6, num_files=1)
    return pq.read_table(shards / "part-00000.parquet")


def predictor(model: CrossModalModel, num_points: int = 128, **settings: Any) -> Predictor:
    config = EvaluationConfig(**({"num_views": 2, "point_samples": 1} | settings))
    return Predictor({"m": ModelFolder(model, None, None)}, CLASSES, TEMPLATES, num_points, config)


def image_confidence(model: CrossModalModel, table: pa.Table, **settings: Any) -> list[float]:
    return list(predictor(model, **settings)(table)["confidence_image"].to_pylist())


def with_views(table: pa.Table, views: list[list[bytes]]) -> pa.Table:
    column = pa.array(views, pa.list_(pa.binary()))
    return table.set_column(table.schema.get_field_index("views"), "views", column)


def test_a_view_by_lot_is_one_of_the_views_and_always_the_same_one(
    model: CrossModalModel, table: pa.Table
) -> None:
    drawn = image_confidence(model, table, num_views=4, random_view=True)
    stored = table["views"].to_pylist()
    # Every object shown by the view that its hash picks, and by no other.
    lot = [
        [views[hash_id(name) % 4]]
        for name, views in zip(table["object_id"].to_pylist(), stored, strict=True)
    ]
    single = image_confidence(model, with_views(table, lot), num_views=1)
    assert drawn == pytest.approx(single, abs=1e-6)
    assert len({hash_id(name) % 4 for name in table["object_id"].to_pylist()}) > 1
    assert image_confidence(model, table, num_views=4) != pytest.approx(drawn, abs=1e-6)


def test_objects_of_few_views_share_a_batch_with_others(
    model: CrossModalModel, table: pa.Table
) -> None:
    stored = table["views"].to_pylist()
    ragged = with_views(table, [views[: 1 + place % 3] for place, views in enumerate(stored)])
    together = predictor(model, num_views=4)(ragged)
    alone = pa.concat_tables(
        predictor(model, num_views=4)(ragged.slice(place, 1)) for place in range(6)
    )
    assert together["object_id"] == alone["object_id"]
    for opinion in OPINIONS:
        np.testing.assert_allclose(
            together[f"confidence_{opinion}"], alone[f"confidence_{opinion}"], atol=1e-5
        )


def test_samples_do_not_depend_on_who_shares_the_batch() -> None:
    places = sample_places(100, 40, 3)
    assert places.shape == (3, 40)
    assert all(len(set(row.tolist())) == 40 for row in places)
    assert len({tuple(row) for row in places.tolist()}) == 3
    # A smaller cloud gives all of its points, as evenly as can be.
    assert sorted(np.bincount(sample_places(10, 25, 1)[0])) == [2] * 5 + [3] * 5


def test_a_row_holds_what_reports_need(model: CrossModalModel, table: pa.Table) -> None:
    ask = predictor(model, num_views=2, point_samples=2, store=["logits", "embeddings"])
    answers = ask.ask(ask.decode(table))
    classifier, _ = ask.models["m"]
    rows = answers.table.to_pylist()
    assert [row["object_id"] for row in rows] == table["object_id"].to_pylist()
    logits = {name: torch.tensor([row[f"logits_{name}"] for row in rows]) for name in OPINIONS[:2]}
    probability = {name: value.softmax(dim=-1) for name, value in logits.items()}
    probability["fused"] = (probability["image"] + probability["point"]) / 2
    for opinion, expected in probability.items():
        best = expected.argsort(dim=-1, descending=True)
        for row, order, chances in zip(rows, best.tolist(), expected, strict=True):
            assert row[f"ranked_{opinion}"] == [CLASSES[place] for place in order]
            assert row[f"confidence_{opinion}"] == pytest.approx(float(chances.max()), abs=1e-5)
            entropy = float(-(chances * chances.log()).sum())
            assert row[f"entropy_{opinion}"] == pytest.approx(entropy, abs=1e-5)
        np.testing.assert_allclose(
            answers.probability["m"][opinion], expected.double().sum(dim=0), atol=1e-5
        )
    # The mean of the embeddings gives the mean of the logits.
    for tower, expected in logits.items():
        embeds = torch.tensor([row[f"embedding_{tower}"] for row in rows])
        with torch.no_grad():
            again = classifier.logits(embeds)
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
        assert (embeds.norm(dim=-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("nan", "1 of 128 points are NaN or infinite"),
        ("few_points", "7 points, num_points asks for 128"),
        ("no_points", "0 points, num_points asks for 128"),
        ("bad_view", r"view 3 can't be decoded \(it is no WebP"),
        ("null_view", "view 3 can't be decoded"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_left_out(
    model: CrossModalModel, tmp_path: Path, fault: Any, problem: str
) -> None:
    shards = write_shards(tmp_path, num_objects=4, num_files=1, corrupt={2: fault})
    rows = pq.read_table(shards / "part-00000.parquet")
    named = rf"^test: a.parquet, row 12 \(synthetic/0-2\): {problem}.*evaluation.bad_rows=skip"
    with pytest.raises(ConfigError, match=named):
        predictor(model, num_views=4).decode(rows, shard="test: a.parquet", first=10)
    batch = predictor(model, num_views=4, bad_rows="skip").decode(rows)
    assert batch.object_id == ["synthetic/0-0", "synthetic/0-1", "synthetic/0-3"]
    assert [bad.row for bad in batch.left_out] == [2]


def test_a_corruption_reaches_both_towers_and_repeats_itself(
    model: CrossModalModel, table: pa.Table
) -> None:
    ask = predictor(model)
    plain, noisy, again = (
        ask.decode(table, corruption=kind)
        for kind in (None, Corruption("noise", 5), Corruption("noise", 5))
    )
    for left, right in ((noisy, plain), (noisy, again)):
        same = right is again
        assert torch.equal(left.samples, right.samples) == same
        assert all(torch.equal(left.images[s], right.images[s]) == same for s in left.images)
    # Corrupted as objects, not as a batch.
    (alone,) = ask.decode(table.slice(3, 1), corruption=Corruption("noise", 5)).samples
    assert torch.equal(alone, noisy.samples[3])


def test_gpus_that_are_not_there_are_refused(model: CrossModalModel) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="use_gpu asks for GPUs, and torch finds none"):
        Predictor({}, CLASSES, TEMPLATES, 8, EvaluationConfig(), use_gpu=True)


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    made = []

    def source() -> Iterator[int]:
        for place in range(1, 4):
            made.append(place)
            yield place

    results = one_ahead(source())
    assert next(results) == 1
    assert list(results) == [2, 3]
    assert made == [1, 2, 3]

    def broken() -> Iterator[int]:
        yield 1
        raise ConfigError("the second can't be made")

    with pytest.raises(ConfigError, match="the second"):
        list(one_ahead(broken()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "m")


def shard_predictor(folder: Path, shards: Path, results: Path, **settings: Any) -> ShardPredictor:
    config = EvaluationConfig(num_views=2, point_samples=1, **settings)
    split = Split(str(shards), CLASSES, TEMPLATES, 128)
    plan = make_plan({"m": str(folder)}, {"s": split}, config)
    return ShardPredictor(plan, Store(str(results)), use_gpu=False)


def ask_unit(actor: ShardPredictor, unit: Unit) -> dict[str, Any]:
    (told,) = actor(pa.Table.from_pylist([unit_row(unit)])).to_pylist()
    return dict(told)


def test_a_shard_becomes_a_file_whatever_its_batches(folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=5, num_files=1)
    unit = Unit("s", "part-00000.parquet")
    tables = []
    for size in (2, 32):
        results = tmp_path / str(size)
        actor = shard_predictor(folder, shards, results, batch_size=size)
        assert ask_unit(actor, unit) == {"objects": 5, "refused": ""}
        assert actor.results.read(unit.path) is not None
        tables.append(pq.read_table(io.BytesIO(actor.results.read(unit.path) or b"")))
    small, large = tables
    assert small["object_id"].to_pylist() == [f"synthetic/0-{place}" for place in range(5)]
    assert set(small["split"].to_pylist()) == {"s"}
    for name in ("object_id", "label", "model", "ranked_fused"):
        assert small[name] == large[name]
    sums = [
        json.loads(pq.read_metadata(tmp_path / size / unit.path).metadata[SUMS_KEY.encode()])
        for size in ("2", "32")
    ]
    for opinion in OPINIONS:
        left, right = (one["probability"]["m"][opinion] for one in sums)
        assert left == pytest.approx(right, abs=1e-5)
        assert sum(left) == pytest.approx(5, abs=1e-4)


def test_a_refused_shard_leaves_no_file_and_a_sentence(folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=5, num_files=1, corrupt={4: "nan"})
    unit = Unit("s", "part-00000.parquet")
    actor = shard_predictor(folder, shards, tmp_path / "out", batch_size=2)
    told = ask_unit(actor, unit)
    assert told["refused"].startswith("s: part-00000.parquet, row 4 (synthetic/0-4): 1 of 128")
    assert actor.results.read(unit.path) is None
    skipping = shard_predictor(folder, shards, tmp_path / "out", batch_size=2, bad_rows="skip")
    assert ask_unit(skipping, unit) == {"objects": 4, "refused": ""}
    stored = pq.read_metadata(tmp_path / "out" / unit.path).metadata[SUMS_KEY.encode()]
    assert len(json.loads(stored)["left_out"]) == 1


def test_a_shard_without_objects_becomes_a_file_without_rows(folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=1, num_files=2)
    actor = shard_predictor(folder, shards, tmp_path / "out")
    unit = Unit("s", "part-00001.parquet")
    assert ask_unit(actor, unit) == {"objects": 0, "refused": ""}
    assert pq.read_table(tmp_path / "out" / unit.path).num_rows == 0
