"""Which models of a measurement are compared with which."""

from __future__ import annotations

from crossmost_ray.evaluation.counts import MOST_COMPARED, compared


def test_few_models_are_all_compared_and_of_many_each_with_the_first() -> None:
    assert compared(["a"]) == []
    assert compared(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    few = [f"model {k}" for k in range(MOST_COMPARED)]
    assert len(compared(few)) == MOST_COMPARED * (MOST_COMPARED - 1) // 2
    many = [*few, "one more"]
    assert compared(many) == [(few[0], model) for model in many[1:]]
