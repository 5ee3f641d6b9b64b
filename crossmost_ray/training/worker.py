"""The loop that each worker runs; the same for every task."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode
from torch import Tensor

from crossmost_ray.config import AdaptConfig, ClusterConfig, PretrainConfig
from crossmost_ray.data.decode import hash_id
from crossmost_ray.data.stream import raw_batches
from crossmost_ray.ops.distributed import mean_over_workers
from crossmost_ray.optim import build_optimizer, learning_rate, set_learning_rate
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import checkpoint_name, load_state, save_state
from crossmost_ray.training.step import train_step

HISTORY_NAME = "metrics.jsonl"
PROGRESS_NAME = "progress.json"
PROGRESS_EVERY_S = 1.0


@dataclasses.dataclass(frozen=True)
class WorkerPlan:
    """What the driver has found out for the workers."""

    config: AdaptConfig | PretrainConfig
    classes: tuple[str, ...]
    steps_per_epoch: int
    view_size: int
    run_folder: str


def resolve_precision(config: ClusterConfig, device: torch.device) -> torch.dtype:
    """Gives the dtype of mixed precision, or float32 where the device gains nothing by one."""
    if config.precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def step_seed(seed: int, step: int, rank: int) -> int:
    """Gives one worker's seed of one step: nothing random is carried from step to step, so that
    a resumed run needs no generator's state."""
    return hash_id(f"{seed}/{step}/{rank}")


def run_worker(loop_config: dict[str, WorkerPlan]) -> None:
    """Trains on this worker's share of the shards, from the last checkpoint if there is one."""
    plan = loop_config["plan"]
    config, optim = plan.config, plan.config.optim
    from_zero = isinstance(config, AdaptConfig) and config.compat.warmup == "from_zero"
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    torch.set_num_threads(config.cluster.threads_per_worker)
    torch.manual_seed(config.seed)

    task = build_task(config, plan.classes, ray.train.torch.prepare_model, device)
    optimizer = build_optimizer(task.parameter_groups(), optim)
    history: list[dict[str, float]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = load_state(Path(folder))
        task.load_state_dict(state["task"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    shard = ray.train.get_dataset_shard("train")
    generator = torch.Generator(device=device)
    precision = resolve_precision(config.cluster, device)
    num_steps = optim.epochs * plan.steps_per_epoch
    progress = _Progress(Path(plan.run_folder), num_steps, config.data.batch_size, active=rank == 0)
    for epoch in range(len(history), optim.epochs):
        batches = raw_batches(
            shard,
            config.data,
            batch_size=config.data.batch_size // num_workers,
            view_size=plan.view_size,
            seed=config.seed * 100_003 + epoch,
            device=device,
        )
        sums: dict[str, Tensor] = {}
        start = time.monotonic()
        step = epoch * plan.steps_per_epoch
        for batch in islice(batches, plan.steps_per_epoch):
            set_learning_rate(
                optimizer,
                learning_rate(
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
            scalars = train_step(
                task,
                optimizer,
                batch,
                step=step,
                generator=generator,
                clip_norm=optim.clip_norm,
                precision=precision,
            )
            sums = {name: sums.get(name, 0.0) + value for name, value in scalars.items()}
            step += 1
            progress.show(step, epoch, scalars)
        done = step - epoch * plan.steps_per_epoch
        if done != plan.steps_per_epoch:
            raise RuntimeError(
                f"epoch {epoch} ended after {done} of {plan.steps_per_epoch} steps: the shards "
                "have changed since the run began"
            )
        seconds = time.monotonic() - start
        row = {name: float(mean_over_workers(value / done)) for name, value in sums.items()}
        row |= {
            "epoch": epoch,
            "step": step,
            "seconds": seconds,
            "pairs_per_s": done * config.data.batch_size / seconds,
        }
        history = [*history, row]
        state = {
            "task": task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
        }
        save_and_report(state, rank=rank, run_folder=Path(plan.run_folder))


def save_and_report(state: dict[str, Any], *, rank: int, run_folder: Path) -> None:
    """Writes a checkpoint from rank 0, reports from every rank, and waits until it counts."""
    row = state["history"][-1]
    name = checkpoint_name(int(row["epoch"]))
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            save_state(Path(folder), state)
            checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(row, checkpoint=checkpoint, checkpoint_dir_name=name)
        else:
            ray.train.report(row, checkpoint_dir_name=name)
    # `report` returns before the controller has taken note; a worker that died in between would
    # take the run back by an epoch, or to its beginning.
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    if rank == 0:
        lines = "".join(json.dumps(past) + "\n" for past in state["history"])
        write_whole(run_folder / HISTORY_NAME, lines)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file such that a reader sees the old or the new one, never a part."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


class _Progress:
    """Tells the driver, by a small file, how far the workers are."""

    def __init__(self, folder: Path, num_steps: int, batch_size: int, *, active: bool) -> None:
        self.path = folder / PROGRESS_NAME
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
        if not self.active or (now - self.last < PROGRESS_EVERY_S and step < self.num_steps):
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
        write_whole(self.path, json.dumps(status))
