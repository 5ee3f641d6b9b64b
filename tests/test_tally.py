"""Counts of predictions, by hand and as properties; the bootstrap against closed forms."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.tally import (
    NUM_BINS,
    Census,
    Tally,
    calibrate,
    compare,
    paired_bootstrap,
    tally,
)

C = 7


def ranked_first(first: list[int], num_classes: int = C) -> npt.NDArray[np.int64]:
    """Orders of all classes that begin with the given ones."""
    return np.array(
        [[best, *(c for c in range(num_classes) if c != best)] for best in first], np.int64
    ).reshape(-1, num_classes)


def test_counts_by_hand() -> None:
    label = np.array([0, 0, 0, 1, 2, -1, 6])
    counted = tally(label, ranked_first([0, 0, 1, 1, 0, 3, 5]), C)
    # The -1 is left out; of the six others 0, 0 and 1 are right.
    assert counted.num_objects == 6
    assert counted.top1_accuracy == pytest.approx(100 * 3 / 6)
    assert counted.confusion[0].tolist() == [2, 1, 0, 0, 0, 0, 0]
    assert counted.confusion[2, 0] == 1
    assert counted.confusion[6, 5] == 1
    # Among the five best of "5 first, then in order" are 5, 0, 1, 2, 3, but not 6.
    assert counted.top5.tolist() == [3, 1, 1, 0, 0, 0, 0]
    assert counted.top5_accuracy == pytest.approx(100 * 5 / 6)
    # Class 0 has 2 of 3, class 1 all, 2 and 6 none; 3, 4 and 5 have no objects.
    assert counted.class_mean == pytest.approx(100 * (2 / 3 + 1 + 0 + 0) / 4)
    np.testing.assert_allclose(counted.per_class, [200 / 3, 100, 0] + [np.nan] * 3 + [0])


@pytest.mark.parametrize(("place", "counts"), [(0, 1), (4, 1), (5, 0)])
def test_the_five_best_are_five(place: int, counts: int) -> None:
    ranked = np.arange(C)[None]
    assert tally(np.array([place]), ranked, C).top5.sum() == counts


def test_fewer_than_five_ranked_are_fine() -> None:
    counted = tally(np.array([1, 2]), np.array([[1], [1]]), 3)
    assert counted.top1_accuracy == counted.top5_accuracy == 50.0


def test_without_labels_there_is_no_accuracy() -> None:
    counted = tally(np.array([-1, -1]), ranked_first([0, 1]), C)
    assert counted.num_objects == 0
    for value in (counted.top1_accuracy, counted.top5_accuracy, counted.class_mean):
        assert math.isnan(value)
    assert np.isnan(counted.per_class).all()


rows = st.lists(st.tuples(st.integers(-1, C - 1), st.integers(0, C - 1)), max_size=30)


def count(pairs: list[tuple[int, int]]) -> Tally:
    label = np.array([label for label, _ in pairs], np.int64)
    return tally(label, ranked_first([best for _, best in pairs]), C)


@given(left=rows, right=rows)
def test_counts_of_parts_add_up(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    parts, whole = count(left) + count(right), count(left + right)
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    np.testing.assert_array_equal(parts.top5, whole.top5)
    # No cell is kept twice, and none that holds nothing: memory grows with what there is to tell.
    np.testing.assert_array_equal(parts.cells, np.flatnonzero(whole.confusion))
    np.testing.assert_array_equal(parts.counts, whole.counts)


@given(pairs=rows)
def test_top5_is_never_below_top1(pairs: list[tuple[int, int]]) -> None:
    counted = count(pairs)
    known = sum(label >= 0 for label, _ in pairs)
    assert counted.num_objects == known
    assert counted.top5.sum() >= np.trace(counted.confusion)
    right = sum(label == best for label, best in pairs)
    assert np.trace(counted.confusion) == right


def answers(n: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(n) < share


@given(seed=st.integers(0, 10_000), n=st.integers(2, 60))
def test_the_interval_holds_the_exact_difference(seed: int, n: int) -> None:
    before, after = answers(n, 0.4, seed), answers(n, 0.6, seed + 1)
    interval = paired_bootstrap(before, after, num_resamples=500)
    assert interval.difference == pytest.approx(100 * (after.mean() - before.mean()))
    assert interval.low <= interval.difference + 1e-9
    assert interval.difference <= interval.high + 1e-9


def test_equal_models_differ_by_nothing() -> None:
    right = answers(50, 0.5, 0)
    interval = paired_bootstrap(right, right, num_resamples=200)
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_objects_are_drawn_in_pairs() -> None:
    # Both models err on the same objects but for one. Drawn apart, the two accuracies would each
    # vary by sqrt(0.25 / 200) = 3.5 points; in pairs, the difference varies by about 0.5.
    before = answers(200, 0.5, 3)
    after = before.copy()
    after[np.flatnonzero(~before)[0]] = True
    interval = paired_bootstrap(before, after, num_resamples=2000)
    assert interval.difference == pytest.approx(0.5)
    assert interval.low >= 0.0
    assert interval.high <= 2.0


def test_the_width_is_that_of_the_normal_approximation() -> None:
    before, after = answers(500, 0.5, 1), answers(500, 0.6, 2)
    gain = after.astype(float) - before
    half = 100 * 1.96 * gain.std() / math.sqrt(500)
    interval = paired_bootstrap(before, after, num_resamples=4000)
    assert interval.high - interval.difference == pytest.approx(half, rel=0.1)
    assert interval.difference - interval.low == pytest.approx(half, rel=0.1)
    narrow = paired_bootstrap(before, after, num_resamples=4000, confidence=0.5)
    assert narrow.high - narrow.difference == pytest.approx(half * 0.6745 / 1.96, rel=0.15)


def test_drawing_a_few_at_a_time_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    before, after = rng.random(40), rng.random(40)
    whole = paired_bootstrap(before, after, num_resamples=500)
    monkeypatch.setattr("crossmost_ray.tally.MOST_DRAWN", 40 * 7)
    parts = paired_bootstrap(before, after, num_resamples=500)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=1e-9)


def test_one_seed_gives_one_interval() -> None:
    before, after = answers(80, 0.5, 1), answers(80, 0.7, 2)
    first, again, other = (
        paired_bootstrap(before, after, num_resamples=300, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first.difference == other.difference


def test_several_opinions_of_one_object_count_as_one() -> None:
    before, after = answers(60, 0.5, 1), answers(60, 0.7, 2)
    names = [f"object {k:03d}" for k in range(60)]
    alone = paired_bootstrap(before, after, num_resamples=500)
    twice = (np.tile(before, 2), np.tile(after, 2))
    together = paired_bootstrap(*twice, clusters=names * 2, num_resamples=500)
    assert together.difference == pytest.approx(alone.difference)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    # Taken for independent, the copies would make the interval narrower by sqrt(2).
    apart = paired_bootstrap(*twice, num_resamples=4000)
    assert together.high - together.low > 1.25 * (apart.high - apart.low)


def test_clusters_of_unequal_size_are_weighted_by_their_rows() -> None:
    before = np.zeros(4, bool)
    after = np.array([True, True, True, False])
    interval = paired_bootstrap(before, after, clusters=["a", "a", "a", "b"], num_resamples=400)
    assert interval.difference == pytest.approx(75.0)
    # A resample holds (a, a), (a, b) or (b, b): 100, 75 or 0.
    assert (interval.low, interval.high) == (0.0, 100.0)


def naive_interval(
    gain: npt.NDArray[np.float64], num_resamples: int, seed: int
) -> tuple[float, float]:
    """Draws every object of every resample."""
    drawn = np.random.default_rng(seed).choice(gain, size=(num_resamples, len(gain)))
    low, high = np.quantile(100 * drawn.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("n", [40, 400])
def test_kinds_of_objects_are_resampled_as_the_objects_would_be(n: int) -> None:
    before, after = answers(n, 0.5, 1), answers(n, 0.65, 2)
    gain = after.astype(float) - before
    naive = naive_interval(gain, 20_000, seed=3)
    ours = paired_bootstrap(before, after, num_resamples=20_000)
    # A quantile of 20,000 resamples is known to about 2 % of the interval's width; two such.
    width = naive[1] - naive[0]
    assert (ours.low, ours.high) == pytest.approx(naive, abs=max(0.06 * width, 100 / n))
    # The whole distribution, by a second pair of its quantiles.
    half = paired_bootstrap(before, after, num_resamples=20_000, confidence=0.5)
    drawn = np.random.default_rng(4).choice(gain, size=(20_000, n)).mean(axis=1)
    assert (half.low, half.high) == pytest.approx(
        tuple(100 * np.quantile(drawn, [0.25, 0.75])), abs=max(0.06 * width, 100 / n)
    )


def test_a_million_objects_take_no_more_memory_than_three() -> None:
    n = 1_000_000  # drawn one by one, 10,000 resamples would be 80 GB
    before = np.zeros(n, bool)
    after = np.arange(n) % 4 == 0
    interval = paired_bootstrap(before, after)
    assert interval.difference == pytest.approx(25.0)
    half = 100 * 1.96 * math.sqrt(0.25 * 0.75 / n)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_four_counts_give_the_interval_of_all_objects(pairs: list[tuple[bool, bool]]) -> None:
    before, after = np.array(pairs).T
    cut = len(pairs) // 3
    counted = compare(before[:cut], after[:cut]) + compare(before[cut:], after[cut:])
    assert counted == compare(before, after)
    assert counted.interval == paired_bootstrap(before, after)


def test_calibration_by_hand() -> None:
    # 0.2 is the upper end of bin 2, and in it; 0.21 is in bin 3; 1.0 in the last.
    confidence = np.array([0.2, 0.21, 0.9, 1.0, 1.0])
    counted = calibrate(confidence, np.array([True, False, True, True, False]))
    assert counted.counts.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert counted.right.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    # Bins of 1, 1, 1 and 2 objects: |1 - 0.2|, |0 - 0.21|, |1 - 0.9|, |0.5 - 1|.
    assert counted.error == pytest.approx(100 * (0.8 + 0.21 + 0.1 + 2 * 0.5) / 5)


def test_a_perfectly_calibrated_model_has_no_error() -> None:
    confidence = np.full(10, 0.7)
    assert calibrate(confidence, np.arange(10) < 7).error == pytest.approx(0, abs=1e-9)
    assert calibrate(np.ones(4), np.ones(4, bool)).error == 0
    # A float32 softmax may round to a little above 1.
    assert calibrate(np.array([1.0000001], np.float32), np.array([True])).counts[-1] == 1
    assert math.isnan(calibrate(np.array([]), np.array([], bool)).error)


def naive_ece(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    total = 0.0
    for low in range(NUM_BINS):
        inside = (confidence > low / NUM_BINS) & (confidence <= (low + 1) / NUM_BINS)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(right) * gap
    return 100 * total


@given(seed=st.integers(0, 10_000), n=st.integers(1, 80), cut=st.integers(0, 80))
def test_calibration_adds_up_and_equals_the_definition(seed: int, n: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.01, 1, n)
    right = rng.random(n) < confidence
    parts = calibrate(confidence[:cut], right[:cut]) + calibrate(confidence[cut:], right[cut:])
    assert parts.error == pytest.approx(naive_ece(confidence, right))


def census(probability: npt.NDArray[np.float64]) -> Census:
    logs = np.log(np.where(probability > 0, probability, 1))
    return Census(
        objects=len(probability),
        confidence=float(probability.max(axis=1).sum()),
        entropy=float(-(probability * logs).sum()),
        confident=int((probability.max(axis=1) > 0.84).sum()),
        predicted=np.bincount(probability.argmax(axis=1), minlength=probability.shape[1]),
        probability=probability.sum(axis=0),
    )


def test_balance_is_full_for_every_class_in_turn_and_none_for_one_class() -> None:
    sure = np.eye(4)
    told = census(np.tile(sure, (3, 1)))
    assert told.balance == pytest.approx(100)
    assert (told.mean_confidence, told.mean_entropy, told.confident_percent) == (100, 0, 100)
    assert census(sure[[2, 2, 2]]).balance == pytest.approx(0)
    # Two of four classes in turn: log 2 of log 4.
    assert census(sure[[0, 1, 0, 1]]).balance == pytest.approx(50)
    unsure = census(np.full((5, 4), 0.25))
    assert unsure.balance == pytest.approx(100)
    assert unsure.mean_entropy == pytest.approx(math.log(4))
    assert unsure.confident_percent == 0


def test_censuses_add_up() -> None:
    rows = np.random.default_rng(0).dirichlet(np.ones(5), size=30)
    parts, whole = census(rows[:11]) + census(rows[11:]), census(rows)
    assert parts.objects == whole.objects
    for name in ("mean_confidence", "mean_entropy", "confident_percent", "balance"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))
    np.testing.assert_array_equal(parts.predicted, whole.predicted)
    assert math.isnan(census(rows[:0]).mean_entropy)
