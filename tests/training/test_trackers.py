"""What trackers are told of a run, read back from the files and stores that they wrote."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.events import read_events
from crossmost_ray.training.trackers import follow, wandb
from crossmost_ray.training.trackers.follow import (
    LEDGER_NAME,
    TrackerCallback,
    check_trackers,
    log_summary,
)
from crossmost_ray.training.trackers.tracker import numbers_of, parameters_of, top1_numbers
from crossmost_ray.training.worker import HISTORY_NAME

CONFIG = {
    "name": "furniture",
    "trackers": ["mlflow"],
    "data": {"shards": "s3://key:secret@shelf/a?token=secret", "classes": ["chair", "table"]},
    "optim": {"epochs": 3, "lr": 0.5},
    "cluster": {"num_workers": 1, "env": {"TOKEN": "secret"}},
    "seed": 0,
    "mode": None,
}

SUMMARY = {
    "splits": {
        "transductive": {
            "zero-shot": {
                "objects": 9,
                "image": {"top1": 40.0, "top5": 90.0},
                "fused": {"top1": 50.0},
                "gain": {"fused": {"low": 1.0}},
                "label_free": {"agreement": 30.0},
            },
            "teacher": {"fused": {"top1": 60.5}},
        },
        "test+noise-3": {"teacher": {"fused": {"top1": 12.5}}},
        "open-set": {"teacher": {"objects": 4, "confident_percent": 3.0, "label_free": {}}},
    }
}

TOP1 = {
    "eval/transductive/zero-shot/image/top1": 40.0,
    "eval/transductive/zero-shot/fused/top1": 50.0,
    "eval/transductive/teacher/fused/top1": 60.5,
    "eval/test+noise-3/teacher/fused/top1": 12.5,
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hides the developer's own keys and servers, and puts back what trackers set."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its session keeps the settings that it began with
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]


def epoch_row(epoch: int, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * (epoch + 1),
        "loss": 2.0 - epoch,
        "selection/score": 0.25 * epoch,
        "seconds": 1.5,
        **more,
    }


def report(callback: TrackerCallback, *rows: dict[str, Any]) -> None:
    """Does what Ray and rank 0 do: the controller hears of a row, then the row is written down."""
    run = callback.followers.run
    for row in rows:
        callback.after_report(None, [row, {"loss": -1.0, "seconds": 9.0}], None)
        if "seconds" in row:
            run.write(
                HISTORY_NAME, (run.read(HISTORY_NAME) or b"") + json.dumps(row).encode() + b"\n"
            )


def events_in(data: bytes) -> Iterator[Event]:
    """Reads the records of an event file: length, checksum, content, checksum."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += 12 + length + 4


def tensorboard_curves(run: Store) -> dict[str, list[tuple[int, float]]]:
    curves = defaultdict(list)
    folder = run.child("tensorboard")
    for name in folder.names():
        assert name.startswith("events.out.tfevents.")
        for event in events_in(folder.read(name)):
            for value in event.summary.value:
                curves[value.tag].append((event.step, value.simple_value))
    return dict(curves)


def test_tensorboard_has_each_epoch_once_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "run"))
    within = {"epoch": 1, "step": 15, "loss": 7.0}
    report(TrackerCallback(run, (), CONFIG), epoch_row(0), within)
    resumed = TrackerCallback(run, (), CONFIG)
    report(resumed, epoch_row(0), epoch_row(1), epoch_row(2))
    log_summary(run, (), SUMMARY)
    curves = tensorboard_curves(run)
    assert curves["loss"] == [(10, 2.0), (20, 1.0), (30, 0.0)]
    assert curves["selection/score"] == [(10, 0.0), (20, 0.25), (30, 0.5)]
    assert "step" not in curves
    assert {tag: curves[tag] for tag in TOP1} == {
        tag: [(30, pytest.approx(value))] for tag, value in TOP1.items()
    }


def test_what_was_logged_and_never_counted_is_hidden_after_a_restart(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "run"))
    callback = TrackerCallback(run, (), CONFIG)
    report(callback, epoch_row(0))
    counted = run.read(LEDGER_NAME)
    report(callback, epoch_row(1))
    run.write(LEDGER_NAME, counted)  # killed in between
    report(TrackerCallback(run, (), CONFIG), epoch_row(1))
    folder = run.child("tensorboard")
    starts = [
        event.step
        for name in folder.names()
        for event in events_in(folder.read(name))
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [11], "TensorBoard forgets what earlier files have from this step on"


def test_tensorboard_of_a_run_in_a_store_of_objects(s3: str) -> None:
    run = Store(s3.format("tracked"))
    callback = TrackerCallback(run, (), CONFIG)
    report(callback, epoch_row(0))
    assert tensorboard_curves(run)["loss"] == [(10, 2.0)], "there after each epoch"
    report(callback, epoch_row(1), epoch_row(2))
    assert tensorboard_curves(run)["loss"] == [(10, 2.0), (20, 1.0), (30, 0.0)]


class Shaky:
    """A tracker whose server is away now and then."""

    away = False
    seen: list[tuple[int, dict[str, float]]]

    def __init__(self, run: Store, enrolment: Any) -> None:
        self._answer()

    def _answer(self) -> None:
        if Shaky.away:
            raise RuntimeError("connection refused\nand a traceback")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._answer()
        Shaky.seen.append((step, numbers))

    def summarize(self, step: int, numbers: dict[str, float]) -> None:
        self.log(step, numbers)

    def finish(self) -> None:
        self._answer()


def test_a_tracker_that_is_away_ends_nothing_and_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(follow.OPEN, "wandb", Shaky)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Shaky.seen = []
    run = Store(str(tmp_path / "run"))
    callback = TrackerCallback(run, ["wandb"], CONFIG)
    report(callback, epoch_row(0))
    monkeypatch.setattr(Shaky, "away", True)
    report(callback, epoch_row(1), epoch_row(2))
    assert [event["event"] for event in read_events(run)] == ["tracker"], "said once"
    assert read_events(run)[0]["tracker"] == "wandb"
    assert "(connection refused)" in read_events(run)[0]["says"]
    assert len(tensorboard_curves(run)["loss"]) == 3, "the others go on"
    monkeypatch.setattr(Shaky, "away", False)
    log_summary(run, ["wandb"], SUMMARY)
    log_summary(run, ["wandb"], SUMMARY)  # as after --resume
    assert [step for step, _ in Shaky.seen] == [10, 20, 30, 30]
    assert Shaky.seen[-1][1] == TOP1
    assert json.loads(run.read(LEDGER_NAME))["wandb"]["finished"]


def test_mlflow_has_the_run_with_its_config_curves_and_accuracies(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = Store(str(tmp_path / "run"))
    report(TrackerCallback(run, ["mlflow"], CONFIG), epoch_row(0))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/mlruns/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'crossmost_ray'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "furniture"
    assert found.info.status == "RUNNING"
    assert found.data.params == {
        name: "null" if value is None else str(value)
        for name, value in parameters_of(CONFIG).items()
    }
    changed = CONFIG | {"cluster": {"num_workers": 2}}
    report(TrackerCallback(run, ["mlflow"], changed), epoch_row(0), epoch_row(1), epoch_row(2))
    log_summary(run, ["mlflow"], SUMMARY)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(10, 2.0), (20, 1.0), (30, 0.0)]
    for name, value in TOP1.items():
        assert found.data.metrics[name.replace("+", "_")] == value
    assert read_events(run) == []
    assert not (tmp_path / "mlruns").exists()

    ledger = json.loads(run.read(LEDGER_NAME))
    ledger["mlflow"]["id"] = "0" * 32
    run.write(LEDGER_NAME, json.dumps(ledger))
    with pytest.raises(ConfigError, match=r"does not take the run 'furniture' .*not found"):
        TrackerCallback(run, ["mlflow"], CONFIG)


def test_an_mlflow_server_that_is_away_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 does not take .*leave mlflow out"):
        TrackerCallback(Store(str(tmp_path / "run")), ["mlflow"], CONFIG)


BLOCK = 32768


def wandb_records(path: Path) -> list[Any]:
    """Reads the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    records, part, place = [], b"", 7
    while place + 7 <= len(data):
        room = BLOCK - place % BLOCK
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0:
            place += room
            continue
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


def item_values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def histories(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [
        item_values(record.history.item)
        for file in files
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_offline_leaves_files_with_config_curves_and_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Store(str(tmp_path / "run"))
    callback = TrackerCallback(run, ["wandb"], CONFIG)
    report(callback, epoch_row(0))
    (first,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 10  # by default it takes 15 s
    while not histories([first]) and time.monotonic() < until:
        time.sleep(0.1)
    assert [row["loss"] for row in histories([first])] == [2.0], "there if the process is killed"
    report(callback, epoch_row(1), epoch_row(2))
    log_summary(run, ["wandb"], SUMMARY)
    assert read_events(run) == []
    name = json.loads(run.read(LEDGER_NAME))["wandb"]["id"]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{name}.wandb"}, "one run, in parts"
    records = [record for file in files for record in wandb_records(file)]
    heads = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(head.run_id, head.project, head.display_name) for head in heads} == {
        (name, "crossmost_ray", "furniture")
    }
    told = item_values(heads[0].config.update)
    assert {key: told[key] for key in parameters_of(CONFIG)} == parameters_of(CONFIG)
    rows = histories(files)
    assert [(row["_step"], row["loss"]) for row in rows] == [*((10, 2.0), (20, 1.0), (30, 0.0))]
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= item_values(record.summary.update)
    assert {tag: summary[tag] for tag in TOP1} == TOP1


def test_wandb_starts_late_where_its_server_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "START_LIMIT_S", 0.5)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run = Store(str(tmp_path / "run"))
    callback = TrackerCallback(run, ["wandb"], CONFIG)
    report(callback, epoch_row(0))
    assert [event["tracker"] for event in read_events(run)] == ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    report(callback, epoch_row(1), epoch_row(2))
    assert len(read_events(run)) == 1
    rows = histories((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert [(row["_step"], row["loss"]) for row in rows] == [(10, 2.0), (20, 1.0), (30, 0.0)]


def test_wandb_wants_a_key_or_to_be_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Store(str(tmp_path))
    with pytest.raises(ConfigError, match=r"set WANDB_API_KEY .* or set WANDB_MODE=offline"):
        check_trackers(["wandb"], here)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    check_trackers(["wandb"], here)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    check_trackers(["wandb"], here)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], here)
    with pytest.raises(ConfigError, match="set WANDB_DIR to a folder"):
        check_trackers(["wandb"], Store("s3://shelf/runs"))


def test_what_can_not_be_tracked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="names comet; the trackers are mlflow, wandb"):
        check_trackers(["comet"])
    with pytest.raises(ConfigError, match=r"can't lie at s3://shelf/runs; set MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"], Store("s3://shelf/runs"))
    monkeypatch.setitem(follow.PACKAGES, "mlflow", ("json", "not_installed"))
    with pytest.raises(
        ConfigError,
        match=r"not_installed is not installed; run `pip install 'crossmost_ray\[mlflow",
    ):
        check_trackers(["mlflow"])


def test_the_controller_gets_the_settings_of_the_drivers_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    sent = pickle.dumps(TrackerCallback(Store(str(tmp_path)), (), CONFIG))
    monkeypatch.delenv("WANDB_MODE")
    report(pickle.loads(sent), epoch_row(0))
    assert os.environ["WANDB_MODE"] == "offline"


leaf = st.none() | st.booleans() | st.integers() | st.text("abc", max_size=3)
sections = st.recursive(
    leaf, lambda part: st.dictionaries(st.text("xyz", min_size=1), part, max_size=3), max_leaves=6
)


@given(st.dictionaries(st.text("xyz", min_size=1), sections))
def test_each_leaf_of_a_config_is_found_by_its_dotted_key(config: dict[str, Any]) -> None:
    found = parameters_of(config)
    for key, value in found.items():
        below: Any = config
        for part in key.split("."):
            below = below[part]
        assert below == value

    def leaves(section: dict[str, Any]) -> int:
        return sum(leaves(part) if isinstance(part, dict) else 1 for part in section.values())

    assert len(found) == leaves(config)


def test_secrets_stay_here() -> None:
    found = parameters_of(CONFIG)
    assert found["data.shards"] == "s3://shelf/a"
    assert found["data.classes"] == '["chair", "table"]'
    assert "secret" not in str(found)


def test_only_numbers_become_curves() -> None:
    row = {"step": 4, "loss": 1, "selection/score": None, "says": "no", "data/wait_share": 0.5}
    assert numbers_of(row) == {"loss": 1.0, "data/wait_share": 0.5}
    assert top1_numbers(SUMMARY) == TOP1
    assert top1_numbers({}) == {}
