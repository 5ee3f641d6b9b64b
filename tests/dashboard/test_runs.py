"""Folders of results in every state, whole and broken, read back."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard.accuracy import part_of_evaluation, wilson
from crossmost_ray.dashboard.configs import flatten, lookup, merged
from crossmost_ray.dashboard.runs import Results, Run, load_results
from crossmost_ray.dashboard.votes import (
    count_votes,
    load_votes,
    oracle_accuracy,
    oracle_labels,
    read_votes,
)
from crossmost_ray.storage import Store
from tests.dashboard.results import CLASSES, write_ledger, write_run, write_sweep


def load(folder: Path, known: Results | None = None) -> Results:
    return load_results(Store(str(folder)), known)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = write_run(tmp_path_factory.mktemp("runs") / "furniture")
    return load(folder).runs[0]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("running", "running"),
        ("empty", "running"),
        ("interrupted", "interrupted"),
        ("failed", "failed"),
        ("stopped", "stopped"),
    ],
)
def test_a_run_says_how_it_stands(tmp_path: Path, state: str, status: str) -> None:
    write_run(tmp_path / "one", state=state, objects=8, labels=False)
    results = load(tmp_path)
    (run,) = results.runs
    assert (run.name, run.status, results.problems) == ("one", status, ())
    assert (run.error is not None) == (state == "failed")
    assert len(run.rows) == (0 if state == "empty" else 2)


def test_a_run_holds_what_its_files_hold(finished: Run) -> None:
    folder = finished.store.local
    assert folder is not None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(finished.rows) == rows
    assert finished.column("health/flips") == [row["health/flips"] for row in rows[1:]]
    assert finished.epochs_of("health/flips") == [1, 2, 3]
    assert finished.last("loss") == rows[-1]["loss"]
    assert finished.last("no/such") is None
    assert not finished.has("no/such")
    assert finished.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    assert finished.score == rows[-1]["selection/score"]
    assert finished.workers == 2
    assert finished.command == "python jobs/adapt.py configs/adapt/furniture.yaml name=furniture"
    assert finished.metrics == json.loads((folder / "metrics.json").read_text())
    assert finished.config["name"] == "furniture"
    assert finished.classes == CLASSES
    assert len(finished.epoch_files) == 4


def test_runs_are_found_three_levels_down_and_no_deeper(tmp_path: Path) -> None:
    for place in ("a", "b/c", "d/e/f", "g/h/i/j"):
        write_run(tmp_path / place, state="empty", labels=False, name="x")
    assert [run.name for run in load(tmp_path).runs] == ["a", "b/c", "d/e/f"]


def test_a_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere").runs == ()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "name: [unclosed"),
        ("config.yaml", "just words"),
        ("run.json", '{"command": '),
        ("status.json", "[]"),
        ("status.json", '{"status": "running"}'),
        ("classes.json", '{"not": "a list"}'),
        ("metrics.jsonl", '{"epoch": 0, "loss": 1.0}\n{"epoch": 1, "lo'),
        ("events.jsonl", "no JSON"),
        ("metrics.json", "\x00"),
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_shown(
    tmp_path: Path, file: str, content: str
) -> None:
    write_run(tmp_path / "broken", state="failed", objects=8, labels=False)
    write_run(tmp_path / "sound", state="failed", objects=8, labels=False)
    (tmp_path / "broken" / file).write_text(content)
    results = load(tmp_path)
    assert [run.name for run in results.runs] == ["broken", "sound"]
    (problem,) = results.problems
    assert f"broken/{file}" in problem
    if file == "metrics.jsonl":
        assert "line 2" in problem
        assert results.runs[0].column("loss") == [1.0]


def test_finished_runs_are_not_read_again(tmp_path: Path) -> None:
    write_run(tmp_path / "old", state="failed", objects=8, labels=False)
    write_run(tmp_path / "new", state="running", objects=8, labels=False)
    first = load(tmp_path)
    again = load(tmp_path, first)
    # Of a running one that has not moved the same object is kept, too.
    assert [a is b for a, b in zip(first.runs, again.runs, strict=True)] == [True, True]
    assert again.version == first.version
    with (tmp_path / "new" / "metrics.jsonl").open("a") as rows:
        rows.write('{"epoch": 2, "loss": 0.5}\n')
    moved = load(tmp_path, again)
    assert [a is b for a, b in zip(again.runs, moved.runs, strict=True)] == [False, True]
    assert moved.runs[0] != again.runs[0]
    assert moved.version != again.version
    assert moved.runs[0].last("loss") == 0.5


def test_a_run_survives_pickling(finished: Run) -> None:
    back = pickle.loads(pickle.dumps(finished))
    assert back == finished
    assert back.rows == finished.rows


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs") / "sweep", trials=8, detailed=2)


def test_a_sweep_holds_what_its_ledger_holds(sweep: Path) -> None:
    results = load(sweep.parent)
    (read,) = results.sweeps
    entries = json.loads((sweep / "trials.json").read_text())["trials"]
    assert (read.name, read.status, read.metric) == ("sweep", "done", "selection/score")
    assert read.runs == results.runs
    for run, entry in zip(read.runs, entries, strict=True):
        assert run.name == f"sweep/trials/{entry['trial']}"
        assert run.title == entry["trial"]
        assert dict(run.settings) == entry["settings"]
        for key in ("status", "score", "seconds", "epochs", "error"):
            assert getattr(run, key) == entry[key], key
    assert read.summary == json.loads((sweep / "summary.json").read_text())


def test_a_trial_s_metrics_are_its_part_of_the_sweep_s(sweep: Path) -> None:
    results = load(sweep)  # the root may be the sweep itself
    whole = json.loads((sweep / "evaluation" / "metrics.json").read_text())
    run = results.runs[0]
    assert run.metrics is not None
    models = run.metrics["splits"]["test"]
    assert models == {
        "zero-shot": whole["splits"]["test"]["zero-shot"],
        "teacher": whole["splits"]["test"]["trial-00000"],
    }
    (pair,) = run.metrics["comparisons"]["test"]
    (expected,) = (
        one
        for one in whole["comparisons"]["test"]
        if (one["before"], one["after"]) == ("zero-shot", "trial-00000")
    )
    assert pair == {**expected, "after": "teacher"}
    assert results.runs[7].metrics is None  # it failed
    assert part_of_evaluation(None, "trial-00000") is None


def test_a_growing_sweep_is_read_anew_and_its_old_trials_are_not(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", trials=4, state="running", detailed=0)
    first = load(tmp_path)
    assert [run.status for run in first.runs] == ["done", "done", "running", "running"]
    entries = json.loads((folder / "trials.json").read_text())["trials"]
    entries[2] |= {"status": "done", "epochs": 3, "score": 0.5}
    write_ledger(folder, [*entries, {**entries[3], "trial": "trial-00004", "status": "pending"}])
    second = load(tmp_path, first)
    assert [run.status for run in second.runs] == ["done", "done", "done", "running", "pending"]
    assert second.runs[0] is first.runs[0]
    assert second.runs[2].score == 0.5
    # The driver is gone: what it was training is not going on.
    said = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(said | {"heartbeat": "2026-01-01T00:00:00Z"}))
    third = load(tmp_path, second)
    assert third.sweeps[0].status == "interrupted"
    assert [run.status for run in third.runs][2:] == ["done", "interrupted", "pending"]


def test_a_trial_that_has_not_begun_has_the_sweep_s_config(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", trials=1, state="running", detailed=0)
    entry = json.loads((folder / "trials.json").read_text())["trials"][0]
    write_ledger(folder, [{**entry, "trial": "later", "status": "pending"}])
    (run,) = load(tmp_path).runs
    assert lookup(run.config, "ema.start") == entry["settings"]["ema.start"]
    assert lookup(run.config, "optim.epochs") == 3  # of the sweep's overrides
    assert run.workers == 1


@pytest.mark.parametrize("content", ["{", '{"trials": 3}', '{"trials": [3]}'])
def test_a_broken_ledger_leaves_the_other_runs(tmp_path: Path, content: str) -> None:
    folder = write_sweep(tmp_path / "sweep", trials=1, detailed=0, evaluated=False)
    write_run(tmp_path / "run", state="empty", labels=False)
    (folder / "trials.json").write_text(content)
    results = load(tmp_path)
    assert [run.name for run in results.runs] == ["run"]
    if content != '{"trials": 3}':
        assert any("trials.json" in line for line in results.problems)


leaf = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
key = st.sampled_from(["a", "b", "c"])
config = st.dictionaries(key, st.one_of(leaf, st.dictionaries(key, leaf, min_size=1)))


@given(config)
def test_a_config_flattened_and_merged_is_itself(values: dict[str, object]) -> None:
    flat = dict(flatten(values))
    assert merged({}, flat) == values
    assert all(lookup(values, name) == value for name, value in flat.items())


def test_merging_leaves_the_given_config_as_it_was() -> None:
    base = {"a": {"b": 1, "c": 2}}
    assert merged(base, {"a.b": 3}) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_ends_solve_its_equation(counts: tuple[int, int]) -> None:
    # The interval holds the shares p with |x - p| <= z sqrt(p (1 - p) / n), x being the observed.
    right, n = counts
    share = right / n
    for end in wilson(100 * share, n):
        p = end / 100
        assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-6)
        assert 0 <= p <= 1


def test_votes_are_counted_as_by_hand(finished: Run) -> None:
    counted = count_votes(finished)
    assert [one.epoch for one in counted] == [0, 1, 2, 3]
    tables = [read_votes(finished, epoch).to_pylist() for epoch in range(4)]
    for place, name in enumerate(CLASSES):
        rows = [row for row in tables[2] if row["image_label"] == place]
        assert counted[2].labels["image"][place] == len(rows), name
        assert counted[2].selected["image"][place] == sum(row["image_selected"] for row in rows)
    changed = [a["image_label"] != b["image_label"] for a, b in zip(*tables[1:3], strict=True)]
    assert counted[2].flips == pytest.approx(np.mean(changed))
    assert counted[0].flips is None


def test_oracle_accuracy_of_votes_is_that_of_the_labels(finished: Run) -> None:
    labels = oracle_labels(finished)
    rows = read_votes(finished, 3).to_pylist()
    told = [(row, CLASSES.index(labels[row["object_id"]])) for row in rows]
    last = oracle_accuracy(finished)[-1]
    assert last.objects == len(rows)
    assert last.image == pytest.approx(100 * np.mean([r["image_class"] == k for r, k in told]))
    assert last.point == pytest.approx(100 * np.mean([r["point_class"] == k for r, k in told]))
    sure = [r["image_label"] == k for r, k in told if r["image_selected"]]
    assert last.selected == pytest.approx(100 * np.mean(sure))


def test_votes_of_one_tower_are_its_own(tmp_path: Path) -> None:
    write_run(tmp_path / "images", state="failed", objects=8, labels=False, towers=("image",))
    (run,) = load(tmp_path).runs
    votes = load_votes(run, 0)
    assert votes is not None
    assert not votes.disagree.any()
    assert (votes.label == votes.image_label).all()
    assert np.isnan(votes.point_confidence).all()
    assert list(count_votes(run)[0].labels) == ["image"]


def test_labels_out_of_reach_leave_out_what_needs_them(tmp_path: Path) -> None:
    write_run(tmp_path / "one", state="failed", objects=8, labels=False)
    (run,) = load(tmp_path).runs
    assert oracle_labels(run) == {}
    assert oracle_accuracy(run) == ()


def test_a_broken_file_of_votes_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", epochs=3, objects=8, labels=False)
    (folder / "votes" / "epoch-0001.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"object_id": ["a"]}), folder / "votes" / "epoch-0003.parquet")
    results = load(tmp_path)
    counted = count_votes(results.runs[0])
    assert [(one.epoch, one.flips) for one in counted] == [(0, None), (2, None)]
    assert len(results.problems) == 2
    assert all("votes/epoch-000" in line for line in results.problems)
    with pytest.raises(ConfigError, match="remove it"):
        read_votes(results.runs[0], 1)
    with pytest.raises(ConfigError, match="no votes of epoch 9"):
        read_votes(results.runs[0], 9)


def test_a_run_in_a_store_is_read_as_one_on_disk(tmp_path: Path, s3: str) -> None:
    write_run(tmp_path / "one", state="failed", objects=8, labels=False)
    store = Store(s3.format("dashboard"))
    for file in (tmp_path / "one").rglob("*"):
        if file.is_file():
            store.upload(file, str(file.relative_to(tmp_path)))
    (here,), (there,) = load(tmp_path).runs, load_results(store).runs
    assert there == here
    assert [one.objects for one in count_votes(there)] == [8, 8]


def test_a_removed_run_is_gone_at_the_next_look(tmp_path: Path) -> None:
    write_run(tmp_path / "one", state="failed", objects=8, labels=False)
    first = load(tmp_path)
    shutil.rmtree(tmp_path / "one")
    assert load(tmp_path, first).runs == ()


def test_what_is_taken_up_again_is_read_again(tmp_path: Path) -> None:
    write_run(tmp_path / "one", state="failed", objects=8, labels=False)
    folder = write_sweep(tmp_path / "sweep", trials=8, detailed=0, evaluated=False)
    first = load(tmp_path)
    assert [run.status for run in (first.runs[0], first.runs[-1])] == ["failed", "failed"]
    write_run(tmp_path / "one", state="running", epochs=6, objects=8, labels=False)
    entries = json.loads((folder / "trials.json").read_text())["trials"]
    write_ledger(folder, [*entries[:-1], {**entries[-1], "status": "done", "score": 0.25}])
    second = load(tmp_path, first)
    assert (second.runs[0].status, len(second.runs[0].rows)) == ("running", 3)
    assert (second.runs[-1].status, second.runs[-1].score) == ("done", 0.25)
    # A measurement that comes later reaches trials that were over before it.
    assert second.runs[1].metrics is None
    write_sweep(tmp_path / "sweep", trials=8, detailed=0)
    third = load(tmp_path, second)
    assert third.runs[1].metrics is not None
