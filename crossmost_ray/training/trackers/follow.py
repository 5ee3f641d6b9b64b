"""Keeps the trackers of a run up to date with its finished epochs, and outlives their failures."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ray.train.v2.api.callback import UserCallback

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.events import log_event
from crossmost_ray.training.trackers import mlflow, wandb
from crossmost_ray.training.trackers.mlflow import Mlflow
from crossmost_ray.training.trackers.tensorboard import TensorBoard
from crossmost_ray.training.trackers.tracker import (
    Enrolment,
    Tracker,
    numbers_of,
    parameters_of,
    top1_numbers,
)
from crossmost_ray.training.trackers.wandb import Wandb
from crossmost_ray.training.worker import HISTORY_NAME

LEDGER_NAME = "trackers.json"
"""What each tracker calls the run and the last step it has, in the run's folder."""

ALWAYS = "tensorboard"

OPEN: dict[str, Callable[[Store, Enrolment], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}

ENROL: dict[str, Callable[[Store, Enrolment], str]] = {
    "mlflow": Mlflow.enrol,
    "wandb": Wandb.enrol,
}

CHECK_PLACE: dict[str, Callable[[Store], None]] = {
    "mlflow": mlflow.check_place,
    "wandb": wandb.check_place,
}

PACKAGES = {
    "mlflow": ("mlflow", "sqlalchemy", "alembic", "cryptography"),
    "wandb": ("wandb",),
}
"""What the extra of each name installs. MLflow's own package leaves out what its
default place, a database, needs."""

CARRIED = ("MLFLOW_", "WANDB_")
"""Environment variables that the driver's user has set, and Ray's controller may not have."""


def check_trackers(names: Sequence[str], output: Store | None = None) -> None:
    """Refuses trackers that could not work, before any worker starts.

    Args:
        names: Values of the config key `trackers`.
        output: Where the run will lie, or its parent; without it, what depends on it is not
            checked.

    Raises:
        ConfigError: If a tracker is unknown, its package is missing, it has no key, or what it
            writes can't lie in `output`.
    """
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(
                f"`trackers` names {name}; the trackers are {', '.join(PACKAGES)} (TensorBoard's "
                "files are written in any case)"
            )
        missing = [part for part in PACKAGES[name] if importlib.util.find_spec(part) is None]
        if missing:
            raise ConfigError(
                f"`trackers` names {name}, and {' and '.join(missing)} is not installed; run "
                f"`pip install 'crossmost_ray[{name}]'`, or leave {name} out of `trackers`"
            )
        if output is not None:
            CHECK_PLACE[name](output)


def carried() -> dict[str, str]:
    """Gives the environment variables that trackers need wherever they are used."""
    return {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}


class TrackerCallback(UserCallback):
    """Shows each finished epoch in the trackers. Made by the driver, lives in Ray's controller.

    An error that escaped it would end the training.
    """

    def __init__(self, run: Store, names: Sequence[str], config: Mapping[str, Any]) -> None:
        """Makes the run known to its trackers, or finds it there again.

        Args:
            run: Its folder.
            names: Values of the config key `trackers`.
            config: The resolved config as plain values.

        Raises:
            ConfigError: As `check_trackers`, and if MLflow can't be reached.
        """
        check_trackers(names, run)
        self.names = (ALWAYS, *names)
        self.num_epochs = int(config["optim"]["epochs"])
        self.environment = carried()
        self.followers = Followers(run, self.names)
        _enrol(run, self.names, config)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Logs rank 0's row, and those that a tracker had missed while it was away."""
        row = metrics[0]
        if "seconds" not in row:
            return  # a checkpoint within an epoch
        os.environ.update(self.environment)
        last = row["epoch"] + 1 == self.num_epochs
        self.followers.deliver([*self.followers.run.read_lines(HISTORY_NAME), row], finish=last)


def log_summary(run: Store, names: Sequence[str], summary: Mapping[str, Any]) -> None:
    """Adds the accuracies of the evaluation at a run's end, and marks the run as finished.

    A tracker that fails is noted in the run's events.

    Args:
        run: Its folder.
        names: Values of the config key `trackers`; one that the run was not started with is left
            out.
        summary: The content of `metrics.json`; empty where nothing was measured.
    """
    known = _ledger(run)
    followers = Followers(run, [name for name in (ALWAYS, *names) if name in known])
    followers.deliver(run.read_lines(HISTORY_NAME), summary=top1_numbers(summary), finish=True)


class Followers:
    """The trackers of a run, each opened once there is something to tell it."""

    def __init__(self, run: Store, names: Iterable[str]) -> None:
        self.run = run
        self.names = tuple(names)
        self._open: dict[str, Tracker] = {}
        self._away: set[str] = set()

    def deliver(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        summary: Mapping[str, float] | None = None,
        finish: bool,
    ) -> None:
        """Tells each tracker what it does not have yet.

        Args:
            rows: Of all finished epochs, in order; one may be there twice.
            summary: Numbers of the end.
            finish: Whether nothing more is to come.
        """
        for name in self.names:
            try:
                self._deliver(name, rows, summary or {}, finish)
            # What the clients of other people's servers raise is not written down anywhere, and
            # whatever it is, a finished curve is not worth a training.
            except Exception as failed:  # noqa: BLE001
                self._open.pop(name, None)
                if name not in self._away:
                    reason = str(failed).partition("\n")[0] or type(failed).__name__
                    log_event(
                        self.run,
                        "tracker",
                        tracker=name,
                        says=f"{name} fails, and the run goes on without it ({reason}); what it "
                        "misses is sent once it is back",
                    )
                self._away.add(name)
            else:
                self._away.discard(name)

    def _deliver(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        summary: Mapping[str, float],
        finish: bool,
    ) -> None:
        ledger = _ledger(self.run)
        entry = ledger[name]
        for row in rows:
            step = int(row["step"])
            if step > entry["step"]:
                self._opened(name, ledger).log(step, numbers_of(row))
                entry |= {"step": step, "finished": False}
                _write_ledger(self.run, ledger)
        # An evaluation that is repeated when a run is resumed gives the same numbers again.
        mark = hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()[:16]
        if summary and mark != entry.get("summary"):
            self._opened(name, ledger).summarize(entry["step"], summary)
            entry |= {"summary": mark, "finished": False}
            _write_ledger(self.run, ledger)
        if finish and not entry["finished"]:
            self._opened(name, ledger).finish()
            del self._open[name]
            entry["finished"] = True
            _write_ledger(self.run, ledger)

    def _opened(self, name: str, ledger: Mapping[str, Any]) -> Tracker:
        if name not in self._open:
            self._open[name] = OPEN[name](self.run, _enrolment(ledger, name))
        return self._open[name]


def _enrol(run: Store, names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Writes down what each tracker calls the run; one that is new begins at step 0."""
    ledger = _ledger(run) | {"name": config["name"], "parameters": parameters_of(config)}
    for name in names:
        entry = ledger.setdefault(name, {"id": None, "step": 0, "finished": False})
        if name in ENROL:
            entry["id"] = ENROL[name](run, _enrolment(ledger, name))
    _write_ledger(run, ledger)


def _enrolment(ledger: Mapping[str, Any], name: str) -> Enrolment:
    entry = ledger[name]
    return Enrolment(ledger["name"], ledger["parameters"], entry["id"], entry["step"])


def _ledger(run: Store) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(run.read(LEDGER_NAME) or b"{}")
    return stored


def _write_ledger(run: Store, ledger: Mapping[str, Any]) -> None:
    run.write(LEDGER_NAME, json.dumps(ledger, indent=1))
