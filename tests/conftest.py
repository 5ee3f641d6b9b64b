"""What every test relies on: one thread, seeded examples, and a Ray cluster for those that ask."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

# Before anything imports Ray, which reads them once.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A report waits for the controller's next look at the workers: every two seconds by default.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
# As the jobs have it: idle processes stay for the next test. Ray wants these in small letters.
os.environ |= {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
os.environ |= {"RAY_num_workers_soft_limit": "6"}

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


FIRST = (
    # It connects to clusters of its own, and a process can't while it holds that of `ray_cluster`.
    "jobs/test_nodes.py",
    # Those that take longest: of several processes, none shall begin one when the others are done.
    "jobs/test_sweep.py",
    "jobs/test_adapt.py",
    "jobs/test_train.py",
    "jobs/test_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files named above first, then the others on Ray; the rest stays as it is."""

    def place(item: pytest.Item) -> int:
        named = (k for k, name in enumerate(FIRST) if item.path.as_posix().endswith(name))
        return next(named, len(FIRST) + ("ray" not in item.keywords))

    items.sort(key=place)


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


class ObjectStore:
    """A store that speaks S3, on this machine. Some uploads it can be told to refuse."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.inner = DomainDispatcherApplication(create_backend_app)
        self.to_refuse: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        refused = [part for part in self.to_refuse if part in environ["PATH_INFO"]]
        if environ["REQUEST_METHOD"] == "PUT" and refused:
            self.to_refuse.remove(refused[0])
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>not now</Message></Error>"]
        return self.inner(environ, start_response)


@pytest.fixture(scope="session")
def object_store() -> ObjectStore:
    return ObjectStore()


@pytest.fixture(scope="session")
def s3(object_store: ObjectStore) -> Iterator[str]:
    """Address of a folder in a bucket, its name left open: `s3.format("folder")`."""
    import boto3
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, object_store, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    ).create_bucket(Bucket="shelf")
    yield (
        "s3://testing:testing@shelf/{}"
        f"?endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"
    )
    server.shutdown()
