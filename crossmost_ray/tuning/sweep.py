"""A sweep's config in; its trials on the cluster, and what they have come to, out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import yaml
from ray import tune

from crossmost_ray.cluster import connect
from crossmost_ray.config import AdaptConfig, ConfigError, config_dict
from crossmost_ray.data.shards import class_names, list_shards
from crossmost_ray.data.stream import TRAIN_COLUMNS
from crossmost_ray.storage import Store
from crossmost_ray.training.status import wait_for_silence, working, write_about
from crossmost_ray.training.trackers.follow import carried
from crossmost_ray.training.trainer import CONFIG_NAME, check_cluster
from crossmost_ray.training.watch import say
from crossmost_ray.training.worker import HISTORY_NAME
from crossmost_ray.tuning.config import SweepConfig, load_base, sweep_values
from crossmost_ray.tuning.disk import check_space, inspect_models
from crossmost_ray.tuning.ledger import OPEN, Ledger
from crossmost_ray.tuning.outcome import Outcome, conclude
from crossmost_ray.tuning.room import concurrent_trials, driver_cpus, trial_cluster
from crossmost_ray.tuning.search import OptunaQueue, Queue, build_scheduler
from crossmost_ray.tuning.space import check_trials, corners, plan, typed
from crossmost_ray.tuning.trial import TRIALS_FOLDER, Job, run_trial
from crossmost_ray.tuning.watch import Watch, settle

SWEEP_NAME = "sweep.yaml"
TUNE_FOLDER = "tune"

MAY_CHANGE = (
    *("max_concurrent", "evaluate", "output"),
    *("base_config.cluster", "base_config.evaluation", "base_config.trackers"),
    *("base_config.name", "base_config.output", "base_config.keep_checkpoints"),
    "base_config.data.check",
    # What they come to is in `base_config`.
    *("base", "overrides"),
)
"""Keys that a sweep may change when it goes on: they don't change what a trial learns."""


def run_sweep(sweep: SweepConfig, *, resume: bool = False, retry_failed: bool = False) -> Outcome:
    """Runs the trials of a sweep, and compares them without labels.

    Args:
        sweep: What varies, and how.
        resume: Go on with the sweep of this name.
        retry_failed: Give its failed trials another try, from their last checkpoints.

    Returns:
        The ranking, and the best run.

    Raises:
        ConfigError: For everything that a user can cure, before any trial starts; afterwards, if
            no trial has finished.
        KeyboardInterrupt: If it was asked to stop.
    """
    base = load_base(sweep)
    folder = Store(sweep.output).child(sweep.name)
    trials = folder.child(TRIALS_FOLDER)
    values = config_dict(base)
    proposes = sweep.search == "optuna"
    planned = list(corners(sweep)) if proposes else plan(sweep)
    configs = check_trials(values, planned, folder=trials)
    class_names(base.data.classes, base.data.shards)
    list_shards(base.data.shards, TRAIN_COLUMNS)
    facts = inspect_models(configs)

    connect()
    check_cluster(trial_cluster(base.cluster))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    at_once = concurrent_trials(nodes, base.cluster, at_most=sweep.max_concurrent)
    room = check_space(facts, at_once=at_once, folder=folder)

    open_sweep(sweep, base, folder, resume=resume)
    if resume:
        wait_for_silence(folder, say)
        ledger = Ledger.read(folder)
    else:
        write_about(folder)
        settings = [typed(one, config) for one, config in zip(planned, configs, strict=True)]
        ledger = Ledger.start(folder, [] if proposes else settings)
    if retry_failed:
        ledger.reopen_failed()
    queue = (
        OptunaQueue(sweep, list(ledger.entries.values()))
        if proposes
        else Queue(ledger.entries.values())
    )
    say(f"{sweep.name}: {queue.num_trials} trials to run, {at_once} at once; {folder}")
    say(room)
    with working(folder, "trials"):
        if queue.num_trials:
            longest = max(config.optim.epochs for config in configs)
            _tune(
                sweep,
                Job(values, trials, HISTORY_NAME, carried()),
                base,
                queue,
                ledger,
                at_once,
                longest,
            )
        settle(ledger)
        if ledger.with_status(*OPEN):
            raise KeyboardInterrupt
    with working(folder, "evaluating", last=True):
        return conclude(sweep, base, ledger)


def _tune(
    sweep: SweepConfig,
    job: Job,
    base: AdaptConfig,
    queue: Queue,
    ledger: Ledger,
    at_once: int,
    longest: int,
) -> None:
    """Has Ray Tune run what the queue holds, until it is empty or somebody interrupts it."""

    def trial(assigned: dict[str, Any]) -> None:
        run_trial(assigned, job)

    # A score may be missing from a row, of a first epoch, say.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Trials get lines of our own; a failed one's whole traceback lies in Tune's folder. Tune's
    # newer output would print its own beside them, even if told to be silent.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    former = {
        entry.trial: job.folder.child(entry.trial).read_lines(HISTORY_NAME)
        for entry in ledger.with_status("done", "stopped")
    }
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": driver_cpus(base.cluster)}),
        tune_config=tune.TuneConfig(
            search_alg=queue,
            scheduler=build_scheduler(sweep, epochs=longest, former=former),
            num_samples=queue.num_trials,
            max_concurrent_trials=at_once,
            trial_name_creator=_assigned_name,
            trial_dirname_creator=_assigned_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=ledger.folder.root,
            storage_filesystem=ledger.folder.system,
            callbacks=[Watch(ledger, sweep.metric, keeps_best=base.compat.select_on == "score")],
            verbose=0,
        ),
    )
    tuner.fit()


def _assigned_name(trial: Any) -> str:
    """Names Tune's own folder of a trial as the trial."""
    name: str = trial.config["trial"]
    return name


def open_sweep(sweep: SweepConfig, base: AdaptConfig, folder: Store, *, resume: bool) -> None:
    """Makes the folder of a sweep, or finds it again.

    Raises:
        ConfigError: If the sweep exists and going on was not asked for, if it is to be gone on with
            and does not exist or was another one, or if the folder can't be written.
    """
    # The cycle through YAML turns tuples into lists, so that both sides compare equal.
    values = yaml.safe_load(yaml.safe_dump(sweep_values(sweep, base)))
    stored = folder.read(SWEEP_NAME)
    if stored is not None:
        if not resume:
            raise ConfigError(
                f"the sweep '{sweep.name}' exists at {folder}; "
                "continue it with --resume, or take another `name`"
            )
        changed = sorted(_differences(yaml.safe_load(stored), values))
        if changed:
            raise ConfigError(
                f"the sweep '{sweep.name}' was started with other values of {', '.join(changed)} "
                f"({folder}/{SWEEP_NAME}); take them back, or take another `name`"
            )
        return
    if resume:
        raise ConfigError(f"there is no sweep '{sweep.name}' at {folder} to resume")
    if folder.has_file(CONFIG_NAME):
        raise ConfigError(f"{folder} holds a run; take another `name`")
    folder.write(SWEEP_NAME, yaml.safe_dump(values, sort_keys=False))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys whose values differ."""
    for name in before.keys() | after.keys():
        key = f"{prefix}{name}"
        left, right = before.get(name), after.get(name)
        if key in MAY_CHANGE or left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{key}.")
        else:
            yield key
