"""The product's training steps in plain torch, in one process: what Ray's are compared with.

    python benchmarks/plain.py CONFIG [key=value ...]

Takes the steps of a run's epochs on what pyarrow reads, decoded in a thread one batch ahead, and
then as many as CROSSMOST_DECODED_STEPS says on batches that lie ready; notes each in the file that
CROSSMOST_MARKS names. No Ray is started.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
import pyarrow as pa
import torch
from marks import DECODED, note

from crossmost_ray.config import AdaptConfig, load_config
from crossmost_ray.data.decode import view_size
from crossmost_ray.data.shards import class_names, list_shards, open_shard
from crossmost_ray.data.stream import TRAIN_COLUMNS, RawCollate, pair_rows
from crossmost_ray.evaluation.actor import one_ahead
from crossmost_ray.optim import build_optimizer, learning_rate, set_learning_rate
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.build import build_task
from crossmost_ray.training.step import train_step
from crossmost_ray.training.worker import step_seed

READY = 4
"""Decoded batches that lie ready, and come round."""


def batches(config: AdaptConfig, size: int, seed: int) -> Iterator[RawBatch]:
    """One epoch's batches in an order by lot, with views of `size` pixels."""
    data = config.data
    tables = []
    for name in list_shards(data.shards, TRAIN_COLUMNS):
        with open_shard(data.shards, name) as shard:
            tables.append(
                pair_rows(
                    shard.read(columns=list(TRAIN_COLUMNS)),
                    num_views=data.num_views,
                    teacher_views=data.teacher_views,
                    left_out=frozenset(),
                )
            )
    pairs = pa.concat_tables(tables).combine_chunks()
    order = np.random.default_rng(seed).permutation(len(pairs))
    collate = RawCollate(size)
    for first in range(0, len(order) - data.batch_size + 1, data.batch_size):
        yield collate(pairs.take(pa.array(order[first : first + data.batch_size])))


class Trainer:
    """A task and its optimiser, as a worker of one builds them."""

    def __init__(self, config: AdaptConfig) -> None:
        torch.set_num_threads(config.cluster.threads_per_worker)
        torch.manual_seed(config.seed)
        classes = class_names(config.data.classes, config.data.shards)
        self.config = config
        task = build_task(config, classes)
        assert isinstance(task, AdaptTask)
        self.task = task
        self.optimizer = build_optimizer(self.task.parameter_groups(), config.optim)
        self.size = view_size(self.task.bare_student.image.image_size)
        self.generator = torch.Generator()
        self.taken = 0

    def step(self, batch: RawBatch) -> None:
        """Takes one step, as the worker's loop does."""
        optim = self.config.optim
        rate = learning_rate(self.taken, num_steps=10_000, warmup_steps=1, config=optim)
        set_learning_rate(self.optimizer, rate)
        seed = step_seed(self.config.seed, self.taken, 0)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)
        train_step(
            self.task,
            self.optimizer,
            batch,
            step=self.taken,
            generator=self.generator,
            clip_norm=optim.clip_norm,
        )
        self.taken += 1


def decoded_steps(config: AdaptConfig, number: int) -> Iterator[tuple[float, float]]:
    """Takes steps on batches that lie ready, and tells when each began and ended."""
    trainer = Trainer(config)
    ready = list(islice(batches(config, trainer.size, seed=0), READY))
    for batch in islice(cycle(ready), number):
        began = time.time()
        trainer.step(batch)
        yield began, time.time()


def main() -> None:
    config = load_config(AdaptConfig, sys.argv[1], sys.argv[2:])
    trainer = Trainer(config)
    for epoch in range(config.optim.epochs):
        for batch in one_ahead(batches(config, trainer.size, seed=epoch)):
            began = time.time()
            trainer.step(batch)
            note("train_step", began, time.time())
        trainer.task.finish_epoch()
        note("finish_epoch", time.time(), time.time())
    for began, ended in decoded_steps(config, int(os.environ[DECODED])):
        note("decoded step", began, ended)


if __name__ == "__main__":
    main()
