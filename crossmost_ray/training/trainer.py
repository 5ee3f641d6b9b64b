"""A config in, a finished run out: checks everything that can be checked before a worker starts,
starts the workers, and shows on the driver how far they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import yaml
from rich.console import Console

from crossmost_ray.cluster import connect
from crossmost_ray.config import (
    AdaptConfig,
    ClusterConfig,
    ConfigError,
    PretrainConfig,
    config_dict,
    resolve_path,
)
from crossmost_ray.data.decode import view_size
from crossmost_ray.data.shards import class_names, list_shards
from crossmost_ray.data.stream import (
    TRAIN_COLUMNS,
    check_shards,
    count_text,
    steps_per_epoch,
    stream_pairs,
)
from crossmost_ray.training.build import inspect_model
from crossmost_ray.training.worker import (
    PROGRESS_NAME,
    WorkerPlan,
    run_worker,
    write_whole,
)

CONFIG_NAME = "config.yaml"
DATA_CPUS = 1.0
"""What Ray Data needs for itself. A run that takes every CPU waits for its first batch for ever."""

MAY_CHANGE = ("cluster", "evaluation", "output", "keep_checkpoints")
"""Sections that a resumed run may change: they don't change what is learned."""

console = Console()


def check_cluster(config: ClusterConfig) -> None:
    """Refuses a request that the cluster can't meet, before anything waits for it.

    Raises:
        ConfigError: Saying what is asked, what there is, and what to change.
    """
    have = ray.cluster_resources()
    cpus, asked = have.get("CPU", 0.0), config.num_workers * config.cpus_per_worker
    if asked + DATA_CPUS > cpus:
        most = int((cpus - DATA_CPUS) / config.cpus_per_worker)
        share = max(cpus - DATA_CPUS, 0) / config.num_workers
        cures = [f"cluster.num_workers={most}"] if most >= 1 else []
        cures += [f"cluster.cpus_per_worker={share:.2g}"] if share > 0 else ["a larger cluster"]
        raise ConfigError(
            f"cluster.num_workers {config.num_workers} with {config.cpus_per_worker:g} CPU each "
            f"take {asked:g} of the cluster's {cpus:g} CPUs, and {DATA_CPUS:g} must be left to "
            f"stream the shards; try {' or '.join(cures)}"
        )
    if config.use_gpu and have.get("GPU", 0.0) < config.num_workers:
        raise ConfigError(
            f"cluster.use_gpu asks for {config.num_workers} GPUs and the cluster has "
            f"{have.get('GPU', 0.0):g}; lower cluster.num_workers, or set cluster.use_gpu=false"
        )


def open_run(config: AdaptConfig | PretrainConfig, *, resume: bool) -> Path:
    """Makes the folder of a run, or finds it again.

    Raises:
        ConfigError: If the run exists and resuming was not asked for, if it is to be resumed and
            does not exist or was another run, or if the folder can't be written.
    """
    folder = resolve_path(config.output) / config.name
    stored = folder / CONFIG_NAME
    # The cycle through YAML turns tuples into lists, so that both sides compare equal.
    values = yaml.safe_load(yaml.safe_dump(config_dict(config)))
    if stored.is_file():
        if not resume:
            raise ConfigError(
                f"the run '{config.name}' exists at {folder}; "
                "continue it with --resume, or take another `name`"
            )
        before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        changed = sorted(_differences(before, values))
        if changed:
            raise ConfigError(
                f"the run '{config.name}' was started with other values of {', '.join(changed)} "
                f"({stored}); take them back, or take another `name`"
            )
    elif resume:
        raise ConfigError(f"there is no run '{config.name}' at {folder} to resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(stored, yaml.safe_dump(values, sort_keys=False))
    except OSError as refused:
        raise ConfigError(
            f"the run's folder {folder} can't be written ({refused.strerror}); mend `output`"
        ) from None
    return folder


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in before.keys() | after.keys():
        if not prefix and key in MAY_CHANGE:
            continue
        left, right = before.get(key), after.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def train(config: AdaptConfig | PretrainConfig, *, resume: bool = False) -> Path:
    """Runs the training of a config to its end.

    Args:
        config: Adaptation or pre-training, told by its type.
        resume: Go on with the run of this name.

    Returns:
        The last checkpoint's folder.

    Raises:
        ConfigError: For everything that a user can cure; before any worker starts.
        ray.train.TrainingFailedError: If the workers fail.
    """
    classes: list[str] = []
    columns: tuple[str, ...] = TRAIN_COLUMNS
    if isinstance(config, AdaptConfig):
        classes = class_names(config.data.classes, config.data.shards)
    else:
        columns = (*TRAIN_COLUMNS, "captions")
    image_size, notes = inspect_model(config)
    size = view_size(image_size)
    files = list_shards(config.data.shards, columns)
    connect()
    check_cluster(config.cluster)
    check = check_shards(config.data.shards, config.data, view_size=size, columns=columns)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    for row in check.bad:
        console.print(f"left out: {row}", highlight=False, soft_wrap=True)
    steps = steps_per_epoch(check, config.data, config.cluster.num_workers)
    folder = open_run(config, resume=resume)
    console.print(
        f"[bold]{config.name}[/]: {count_text(check, files)}, {config.optim.epochs} epochs of "
        f"{steps} steps on {config.cluster.num_workers} worker(s); {folder}",
        highlight=False,
        soft_wrap=True,
    )

    cluster = config.cluster
    trainer = ray.train.torch.TorchTrainer(
        run_worker,
        train_loop_config={
            "plan": WorkerPlan(
                config=config,
                classes=tuple(classes),
                steps_per_epoch=steps,
                view_size=size,
                run_folder=str(folder),
            )
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": 1} if cluster.use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(folder.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
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
        dataset_config=ray.train.DataConfig(
            execution_options=ray.data.DataContext.get_current().execution_options,
            # With locality, which worker gets which block depends on where it was read.
            enable_shard_locality=False,
        ),
    )
    with _shown(folder, config.optim.epochs):
        result = trainer.fit()
    assert result.checkpoint is not None, "a run of at least one epoch has a checkpoint"
    return Path(result.checkpoint.path)


@contextmanager
def _shown(folder: Path, num_epochs: int) -> Iterator[None]:
    """Prints a line for every epoch, and for every ten seconds of a long one."""
    stop = threading.Event()
    (folder / PROGRESS_NAME).unlink(missing_ok=True)

    def watch() -> None:
        shown: tuple[int, int] | None = None
        while not stop.wait(0.5):
            try:
                status = json.loads((folder / PROGRESS_NAME).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            mark = (status["epoch"], int(status["step"] * 20 / status["num_steps"]))
            if mark != shown:
                shown = mark
                console.print(progress_line(status, num_epochs), highlight=False, soft_wrap=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def progress_line(status: dict[str, Any], num_epochs: int) -> str:
    """Says in one line how far a run is."""
    parts = [
        f"epoch {status['epoch'] + 1}/{num_epochs}",
        f"step {status['step']}/{status['num_steps']}",
        f"{status['pairs_per_s']:.0f} objects/s",
        f"loss {status['loss']:.2f}",
    ]
    for key, word in (("pseudo/selected_image", "image"), ("pseudo/selected_point", "points")):
        if key in status:
            parts.append(f"{100 * status[key]:.0f} % confident by {word}")
    terms = [
        f"{name.removeprefix('loss/')} {value:.2f}"
        for name, value in status.items()
        if name.startswith("loss/")
    ]
    if status["eta_s"] is not None:
        minutes, seconds = divmod(round(status["eta_s"]), 60)
        parts.append(f"{minutes}:{seconds:02d} to go")
    return "  ".join(parts) + f"\n    {', '.join(terms)}"
