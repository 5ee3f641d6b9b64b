"""The way to the cluster, for every job."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

import ray
from ray._private.utils import read_ray_address

logger = logging.getLogger(__name__)

KNOCK_S = 3.0

# Set before Ray starts; a user's own setting wins.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    # Of a cluster that a job starts itself. Ray ends processes that were idle for a second, down to
    # one for each CPU: the stream's would be started anew in every epoch, which on two CPUs takes
    # as long as training does.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_num_workers_soft_limit": "6",
}

# Of processes that train or predict, read by glibc as they start: what they free they keep, in one
# place for all threads, for the tensors of the next step. Otherwise large pieces go back to the
# kernel at once and come anew page by page, which on a CPU is some percent of the work.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
}


def worker_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Gives the environment of a process that trains or predicts; what a user set, `env`, wins."""
    return {**KEEP_FREED_MEMORY, **env}


def connect() -> None:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine."""
    if ray.is_initialized():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Notes on encodings and execution plans, on the driver's terminal; warnings stay.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        if (gone := _gone_cluster()) is not None:
            logger.warning("no cluster answers at %s any more: starting one of our own", gone)
        # RAY_AUTH_MODE stays as it is: left alone, Ray makes a token for a cluster of its own; told
        # "token", it expects to find one, and its server dies on a fresh machine.
        ray.init(
            address=None if gone is None else "local",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


def _gone_cluster() -> str | None:
    """Finds the address of a cluster on this machine that was killed: Ray keeps it in a file, and
    would knock there for ten minutes."""
    address: str | None = read_ray_address(None)
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    except (OSError, ValueError):
        return address
    return None
