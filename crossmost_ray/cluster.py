"""The way to the cluster, for every job."""

from __future__ import annotations

import logging
import os

import ray

# Set before Ray starts; a user's own setting wins.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
}


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
        # RAY_AUTH_MODE stays as it is: left alone, Ray makes a token for a cluster of its own; told
        # "token", it expects to find one, and its server dies on a fresh machine.
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
