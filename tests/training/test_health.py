"""The state of a run by hand, and findings where there is something to find, and nowhere else."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.training.health import (
    PATIENCE,
    STARVED_SHARE,
    Finding,
    Health,
    assess,
    diagnose,
    effective_classes,
    lowered,
)

seeds = st.integers(0, 2**31 - 1)


def sure(named: list[int], C: int) -> Tensor:
    return F.one_hot(torch.tensor(named), C).float()


def epoch(named: list[int], C: int, *, selected: list[bool] | None = None) -> Health:
    """One tower that is sure of what it names, and takes it for its label."""
    label = torch.tensor(named)
    marks = torch.ones(len(named)).bool() if selected is None else torch.tensor(selected)
    return assess({"point": sure(named, C)}, {"point": label}, {"point": marks})


def names(C: int) -> list[str]:
    return [f"class {place}" for place in range(C)]


def kinds(history: list[Health], patience: int = PATIENCE) -> list[str]:
    found = diagnose(history, names(len(history[0].balance)), patience=patience)
    return [finding.kind for finding in found]


# The state


@pytest.mark.parametrize("C", [1, 2, 10, 40])
def test_effective_classes_of_even_shares_are_all_and_of_one_share_one(C: int) -> None:
    assert effective_classes(torch.full((C,), 1 / C)).item() == pytest.approx(C, rel=1e-5)
    assert effective_classes(torch.eye(C)[0]).item() == 1.0


def test_a_health_by_hand() -> None:
    health = assess(
        {
            "image": torch.tensor(
                [[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.0, 1.0, 0.0]]
            ),
            "point": sure([0, 1, 1, 1], C=3),
        },
        {"image": torch.tensor([0, 0, 1, 1]), "point": torch.tensor([0, 1, 1, 1])},
        {
            "image": torch.tensor([True, False, False, False]),
            "point": torch.tensor([True, True, True, False]),
        },
        before={"point": torch.tensor([0, 1, 0, -1]), "image": torch.tensor([1, 0, 1, 1])},
        ever_confident=torch.tensor([False, False, False]),
    )
    # Eight labels: 0 0 1 1 and 0 1 1 1; selected: 0, 0, 1, 1.
    assert health.balance == pytest.approx((3 / 8, 5 / 8, 0))
    assert health.confident_share == pytest.approx((2 / 8, 2 / 8, 0))
    assert health.confident == 0.5
    # Of the seven that had a label, one of the image tower's and one of the point tower's changed.
    assert health.flips == pytest.approx(2 / 7)
    assert health.agreement == 0.75
    assert health.never_confident == (2,)
    point = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert health.tower_named == {"image": (0.5, 0.5, 0.0), "point": (0.25, 0.75, 0.0)}
    mean = torch.tensor([[0.425, 0.5, 0.075], [0.25, 0.75, 0.0]])
    image = -sum(p * math.log(p) for p in mean[0].tolist())
    assert health.tower_used == pytest.approx({"image": math.exp(image), "point": math.exp(point)})
    both = -sum(p * math.log(p) for p in mean.mean(dim=0).tolist())
    assert health.classes_used == pytest.approx(math.exp(both))


def test_a_joint_label_counts_alike_once_or_for_each_tower() -> None:
    label, marks = torch.tensor([0, 1, 1]), torch.tensor([True, False, True])
    prob = {"image": sure([0, 1, 1], 3), "point": sure([0, 2, 1], 3)}
    once = assess(prob, {"image": label}, {"image": marks}, before={"image": label.flip(0)})
    twice = assess(
        prob,
        dict.fromkeys(prob, label),
        dict.fromkeys(prob, marks),
        before=dict.fromkeys(prob, label.flip(0)),
    )
    assert once == twice


def test_one_tower_has_no_agreement_and_the_first_epoch_no_flips() -> None:
    health = epoch([0, 1], C=2)
    assert health.agreement is None
    assert health.flips is None
    assert "health/flips" not in health.metrics()


def test_what_was_ever_confident_is_remembered_from_epoch_to_epoch() -> None:
    first = epoch([0, 1, 2], C=4, selected=[True, False, False])
    assert first.never_confident == (1, 2, 3)
    second = assess(
        {"point": sure([1, 1, 2], 4)},
        {"point": torch.tensor([1, 1, 2])},
        {"point": torch.tensor([True, False, False])},
        ever_confident=first.ever_confident,
    )
    assert second.never_confident == (2, 3)
    assert second.ever_confident.tolist() == [True, True, False, False]


def test_a_label_that_is_no_class_belongs_to_none() -> None:
    health = assess(
        {"point": sure([0, 1], 2)}, {"point": torch.tensor([0, 2])}, {"point": torch.ones(2).bool()}
    )
    assert health.balance == health.confident_share == (0.5, 0.0)


def test_a_health_survives_json() -> None:
    health = epoch([0, 1, 1], C=3)
    stored = json.loads(json.dumps(dataclasses.asdict(health)))
    assert dataclasses.asdict(Health(**stored)).keys() == dataclasses.asdict(health).keys()
    assert kinds([health, Health(**stored)]) == []
    assert Health(**stored).ever_confident.tolist() == health.ever_confident.tolist()


@given(seed=seeds, N=st.integers(1, 20), C=st.integers(1, 6))
def test_shares_add_up(seed: int, N: int, C: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prob = torch.randn(N, C, generator=generator).softmax(dim=-1)
    label = torch.randint(0, C, (N,), generator=generator)
    marks = torch.rand(N, generator=generator) < 0.5
    health = assess({"image": prob}, {"image": label}, {"image": marks}, before={"image": label})
    assert sum(health.balance) == pytest.approx(1.0, abs=1e-5)
    assert sum(health.confident_share) == pytest.approx(health.confident, abs=1e-5)
    assert 1 - 1e-5 <= health.classes_used <= C + 1e-4
    assert health.flips == 0.0
    assert set(health.never_confident) == set(range(C)) - set(label[marks].tolist())
    assert health.metrics() == {
        "health/confident": health.confident,
        "health/classes_used": health.classes_used,
        "health/largest_class": max(health.balance),
        "health/never_confident": len(health.never_confident),
        "health/flips": 0.0,
    }


# Collapse


@pytest.mark.parametrize("C", [2, 3, 4, 10, 50])
def test_one_answer_for_all_is_a_collapse(C: int) -> None:
    healthy = epoch(list(range(C)) * 10, C)
    collapsed = epoch([1] * (10 * C), C)
    (finding,) = diagnose([healthy, collapsed], names(C))
    assert finding.kind == "collapse"
    assert finding.classes == (1,)
    said = f"the point tower uses 1.0 classes, {C}.0 at first, and calls 100 % of the objects"
    assert f"{said} 'class 1'" in finding.says
    # Of two, one had half of the labels already: it cannot have more than twice as many.
    label = f"'class 1' is the label of 100 % of the objects, of {100 / C:.0f} % at first"
    assert (label in finding.says) == (C > 2)


@pytest.mark.parametrize("C", [2, 3, 4, 10, 40])
def test_what_stays_as_it_was_is_no_collapse(C: int) -> None:
    even = epoch(list(range(C)) * 10, C)
    assert kinds([even, even]) == []
    # Data that are chairs for the greater part, and were so from the first epoch on.
    mostly = epoch([0] * 90 + [place % C for place in range(10)], C)
    assert kinds([mostly, mostly]) == []


def test_a_first_epoch_alone_is_never_a_collapse() -> None:
    assert kinds([epoch([0] * 20, C=5)]) == []


def test_two_classes_collapse_where_one_has_86_percent() -> None:
    # (used - 1) / (2 - 1) falls below a half where exp(H) is 1.5: at a share of 0.86.
    first = epoch([0, 1] * 50, C=2)
    assert kinds([first, epoch([0] * 85 + [1] * 15, C=2)]) == []
    assert kinds([first, epoch([0] * 87 + [1] * 13, C=2)]) == ["collapse"]


def test_growing_sure_is_no_collapse() -> None:
    # The labels stay; only the spread of the answers goes, and with it the mean answer's entropy.
    label = {"point": torch.tensor([0] * 9 + [1])}
    marks = {"point": torch.ones(10).bool()}
    certain = sure(label["point"].tolist(), 10)
    unsure = assess({"point": 0.3 * certain + 0.07}, label, marks)
    confident = assess({"point": certain}, label, marks)
    assert confident.classes_used - 1 < 0.5 * (unsure.classes_used - 1)
    assert kinds([unsure, confident]) == []


def test_a_tower_that_collapses_beside_a_healthy_one_is_named() -> None:
    C = 10
    even = list(range(C)) * 3
    label, marks = {"image": torch.tensor(even)}, {"image": torch.ones(len(even)).bool()}
    first = assess({"image": sure(even, C), "point": sure(even, C)}, label, marks)
    now = assess({"image": sure(even, C), "point": sure([4] * len(even), C)}, label, marks)
    # The mean of both towers still uses half of the classes.
    assert now.classes_used > 5
    (finding,) = diagnose([first, now], names(C))
    assert finding == Finding(
        "collapse",
        (4,),
        "the point tower uses 1.0 classes, 10.0 at first, and calls 100 % of the objects 'class 4'",
    )


def test_a_class_that_takes_over_half_of_the_labels_is_a_collapse_before_the_rest_is_gone() -> None:
    C = 10
    first = epoch(list(range(C)) * 10, C)
    half = epoch([0] * 46 + list(range(1, C)) * 6, C)
    more = epoch([0] * 56 + list(range(1, C)) * 6, C)
    assert kinds([first, half]) == []
    assert more.classes_used > 5.5  # more than half are in use
    (finding,) = diagnose([first, more], names(C))
    assert finding.classes == (0,)
    assert finding.says.startswith("'class 0' is the label of 51 % of the objects, of 10 %")


def test_a_collapse_is_judged_by_the_first_epoch_however_slowly_it_comes() -> None:
    C = 8
    history = [epoch(list(range(k)) * 8, C) for k in range(C, 0, -1)]
    found = [bool(kinds(history[: k + 1])) for k in range(C)]
    # (k - 1) < (8 - 1) / 2 is first so at k = 4.
    assert found == [False] * 4 + [True] * 4


# Starvation


def starving(C: int = 4) -> Health:
    """Class 1 is named for a quarter of the objects, and never surely; class 3 for none."""
    return epoch([0, 1, 2, 2] * 5, C, selected=[True, False, True, True] * 5)


def test_a_class_starves_after_some_epochs_without_a_confident_label() -> None:
    assert kinds([starving()] * 2, patience=3) == []
    assert diagnose([starving()] * 3, ["chair", "lamp", "sofa", "table"], patience=3) == [
        Finding(
            "starvation",
            (1,),
            "1 of 4 classes had no confident label for 3 epoch(s): 'lamp' (25.0 % of the labels)",
        )
    ]


@pytest.mark.parametrize("fed_at", [0, 1, 2])
def test_one_confident_label_within_the_patience_is_enough(fed_at: int) -> None:
    fed = epoch([0, 1, 2, 2] * 5, 4, selected=[True, True, True, True] * 5)
    history = [starving()] * 3
    history[fed_at] = fed
    assert kinds(history, patience=3) == []
    assert kinds([*history, *[starving()] * 3], patience=3) == ["starvation"]


def test_a_class_that_is_hardly_named_is_not_missed() -> None:
    C, N = 4, 1000
    few = int(STARVED_SHARE / C * N)
    for count, expected in ((few - 1, []), (few + 1, ["starvation"])):
        named = [3] * count + [place % 3 for place in range(N - count)]
        health = epoch(named, C, selected=[place != 3 for place in named])
        assert kinds([health] * PATIENCE) == expected


def test_a_class_that_is_no_longer_named_is_not_missed() -> None:
    # No threshold would bring it back.
    history = [starving(), starving(), epoch([0, 0, 2, 2] * 5, 4)]
    assert kinds(history, patience=3) == []


def test_all_classes_starve_where_nothing_is_confident() -> None:
    health = epoch([0, 1, 2] * 4, 3, selected=[False] * 12)
    (finding,) = diagnose([health] * PATIENCE, names(3))
    assert finding.classes == (0, 1, 2)


# Thresholds


def test_only_starved_thresholds_are_lowered_and_none_below_the_floor() -> None:
    threshold = torch.tensor([0.8, 0.8, 0.55, 0.4])
    fresh = lowered(threshold, (1, 2, 3), factor=0.9, floor=0.5)
    # The third stops at the floor; the fourth is below it already, and must not be raised.
    torch.testing.assert_close(fresh, torch.tensor([0.8, 0.72, 0.5, 0.4]))
    assert threshold.tolist() == pytest.approx([0.8, 0.8, 0.55, 0.4])


@given(seed=seeds, factor=st.floats(0.01, 1.0), floor=st.floats(0.0, 1.0))
def test_no_threshold_is_ever_raised(seed: int, factor: float, floor: float) -> None:
    threshold = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    fresh = lowered(threshold, (0, 3), factor=factor, floor=floor)
    assert (fresh <= threshold).all()
    assert (fresh >= threshold.clamp(max=floor) - 1e-6).all()
    assert torch.equal(lowered(threshold, (), factor=factor, floor=floor), threshold)


# Bad calls


def test_wrong_calls_are_refused() -> None:
    prob, label = {"point": sure([0, 1], 2)}, {"point": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="2 labels, and 1 marks"):
        assess(prob, label, {"point": torch.tensor([True])})
    with pytest.raises(ValueError, match="2 labels, and 1 of the epoch before"):
        assess(prob, label, {"point": torch.ones(2).bool()}, before={"point": torch.tensor([0])})
    with pytest.raises(ValueError, match="expected those of at least one object"):
        assess(
            {"point": torch.zeros(0, 2)},
            {"point": torch.zeros(0).long()},
            {"point": torch.zeros(0)},
        )
    with pytest.raises(ValueError, match="0 epochs"):
        diagnose([], names(2))
    with pytest.raises(ValueError, match="3 names of 2 classes"):
        diagnose([epoch([0, 1], 2)], names(3))
    with pytest.raises(ValueError, match=r"factor is 1\.1"):
        lowered(torch.ones(2), (0,), factor=1.1, floor=0.5)
