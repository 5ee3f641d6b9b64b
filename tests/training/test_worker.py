"""The workers' loop, as far as it can be asked without Ray."""

from __future__ import annotations

import itertools

import pytest
import ray.train
import ray.train.collective
from ray.train.v2.api.preemption import PreemptionInfo

from crossmost_ray.training import worker
from crossmost_ray.training.worker import LOOK_EVERY_S


@pytest.mark.parametrize("first_step", [0, 5_000])
@pytest.mark.parametrize("step_s", [0.01, 0.5, 20.0])
def test_notices_are_looked_for_every_few_seconds_in_each_life_of_a_run(
    monkeypatch: pytest.MonkeyPatch, first_step: int, step_s: float
) -> None:
    now = 100.0
    looks: list[float] = []
    told: list[PreemptionInfo | None] = []

    def look() -> PreemptionInfo | None:
        looks.append(now)
        return told[-1] if told else None

    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    monkeypatch.setattr(ray.train, "get_preemption_info", look)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: value)

    notice = worker._Notice(first_step)
    step = first_step
    while now < 100 + 20 * max(LOOK_EVERY_S, step_s):
        # The first step is a slow one: everything is set up on the way.
        now += step_s if step > first_step else 10 * step_s
        assert notice.given(step) == 0
        step += 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert max(gaps) < 1.5 * max(LOOK_EVERY_S, step_s)
    assert 10 < len(looks) < 30, "to look is a meeting"

    # It is news once; a second node is news again.
    for nodes in ({"a": [0]}, {"a": [0], "b": [1]}):
        told.append(PreemptionInfo(None, nodes))
        given = []
        for _ in range(2 * notice.next_look - 2 * step + 2):
            now += step_s
            given.append(notice.given(step))
            step += 1
        assert [count for count in given if count] == [len(nodes)]
