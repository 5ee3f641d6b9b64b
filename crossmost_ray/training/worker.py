"""The loop that each worker runs; the same for every task."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode
from torch import Tensor, nn

from crossmost_ray.config import AdaptConfig, PretrainConfig
from crossmost_ray.data.decode import hash_id
from crossmost_ray.data.stream import Epochs, raw_batches
from crossmost_ray.ops.distributed import mean_over_workers, most_of_workers
from crossmost_ray.optim import build_optimizer, learning_rate, set_learning_rate
from crossmost_ray.schema import RawBatch
from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import (
    STATE_NAME,
    checkpoint_name,
    load_state,
    save_state,
    step_of,
)
from crossmost_ray.training.events import log_event
from crossmost_ray.training.execution import exchange_options, resolve_execution
from crossmost_ray.training.step import NonFiniteLossError, train_step
from crossmost_ray.training.task import EpochEnd, Task
from crossmost_ray.training.votes import votes_name

HISTORY_NAME = "metrics.jsonl"
PROGRESS_NAME = "progress.json"

NO_SCORE = -1.0
"""Stands where a score is wanted and there is none: below all scores."""

ROLLBACK_LR = 0.5
"""Factor on the learning rate of a run that has gone back to a healthy teacher."""

LOOK_EVERY_S = 5.0
"""Between two looks for the notice that a node is about to be taken away."""


@dataclasses.dataclass(frozen=True)
class WorkerPlan:
    """What the driver has found out for the workers."""

    config: AdaptConfig | PretrainConfig
    classes: tuple[str, ...]
    steps_per_epoch: int
    view_size: int
    run: Store
    resume_from: str | None
    """Name of the checkpoint to go on from where Ray knows of none."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """Gives one worker's seed of one step: nothing random is carried from step to step, so that
    a resumed run needs no generator's state."""
    return hash_id(f"{seed}/{step}/{rank}")


@dataclasses.dataclass
class Position:
    """How far a run is: finished epochs, and what has been summed up of the one at hand."""

    history: list[dict[str, float]]
    done: int = 0
    """Steps of the epoch at hand."""
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of the epoch at hand in which this worker had no batch."""
    lr_scale: float = 1.0
    """Factor on the learning rate; halved each time that the run goes back."""
    stop: str | None = None
    """Why the run is over before its last epoch, if it is."""

    @property
    def epoch(self) -> int:
        """The epoch at hand, from 0."""
        return len(self.history)

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Counts one step."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in scalars.items()}
        self.done += 1

    def timed(self, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """Passes batches on, and counts the time until each is there."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            yield batch

    def means(self) -> dict[str, float]:
        """Means over the steps of the epoch at hand and over the workers."""
        return {
            name: float(mean_over_workers(value / self.done)) for name, value in self.sums.items()
        }


def run_worker(loop_config: dict[str, WorkerPlan]) -> str | None:
    """Trains on this worker's share of the shards, from the last checkpoint if there is one.

    Returns:
        Why the run was stopped, where another try would meet the same; else None.
    """
    plan = loop_config["plan"]
    config, optim = plan.config, plan.config.optim
    from_zero = isinstance(config, AdaptConfig) and config.compat.warmup == "from_zero"
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    share = config.data.batch_size // num_workers
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    torch.set_num_threads(config.cluster.threads_per_worker)
    torch.manual_seed(config.seed)

    shard = ray.train.get_dataset_shard("train")
    checkpoint = _last_checkpoint(plan)
    # The stream is set up while the task is.
    epochs = Epochs(
        lambda epoch: raw_batches(
            shard,
            config.data,
            batch_size=share,
            view_size=plan.view_size,
            seed=config.seed * 100_003 + epoch,
            device=device,
        ),
        first=0 if checkpoint is None else step_of(checkpoint) // plan.steps_per_epoch,
        num_epochs=optim.epochs,
        num_batches=plan.steps_per_epoch,
    )

    execution = resolve_execution(config.cluster, device)
    wrap = partial(_for_workers, accumulate=optim.accumulate)
    task = build_task(config, plan.classes, wrap, device, execution)
    optimizer = build_optimizer(task.parameter_groups(), optim)
    position = _restore(plan.run, checkpoint, task, optimizer, device)
    first_step = position.epoch * plan.steps_per_epoch + position.done
    if rank == 0:
        log_event(plan.run, "started", num_workers=num_workers, step=first_step)
        if execution.note is not None:
            log_event(plan.run, "uncompiled", says=execution.note)

    generator = torch.Generator(device=device)
    num_steps = optim.epochs * plan.steps_per_epoch
    progress = _Progress(plan.run, num_steps, share * num_workers, active=rank == 0)
    notice = _Notice(first_step)
    while position.epoch < optim.epochs and position.stop is None:
        epoch = position.epoch
        start = time.monotonic()
        for batch in position.timed(epochs.batches(skip=position.done)):
            step = epoch * plan.steps_per_epoch + position.done
            set_learning_rate(
                optimizer,
                position.lr_scale
                * learning_rate(
                    step,
                    num_steps=num_steps,
                    warmup_steps=round(optim.warmup_epochs * plan.steps_per_epoch),
                    config=optim,
                    from_zero=from_zero,
                ),
            )
            seed = step_seed(config.seed, step, rank)
            generator.manual_seed(seed)
            torch.manual_seed(seed)
            try:
                scalars = train_step(
                    task,
                    optimizer,
                    batch,
                    step=step,
                    generator=generator,
                    clip_norm=optim.clip_norm,
                    accumulate=optim.accumulate,
                )
            except NonFiniteLossError as stopped:
                # On all workers alike, so all return: to raise would have Ray try again.
                return str(stopped)
            position.add(scalars)
            progress.show(step + 1, epoch, scalars)
            every = config.cluster.checkpoint_steps
            due = every is not None and position.done % every == 0
            nodes = notice.given(step)
            if nodes and rank == 0:
                log_event(plan.run, "preemption", nodes=nodes, step=step + 1)
            if (nodes or due) and position.done < plan.steps_per_epoch:
                position.seconds += time.monotonic() - start
                start = time.monotonic()
                # Ray keeps the best checkpoints: one within an epoch has no score, and comes last.
                row = {"epoch": epoch, "step": step + 1, SCORE: NO_SCORE, **position.means()}
                _save_and_report(plan.run, rank, row, task, optimizer, position)
        if position.done != plan.steps_per_epoch:
            raise RuntimeError(
                f"epoch {epoch} ended after {position.done} of {plan.steps_per_epoch} steps: the "
                "shards have changed since the run began"
            )
        seconds = position.seconds + time.monotonic() - start
        end = task.finish_epoch()
        row = (
            position.means()
            | {
                "epoch": epoch,
                "step": (epoch + 1) * plan.steps_per_epoch,
                "seconds": seconds,
                "pairs_per_s": position.done * share * num_workers / seconds,
                "num_workers": num_workers,
                "data/wait_share": most_of_workers(position.waited / seconds),
                "system/memory_mb": most_of_workers(_peak_mb()),
            }
            | end.metrics
        )
        if rank == 0:
            _write_down(plan.run, epoch, end)
        lr_scale = position.lr_scale
        if end.rolled_back:
            # Momentum that led astray would lead astray again.
            optimizer.state.clear()
            lr_scale *= ROLLBACK_LR
        position = Position([*position.history, row], lr_scale=lr_scale, stop=end.stop)
        _save_and_report(plan.run, rank, row, task, optimizer, position)
    return None


def _for_workers(student: nn.Module, accumulate: int) -> nn.Module:
    """Prepares the student for exchanging gradients, if there are several workers."""
    return ray.train.torch.prepare_model(
        student, parallel_strategy_kwargs=exchange_options(accumulate)
    )


def _peak_mb() -> float:
    """Gives the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _write_down(run: Store, epoch: int, end: EpochEnd) -> None:
    """Writes the votes of an epoch, and what befell it."""
    if end.votes is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(end.votes, sink, compression="zstd")
        run.write(votes_name(epoch), sink.getvalue().to_pybytes())
    for event in end.events:
        kind, facts = event["event"], {key: event[key] for key in event if key != "event"}
        log_event(run, kind, epoch=epoch, **facts)


def _last_checkpoint(plan: WorkerPlan) -> str | None:
    """Names the checkpoint to go on from; None at the beginning of a run."""
    registered = ray.train.get_checkpoint()
    return plan.resume_from if registered is None else os.path.basename(registered.path)


def _restore(
    run: Store,
    checkpoint: str | None,
    task: Task,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Position:
    """Takes up a checkpoint, if there is one."""
    if checkpoint is None:
        return Position([])
    state = load_state(run.child(checkpoint))
    task.load_state_dict(state["task"])
    optimizer.load_state_dict(state["optimizer"])
    sums = {key: value.to(device) for key, value in state["sums"].items()}
    return Position(
        state["history"],
        state["done"],
        sums,
        *(state[name] for name in ("seconds", "waited", "lr_scale", "stop")),
    )


def _save_and_report(
    run: Store,
    rank: int,
    row: dict[str, float],
    task: Task,
    optimizer: torch.optim.Optimizer,
    position: Position,
) -> None:
    """Writes a checkpoint from rank 0, reports from every rank, and waits until it counts."""
    name = checkpoint_name(int(row["step"]))
    # The workers' sums differ; their mean serves each of them as well.
    sums = {key: mean_over_workers(value) for key, value in position.sums.items()}
    of_task = task.state_dict()
    if rank == 0:
        state = {
            "task": of_task,
            "optimizer": optimizer.state_dict(),
            "history": position.history,
            "done": position.done,
            "sums": sums,
            **{name: getattr(position, name) for name in ("seconds", "waited", "lr_scale", "stop")},
        }
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            ray.train.report(
                row,
                checkpoint=Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
                checkpoint_upload_fn=lambda local, name: _upload(run, local, name),
            )
    else:
        ray.train.report(row, checkpoint_dir_name=name)
    # `report` returns before the controller has taken note; a worker that died in between would
    # take the run back by a checkpoint, or to its beginning.
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    if rank == 0:
        run.write(HISTORY_NAME, "".join(json.dumps(past) + "\n" for past in position.history))


def _upload(run: Store, local: Checkpoint, name: str) -> Checkpoint:
    """Copies a checkpoint into the run's folder; half of one is never seen there."""
    run.upload(Path(local.path) / STATE_NAME, f"{name}/{STATE_NAME}")
    return Checkpoint(run.path(name), run.system)


class _Notice:
    """Looks now and then whether a node of the run is about to be taken away.

    To look is a meeting of all workers, so they agree beforehand at which step it is.
    """

    def __init__(self, step: int) -> None:
        self.next_look = step
        self.last_step, self.last_time = step, time.monotonic()
        self.saved_for: list[str] = []

    def given(self, step: int) -> int:
        """Counts the nodes about to go, where that is news; the same on all workers."""
        if step < self.next_look:
            return 0
        info = ray.train.get_preemption_info()
        now = time.monotonic()
        # Steps of this process only: a resumed run would take itself for a very fast one, and look
        # up much too late.
        per_step = (now - self.last_time) / max(step - self.last_step, 1)
        self.last_step, self.last_time = step, now
        ahead = max(1, round(LOOK_EVERY_S / max(per_step, 1e-3)))
        self.next_look = ray.train.collective.broadcast_from_rank_zero(step + ahead)
        nodes = [] if info is None else info.preempted_node_ids
        if nodes == self.saved_for:
            return 0
        self.saved_for = nodes
        return len(nodes)


class _Progress:
    """Tells the driver, by a small file, how far the workers are."""

    def __init__(self, run: Store, num_steps: int, batch_size: int, *, active: bool) -> None:
        self.run = run
        self.every_s = 1.0 if run.local is not None else 10.0
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.active = active
        self.last = self.started = time.monotonic()
        self.first_step: int | None = None

    def show(self, step: int, epoch: int, scalars: dict[str, Tensor]) -> None:
        now = time.monotonic()
        if self.first_step is None:
            # The first step pays for everything that is set up on the way; it would spoil the rate.
            self.first_step, self.started = step, now
        if not self.active or (now - self.last < self.every_s and step < self.num_steps):
            return
        self.last = now
        rate = (step - self.first_step) / max(now - self.started, 1e-9)
        status = {
            "epoch": epoch,
            "step": step,
            "num_steps": self.num_steps,
            "pairs_per_s": rate * self.batch_size,
            "eta_s": (self.num_steps - step) / rate if rate > 0 else None,
            **{name: float(value) for name, value in scalars.items()},
        }
        self.run.write(PROGRESS_NAME, json.dumps(status))
