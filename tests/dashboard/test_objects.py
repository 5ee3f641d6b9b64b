"""The object browser: every list and number against votes and shards that the test wrote itself."""

from __future__ import annotations

import base64
import csv
import io
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard import closeup
from crossmost_ray.dashboard.closeup import (
    best_classes,
    cloud_figure,
    follow,
    history_figure,
    read_stored,
    view_address,
)
from crossmost_ray.dashboard.objects import (
    filter_objects,
    load_objects,
    oracle_wrong,
    order_objects,
    search_objects,
    write_csv,
)
from crossmost_ray.dashboard.runs import load_results
from crossmost_ray.storage import Store
from tests.synthetic import CLASSES, write_shards

TRUE, FALSE = True, False


def draw_votes(ids, seed: int, towers=("image", "point")) -> dict:
    """Random votes on objects, as columns of plain lists."""
    rng = np.random.default_rng(seed)
    n = len(ids)
    votes: dict = {"object_id": list(ids)}
    for tower in ("image", "point"):
        trained = tower in towers
        votes[f"{tower}_class"] = rng.integers(0, 4, n).tolist() if trained else [None] * n
        votes[f"{tower}_confidence"] = rng.random(n).tolist() if trained else [None] * n
        votes[f"student_{tower}_class"] = rng.integers(0, 4, n).tolist() if trained else [None] * n
    label, selected = rng.integers(0, 4, n).tolist(), (rng.random(n) < 0.3).tolist()
    for tower in ("image", "point"):
        votes[f"{tower}_label"] = label if tower in towers else [None] * n
        votes[f"{tower}_selected"] = selected if tower in towers else [None] * n
    votes["label_confidence"] = rng.random(n).tolist()
    return votes


TYPES = {"id": pa.string(), "class": pa.int16(), "label": pa.int16(), "selected": pa.bool_()}


def write_run(folder, epochs, shards=None):
    """A finished run's folder with the given votes, one dict of columns for each epoch."""
    (folder / "votes").mkdir(parents=True)
    config = {"name": folder.name, "mode": "crossmost", "data": {"shards": str(shards)}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"status": "done", "error": None}))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    rows = [{"epoch": epoch, "step": epoch + 1, "seconds": 1.0} for epoch in range(len(epochs))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch, votes in enumerate(epochs):
        table = pa.table(
            {
                name: pa.array(values, TYPES.get(name.rpartition("_")[2], pa.float32()))
                for name, values in votes.items()
            }
        )
        pq.write_table(table, folder / f"votes/epoch-{epoch:04}.parquet")
    return load_results(Store(str(folder))).runs[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "in", num_objects=24, num_points=300)


@pytest.fixture(scope="module")
def ids():
    return [f"synthetic/0-{k}" for k in range(24)]


@pytest.fixture(scope="module")
def epochs(ids):
    return [draw_votes(sorted(ids), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards, epochs):
    return write_run(tmp_path_factory.mktemp("runs") / "furniture", epochs, shards)


def test_filters_mark_what_a_loop_over_the_files_marks(run, epochs):
    objects = load_objects(run)
    last, before = epochs[-1], epochs[-2]
    n = len(last["object_id"])
    # Object k of the synthetic shards is of class k modulo 4.
    truth = [int(name.rpartition("-")[2]) % 4 for name in last["object_id"]]
    naive = {
        "all": [True] * n,
        "disagree": [last["image_class"][k] != last["point_class"][k] for k in range(n)],
        "changed": [last["image_label"][k] != before["image_label"][k] for k in range(n)],
        "never": [not any(votes["image_selected"][k] for votes in epochs) for k in range(n)],
        "wrong": [last["image_label"][k] != truth[k] for k in range(n)],
    }
    wrong = oracle_wrong(run, objects)
    for key, expected in naive.items():
        assert filter_objects(objects, key, wrong).tolist() == expected, key
        assert key == "all" or 0 < sum(expected) < n, "the drawn votes tell the filters apart"


def test_without_labels_nothing_is_wrong(tmp_path, ids):
    unlabelled = write_shards(tmp_path / "in", num_objects=24, labels=False)
    run = write_run(tmp_path / "run", [draw_votes(sorted(ids), 0)], unlabelled)
    objects = load_objects(run)
    assert oracle_wrong(run, objects) is None
    assert not filter_objects(objects, "wrong").any()


def test_objects_that_come_late_or_leave(tmp_path):
    first, second = draw_votes(["a", "b", "c"], 0), draw_votes(["b", "c", "d"], 1)
    for tower in ("image", "point"):
        first[f"{tower}_label"], second[f"{tower}_label"] = [0, 1, 2], [1, 3, 0]
        first[f"{tower}_selected"] = [TRUE, TRUE, FALSE]
        second[f"{tower}_selected"] = [FALSE, FALSE, FALSE]
    objects = load_objects(write_run(tmp_path / "run", [first, second]))
    assert objects.votes.object_id.to_pylist() == ["b", "c", "d"]
    # b keeps its label, c changes it, d was never seen before: nothing has changed about it.
    assert objects.changed.tolist() == [False, True, False]
    assert objects.ever_selected.tolist() == [True, False, False]


def test_one_tower_alone_never_disagrees(tmp_path, ids):
    run = write_run(tmp_path / "run", [draw_votes(sorted(ids), 0, towers=("point",))])
    objects = load_objects(run)
    assert not filter_objects(objects, "disagree").any()
    # The tower that is not trained has no confidence: its objects come last, in order of the ids.
    everything = np.ones(len(objects), bool)
    assert order_objects(objects, everything, "image", down=True).tolist() == list(range(24))
    (moment,) = follow(run, "synthetic/0-3")
    assert set(moment.votes) == set(moment.labels) == set(moment.student) == {"point"}


def test_a_damaged_epoch_is_named_and_left_out(tmp_path, ids):
    run = write_run(tmp_path / "run", [draw_votes(sorted(ids), seed) for seed in range(2)])
    (tmp_path / "run/votes/epoch-0001.parquet").write_bytes(b"PAR1 not really")
    objects = load_objects(run)
    assert objects.votes.epoch == 0
    assert any("epoch-0001.parquet" in line for line in run.problems)
    assert [moment.epoch for moment in follow(run, "synthetic/0-3")] == [0]


def test_a_run_without_votes_has_no_objects(tmp_path):
    assert load_objects(write_run(tmp_path / "run", [])) is None


@given(text=st.sampled_from(["", "  ", "0-1", "SYNTHETIC/0-2", "box", "Pill", "nowhere", "."]))
def test_search_looks_at_ids_and_at_names_of_classes(run, epochs, text):
    objects, last = load_objects(run), epochs[-1]
    wanted = text.strip().lower()
    expected = [
        wanted in last["object_id"][k].lower()
        or any(
            wanted in CLASSES[last[column][k]]
            for column in ("image_class", "point_class", "image_label")
        )
        for k in range(len(objects))
    ]
    assert search_objects(objects, text).tolist() == expected


@given(
    sort=st.sampled_from(["id", "image", "point", "confidence", "what else"]), down=st.booleans()
)
def test_a_list_is_in_order_and_complete(run, epochs, sort, down):
    objects, last = load_objects(run), epochs[-1]
    marks = objects.votes.disagree
    places = order_objects(objects, marks, sort, down=down)
    assert sorted(places.tolist()) == np.flatnonzero(marks).tolist()
    column = {
        "id": "object_id",
        "image": "image_confidence",
        "point": "point_confidence",
    }.get(sort, "label_confidence")
    values = [last[column][place] for place in places]
    assert values == sorted(values, reverse=down)


def test_the_csv_holds_the_list(run, epochs):
    objects, last = load_objects(run), epochs[-1]
    places = order_objects(objects, objects.votes.disagree, "confidence", down=False)
    rows = list(csv.DictReader(io.StringIO(write_csv(objects, places))))
    assert [row["object_id"] for row in rows] == [last["object_id"][k] for k in places]
    for row, k in zip(rows, places.tolist(), strict=True):
        assert row["image_class"] == CLASSES[last["image_class"][k]]
        assert row["label"] == CLASSES[last["image_label"][k]]
        sure = last["label_confidence"][k]
        assert float(row["label_confidence"]) == pytest.approx(sure, abs=1e-4)
        assert row["selected"] == str(int(last["image_selected"][k]))
        assert row["epoch"] == "2"


def test_no_id_is_a_formula_in_a_spreadsheet(tmp_path):
    objects = load_objects(write_run(tmp_path / "run", [draw_votes(["=1+1", "chair"], 0)]))
    written = write_csv(objects, np.arange(2))
    assert [line.partition(",")[0] for line in written.splitlines()[1:]] == ["'=1+1", "chair"]


def test_a_hundred_thousand_objects_are_listed_at_once(tmp_path):
    ids = [f"object-{k:06}" for k in range(100_000)]
    votes = draw_votes(ids, 0)
    run = write_run(tmp_path / "run", [votes, draw_votes(ids, 1)])
    load_objects(run)
    start = time.perf_counter()
    objects = load_objects(run)
    for key in ("all", "disagree", "changed", "never"):
        marks = filter_objects(objects, key) & search_objects(objects, "box")
        order_objects(objects, marks, "confidence", down=True)
    # About 0.2 s on one slow core.
    assert time.perf_counter() - start < 3


def test_one_object_comes_out_of_the_shards_as_it_lies_there(shards, ids):
    for name in ids:
        stored = read_stored(str(shards), name)
        table = pq.read_table(shards / stored.shard)
        row = table["object_id"].to_pylist().index(name)
        np.testing.assert_array_equal(stored.points, table["points"][row].as_py())
        assert list(stored.views) == table["views"][row].as_py()
        assert stored.label == table["label"][row].as_py()
    assert read_stored(str(shards), "synthetic/9-9") is None


def test_shards_out_of_reach_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no folder of shards"):
        read_stored(str(tmp_path / "gone"), "a")


def test_a_view_reaches_the_browser_as_it_is(shards):
    view = read_stored(str(shards), "synthetic/0-0").views[0]
    kind, _, data = view_address(view).partition(";base64,")
    assert kind == "data:image/png"
    assert base64.b64decode(data) == view


@pytest.mark.parametrize("axis", ["+y", "+z", "-y", "+x"])
def test_a_large_cloud_is_thinned_and_stands_upright(axis):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(10_000, 3)).astype(np.float32)
    colors = rng.integers(0, 256, (10_000, 3)).astype(np.uint8)
    stored = closeup.Stored(points, colors, (), axis, None, (), "part-00000.parquet")
    figure = cloud_figure(stored)
    (trace,) = figure.data
    assert len(trace.x) == closeup.MAX_POINTS
    kept = {tuple(point): color for point, color in zip(points.tolist(), colors, strict=True)}
    for x, y, z, color in zip(trace.x, trace.y, trace.z, trace.marker.color, strict=True):
        assert color == "rgb({},{},{})".format(*kept[float(x), float(y), float(z)])
    camera = figure.layout.scene.camera
    up = [camera.up.x, camera.up.y, camera.up.z]
    sign = -1 if axis[0] == "-" else 1
    assert up == [sign * float(axis[1] == name) for name in "xyz"]
    # The eye is above the object, and not straight above it.
    eye = [camera.eye.x, camera.eye.y, camera.eye.z]
    assert 0 < np.dot(up, eye) < 0.6 * np.linalg.norm(eye)


def test_a_cloud_without_colours_is_shaded_by_height():
    points = np.array([[0, -1, 5], [0, 0, 0], [0, 2, 1]], np.float32)
    stored = closeup.Stored(points, None, (), "+y", None, (), "part-00000.parquet")
    (trace,) = cloud_figure(stored).data
    assert list(trace.marker.color) == [-1, 0, 2]


def test_one_object_is_followed_over_the_epochs(run, epochs):
    moments = follow(run, "synthetic/0-7")
    k = epochs[0]["object_id"].index("synthetic/0-7")
    assert [moment.epoch for moment in moments] == [0, 1, 2]
    for moment, votes in zip(moments, epochs, strict=True):
        for tower in ("image", "point"):
            name, sure = moment.votes[tower]
            assert name == CLASSES[votes[f"{tower}_class"][k]]
            assert sure == pytest.approx(votes[f"{tower}_confidence"][k], rel=1e-6)
            assert moment.student[tower] == CLASSES[votes[f"student_{tower}_class"][k]]
        assert moment.label == CLASSES[votes["image_label"][k]]
        assert moment.selected == votes["image_selected"][k]
    figure = history_figure(moments)
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines) == ["image tower", "point tower", "label"]
    np.testing.assert_allclose(
        lines["point tower"].y, [votes["point_confidence"][k] for votes in epochs], rtol=1e-6
    )
    # A class is written where it first stands, and where it changes.
    classes = [CLASSES[votes["image_class"][k]] for votes in epochs]
    words = [name if e == 0 or name != classes[e - 1] else "" for e, name in enumerate(classes)]
    assert list(lines["image tower"].text) == words


def test_the_best_classes_are_the_teachers(run, shards):
    ranked = ["box", "ball", "cone"]
    rows = [
        {"object_id": name, "model": model, **{f"ranked_{one}": order for one in closeup.OPINIONS}}
        for name in ("synthetic/0-1", "synthetic/0-0")
        for model, order in (("zero-shot", ranked[::-1]), ("teacher", ranked))
    ]
    stored = read_stored(str(shards), "synthetic/0-0")
    path = run.store.local / "predictions/transductive" / stored.shard
    assert best_classes(run, "synthetic/0-0", stored.shard) == {}
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = best_classes(run, "synthetic/0-0", stored.shard)
    assert found == dict.fromkeys(closeup.OPINIONS, ranked)
    assert best_classes(run, "nobody", stored.shard) == {}
