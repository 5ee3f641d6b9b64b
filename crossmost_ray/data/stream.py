"""A folder of shards in, a Ray Dataset of undecoded pairs out, and raw batches out of that."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data.collate_fn import ArrowBatchCollateFn

from crossmost_ray.config import ConfigError, DataConfig
from crossmost_ray.data.decode import (
    decode_points,
    decode_view,
    hash_id,
    pack_points,
    ring_views,
)
from crossmost_ray.data.shards import BadRow, ShardCheck, check_file, shard_store
from crossmost_ray.schema import RawBatch

if TYPE_CHECKING:
    import torch

TRAIN_COLUMNS = ("object_id", "points", "views")
"""What adaptation reads. The label is not among it."""

MAX_NAMED_ROWS = 10

MOST_ROUNDING = 0.05
"""Share of a batch that may be left out so that an elastic run's workers have equal parts."""

STREAM_CPUS = 0
"""What a task of the stream asks of the cluster: nothing, for workers that hold every CPU would
wait for ever for a first batch that has no CPU to come from. It reads and slices, which is little;
decoding is done where the batch is used."""

STREAM_TASKS = 4
"""Tasks of a kind that run at a time, for nothing else bounds those that ask for nothing."""


@ray.remote(num_cpus=0.5)
def _check_task(look: Callable[[str], ShardCheck], name: str) -> ShardCheck:
    return look(name)


def check_shards(
    shards: str,
    files: Sequence[str],
    config: DataConfig,
    *,
    view_size: int,
    columns: Sequence[str] = TRAIN_COLUMNS,
) -> ShardCheck:
    """Looks at every row of every shard once, each shard in a task of its own.

    Args:
        shards: Folder of Parquet files.
        files: What `list_shards` found in it.
        config: What a row must have.
        view_size: Side that views are decoded to.
        columns: What is read.

    Returns:
        The number of objects, and the rows that can't be used, in the order of the shards.

    Raises:
        ConfigError: If a file can't be read, if no row can be used, or if a row can't and
            `data.bad_rows` is "refuse".
    """
    look = functools.partial(
        check_file,
        shard_store(shards).address,
        columns=tuple(columns),
        num_points=config.num_points,
        num_views=config.num_views,
        view_size=view_size,
        full=config.check == "full",
    )
    checks: list[ShardCheck] = ray.get([_check_task.remote(look, file) for file in files])
    whole = ShardCheck(
        num_objects=sum(part.num_objects for part in checks),
        bad=tuple(row for part in checks for row in part.bad),
        files=tuple(files),
    )
    named = "\n".join(_name_rows(whole.bad, "  {}", "  ... and {} more"))
    if whole.bad and config.bad_rows == "refuse":
        raise ConfigError(
            f"{len(whole.bad)} of {whole.num_objects} rows of '{shards}' can't be used:\n"
            f"{named}\n"
            "prepare them anew, or leave them out with data.bad_rows=skip"
        )
    if whole.num_good == 0:
        raise ConfigError(f"no row of '{shards}' can be used:\n{named}".rstrip(":\n"))
    return whole


def name_left_out(bad: Sequence[BadRow]) -> list[str]:
    """Names what is left out, in lines: the first few, and how many more."""
    return _name_rows(bad, "left out: {}", "left out: {} more")


def _name_rows(bad: Sequence[BadRow], each: str, rest: str) -> list[str]:
    lines = [each.format(row) for row in bad[:MAX_NAMED_ROWS]]
    more = len(bad) - MAX_NAMED_ROWS
    return [*lines, rest.format(more)] if more > 0 else lines


def pair_rows(
    table: pa.Table, *, num_views: int, teacher_views: int, left_out: frozenset[str]
) -> pa.Table:
    """Turns each object into one row per used view, still encoded.

    Args:
        table: Rows of a shard; the columns that training reads.
        num_views: Views of each object that are used.
        teacher_views: T; further views, spread over the ring, come with each row's own.
        left_out: Ids of objects to leave out.

    Returns:
        The same columns; points are packed (`pack_points`), views are lists of T.
    """
    if left_out:
        keep = [name not in left_out for name in table["object_id"].to_pylist()]
        table = table.filter(pa.array(keep))
    points = table.schema.get_field_index("points")
    table = table.set_column(points, "points", pack_points(table["points"]))
    stored = table["views"].combine_chunks()
    offsets = stored.offsets.to_numpy()
    index = []
    for first, last in itertools.pairwise(offsets):
        ring = ring_views(num_views, int(last - first))
        for place in range(num_views):
            for turn in range(teacher_views):
                other = (place + turn * num_views // teacher_views) % num_views
                index.append(int(first) + ring[other])
    pairs = table.drop_columns(["views"]).take(np.repeat(np.arange(table.num_rows), num_views))
    views = stored.values.take(pa.array(index, pa.int64()))
    starts = np.arange(0, len(index) + 1, teacher_views, dtype=np.int32)
    return pairs.append_column("views", pa.ListArray.from_arrays(pa.array(starts), views))


def read_rows(shards: str, files: Sequence[str], columns: Sequence[str]) -> ray.data.Dataset:
    """Reads the columns of the files lazily, in their order."""
    context = ray.data.DataContext.get_current()
    # The newer reader starts a crowd of actors for each pass over the data, which costs a small
    # machine half a minute every epoch, and it packs small shards into one block.
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    # One seed, one result: blocks must not arrive in the order they happen to finish.
    context.execution_options.preserve_order = True
    store = shard_store(shards)
    return ray.data.read_parquet(
        [store.path(name) for name in files],
        filesystem=store.system,
        columns=list(columns),
        num_cpus=STREAM_CPUS,
        concurrency=min(STREAM_TASKS, len(files)),
        # Left to itself, Ray cuts the files by the cluster's CPUs, and the workers' shares with
        # them: a run that goes on elsewhere would be another run.
        override_num_blocks=len(files),
    )


def stream_pairs(
    shards: str,
    config: DataConfig,
    *,
    columns: Sequence[str],
    check: ShardCheck,
    teacher_views: int,
) -> ray.data.Dataset:
    """Streams the objects under `shards` as one row per used view, in the order of the shards.

    Args:
        shards: Folder of Parquet files.
        config: Which views.
        columns: What to read; nothing else leaves the disk.
        check: What `check_shards` found: the files, and the rows to leave out.
        teacher_views: T, views that come with each row.
    """
    return read_rows(shards, check.files, columns).map_batches(
        pair_rows,  # type: ignore[arg-type]
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        compute=ray.data.TaskPoolStrategy(size=STREAM_TASKS),
        num_cpus=STREAM_CPUS,
        fn_kwargs={
            "num_views": config.num_views,
            "teacher_views": teacher_views,
            "left_out": frozenset(row.object_id for row in check.bad),
        },
    )


class BrokenViewError(RuntimeError):
    """A view that looked whole before training can't be decoded.

    Args:
        object_id: Whose.
        reason: What the decoder says.
    """

    def __init__(self, object_id: str, reason: str) -> None:
        # All arguments go to the base class: it makes the error anew in another process of them.
        super().__init__(object_id, reason)
        self.object_id, self.reason = object_id, reason

    def __str__(self) -> str:
        return f"a view of the object '{self.object_id}' can't be decoded ({self.reason})"


class RawCollate(ArrowBatchCollateFn):
    """Decodes the rows of a batch; runs in the loader's threads, so it draws nothing at random.

    Args:
        view_size: S, side that views are decoded to.
        threads: How many views are decoded at a time; Pillow lets others run meanwhile.
        pin: Whether to lay the result where a GPU fetches it while the host goes on.
    """

    def __init__(self, view_size: int, *, threads: int = 1, pin: bool = False) -> None:
        self.view_size = view_size
        self.threads = threads
        self.pin = pin

    # Ray types the result as tensors, and allows anything.
    def __call__(self, table: pa.Table) -> RawBatch:  # type: ignore[override]
        """Turns B rows of `pair_rows` into a batch on the CPU.

        Raises:
            BrokenViewError: If a view can't be decoded.
        """
        # Not at the top: the processes that read, slice and deal out rows import this module, and
        # torch would cost each of them seconds and half a gigabyte.
        import torch

        clouds = decode_points(table["points"])
        # A prefix of a cloud is a fair sample of it, for its points are in random order.
        shortest = min(len(cloud) for cloud in clouds)
        points = torch.from_numpy(np.stack([cloud[:shortest] for cloud in clouds]))
        try:
            images = torch.from_numpy(self._decode(table["views"].to_pylist()))
        except (OSError, TypeError, ValueError):
            raise self._broken_view(table) from None
        captions = table["captions"].to_pylist() if "captions" in table.column_names else ()
        names = tuple(table["object_id"].to_pylist())
        return RawBatch(
            images=images.pin_memory() if self.pin else images,
            points=points.pin_memory() if self.pin else points,
            object_id=torch.tensor([hash_id(name) for name in names]),
            captions=tuple(tuple(texts) for texts in captions),
            names=names,
        )

    def _broken_view(self, table: pa.Table) -> BrokenViewError:
        """Finds the object whose view can't be decoded."""
        for name, views in zip(table["object_id"], table["views"], strict=True):
            for view in views.as_py():
                try:
                    decode_view(view, self.view_size)
                except (OSError, TypeError, ValueError) as broken:
                    return BrokenViewError(name.as_py(), str(broken))
        raise AssertionError("a view could not be decoded, and now all of them can")

    def _decode(self, rows: Sequence[Sequence[bytes]]) -> npt.NDArray[np.uint8]:
        """Decodes T views of each of B objects to (B, T, 3, S, S), the channels last in memory."""
        side, num_views = self.view_size, len(rows[0])
        images = np.empty((len(rows), num_views, side, side, 3), np.uint8).transpose(0, 1, 4, 2, 3)

        def decode(place: int) -> None:
            row, view = divmod(place, num_views)
            images[row, view] = decode_view(rows[row][view], side)

        places = range(len(rows) * num_views)
        if self.threads == 1:
            for place in places:
                decode(place)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                for _ in pool.map(decode, places):
                    pass  # to raise what was raised
        return images


def _own_cpus() -> int:
    """Counts the CPUs that Ray gave this worker; a driver is given none, and has the machine's."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return len(os.sched_getaffinity(0))
    return max(1, int(context.get_assigned_resources().get("CPU", 1)))


def raw_batches(
    shard: ray.data.DataIterator,
    config: DataConfig,
    *,
    batch_size: int,
    view_size: int,
    seed: int,
    device: torch.device,
) -> Generator[RawBatch, None, None]:
    """Iterates over one epoch's batches of one worker.

    Args:
        shard: The worker's share of `stream_pairs`.
        config: Size of the shuffle buffer, and threads that decode.
        batch_size: This worker's share of a step.
        view_size: S, side that views are decoded to.
        seed: Of the order; another for each epoch.
        device: Where the tensors shall lie.
    """
    batches = shard.iter_torch_batches(
        batch_size=batch_size,
        collate_fn=RawCollate(
            view_size,
            threads=config.decode_threads or _own_cpus(),
            pin=device.type == "cuda",
        ),
        # drop_last keeps the workers in step: one that takes a step more than the others
        # waits in its first collective for ever.
        drop_last=True,
        local_shuffle_buffer_size=max(config.shuffle_buffer, batch_size),
        local_shuffle_seed=seed,
    )
    for batch in batches:
        assert isinstance(batch, RawBatch)
        yield RawBatch(
            batch.images.to(device, non_blocking=True),
            batch.points.to(device, non_blocking=True),
            batch.object_id.to(device, non_blocking=True),
            batch.captions,
            batch.names,
        )


_Started = tuple[list["RawBatch"], Generator["RawBatch", None, None]]
"""The first batch of an epoch, and the others."""


class Epochs:
    """One epoch's batches after the other's. An epoch begins while the last step of the one before
    is taken: to set its stream up takes Ray half a second, in which no step would be.

    Args:
        begin: Gives the batches of an epoch, by its number.
        first: Number of the epoch that begins at once.
        num_epochs: How many there are; none begins after the last.
        num_batches: Of an epoch, as many as every worker takes.
    """

    def __init__(
        self,
        begin: Callable[[int], Generator[RawBatch, None, None]],
        *,
        first: int,
        num_epochs: int,
        num_batches: int,
    ) -> None:
        self._begin = begin
        self._num_batches = num_batches
        self._thread = ThreadPoolExecutor(1)
        self._numbers = iter(range(first, num_epochs))
        self._prepare()

    def batches(self, *, skip: int = 0) -> Iterator[RawBatch]:
        """Iterates over the batches of the epoch at hand, but for the first few."""
        first, rest = self._coming.result()
        batches = itertools.islice(itertools.chain(first, rest), self._num_batches)
        for place, batch in enumerate(batches, start=1):
            if place == self._num_batches:
                # First: Ray takes the end of a share's iteration for that of its newest one.
                rest.close()
                self._prepare()
            if place > skip:
                yield batch

    def _prepare(self) -> None:
        """Lets the next epoch begin, if there is one."""
        epoch = next(self._numbers, None)
        if epoch is not None:
            self._coming: Future[_Started] = self._thread.submit(self._started, epoch)

    def _started(self, epoch: int) -> _Started:
        batches = self._begin(epoch)
        return list(itertools.islice(batches, 1)), batches


def steps_per_epoch(check: ShardCheck, config: DataConfig, fewest: int, most: int) -> int:
    """Counts the steps that every worker takes in an epoch, however many workers there are.

    Args:
        check: What the shards hold.
        config: Size of the batch, and views.
        fewest: Workers that there are at least.
        most: Workers that there are at most.

    Raises:
        ConfigError: If the batch can't be shared by the workers, or is larger than the data.
    """
    size = config.batch_size
    for workers in range(fewest, most + 1):
        kept = size // workers * workers
        if fewest == most and kept < size:
            raise ConfigError(
                f"data.batch_size {size} can't be shared by {workers} workers; "
                f"take a multiple of {workers}"
            )
        if kept < (1 - MOST_ROUNDING) * size:
            raise ConfigError(
                f"data.batch_size {size} would be {kept} with {workers} workers, for each takes as "
                f"many pairs as the others; take at least {_fair_size(fewest, most, size)}"
            )
    pairs = check.num_good * config.num_views
    steps = min((pairs // workers) // (size // workers) for workers in range(fewest, most + 1))
    if steps == 0:
        raise ConfigError(
            f"data.batch_size {config.batch_size} is larger than the {pairs} pairs of the shards; "
            "make it smaller"
        )
    return steps


def _fair_size(fewest: int, most: int, size: int) -> int:
    """The next size of a batch that no number of workers rounds by much."""
    counts = range(fewest, most + 1)
    while any(size // n * n < (1 - MOST_ROUNDING) * size for n in counts):
        size += 1
    return size


def count_text(check: ShardCheck) -> str:
    """Says in one line what was found."""
    left_out = f", {len(check.bad)} left out" if check.bad else ""
    return f"{check.num_good} objects in {len(check.files)} shards{left_out}"
