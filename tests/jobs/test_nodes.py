"""Nodes that are announced to go, that go, and that come: on a cluster of several raylets."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from crossmost_ray.config import EvaluateConfig, parse_config
from crossmost_ray.evaluation.measure import evaluate
from crossmost_ray.storage import Store
from crossmost_ray.training import trainer, worker
from crossmost_ray.training.checkpoint import checkpoint_name, list_checkpoints, load_state
from crossmost_ray.training.events import read_events
from crossmost_ray.training.trainer import train
from crossmost_ray.training.votes import votes_name
from tests.jobs.runs import adapt_config
from tests.synthetic import tiny_model, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

HEAD = "127.0.0.9"
"""Not 127.0.0.1, which a driver turns into the machine's own address."""

PATIENCE_S = 180.0

GRACE_S = 15.0
"""Between the notice and the end of a node."""

EPOCHS = 28


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes of one CPU each, every one with an address of its own."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    monkeypatch.setattr(trainer, "GROWTH_CHECK_S", 5.0)
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "node_ip_address": HEAD,
            "object_store_memory": 150_000_000,
            "dashboard_host": HEAD,
        },
    )
    for place in (2, 3):
        add_node(made, place)
    made.wait_for_nodes()
    # The driver belongs to the head, which stays.
    ray.init(address=made.address, log_to_driver=False, _node_ip_address=HEAD)
    yield made
    ray.shutdown()
    made.shutdown()


def add_node(cluster: Cluster, place: int) -> Any:
    return cluster.add_node(
        num_cpus=1, node_ip_address=f"127.0.0.{place}", object_store_memory=150_000_000
    )


def wait_for(what: Callable[[], Any], doing: threading.Thread) -> Any:
    """Waits until something is there, as long as the run goes on."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert doing.is_alive(), "the run has ended"
        assert time.monotonic() < deadline, "waited for three minutes"
        time.sleep(0.1)
    return found


def announce_end(cluster: Cluster, node: Any, seconds: float) -> None:
    """Does what a cloud's notice of preemption does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, why_not = GcsClient(address=cluster.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the test takes it away",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why_not


def test_a_run_goes_on_with_fewer_nodes_and_grows_again(cluster: Cluster, tmp_path: Path) -> None:
    # Steps enough for all that is to happen on the way, and two pairs left over in each epoch.
    write_shards(tmp_path / "shards", num_objects=129, num_views=2)
    tiny_model(tmp_path / "model")
    config = adapt_config(
        tmp_path,
        data={"num_views": 2},
        optim={"epochs": EPOCHS},
        cluster={"num_workers": [1, 2]},
        keep_checkpoints=1,
    )
    run = Store(config.output).child(config.name)
    failed: list[BaseException] = []

    def go() -> None:
        try:
            train(config)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    doing = threading.Thread(target=go)
    doing.start()

    def history() -> list[dict[str, float]]:
        return [json.loads(line) for line in (run.read(worker.HISTORY_NAME) or b"").splitlines()]

    def has_told(event: str) -> dict[str, Any] | None:
        return next((told for told in read_events(run) if told["event"] == event), None)

    wait_for(history, doing)
    assert history()[0]["num_workers"] == 2
    steps_per_epoch = int(history()[0]["step"])

    # The notice: a checkpoint within the grace time, wherever in the epoch that is.
    node = next(node for node in cluster.worker_nodes if node.node_ip_address == "127.0.0.3")
    announced = time.monotonic()
    announce_end(cluster, node, seconds=GRACE_S)
    noticed = int(wait_for(lambda: has_told("preemption"), doing)["step"])
    wait_for(lambda: checkpoint_name(noticed) in list_checkpoints(run), doing)
    assert time.monotonic() - announced < GRACE_S
    state = load_state(run.child(checkpoint_name(noticed)))
    assert state["done"] == noticed % steps_per_epoch
    # Each object's votes by its views: all workers', each once.
    sums = state["task"]["votes"].get("sums", torch.zeros(1, 1))
    assert sums[:, -1].sum() == state["done"] * config.data.batch_size
    cluster.remove_node(node, allow_graceful=False)

    wait_for(lambda: history()[-1]["num_workers"] == 1, doing)
    new = add_node(cluster, 4)
    wait_for(lambda: history()[-1]["num_workers"] == 2, doing)
    # Another one goes without a word.
    cluster.remove_node(new, allow_graceful=False)
    doing.join(2 * PATIENCE_S)
    assert not doing.is_alive()
    assert not failed, failed

    # Nothing was left out or done twice, and a batch stayed a batch.
    rows = history()
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    assert [row["step"] for row in rows] == [steps_per_epoch * (k + 1) for k in range(EPOCHS)]
    # The one worker took up the epoch that two had begun.
    assert [row["num_workers"] for row in rows].index(1) == noticed // steps_per_epoch
    assert rows[-1]["num_workers"] == 1
    told = read_events(run)
    events = [event for event in told if event["event"] in ("started", "preemption")]
    assert [(event["event"], event.get("num_workers")) for event in events] == [
        ("started", 2),
        ("preemption", None),
        ("started", 1),
        ("started", 2),
        ("started", 1),
    ]
    assert events[2]["step"] == noticed
    assert "workers lost" in [event["event"] for event in told[told.index(events[3]) :]]
    for epoch in range(EPOCHS):
        ids = pq.read_table(run.local / votes_name(epoch))["object_id"].to_pylist()
        assert len(ids) == len(set(ids))
    assert len(list_checkpoints(run)) <= 2


def test_a_node_that_goes_during_evaluation_costs_no_object(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", num_objects=240, num_files=12)
    tiny_model(tmp_path / "model")
    config = parse_config(
        EvaluateConfig,
        {
            "name": "measured",
            "models": {"it": str(tmp_path / "model")},
            "splits": {"all": str(tmp_path / "shards")},
            "num_points": 128,
            "output": str(tmp_path / "runs"),
            "evaluation": {"num_actors": 2, "num_views": 4, "point_samples": 20},
        },
        "the test",
    )
    done: list[Any] = []
    doing = threading.Thread(target=lambda: done.append(evaluate(config)))
    doing.start()
    folder = tmp_path / "runs/measured/predictions/all"
    wait_for(lambda: list(folder.glob("part-*.parquet")), doing)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    doing.join(PATIENCE_S)
    assert not doing.is_alive()
    ((_, summary),) = done
    assert summary["splits"]["all"]["it"]["objects"] == 240
    ids = pq.read_table(folder)["object_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 240
