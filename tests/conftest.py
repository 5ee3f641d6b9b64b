"""What every test relies on: one thread, seeded examples, and a Ray cluster for those that ask."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything imports Ray, which reads them once.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A report waits for the controller's next look at the workers: every two seconds by default.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"

import pytest
import torch
from hypothesis import HealthCheck, settings

from crossmost_ray.models.classifier import CrossModalModel
from tests.synthetic import fresh_model

# With torch's default threads, small tensors on a loaded machine take thirty times as long.
torch.set_num_threads(1)

settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def model() -> CrossModalModel:
    """A small model with fresh weights. Shared: a test that changes it copies it first."""
    return fresh_model()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of four CPUs on this machine, for all tests of a session."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
