"""Every panel on results in every state; numbers in charts against those in the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.dashboard import chart
from crossmost_ray.dashboard.accuracy import Accuracy, Gain
from crossmost_ray.dashboard.panels import GROUPS, PANELS, Panel, Table, Text
from crossmost_ray.dashboard.panels import accuracy as accuracy_panels
from crossmost_ray.dashboard.panels.settings import explained_share, read_setting
from crossmost_ray.dashboard.panels.system import event_words
from crossmost_ray.dashboard.runs import Results, Run, load_results
from crossmost_ray.dashboard.table import cell_text
from crossmost_ray.dashboard.votes import oracle_accuracy, read_votes
from crossmost_ray.storage import Store
from tests.dashboard.results import CLASSES, write_run, write_sweep

BY_KEY = {panel.key: panel for panel in PANELS}


def load(folder: Path) -> Results:
    return load_results(Store(str(folder)))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A run in each state, one of one tower, and a sweep."""
    root = tmp_path_factory.mktemp("results")
    write_run(root / "furniture", seed=1)
    for state in ("running", "interrupted", "failed", "stopped", "empty"):
        write_run(root / state, state=state, objects=16, labels=False)
    write_run(root / "images", objects=16, labels=False, towers=("image",))
    write_sweep(root / "sweep", trials=10, detailed=2)
    return load(root)


def run_called(results: Results, name: str) -> Run:
    return next(run for run in results.runs if run.name == name)


def figure_of(results: Results, key: str, runs: Sequence[Run]) -> go.Figure:
    figure = BY_KEY[key].figure(results, runs)
    assert isinstance(figure, go.Figure)
    return figure


ALONE = ("furniture", "running", "interrupted", "failed", "stopped", "empty", "images")

EMPTY_WITHOUT_LABELS = {"votes", "confusion", "per-class", "reliability"}
NEEDS_MANY = {"parallel", "importance", "slices"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.key)
def test_a_panel_shows_each_kind_of_run_or_says_why_not(panel: Panel, everything: Results) -> None:
    assert panel.question.endswith((".", "?"))
    assert panel.empty.endswith(".")
    assert panel.group in GROUPS
    assert panel.figure(everything, []) is None
    for name in ALONE:
        content = panel.figure(everything, [run_called(everything, name)])
        absent = panel.key in NEEDS_MANY
        absent |= name != "furniture" and panel.key in EMPTY_WITHOUT_LABELS
        absent |= name == "empty" and panel.key not in ("leaderboard", "reproduce")
        assert (content is None) == absent, name
        check(content)
    check(panel.figure(everything, everything.runs))
    check(panel.figure(everything, everything.sweeps[0].runs))


def check(content: object) -> None:
    """Charts say what they show and leave colours of the page to the page; tables are square."""
    if isinstance(content, go.Figure):
        assert chart.summary_of(content).endswith(".")
        assert content.layout.height >= 96
        bare = go.Figure(content)
        bare.layout.template = None
        drawn = json.loads(bare.to_json())
        assert "bgcolor" not in json.dumps(drawn)
        assert "font" not in drawn["layout"]
    elif isinstance(content, Table):
        assert all(len(row) == len(content.columns) for row in content.rows)
        assert len(content.texts()) == len(content.rows)
    else:
        assert content is None or (isinstance(content, Text) and content.blocks)


def test_keys_of_panels_are_theirs_alone() -> None:
    assert len(BY_KEY) == len(PANELS)
    # Groups follow each other in the order of the page.
    order = [panel.group for panel in PANELS]
    assert list(dict.fromkeys(order)) == list(GROUPS)
    assert order == sorted(order, key=list(GROUPS).index)


def test_the_leaderboard_holds_the_ledger_and_the_metrics(everything: Results) -> None:
    sweep = everything.sweeps[0]
    folder = sweep.store.local
    assert folder is not None
    entries = {
        one["trial"]: one for one in json.loads((folder / "trials.json").read_text())["trials"]
    }
    measured = json.loads((folder / "evaluation" / "metrics.json").read_text())["splits"]["test"]
    table = BY_KEY["leaderboard"].figure(everything, sweep.runs)
    assert isinstance(table, Table)
    titles = [column.title for column in table.columns]
    scores = []
    for row, name in zip(table.rows, table.keys, strict=True):
        cells = dict(zip(titles, row, strict=True))
        entry = entries[str(cells["run"])]
        assert name == f"sweep/trials/{entry['trial']}"
        assert (cells["status"], cells["score"], cells["epochs"]) == (
            entry["status"],
            entry["score"],
            entry["epochs"],
        )
        assert cells["ema.start"] == entry["settings"]["ema.start"]
        assert cells["model"] == entry["settings"]["model"]
        assert cells["cost"] == pytest.approx(entry["seconds"] / 60)  # one worker
        top1, gained = cells["top-1 fused, %"], cells["gain fused"]
        if entry["status"] != "done":
            assert (top1, gained) == (None, None)
        else:
            one = measured[entry["trial"]]
            assert isinstance(top1, Accuracy)
            assert top1.top1 == one["fused"]["top1"]
            assert top1.low <= top1.top1 <= top1.high
            assert gained == Gain(**one["gain"]["fused"])
        scores.append(entry["score"])
    # The best first; those without a score last.
    known = [score for score in scores if score is not None]
    assert known == sorted(known, reverse=True)
    assert scores[len(known) :] == [None] * (len(scores) - len(known))


def test_cells_are_written_with_their_intervals(everything: Results) -> None:
    column = BY_KEY["leaderboard"].figure(everything, everything.runs).columns[0]
    assert cell_text(Accuracy(78.125, 71.07, 83.84, 160), column) == "78.1 [71.1, 83.8]"
    assert cell_text(Gain(-1.25, -3.0, 0.5), column) == "-1.2 [-3.0, +0.5]"
    assert cell_text(None, column) == "–"


def test_curves_hold_the_rows(everything: Results) -> None:
    run = run_called(everything, "furniture")
    figure = figure_of(everything, "losses", [run])
    terms = ["loss", *sorted(key for key in run.rows[0] if key.startswith("loss/"))]
    assert len(figure.data) == len(terms)
    for trace, term in zip(figure.data, terms, strict=True):
        assert list(trace.x) == run.epochs_of(term)
        assert list(trace.y) == run.column(term)
    titles = [note.text for note in figure.layout.annotations]
    assert titles[1:3] == ["fairness, image", "fairness, point"]


def test_of_many_runs_the_best_are_drawn_and_it_says_so(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", trials=40, detailed=0, evaluated=False)
    results = load(tmp_path)
    figure = figure_of(results, "scores", results.runs)
    scores = {run.title: run.score for run in results.runs if run.score is not None}
    best = sorted(scores, key=lambda title: -scores[title])[: chart.MOST_LINES]
    assert {trace.name for trace in figure.data} == set(best)
    assert "20 of 40" in chart.summary_of(figure)
    assert best[0] in figure.layout.title.text


def test_parallel_coordinates_hold_settings_and_scores(everything: Results) -> None:
    runs = [run for run in everything.sweeps[0].runs if run.score is not None]
    (trace,) = figure_of(everything, "parallel", everything.sweeps[0].runs).data
    dimensions = {one.label: one for one in trace.dimensions}
    scores = [run.score for run in runs]
    assert list(dimensions["selection/score"].values) == scores
    assert list(trace.line.color) == scores
    assert list(dimensions["ema.start"].values) == [run.settings["ema.start"] for run in runs]
    rates = dimensions["optim.lr"]  # from 1e-5 to 1e-3: as powers of ten
    np.testing.assert_allclose(10 ** np.array(rates.values), [r.settings["optim.lr"] for r in runs])
    model = dimensions["model"]
    named = [model.ticktext[int(place)] for place in model.values]
    assert named == [run.settings["model"] for run in runs]


def test_slices_hold_settings_and_scores(everything: Results) -> None:
    runs = [run for run in everything.sweeps[0].runs if run.score is not None]
    figure = figure_of(everything, "slices", runs)
    for trace in figure.data:
        assert list(trace.x) == [run.settings[trace.name] for run in runs]
        assert list(trace.y) == [run.score for run in runs]
        assert list(trace.text) == [run.title for run in runs]


def test_importance_finds_the_setting_that_makes_the_score(everything: Results) -> None:
    (bars,) = figure_of(everything, "importance", everything.sweeps[0].runs).data
    assert bars.y[0] == "pseudo_labels.threshold"
    assert bars.x[0] > 0.8
    assert list(bars.x) == sorted(bars.x, reverse=True)


def test_importance_of_few_runs_is_called_a_guess(everything: Results) -> None:
    few = figure_of(everything, "importance", everything.sweeps[0].runs[:4])
    assert "a guess" in few.layout.annotations[0].text
    many = figure_of(everything, "importance", everything.sweeps[0].runs)
    assert not many.layout.annotations


def test_explained_share_of_two_groups_is_that_of_the_formula() -> None:
    # Groups {0, 2} and {4, 6}: means 1 and 5, SS_between 16, SS_total 20, eta^2 = 0.8;
    # epsilon^2 = 1 - 0.2 * 3 / 2 = 0.7.
    setting = read_setting("a", ["x", "x", "y", "y"])
    assert explained_share(setting, np.array([0.0, 2.0, 4.0, 6.0])) == pytest.approx(0.7)


@given(st.integers(0, 1000), st.integers(6, 60))
def test_explained_share_knows_everything_and_nothing(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    place = rng.integers(0, 3, n)
    setting = read_setting("a", [str(one) for one in place])
    all_of_it = explained_share(setting, place.astype(np.float64))
    assert all_of_it == pytest.approx(1.0 if len(set(place.tolist())) > 1 else 0.0)
    assert 0.0 <= explained_share(setting, rng.normal(size=n)) <= 1.0
    assert explained_share(setting, np.full(n, 3.0)) == 0.0


def test_a_setting_of_chance_explains_nothing_on_average() -> None:
    # Without the correction the mean would be (k - 1) / (n - 1), a fifth here.
    rng = np.random.default_rng(0)
    numbers = read_setting("a", rng.uniform(size=20).tolist())
    shares = [explained_share(numbers, rng.normal(size=20)) for _ in range(300)]
    assert np.mean(shares) < 0.1


@pytest.mark.parametrize(
    ("values", "log", "names"),
    [
        ([1e-5, 1e-3], True, ()),
        ([1, 2, 4], False, ()),
        ([0.0, 100.0], False, ()),
        (["b", "a"], False, ("a", "b")),
        ([True, False], False, ("false", "true")),
        ([1.5, None], False, ("1.5", "null")),
        ([[1, 2], [3]], False, ("[1, 2]", "[3]")),
    ],
)
def test_a_setting_is_put_on_the_scale_that_suits_it(
    values: list[object], log: bool, names: tuple[str, ...]
) -> None:
    setting = read_setting("a", values)
    assert (setting.log, setting.names) == (log, names)


def test_the_class_histogram_holds_the_votes(everything: Results) -> None:
    run = run_called(everything, "furniture")
    (trace,) = figure_of(everything, "class-histogram", [run]).data
    for epoch in range(4):
        labels = read_votes(run, epoch)["image_label"].to_numpy()
        counts = np.bincount(labels, minlength=len(CLASSES))
        assert (np.array(trace.customdata)[:, epoch, 0] == counts).all()
        with np.errstate(divide="ignore"):
            even = np.log2(counts / (len(labels) / len(CLASSES)))
        np.testing.assert_allclose(np.array(trace.z)[:, epoch], even.clip(-2, 2))


def test_confidence_by_class_and_the_silent_classes_hold_the_votes(everything: Results) -> None:
    run = run_called(everything, "furniture")
    (trace,) = figure_of(everything, "confident-classes", [run]).data
    rows = read_votes(run, 3).to_pylist()
    for place in range(len(CLASSES)):
        sure = [row["image_selected"] for row in rows if row["image_label"] == place]
        assert np.array(trace.z)[place, 3] == pytest.approx(100 * np.mean(sure))
    table = BY_KEY["never-confident"].figure(everything, [run])
    assert isinstance(table, Table)
    # The generator's towers are never sure of the last class.
    labelled = sum(row["image_label"] == len(CLASSES) - 1 for row in rows)
    assert table.rows == ((CLASSES[-1], labelled, 4.0),)


def test_accuracy_of_votes_is_drawn_as_counted(everything: Results) -> None:
    run = run_called(everything, "furniture")
    figure = figure_of(everything, "votes", [run])
    compared = oracle_accuracy(run)
    drawn = {trace.name: list(trace.y) for trace in figure.data}
    assert drawn["image tower"] == [one.image for one in compared]
    assert drawn["labels that count"] == [one.selected for one in compared]


@pytest.mark.parametrize(("split", "opinion"), [(None, "fused"), ("transductive", "point")])
def test_confusions_are_those_of_the_file(
    everything: Results, split: str | None, opinion: str
) -> None:
    run = run_called(everything, "furniture")
    figure = accuracy_panels.confusion(everything, [run], split, opinion)
    assert figure is not None
    folder = run.store.local
    assert folder is not None
    cells = {
        (row["model"], row["label"], row["predicted"]): row["objects"]
        for row in pq.read_table(folder / "confusion.parquet").to_pylist()
        if (row["split"], row["opinion"]) == (split or "test", opinion)
    }
    before, after, moved = (np.array(trace.customdata) for trace in figure.data)
    for row, label in enumerate(CLASSES):
        for column, predicted in enumerate(CLASSES):
            assert before[row, column] == cells.get(("zero-shot", label, predicted), 0)
            assert after[row, column] == cells.get(("teacher", label, predicted), 0)
    assert (moved == after - before).all()
    shares = np.array(figure.data[0].z)
    np.testing.assert_allclose(shares.sum(axis=1), 100)


def test_a_trial_s_confusions_are_its_own(everything: Results) -> None:
    run = everything.sweeps[0].runs[2]
    figure = figure_of(everything, "confusion", [run])
    right = np.trace(np.array(figure.data[1].customdata))
    assert run.metrics is not None
    top1 = run.metrics["splits"]["test"]["teacher"]["fused"]["top1"]
    assert 100 * right / 120 == pytest.approx(top1)


def test_bars_of_classes_are_sorted_by_what_they_gain(everything: Results) -> None:
    run = run_called(everything, "furniture")
    assert run.metrics is not None
    models = run.metrics["splits"]["test"]
    before, after = (models[model]["fused"]["per_class"] for model in ("zero-shot", "teacher"))
    (bars,) = figure_of(everything, "per-class", [run]).data
    assert set(bars.y) == set(CLASSES)
    assert list(bars.x) == sorted(bars.x, reverse=True)
    for name, gained in zip(bars.y, bars.x, strict=True):
        assert gained == pytest.approx(after[name] - before[name])


def test_reliability_shows_the_bins_and_the_error(everything: Results) -> None:
    run = run_called(everything, "furniture")
    assert run.metrics is not None
    fused = run.metrics["splits"]["test"]["teacher"]["fused"]
    _, _, trace = figure_of(everything, "reliability", [run]).data
    assert trace.name == f"adapted: ECE {fused['ece']:.1f}"
    bins = fused["calibration"]
    there = [k for k, objects in enumerate(bins["objects"]) if objects]
    for drawn_at, k in enumerate(there):
        assert trace.y[drawn_at] == pytest.approx(100 * bins["right"][k] / bins["objects"][k])
        assert trace.customdata[drawn_at] == bins["objects"][k]
    gaps = np.abs(np.array(trace.y) - np.array(trace.x))
    weights = np.array(trace.customdata) / np.sum(trace.customdata)
    assert float(gaps @ weights) == pytest.approx(fused["ece"])


def test_the_timeline_tells_what_was_lost_and_why(everything: Results) -> None:
    table = BY_KEY["timeline"].figure(everything, [run_called(everything, "failed")])
    assert isinstance(table, Table)
    said = [(row[2], row[3]) for row in table.rows]
    assert said == [
        ("started", "2 worker(s), from step 0"),
        ("workers lost", "worker 1: node died"),
        ("started", "1 worker(s), from step 34"),
        ("failed", "ConfigError: the shard part-00003.parquet is damaged"),
    ]
    stopped = BY_KEY["timeline"].figure(everything, [run_called(everything, "stopped")])
    assert isinstance(stopped, Table)
    assert stopped.rows[1][3] == "epoch 1: collapse: 2 of 8 classes take all labels (guard: stop)"


def test_an_unknown_event_is_shown_as_it_is() -> None:
    assert event_words({"time": "t", "event": "moved", "where": "node-2"}) == "where node-2"
    assert event_words({"event": "workers lost"}) == ""


def test_what_reproduces_a_run_is_its_command_and_config(everything: Results) -> None:
    text = BY_KEY["reproduce"].figure(everything, [run_called(everything, "furniture")])
    assert isinstance(text, Text)
    blocks = dict(text.blocks)
    assert blocks["Command"].startswith("python jobs/adapt.py configs/adapt/furniture.yaml")
    assert "torch: 2.9.0" in blocks["Machine and versions"]
    assert "threshold: 0.8" in blocks["Config, as it was used"]


def test_names_with_tags_are_shown_as_they_are(tmp_path: Path) -> None:
    write_run(tmp_path / "<b>bold<b>", name="bold", epochs=1, objects=8, labels=False)
    results = load(tmp_path)
    trace = figure_of(results, "losses", results.runs).data[0]
    assert trace.name == "&lt;b&gt;bold&lt;b&gt;"


def test_the_palette_stands_out_from_both_pages() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    # WCAG 2.1 asks 3 : 1 of what is needed to read a chart.
    for color in (*chart.COLORS, chart.GREY):
        for page in ("#ffffff", "#171b21"):
            bright, dark = sorted((luminance(color), luminance(page)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 3, (color, page)
