"""A trial's settings in; a whole training run out, whose every epoch Tune hears of."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.tune

from crossmost_ray.cluster import ENVIRONMENT
from crossmost_ray.config import AdaptConfig
from crossmost_ray.storage import Store
from crossmost_ray.tuning.room import trial_cluster
from crossmost_ray.tuning.space import trial_config

TRIALS_FOLDER = "trials"

STOP_NAME = "stop"
"""File in a trial's folder by which it is asked to end; it removes the file when it has."""

STOP_LIMIT_S = 60.0
"""How long is waited for that."""

EPOCHS = "epochs_done"
"""Key of a report to Tune: finished epochs, those before an interruption included. What Tune itself
counts begins anew with every start of a trial."""

OF_EPOCHS = "epochs_planned"
SECONDS = "seconds_trained"


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trials of a sweep share; is sent to where they run."""

    values: dict[str, Any]
    """The run that is varied, spelled out."""

    folder: Store
    """Takes the trials' folders."""

    history: str
    """Name of the file that a run writes its finished epochs to."""

    environment: dict[str, str]
    """Variables that the driver's user has set for the trackers."""


def run_trial(assigned: dict[str, Any], job: Job) -> None:
    """Runs a trial, and tells Tune of each epoch once its checkpoint is safe.

    The run goes on in a process beside the one that Tune started, and what it writes down of its
    epochs is passed on from there. So a trial that is taken up again tells of its former epochs,
    too, which the scheduler has forgotten; and the tasks that the run starts are not held within
    the sliver of a CPU that Tune has set aside.

    Args:
        assigned: `trial`, a name, and `settings`, values of dotted keys.
        job: What all trials share.

    Raises:
        ray.exceptions.RayTaskError: If the run fails.
    """
    config = trial_config(
        job.values, assigned["settings"], name=assigned["trial"], folder=job.folder
    )
    config = dataclasses.replace(config, cluster=trial_cluster(config.cluster))
    run = job.folder.child(config.name)
    spent = 0.0
    for done, row in enumerate(_rows(run, config, job), start=1):
        spent += row["seconds"]
        told = {EPOCHS: done, OF_EPOCHS: config.optim.epochs, SECONDS: spent}
        ray.tune.report({**row, **told})


def _rows(run: Store, config: AdaptConfig, job: Job) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run's finished epochs as they come, until the run has ended."""
    # "DEFAULT" takes it out of the trial's placement group, and all that it starts.
    work = _work.options(scheduling_strategy="DEFAULT").remote(config, run, job.environment)
    told, ended = 0, False
    while True:
        rows = run.read_lines(job.history)
        yield from itertools.islice(rows, told, None)
        told = max(told, len(rows))
        if ended:
            return
        ready, _ = ray.wait([work], timeout=1.0 if run.local is not None else 5.0)
        # Raises what the run has failed by.
        ray.get(ready)
        ended = bool(ready)


@ray.remote(num_cpus=0, max_retries=0)
def _work(config: AdaptConfig, run: Store, environment: dict[str, str]) -> None:
    """Trains a trial's model and keeps what is needed of it; nothing, if all that is done."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(environment)
    # A run writes down the command that started it, which here is one of Ray's own; this one
    # starts the same run by itself.
    sys.argv[:] = ["jobs/adapt.py", f"{run}/config.yaml"]
    # The process that waits for this one needs neither torch nor the models.
    from crossmost_ray.evaluation.adaptation import export_run
    from crossmost_ray.training.status import working
    from crossmost_ray.training.trackers.follow import log_summary
    from crossmost_ray.training.trainer import CONFIG_NAME, train
    from crossmost_ray.tuning.disk import free, is_complete

    if is_complete(run):
        return
    run.remove(STOP_NAME)
    ended = threading.Event()
    threading.Thread(target=_heed, args=(run, ended), daemon=True).start()
    try:
        train(config, resume=run.has_file(CONFIG_NAME))
        with working(run, "training", last=True):
            export_run(config, run)
            free(run)
            log_summary(run, config.trackers, {})
    finally:
        ended.set()
        run.remove(STOP_NAME)


def _heed(run: Store, ended: threading.Event) -> None:
    """Interrupts the training of this process when its trial is to stop.

    Ray Train then takes its workers down and gives their CPUs back. Were the process killed
    instead, as Tune does, they would stay taken for as long as the sweep runs, wherever Ray's
    dashboard is off: what is to free them asks it whether the training is still alive.
    """
    pause_s = 1.0 if run.local is not None else 5.0
    while not ended.wait(pause_s):
        if run.has_file(STOP_NAME):
            signal.raise_signal(signal.SIGINT)
            # The third interrupt would be taken for impatience.
            pause_s = STOP_LIMIT_S


def stop_trial(run: Store) -> bool:
    """Has a trial's training end; what was killed would leave its workers' CPUs taken.

    Returns:
        Whether it has ended, and not merely been asked to.
    """
    run.write(STOP_NAME, "")
    deadline = time.monotonic() + STOP_LIMIT_S
    while run.has_file(STOP_NAME):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2 if run.local is not None else 2.0)
    return True
