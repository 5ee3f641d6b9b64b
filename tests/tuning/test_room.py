"""How many trials a cluster has room for, and that what they ask for always fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ClusterConfig
from crossmost_ray.tuning.room import concurrent_trials, driver_cpus, trial_cluster


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        ([{"CPU": 2}], {}, 2),
        ([{"CPU": 1}], {}, 1),
        ([{"CPU": 0.5}], {}, 1),
        ([{"CPU": 8}], {"num_workers": 2}, 4),
        ([{"CPU": 8}], {"num_workers": (1, 3)}, 2),
        ([{"CPU": 1}], {"cpus_per_worker": 1 / 3}, 3),
        # A worker needs two CPUs of one node.
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, 2),
        ([{"CPU": 0}, {"CPU": 4}, {"CPU": 4}], {"num_workers": 4, "cpus_per_worker": 2}, 1),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 2, "GPU": 8}], {"use_gpu": True, "num_workers": 2}, 5),
        ([{"CPU": 64}], {"use_gpu": True}, 1),
    ],
)
def test_concurrency_follows_from_the_cluster(
    nodes: list[dict[str, float]], asked: dict[str, object], expected: int
) -> None:
    assert concurrent_trials(nodes, ClusterConfig(**asked)) == expected


def test_no_more_run_at_once_than_asked_and_than_fit() -> None:
    cluster = ClusterConfig()
    assert concurrent_trials([{"CPU": 8}], cluster, at_most=3) == 3
    assert concurrent_trials([{"CPU": 2}], cluster, at_most=3) == 2


@given(
    cpus=st.lists(st.integers(1, 128), min_size=1, max_size=5),
    num_workers=st.integers(1, 8),
    each=st.floats(0.05, 8).map(lambda value: round(value, 2)),
)
def test_drivers_and_workers_of_all_trials_fit_together(
    cpus: list[int], num_workers: int, each: float
) -> None:
    cluster = ClusterConfig(num_workers=num_workers, cpus_per_worker=each)
    at_once = concurrent_trials([{"CPU": count} for count in cpus], cluster)
    slots = sum(int(count / each + 1e-6) for count in cpus)
    if slots < num_workers:
        return  # not even one fits, which is refused elsewhere
    asked = trial_cluster(cluster).cpus_per_worker
    driver = driver_cpus(cluster)
    assert driver > 0
    # Where Ray puts all drivers on the node with the fewest workers, they still fit beside those
    # of that node, five to a worker.
    assert asked + 5 * driver <= each + 2e-4
    assert at_once * (num_workers * asked + driver) <= sum(cpus) + 1e-3
