"""The guard: what it does about a run that collapses, starves a class, or no longer gets better."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from crossmost_ray.config import GuardConfig
from crossmost_ray.models.classifier import CrossModalModel, build_classifier
from crossmost_ray.training.adapt import SCORE, AdaptTask
from crossmost_ray.training.guard import MOST_ROLLBACKS, Guard
from crossmost_ray.training.health import Health
from crossmost_ray.training.votes import VOTES_SCHEMA
from tests.synthetic import CLASSES, adapt_config, raw_batch

NAMES = ("chair", "table", "lamp", "sofa")


def health(*balance: float, confident: tuple[float, ...] | None = None) -> Health:
    used = len(balance) if max(balance) < 0.9 else 1.1
    return Health(
        confident=1.0,
        classes_used=used,
        tower_used={"image": used, "point": used},
        tower_named={"image": used, "point": used},
        balance=balance,
        confident_share=balance if confident is None else confident,
        flips=None,
        agreement=None,
        never_confident=(),
    )


EVEN = health(0.25, 0.25, 0.25, 0.25)
CHAIRS = health(0.97, 0.01, 0.01, 0.01)
NO_LAMP = health(0.25, 0.25, 0.25, 0.25, confident=(0.2, 0.2, 0.0, 0.2))


def test_a_healthy_run_goes_on() -> None:
    guard = Guard(GuardConfig(collapse="stop", starvation="lower"), NAMES)
    for _ in range(5):
        verdict = guard.judge(EVEN, 0.5)
        assert (verdict.events, verdict.stop, verdict.rollback) == ((), None, False)
        assert verdict.healthy
    assert torch.equal(guard.ease, torch.ones(4))


@pytest.mark.parametrize("action", ["report", "stop", "rollback"])
def test_a_collapse_is_reported_and_met_as_the_config_says(action: str) -> None:
    guard = Guard(GuardConfig(collapse=action), NAMES)
    guard.judge(EVEN, 0.5)
    verdict = guard.judge(CHAIRS, 0.4)
    (event,) = verdict.events
    assert event["kind"] == "collapse"
    assert "chair" in event["says"]
    assert event["action"] == ("none" if action == "report" else action)
    assert not verdict.healthy
    assert verdict.rollback == (action == "rollback")
    assert (verdict.stop is not None) == (action == "stop")


def test_a_run_that_collapses_again_and_again_is_stopped() -> None:
    guard = Guard(GuardConfig(collapse="rollback"), NAMES)
    guard.judge(EVEN, 0.5)
    for _ in range(MOST_ROLLBACKS):
        assert guard.judge(CHAIRS, 0.4).rollback
    verdict = guard.judge(CHAIRS, 0.4)
    assert not verdict.rollback
    assert verdict.stop is not None


def test_the_threshold_of_a_starved_class_is_lowered_to_its_floor_and_no_other() -> None:
    config = GuardConfig(starvation="lower", starved_epochs=2, lower_by=0.5, lowest=0.3)
    guard = Guard(config, NAMES)
    assert guard.judge(NO_LAMP, 0.5).events == ()
    assert guard.judge(NO_LAMP, 0.5).events[0]["action"] == "lower"
    assert guard.ease.tolist() == [1.0, 1.0, 0.5, 1.0]
    guard.judge(NO_LAMP, 0.5)
    assert guard.ease.tolist() == pytest.approx([1.0, 1.0, 0.3, 1.0])
    assert guard.judge(EVEN, 0.5).events == ()
    assert guard.ease.tolist() == pytest.approx([1.0, 1.0, 0.3, 1.0])


def test_starvation_is_only_reported_unless_asked_for_more() -> None:
    guard = Guard(GuardConfig(starved_epochs=1), NAMES)
    assert guard.judge(NO_LAMP, 0.5).events[0]["action"] == "none"
    assert torch.equal(guard.ease, torch.ones(4))


def test_a_run_stops_where_its_score_no_longer_rises() -> None:
    guard = Guard(GuardConfig(patience=2), NAMES)
    stops = [guard.judge(EVEN, score).stop is not None for score in (0.5, 0.6, 0.6, 0.7, 0.7, 0.6)]
    assert stops == [False, False, False, False, False, True]


def test_a_guard_goes_on_where_it_was() -> None:
    config = GuardConfig(collapse="rollback", starvation="lower", starved_epochs=1, patience=4)
    whole, begun = Guard(config, NAMES), Guard(config, NAMES)
    steps = [(EVEN, 0.5), (CHAIRS, 0.4), (NO_LAMP, 0.6), (CHAIRS, 0.3), (EVEN, 0.5), (CHAIRS, 0.5)]
    expected = [whole.judge(*step) for step in steps]
    found = []
    for step in steps:
        stored = io.BytesIO()
        torch.save(begun.state_dict(), stored)
        stored.seek(0)
        begun = Guard(config, NAMES)
        begun.load_state_dict(torch.load(stored, weights_only=True))
        found.append(begun.judge(*step))
    assert found == expected


def adapted(model: CrossModalModel, **sections: Any) -> AdaptTask:
    """A task of which every object counts."""
    config = adapt_config(
        **{"pseudo_labels": {"threshold": 0.0}, "guard": {"collapse": "rollback"}} | sections
    )
    classifier = build_classifier(copy.deepcopy(model), list(CLASSES), config.data.templates)
    return AdaptTask(classifier, model.spec, config, classes=list(CLASSES))


def look(task: AdaptTask) -> None:
    for seed in range(3):
        task.losses(raw_batch(8, captions=False, seed=seed), torch.Generator().manual_seed(seed))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_rolled_back_task_has_its_healthy_teacher_again(model: CrossModalModel) -> None:
    task = adapted(model)
    task.guard.judge(health(*[1 / len(CLASSES)] * len(CLASSES)), 0.5)
    healthy = {name: value.clone() for name, value in task.teacher.module.state_dict().items()}
    for module in (task.teacher.module, task.bare_student):
        with torch.no_grad():
            # All objects go to one class: its embedding is where they are, the others' opposite.
            seen = module.predict(*_inputs(task)).image_embed.mean(dim=0)
            module.class_embed.copy_(torch.stack([seen, *[-seen] * (len(CLASSES) - 1)]))
    look(task)
    end = task.finish_epoch()
    assert end.rolled_back
    assert end.events[0]["kind"] == "collapse"
    assert CLASSES[0] in end.events[0]["says"]
    for module in (task.teacher.module, task.bare_student):
        state = module.state_dict()
        assert all(torch.equal(state[name], value) for name, value in healthy.items())


def _inputs(task: AdaptTask) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = task.augment(raw_batch(8, captions=False), rng())
    return pairs.image_weak.flatten(0, 1), pairs.points_weak.flatten(0, 1)


def test_an_epoch_ends_with_its_scores_its_health_and_a_row_for_each_object(
    model: CrossModalModel,
) -> None:
    task = adapted(model)
    look(task)
    end = task.finish_epoch()
    assert end.votes is not None
    assert end.votes.num_rows == 3 * 8
    assert end.votes["image_selected"].to_pylist() == [True] * 24
    assert end.metrics["health/confident"] == 1.0
    assert {SCORE, "selection/agreement", "selection/information"} <= end.metrics.keys()
    # Two views of each object make an opinion stable or not; one epoch makes none persistent.
    assert "selection/stability" in end.metrics
    assert "selection/persistence" not in end.metrics
    agreed = [
        row["image_class"] == row["point_class"]
        for row in end.votes.select(["image_class", "point_class"]).to_pylist()
    ]
    assert end.metrics["selection/agreement"] == pytest.approx(sum(agreed) / 24)

    look(task)
    again = task.finish_epoch()
    # Nothing has moved, so the teacher has not changed its mind.
    assert again.metrics["selection/persistence"] == 1.0
    assert again.metrics["health/flips"] == 0.0
    teachers = [name for name in VOTES_SCHEMA.names if not name.startswith("student")]
    assert again.votes is not None
    assert again.votes.select(teachers) == end.votes.select(teachers)
    assert task.finish_epoch().votes is None


def test_a_lowered_threshold_lets_a_class_in(model: CrossModalModel) -> None:
    task = adapted(model, pseudo_labels={"threshold": 0.85})
    # Confidence of four classes is at least 1/4, and of a fresh model not much more.
    look(task)
    before = task.finish_epoch()
    assert before.votes is not None
    assert not any(before.votes["image_selected"].to_pylist())
    favoured = before.votes["image_label"].to_pylist()[0]
    task.guard.ease[favoured] = 0.1
    look(task)
    after = task.finish_epoch()
    assert after.votes is not None
    selected = after.votes["image_selected"].to_pylist()
    expected = [label == favoured for label in after.votes["image_label"].to_pylist()]
    assert selected == expected
