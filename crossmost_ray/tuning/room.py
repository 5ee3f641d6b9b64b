"""The cluster's nodes in, how many trials run at once out, such that none waits for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from crossmost_ray.config import ClusterConfig

WORKER_SHARE = 0.95
"""What a trial's workers ask of the CPUs that they are given. Tune asks for a trial's driver, too,
and it has to ask for something: two trials of one worker each, and of one CPU each, would fill two
CPUs to the last, and the second driver would find no place beside the first one's worker."""

DRIVER_SHARE = 0.01
"""What a trial's driver asks of one worker's CPUs. What the workers leave has room for five, for
Ray may put several trials' drivers on one node."""

PRECISION = 4
"""Digits that Ray counts CPUs to."""


def trial_cluster(cluster: ClusterConfig) -> ClusterConfig:
    """Gives what a trial asks of the cluster: its workers make room for its driver."""
    cpus = round(WORKER_SHARE * cluster.cpus_per_worker, PRECISION)
    return dataclasses.replace(cluster, cpus_per_worker=cpus)


def driver_cpus(cluster: ClusterConfig) -> float:
    """Gives the CPUs that a trial's driver asks for; Tune does not start one that asks for none."""
    return max(round(DRIVER_SHARE * cluster.cpus_per_worker, PRECISION), 10**-PRECISION)


def concurrent_trials(
    nodes: Iterable[Mapping[str, float]], cluster: ClusterConfig, *, at_most: int | None = None
) -> int:
    """Counts the trials that find room for all their workers at once; at least one.

    Tune knows nothing of the workers that a trial starts. Were there more trials than room, the
    last ones' drivers would wait for workers until others have finished, and count as running.

    Args:
        nodes: `CPU` and `GPU` of each living node.
        cluster: What a run asks for; of an elastic one, the most.
        at_most: More than these were not asked for.
    """
    workers = 0
    for node in nodes:
        # A worker lies on one node: two halves of a CPU on two nodes are of no use to it. The
        # small number is for quotients such as that of 1 by a third, which end below 3.
        here = int(node.get("CPU", 0.0) / cluster.cpus_per_worker + 1e-6)
        if cluster.use_gpu:
            here = min(here, int(node.get("GPU", 0.0)))
        workers += here
    room = max(workers // cluster.most_workers, 1)
    return room if at_most is None else min(room, at_most)
