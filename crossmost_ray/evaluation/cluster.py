"""A plan in, predictions for each shard out, over the cluster; goes on where it was stopped."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence

import ray
import ray.data

from crossmost_ray.cluster import connect, worker_environment
from crossmost_ray.config import ConfigError
from crossmost_ray.evaluation.actor import ShardPredictor, unit_row
from crossmost_ray.evaluation.plan import (
    PREDICTIONS_FOLDER,
    Plan,
    Unit,
    claim,
    fingerprint,
    list_units,
    variant_name,
)
from crossmost_ray.storage import Store

logger = logging.getLogger(__name__)

LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
)
"""What Ray says of processes and nodes that are gone."""

MAX_ROUNDS = 3
"""How often in a row processes may be lost without a single shard done. Left to itself, Ray tries
for ever, also what takes every process down."""


def predict(
    plan: Plan,
    results: Store,
    *,
    use_gpu: bool = False,
    overwrite: bool = False,
    env: Mapping[str, str] | None = None,
) -> list[Unit]:
    """Asks every model about every object, and writes the answers shard by shard.

    A shard whose predictions are there, from a measurement with the same fingerprint, is not asked
    about again.

    Args:
        plan: What is asked.
        results: Holds the predictions in the end, and while they are made.
        use_gpu: Whether each actor takes a GPU.
        overwrite: Replaces another measurement's predictions.
        env: Environment variables of the actors.

    Returns:
        The units, in the order of the report.

    Raises:
        ConfigError: If a shard, a row of it or a model can't be read, the results belong to another
            measurement or can't be written, or the cluster can't hold the actors.
    """
    units = list_units(plan)
    claim(results, fingerprint(plan, units), overwrite=overwrite)
    left = _left(units, plan, results)
    if 0 < len(left) < len(units):
        logger.info("going on: %d of %d shards are there", len(units) - len(left), len(units))
    if left:
        connect()
        check_resources(min(plan.config.num_actors, len(left)), use_gpu=use_gpu)
    rounds = 0
    while left:
        try:
            _run(left, plan, results, use_gpu=use_gpu, env=env or {})
            break
        except LOSSES as died:
            before, left = left, _left(units, plan, results)
            # Nodes come and go; only what takes down one process after the other is given up.
            rounds = rounds + 1 if len(left) == len(before) else 0
            said = str(died).partition("\n")[0]
            if rounds == MAX_ROUNDS:
                raise ConfigError(
                    "a shard's process died again and again, most often for lack of memory "
                    f"({said}); lower evaluation.batch_size or evaluation.num_actors, or look into "
                    "Ray's log. What is done is kept: the same command goes on"
                ) from None
            logger.info("a process was lost (%s); going on with %d shards", said, len(left))
    return units


def _left(units: Sequence[Unit], plan: Plan, results: Store) -> list[Unit]:
    """Lists the units whose predictions are not there yet."""
    done = {
        variant: set(results.names(f"{PREDICTIONS_FOLDER}/{variant}"))
        for variant in (variant_name(*parts) for parts in plan.variants)
    }
    return [unit for unit in units if unit.name not in done[unit.variant]]


def _run(
    todo: Sequence[Unit], plan: Plan, results: Store, *, use_gpu: bool, env: Mapping[str, str]
) -> None:
    """Asks about the units.

    Raises:
        ConfigError: If a shard, a row or a model can't be read, or the results can't be written.
        ray.exceptions.RayError: One of LOSSES, if an actor is lost for good: its node, say.
    """
    num_actors = min(plan.config.num_actors, len(todo))
    actors = _Actors()
    # One block for each unit: a task is a shard, and a lost task costs one shard.
    listed = ray.data.from_items([unit_row(unit) for unit in todo], override_num_blocks=len(todo))
    with warnings.catch_warnings():
        # Ray will take these arguments away in 2.64 and has no others for them yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        told = listed.map_batches(
            ShardPredictor,
            fn_constructor_kwargs={"plan": plan, "results": results, "use_gpu": use_gpu},
            batch_format="pyarrow",
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                # One is enough to go on with, where nodes have gone.
                min_size=1,
                max_size=num_actors,
                initial_size=num_actors,
                # Two at a time, so that none waits for its next shard; but not four, the default,
                # which would hand all shards of a small measurement to the first actor.
                max_tasks_in_flight_per_actor=2,
            ),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
            # A process that dies is replaced once on the spot; a node that goes is not waited for.
            max_restarts=1,
            max_task_retries=1,
            runtime_env={"env_vars": worker_environment(env)},
            ray_remote_args_fn=actors.name_next,
        )
    told.context.enable_progress_bars = False
    progress = _Progress(len(todo))
    try:
        for row in told.iter_rows():
            if row["refused"]:
                raise ConfigError(row["refused"])
            progress.show(row["objects"])
    finally:
        actors.end()


class _Actors:
    """Names the actors of a measurement, so that they can be ended.

    Ray Data lets go of an actor by forgetting it. After an error that is not enough: the error's
    own traceback remembers it, and so may whoever logged it. What is remembered keeps its CPU, for
    which those that are to go on with the rest would wait for ever.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def name_next(self) -> dict[str, str]:
        """Gives what Ray is to be told of the next actor."""
        self.names.append(f"measure-{uuid.uuid4().hex}")
        return {"name": self.names[-1]}

    def end(self) -> None:
        """Ends all of them, also those that wait for a place to start anew."""
        for name in self.names:
            # Ended, or never begun.
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name))


def check_resources(num_actors: int, *, use_gpu: bool) -> None:
    """Refuses actors that would wait for ever for a CPU or GPU.

    None need be left over: listing the shards takes no task, and the actors read them.

    Raises:
        ConfigError: If the cluster has less than the actors take together.
    """
    resources = ray.cluster_resources()
    for kind, wanted in (("CPU", num_actors), ("GPU", num_actors if use_gpu else 0)):
        there = resources.get(kind, 0.0)
        if wanted > there:
            raise ConfigError(
                f"evaluation.num_actors {num_actors} takes {wanted} {kind}s and the cluster has "
                f"{there:g}; make it smaller{', or set use_gpu=false' if kind == 'GPU' else ''}"
            )


class _Progress:
    """A line now and then: how many shards and objects, how fast, how long still."""

    EVERY_S = 10.0

    def __init__(self, total: int) -> None:
        self.total, self.done, self.objects = total, 0, 0
        self.start = self.shown = time.monotonic()

    def show(self, objects: int) -> None:
        self.done += 1
        self.objects += objects
        now = time.monotonic()
        if now - self.shown < self.EVERY_S and self.done < self.total:
            return
        self.shown = now
        taken = max(now - self.start, 1e-9)
        minutes, seconds = divmod(round((self.total - self.done) * taken / self.done), 60)
        logger.info(
            "%d of %d shards, %d objects, %.1f objects/s, %d:%02d to go",
            *(self.done, self.total, self.objects, self.objects / taken, minutes, seconds),
        )
