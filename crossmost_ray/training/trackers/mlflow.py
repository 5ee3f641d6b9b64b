"""Curves to an MLflow server, or to a database in the run's folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.trackers.tracker import PROJECT, Enrolment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"

FOLDER = "mlruns"
DATABASE = "mlflow.db"
"""MLflow's folder of plain files would need no database; MLflow 3 refuses to open one."""

DEFAULTS = {
    # By default a server that is away is asked for ten minutes, and the training waits.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables of MLflow that are set here where the user has not set them."""


def check_place(output: Store) -> None:
    """Refuses a place where the default database can't lie.

    Raises:
        ConfigError: If the run lies in a store of objects, and no server is named.
    """
    if URI_VARIABLE not in os.environ and output.local is None:
        raise ConfigError(
            f"`trackers` names mlflow, whose default is a database in the run's folder, and that "
            f"can't lie at {output}; set {URI_VARIABLE} to a server's address, such as "
            "http://host:5000"
        )


class Mlflow:
    """A run of MLflow."""

    def __init__(self, run: Store, enrolment: Enrolment) -> None:
        assert enrolment.id is not None
        self.client = _client(run)
        self.id = enrolment.id
        self.client.update_run(self.id, status="RUNNING")

    @staticmethod
    def enrol(run: Store, enrolment: Enrolment) -> str:
        """Makes the run, or finds it again.

        Returns:
            Its id.

        Raises:
            ConfigError: If MLflow can't be reached, or does not know the run any more.
        """
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        place = os.environ.get(URI_VARIABLE) or f"{run}/{FOLDER}"
        try:
            client = _client(run)
            if enrolment.id is not None:
                found: str = client.get_run(enrolment.id).info.run_id
                return found
            name = os.environ.get(EXPERIMENT_VARIABLE) or PROJECT
            experiment = client.get_experiment_by_name(name)
            made: str = client.create_run(
                client.create_experiment(name, artifact_location=_artifacts(run))
                if experiment is None
                else experiment.experiment_id,
                run_name=enrolment.name,
            ).info.run_id
            params = [
                Param(_name(key), "null" if value is None else str(value))
                for key, value in enrolment.parameters.items()
            ]
            client.log_batch(made, params=params)
        except (MlflowException, OSError) as failed:
            reason = str(failed).partition("\n")[0]
            raise ConfigError(
                f"MLflow at {place} does not take the run '{enrolment.name}' ({reason}); mend "
                f"{URI_VARIABLE}, or leave mlflow out of `trackers`"
            ) from None
        return made

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to each curve, all of them in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def summarize(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds metrics of one point."""
        self.log(step, numbers)

    def finish(self) -> None:
        """Marks the run as finished."""
        self.client.set_terminated(self.id, "FINISHED")


def _client(run: Store) -> MlflowClient:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # Not above: MLflow is optional, takes seconds to import, and reads these on the way.
    from mlflow.tracking import MlflowClient

    uri = os.environ.get(URI_VARIABLE)
    if not uri:
        assert run.local is not None
        folder = run.local / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder / DATABASE}"
    return MlflowClient(tracking_uri=uri)


def _artifacts(run: Store) -> str | None:
    """Where a database of our own would put files; None leaves that to the server.

    MLflow's default for a database is the working directory.
    """
    return None if URI_VARIABLE in os.environ else f"{run}/{FOLDER}/artifacts"


def _name(name: str) -> str:
    """Writes a name with the characters that MLflow allows."""
    return re.sub(r"[^/\w.\- ]", "_", name)
