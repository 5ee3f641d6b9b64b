"""What Tune is handed and which trials stop, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from crossmost_ray.tuning.ledger import Entry
from crossmost_ray.tuning.search import (
    OptunaQueue,
    Queue,
    _Former,
    build_scheduler,
)
from crossmost_ray.tuning.trial import EPOCHS, OF_EPOCHS
from tests.tuning.test_config import sweep

SCORE = "selection/score"


def test_a_queue_hands_out_what_is_left_once_and_in_order() -> None:
    entries = [
        Entry("a", {"seed": 0}, "done"),
        Entry("b", {"seed": 1}, "running"),
        Entry("c", {"seed": 2}, "stopped"),
        Entry("d", {"seed": 3}, "failed"),
        Entry("e", {"seed": 4}),
    ]
    queue = Queue(entries)
    assert queue.num_trials == 2
    assert queue.suggest("1") == {"trial": "b", "settings": {"seed": 1}}
    assert queue.suggest("2") == {"trial": "e", "settings": {"seed": 4}}
    assert queue.suggest("3") == Searcher.FINISHED


# Another trial waits: Tune's median rule would pause one for it.
CONTROLLER: Any = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])


def run(scheduler: Any, trial: str, *scores: float | None, epochs: int = 4) -> int:
    """Plays a trial; gives the epoch after which it was stopped, or `epochs`."""
    who = _Former(trial)
    scheduler.on_trial_add(CONTROLLER, who)
    row: dict[str, Any] = {}
    for done, score in enumerate(scores, start=1):
        row = {EPOCHS: done, OF_EPOCHS: epochs, **({} if score is None else {SCORE: score})}
        action = scheduler.on_trial_result(CONTROLLER, who, row)
        assert action in (TrialScheduler.CONTINUE, TrialScheduler.STOP)
        if action == TrialScheduler.STOP:
            return done
    scheduler.on_trial_complete(CONTROLLER, who, row)
    return epochs


def test_without_a_scheduler_nothing_stops() -> None:
    assert type(build_scheduler(sweep(), epochs=4, former={})) is FIFOScheduler


def test_asha_stops_the_worse_half_at_its_rungs() -> None:
    scheduler = build_scheduler(sweep(scheduler="asha"), epochs=4, former={})
    assert run(scheduler, "first", 0.5, 0.5, 0.5, 0.5) == 4
    assert run(scheduler, "better", 0.6, 0.6, 0.6, 0.6) == 4
    # Rung 1 holds 0.5 and 0.6: what is below their median, 0.55, stops there.
    assert run(scheduler, "worse", 0.52, 0.9, 0.9, 0.9) == 1
    # Above the median of rung 1 (0.5, 0.52, 0.6), below that of rung 2 (0.5, 0.6).
    assert run(scheduler, "late", 0.55, 0.4, 0.9, 0.9) == 2


def test_asha_leaves_the_last_epoch_alone() -> None:
    # Its last rung is the last epoch, after which a trial still has its model to write.
    scheduler = build_scheduler(sweep(scheduler="asha"), epochs=4, former={})
    run(scheduler, "first", 0.5, 0.5, 0.5, 0.9)
    assert run(scheduler, "second", 0.6, 0.6, 0.6, 0.1) == 4


def test_grace_epochs_are_everyones() -> None:
    scheduler = build_scheduler(sweep(scheduler="asha", grace_epochs=2), epochs=4, former={})
    run(scheduler, "first", 0.5, 0.5, 0.5, 0.5)
    assert run(scheduler, "second", 0.1, 0.1, 0.1, 0.1) == 2


def test_the_median_rule_stops_what_is_below_the_others_means_and_never_pauses() -> None:
    scheduler = build_scheduler(sweep(scheduler="median"), epochs=4, former={})
    for trial, score in (("a", 0.4), ("b", 0.5), ("c", 0.6)):
        # Three are needed for a median; the first ones go on in the meantime.
        assert run(scheduler, trial, *[score] * 4) == 4
    assert run(scheduler, "d", 0.45, 0.45, 0.45, 0.45) == 1
    assert run(scheduler, "e", 0.55, 0.1, 0.1, 0.1) == 4


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_former_trials_count_when_a_sweep_goes_on(kind: str) -> None:
    rows = [{SCORE: 0.5}, {SCORE: 0.5}, {SCORE: 0.5}, {SCORE: 0.5}]
    former = dict.fromkeys(("a", "b", "c"), rows)
    scheduler = build_scheduler(sweep(scheduler=kind), epochs=4, former=former)
    assert run(scheduler, "worse", 0.4, 0.4, 0.4, 0.4) == 1
    assert run(scheduler, "better", 0.6, 0.6, 0.6, 0.6) == 4


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_row_without_a_score_decides_nothing(kind: str) -> None:
    former = {name: [{"loss": 1.0}, {SCORE: 0.5}] for name in ("a", "b", "c")}
    scheduler = build_scheduler(sweep(scheduler=kind), epochs=4, former=former)
    assert run(scheduler, "mute", None, None, None, None) == 4


SPACE: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-5, 1e-2]},
    "seed": {"randint": [0, 9]},
    "mode": {"choice": ["crossmost", "baseline"]},
}


def test_optuna_proposes_within_the_space_and_learns_from_scores() -> None:
    one = sweep(search="optuna", num_trials=40, space=SPACE)
    queue = OptunaQueue(one, [])
    assert queue.num_trials == 40
    rates = []
    for number in range(40):
        assigned = queue.suggest(str(number))
        settings = assigned["settings"]
        assert assigned["trial"] == f"trial-{number:05d}"
        assert settings.keys() == SPACE.keys()
        assert 1e-5 <= settings["optim.lr"] <= 1e-2
        assert settings["seed"] in range(10)
        rates.append(settings["optim.lr"])
        queue.on_trial_complete(str(number), {SCORE: settings["optim.lr"]})
    assert queue.suggest("41") == Searcher.FINISHED
    # The score is the learning rate itself: the last proposals must be higher than the first.
    assert sum(rates[-10:]) > 2 * sum(rates[:10])


def test_optuna_goes_on_with_what_was_left_and_knows_what_was_found() -> None:
    one = sweep(search="optuna", num_trials=5, space=SPACE)
    settings = [{"optim.lr": 1e-3, "seed": n, "mode": "baseline"} for n in range(4)]
    entries = [
        Entry("trial-00000", settings[0], "done", score=0.5),
        Entry("trial-00001", settings[1], "running"),
        Entry("trial-00002", settings[2], "failed"),
        Entry("trial-00003", settings[3], "stopped", score=0.1),
    ]
    queue = OptunaQueue(one, entries)
    assert sorted(trial.value for trial in queue.study.trials if trial.value) == [0.1, 0.5]
    assert queue.num_trials == 2
    assert queue.suggest("x") == {"trial": "trial-00001", "settings": settings[1]}
    assert queue.suggest("y")["trial"] == "trial-00004"
    queue.on_trial_complete("x", error=True)
    queue.on_trial_complete("y", {"loss": 1.0})
    assert queue.suggest("z") == Searcher.FINISHED
