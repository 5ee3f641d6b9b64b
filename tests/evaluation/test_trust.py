"""Rank correlation and regret against SciPy and by hand, and a sweep's folder read for them."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError
from crossmost_ray.evaluation.trust import (
    EVALUATION_NAME,
    ScoredRun,
    Trust,
    average_ranks,
    oracle_table,
    picked_accuracy,
    regret,
    spearman,
    spearman_interval,
    sweep_trust,
    trust_markdown,
)
from crossmost_ray.storage import Store

# Few values, so that there are ties.
pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=3, max_size=12)


def columns(told: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
    a, b = np.array(told, dtype=np.float64).T
    return a, b


# Statistics


@given(told=pairs)
def test_ranks_are_those_of_scipy(told: list[tuple[int, int]]) -> None:
    rows = np.array(told, dtype=np.float64).T
    expected = np.stack([scipy.stats.rankdata(row) for row in rows])
    assert np.array_equal(average_ranks(rows), expected)
    assert np.array_equal(average_ranks(rows[1]), expected[1])


@given(told=pairs)
def test_spearman_is_that_of_scipy_ties_and_all(told: list[tuple[int, int]]) -> None:
    a, b = columns(told)
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    # Any rising curve of a score says the same.
    assert spearman(np.exp(a), b) == pytest.approx(spearman(a, b), abs=1e-12)


def test_a_constant_has_no_rank_correlation() -> None:
    a, b = np.full(5, 0.1), np.arange(5.0)
    assert math.isnan(spearman(a, b))
    assert all(map(math.isnan, spearman_interval(a, b)))


def test_the_interval_holds_the_correlation_and_narrows_with_the_runs() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (12, 200):
        a = rng.normal(size=n)
        b = a + rng.normal(size=n)
        low, high = spearman_interval(a, b)
        assert low < spearman(a, b) < high
        assert (low, high) == spearman_interval(a, b)
        widths.append(high - low)
    # It goes with one over the root of n, so by a factor of about four.
    assert widths[1] < widths[0] / 2


def test_the_interval_is_as_wide_as_the_normal_approximation_says() -> None:
    # Of two independent columns the correlation has a deviation of 1 / sqrt(n - 1).
    n = 400
    rng = np.random.default_rng(1)
    low, high = spearman_interval(rng.normal(size=n), rng.normal(size=n))
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(n - 1), rel=0.15)


def test_the_interval_is_taken_evenly_from_both_ends() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 30))
    ends = [spearman_interval(a, b, confidence=share) for share in (0.0, 0.5, 0.95, 1.0)]
    assert ends[0][0] == ends[0][1]
    assert [low for low, _ in ends] == sorted((low for low, _ in ends), reverse=True)
    assert [high for _, high in ends] == sorted(high for _, high in ends)


def test_the_interval_of_a_perfect_order_is_a_point() -> None:
    a = np.arange(9.0)
    assert spearman_interval(a, a**3) == pytest.approx((1.0, 1.0))


def test_regret_by_hand() -> None:
    accuracy = np.array([50.0, 70.0, 60.0, 40.0])
    assert picked_accuracy(np.array([0.1, 0.9, 0.5, 0.3]), accuracy) == 70.0
    assert regret(np.array([0.1, 0.9, 0.5, 0.3]), accuracy) == 0.0
    assert regret(np.array([0.9, 0.1, 0.5, 0.3]), accuracy) == 20.0
    # A tie is broken by nothing that is known: the mean of the tied.
    assert regret(np.array([0.9, 0.1, 0.9, 0.3]), accuracy) == 15.0


@given(told=pairs)
def test_regret_is_zero_for_accuracy_itself_and_never_negative(told: list[tuple[int, int]]) -> None:
    a, b = columns(told)
    assert regret(b, b) == 0.0
    assert 0.0 <= regret(a, b) <= b.max() - b.min()


def test_what_has_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        spearman(np.array([1.0, math.nan]), np.ones(2))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        regret(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="at least 2"):
        spearman(np.ones(1), np.ones(1))


# The table


def runs(accuracy: Sequence[float], **scores: Sequence[float | None]) -> list[ScoredRun]:
    """Runs, one for each accuracy; None is a score that a run does not have."""
    return [
        ScoredRun(
            f"trial-{place}",
            {name: told for name, all_ in scores.items() if (told := all_[place]) is not None},
            {"test, fused": value},
        )
        for place, value in enumerate(accuracy)
    ]


def test_the_table_sets_each_score_against_each_accuracy() -> None:
    accuracy = [50.0, 70.0, 60.0, 40.0]
    good, bad = oracle_table(runs(accuracy, score=[2, 4, 3, 1], agreement=[3, 1, 2, 4]))
    assert (good.score, good.accuracy, good.runs) == ("score", "test, fused", 4)
    assert (good.correlation, good.low, good.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (good.regret, good.picked) == (0.0, 70.0)
    assert bad.score == "agreement"
    assert bad.correlation == pytest.approx(-1.0)
    assert (bad.regret, bad.picked) == (30.0, 40.0)
    for row in (good, bad):
        assert (row.best, row.median, row.last) == (70.0, 55.0, 40.0)


def test_runs_without_a_score_are_not_counted_for_it() -> None:
    told = runs(
        [50.0, 70.0, 60.0, 40.0],
        score=[1, 2, 3, 4],
        stability=[1, None, 3, 2],
        rare=[1, 2, None, None],
    )
    counted = {row.score: row.runs for row in oracle_table(told)}
    assert counted == {"score": 4, "stability": 3}
    (stability,) = (row for row in oracle_table(told) if row.score == "stability")
    assert (stability.best, stability.picked) == (60.0, 60.0)


def test_a_score_that_tells_nothing_apart_is_undefined_in_words() -> None:
    rows = oracle_table(runs([50.0, 70.0, 60.0], score=[1, 1, 1]))
    assert rows[0].correlation is None
    assert rows[0].regret == pytest.approx(10.0)
    assert "| score | 3 | undefined | 10.0 | 60.0 | 70.0 | 60.0 | 60.0 |" in trust_markdown(
        Trust(rows)
    )


def test_the_markdown_says_what_accuracy_is_read_for() -> None:
    rows = oracle_table(runs([50.0, 70.0, 60.0, 40.0], score=[2, 4, 3, 1]))
    text = trust_markdown(Trust(rows, {"test, fused": 45.04}))
    assert text.startswith("Accuracy is read here for this report alone")
    assert "## top-1 of test, fused; zero-shot 45.0\n" in text
    assert "| score | 4 | +1.00 [+1.00, +1.00] | 0.0 | 70.0 | 70.0 | 55.0 | 40.0 |" in text


# A sweep's folder

ACCURACY = {"zero-shot": 40, "trial-00000": 50, "trial-00001": 70, "trial-00002": 60}


def measured(top1: float, labelled: int) -> dict[str, Any]:
    return {
        "objects": labelled,
        "labelled": labelled,
        "image": {"top1": top1 - 1},
        "point": {"top1": top1 - 2},
        "fused": {"top1": top1},
    }


def write_sweep(
    folder: Path, *, select_on: str = "score", labelled: tuple[int, int] = (30, 10)
) -> Store:
    """A finished sweep of three trials: of each, the score peaks in the second of three epochs."""
    store = Store(str(folder))
    splits = {
        "transductive": {name: measured(top1, labelled[0]) for name, top1 in ACCURACY.items()},
        "test": {name: measured(top1 + 4, labelled[1]) for name, top1 in ACCURACY.items()},
        "open-set": {name: {"objects": 5} for name in ACCURACY},
    }
    metrics = {"models": list(ACCURACY), "splits": splits}
    store.write(EVALUATION_NAME, json.dumps(metrics))
    for place, name in enumerate(list(ACCURACY)[1:]):
        store.write(
            f"trials/{name}/config.yaml", yaml.safe_dump({"compat": {"select_on": select_on}})
        )
        rows = [
            {
                "epoch": epoch,
                "loss": 1.0,
                "selection/score": score + ACCURACY[name] / 1000,
                "selection/agreement": epoch + place / 10,
            }
            for epoch, score in enumerate((0.5, 0.6, 0.3))
        ]
        store.write(f"trials/{name}/metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return store


def test_a_sweep_is_read_at_the_epoch_that_was_kept(tmp_path: Path) -> None:
    trust = sweep_trust(write_sweep(tmp_path))
    rows = {(row.score, row.accuracy): row for row in trust.rows}
    assert {score for score, _ in rows} == {"score", "agreement"}
    fused = rows["score", "transductive, fused"]
    assert (fused.correlation, fused.picked, fused.last) == pytest.approx((1.0, 70.0, 60.0))
    # By order of the trials: 50, 70, 60.
    agreement = rows["agreement", "transductive, fused"]
    assert (agreement.correlation, agreement.regret) == pytest.approx((0.5, 10.0))
    assert rows["score", "transductive, point"].best == 68.0
    assert rows["score", "test, image"].best == 73.0
    # Of 30 objects and of 10.
    assert rows["score", "both, fused"].best == pytest.approx((30 * 70 + 10 * 74) / 40)
    assert trust.zero_shot["both, fused"] == pytest.approx((30 * 40 + 10 * 44) / 40)


def test_the_kept_epoch_is_the_best_or_the_last_as_the_config_says(tmp_path: Path) -> None:
    for select_on, picked in (("score", 54.0), ("last", 64.0)):
        store = write_sweep(tmp_path / select_on, select_on=select_on)
        for place, name in enumerate(("trial-00000", "trial-00001", "trial-00002")):
            # The two trials' scores swap places between the second epoch and the third.
            rows = [
                {"selection/score": [0.1, 0.9 - place / 10, 0.1 + place / 10][epoch]}
                for epoch in range(3)
            ]
            store.write(f"trials/{name}/metrics.jsonl", "\n".join(map(json.dumps, rows)))
        (fused,) = (row for row in sweep_trust(store).rows if row.accuracy == "test, fused")
        assert fused.picked == picked


def test_without_labels_nobody_can_tell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no accuracy of a trial, expected labels in the shards"):
        sweep_trust(write_sweep(tmp_path, labelled=(0, 0)))


def test_one_labelled_split_is_enough(tmp_path: Path) -> None:
    trust = sweep_trust(write_sweep(tmp_path, labelled=(30, 0)))
    assert {row.accuracy.partition(",")[0] for row in trust.rows} == {"transductive"}


def test_models_that_labels_chose_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labels chose the checkpoint"):
        sweep_trust(write_sweep(tmp_path, select_on="oracle_test_points"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (EVALUATION_NAME, "{", "expected the metrics of a measurement"),
        (EVALUATION_NAME, "[]", "expected the metrics of a measurement"),
        (EVALUATION_NAME, '{"models": ["a"]}', "expected the metrics of a measurement"),
        ("trials/trial-00001/config.yaml", "seed: 1", "expected compat.select_on in it"),
        ("trials/trial-00001/config.yaml", "a: [", "expected compat.select_on in it"),
        ("trials/trial-00001/metrics.jsonl", "", "expected epochs with numbers for"),
        ("trials/trial-00001/metrics.jsonl", '{"loss": 1}', "expected epochs with numbers for"),
        ("trials/trial-00001/metrics.jsonl", '{"selection/score": NaN}', "expected epochs with"),
        ("trials/trial-00001/metrics.jsonl", '{"selection/score": 1', "expected epochs with"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    store = write_sweep(tmp_path)
    store.write(name, content)
    with pytest.raises(ConfigError) as refused:
        sweep_trust(store)
    assert f"{store}/{name} is broken" in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", [EVALUATION_NAME, "trials/trial-00001/metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    store = write_sweep(tmp_path)
    store.remove(name)
    with pytest.raises(ConfigError, match=f"lacks {name}.*--resume"):
        sweep_trust(store)


def test_two_trials_are_too_few(tmp_path: Path) -> None:
    store = write_sweep(tmp_path)
    metrics = json.loads(store.read(EVALUATION_NAME) or b"")
    metrics["models"].remove("trial-00002")
    store.write(EVALUATION_NAME, json.dumps(metrics))
    with pytest.raises(ConfigError, match=r"measures 2 trial\(s\), expected at least 3"):
        sweep_trust(store)


# The job


def test_the_job_prints_the_table_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_sweep(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trust.py", str(tmp_path)])
    runpy.run_path("jobs/trust.py", run_name="__main__")
    said = capsys.readouterr().out
    text = (store.read("trust.md") or b"").decode()
    assert text in said
    assert "for this report alone" in said
    assert said.splitlines()[-1] == f"done: the table is at {store}/trust.md"
    kept = json.loads(store.read("trust.json") or b"")
    expected = sweep_trust(store)
    assert [row["regret"] for row in kept["rows"]] == [row.regret for row in expected.rows]
    assert kept["zero_shot"] == expected.zero_shot


def test_the_job_says_what_a_user_can_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trust.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"^error: .*nothing lacks evaluation/metrics.json"):
        runpy.run_path("jobs/trust.py", run_name="__main__")
