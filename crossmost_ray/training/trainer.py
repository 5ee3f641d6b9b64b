"""A config in, a finished run out: checks everything that can be checked before a worker starts,
and starts the workers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import yaml
from ray.train import DataConfig, WorkerGroupError

# `ray.train` names these, too, but to a type checker as those of its older version.
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer

from crossmost_ray.cluster import connect, worker_environment
from crossmost_ray.config import (
    AdaptConfig,
    ClusterConfig,
    ConfigError,
    PretrainConfig,
    config_dict,
)
from crossmost_ray.data.decode import view_size
from crossmost_ray.data.shards import class_names, find_row, list_shards
from crossmost_ray.data.stream import (
    TRAIN_COLUMNS,
    BrokenViewError,
    check_shards,
    count_text,
    name_left_out,
    steps_per_epoch,
    stream_pairs,
)
from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.training.build import ModelFacts, inspect_model
from crossmost_ray.training.checkpoint import PREFIX, list_checkpoints
from crossmost_ray.training.status import CLASSES_NAME, wait_for_silence, working, write_about
from crossmost_ray.training.trackers.follow import TrackerCallback, check_trackers
from crossmost_ray.training.votes import bytes_per_object
from crossmost_ray.training.watch import EventLog, say, shown
from crossmost_ray.training.worker import WorkerPlan, run_worker

CONFIG_NAME = "config.yaml"

SNAPSHOT_NAME = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that count."""

GROWTH_CHECK_S = 30.0
"""Between two looks whether an elastic run can have more workers."""

START_LIMIT_S = {"fixed": 600, "elastic": 60}
"""How long workers may take to start. An elastic run begins anew with fewer after that: Ray counts
on a lost node's CPUs for so long. With a fixed number there is nothing to gain but a crowd of
half-started workers on a slow machine."""

MAY_CHANGE = ("cluster", "evaluation", "output", "keep_checkpoints", "trackers", "data.check")
"""Sections and keys that a resumed run may change: they don't change what is learned."""


def check_cluster(config: ClusterConfig) -> None:
    """Refuses a request that the cluster can't meet, before anything waits for it.

    Raises:
        ConfigError: Saying what is asked, what there is, and what to change.
    """
    have = ray.cluster_resources()
    fewest = config.fewest_workers
    cpus, asked = have.get("CPU", 0.0), fewest * config.cpus_per_worker
    if asked > cpus:
        most = int(cpus / config.cpus_per_worker)
        cures = [f"cluster.num_workers={most}"] if most >= 1 else []
        cures.append(f"cluster.cpus_per_worker={cpus / fewest:.2g}" if cpus else "a larger cluster")
        raise ConfigError(
            f"cluster.num_workers {fewest} with {config.cpus_per_worker:g} CPU each take {asked:g} "
            f"CPUs, and the cluster has {cpus:g}; try {' or '.join(cures)}"
        )
    if config.use_gpu and have.get("GPU", 0.0) < fewest:
        raise ConfigError(
            f"cluster.use_gpu asks for {fewest} GPUs and the cluster has "
            f"{have.get('GPU', 0.0):g}; lower cluster.num_workers, or set cluster.use_gpu=false"
        )


def open_run(config: AdaptConfig | PretrainConfig, *, resume: bool) -> Store:
    """Makes the folder of a run, or finds it again.

    Raises:
        ConfigError: If the run exists and resuming was not asked for, if it is to be resumed and
            does not exist or was another run, or if the folder can't be written.
    """
    run = Store(config.output).child(config.name)
    stored = run.read(CONFIG_NAME)
    # The cycle through YAML turns tuples into lists, so that both sides compare equal.
    values = yaml.safe_load(yaml.safe_dump(config_dict(config)))
    if stored is not None:
        if not resume:
            raise ConfigError(
                f"the run '{config.name}' exists at {run}; "
                "continue it with --resume, or take another `name`"
            )
        changed = sorted(_differences(yaml.safe_load(stored), values))
        if changed:
            raise ConfigError(
                f"the run '{config.name}' was started with other values of {', '.join(changed)} "
                f"({run}/{CONFIG_NAME}); take them back, or take another `name`"
            )
    elif resume:
        raise ConfigError(f"there is no run '{config.name}' at {run} to resume")
    run.write(CONFIG_NAME, yaml.safe_dump(values, sort_keys=False))
    return run


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in before.keys() | after.keys():
        if f"{prefix}{key}" in MAY_CHANGE:
            continue
        left, right = before.get(key), after.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def tidy_run(run: Store) -> str | None:
    """Makes a run that was interrupted ready to go on.

    What a killed driver left half done is removed: checkpoints that Ray had not taken note of, and
    Ray's own list of them, where that was being written.

    Returns:
        Name of the checkpoint to go on from where Ray's list is lost.
    """
    complete = list_checkpoints(run)
    try:
        snapshot = json.loads(run.read(SNAPSHOT_NAME) or b"")
        known = {entry["checkpoint_dir_name"] for entry in snapshot["checkpoint_results"]}
    except (ValueError, KeyError, TypeError):
        known = set()
    if not known <= set(complete):
        known = set()
    newest = complete[-1] if complete else None
    if not known:
        run.remove(SNAPSHOT_NAME)
    for name in run.names():
        if name.startswith(PREFIX) and name not in (known or {newest}):
            run.remove(name)
    return newest if not known else None


def check_space(
    config: AdaptConfig | PretrainConfig, run: Store, facts: ModelFacts, *, votes_bytes: int = 0
) -> str:
    """Estimates what a run will leave behind.

    Args:
        config: The run.
        run: Its folder.
        facts: Of its model.
        votes_bytes: What a checkpoint within an epoch holds besides, of the epoch so far.

    Returns:
        The estimate, in words.

    Raises:
        ConfigError: If the disk of the run's folder has no room for it.
    """
    # One more than are kept lies there while the oldest goes, and the last is kept in any case.
    checkpoints = (config.keep_checkpoints + 2) * facts.checkpoint_bytes
    whole = checkpoints + facts.exported_bytes
    if config.cluster.checkpoint_steps is not None:
        # Of those within an epoch the last one stays, and the one before it until it is there.
        whole += 2 * votes_bytes
    text = (
        f"checkpoints of {size_text(facts.checkpoint_bytes)}, of which {config.keep_checkpoints} "
        f"and the last are kept; at most {size_text(whole)} in all"
    )
    if run.local is not None:
        free = shutil.disk_usage(run.local).free
        if free < whole:
            raise ConfigError(
                f"{run} has {size_text(free)} free and the run may need {size_text(whole)}; lower "
                "keep_checkpoints, or mend `output`"
            )
        text += f" ({size_text(free)} free)"
    return text


def size_text(count: float) -> str:
    """Writes a number of bytes, such as 42 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _cure(failed: WorkerGroupError, shards: str, files: Sequence[str]) -> ConfigError | None:
    """Says what a user can do about workers that failed; None where that is nothing."""
    for error in failed.worker_failures.values():
        if isinstance(error, BrokenViewError):
            place = find_row(shards, files, error.object_id)
            where = "" if place is None else f"{place[0]}, row {place[1]}: "
            return ConfigError(
                f"{where}{error}; prepare the row anew, or name or leave out all such rows before "
                "the next start with data.check=full and data.bad_rows"
            )
    return None


def train(
    config: AdaptConfig | PretrainConfig,
    *,
    resume: bool = False,
    callbacks: Sequence[UserCallback] = (),
) -> Store:
    """Runs the training of a config to its end.

    Args:
        config: Adaptation or pre-training, told by its type.
        resume: Go on with the run of this name.
        callbacks: Told of every report, in Ray's controller.

    Returns:
        The run's folder.

    Raises:
        ConfigError: For everything that a user can cure; but for a loss that is not finite and a
            view that only decoding finds broken, before any worker starts.
        ray.train.TrainingFailedError: If the workers fail.
    """
    classes: list[str] = []
    columns: tuple[str, ...] = TRAIN_COLUMNS
    if isinstance(config, AdaptConfig):
        classes = class_names(config.data.classes, config.data.shards)
    else:
        columns = (*TRAIN_COLUMNS, "captions")
    check_trackers(config.trackers, Store(config.output))
    facts = inspect_model(config)
    size = view_size(facts.image_size)
    files = list_shards(config.data.shards, columns)
    connect()
    cluster = config.cluster
    check_cluster(cluster)
    check = check_shards(config.data.shards, files, config.data, view_size=size, columns=columns)
    for note in facts.notes:
        say(note)
    for line in name_left_out(check.bad):
        say(line)
    fewest, most = cluster.fewest_workers, cluster.most_workers
    steps = steps_per_epoch(check, config.data, fewest, most)
    run = open_run(config, resume=resume)
    resume_from = None
    if resume:
        wait_for_silence(run, say)
        resume_from = tidy_run(run)
    workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    say(
        f"{config.name}: {count_text(check)}, {config.optim.epochs} epochs of "
        f"{steps} steps on {workers} worker(s); {run}"
    )
    votes_bytes = check.num_good * bytes_per_object(len(classes)) if classes else 0
    say(check_space(config, run, facts, votes_bytes=votes_bytes))

    limit = START_LIMIT_S["fixed" if fewest == most else "elastic"]
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(limit))
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "plan": WorkerPlan(
                config=config,
                classes=tuple(classes),
                steps_per_epoch=steps,
                view_size=size,
                run=run,
                resume_from=resume_from,
            )
        },
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=cluster.use_gpu,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": 1} if cluster.use_gpu else {}),
            },
            elastic_resize_monitor_interval_s=GROWTH_CHECK_S,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=run.root.rpartition("/")[0],
            storage_filesystem=run.system,
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints,
                checkpoint_score_attribute=SCORE if isinstance(config, AdaptConfig) else None,
            ),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": worker_environment(cluster.env)},
            callbacks=[
                EventLog(run),
                TrackerCallback(run, config.trackers, config_dict(config)),
                *callbacks,
            ],
        ),
        datasets={
            "train": stream_pairs(
                config.data.shards,
                config.data,
                columns=columns,
                check=check,
                teacher_views=config.data.teacher_views if isinstance(config, AdaptConfig) else 1,
            )
        },
        dataset_config=DataConfig(
            execution_options=ray.data.DataContext.get_current().execution_options,
            # With locality, which worker gets which block depends on where it was read.
            enable_shard_locality=False,
        ),
    )
    write_about(run, num_objects=check.num_good, steps_per_epoch=steps)
    run.write(CLASSES_NAME, json.dumps(classes) + "\n")
    with working(run, "training"), shown(run, config.optim.epochs, cluster):
        try:
            result: Any = trainer.fit()
        except WorkerGroupError as failed:
            raise _cure(failed, config.data.shards, files) or failed from None
    stopped: str | None = result.return_value
    if stopped is not None:
        kept = list_checkpoints(run)
        raise ConfigError(
            f"{stopped}. The last good checkpoint is {f'{run}/{kept[-1]}' if kept else 'none yet'}"
        )
    return run
