"""What does streaming cost when the shards are ten times as large as Ray's object store?

    python benchmarks/stream.py [--store-mb 90] [--times 10] [--passes 2]

Reads shards that fit into the store and shards that don't, in turns, by the way that training reads
them, up to decoded batches that no model takes. Prints throughput, time to the first batch, peak
use of the store, what was written to disk, and the memory of all processes; appends one line to
benchmarks/results/stream.jsonl. Takes about 4 minutes and 1.1 GB of disk on 2 cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray reads it: a cluster of our own, on loopback

import ray
import torch
from copies import SHARD_OBJECTS, write_copies
from measure import append_result
from memory import Sampler

from crossmost_ray.config import DataConfig
from crossmost_ray.data.shards import list_shards
from crossmost_ray.data.stream import TRAIN_COLUMNS, check_shards, raw_batches, stream_pairs

VIEW_SIZE = 96
BATCH_SIZE = 32
SMALL_SHARE = 0.25
"""Of the store: with the copies under way, that fits."""

SMALL_PASSES = 5
"""Passes over the small shards for one over the large: theirs are short."""

SAMPLE_S = 1.0


@dataclass(frozen=True)
class Shards:
    """A folder of shards, read as training would."""

    folder: Path
    num_objects: int
    mb: float
    pairs: ray.data.DataIterator


@dataclass(frozen=True)
class Pass:
    """One reading of all shards."""

    objects_per_s: float
    mb_per_s: float
    first_batch_s: float
    steady_per_s: float
    """Objects per second after the first batch."""

    store_mb: float
    """Largest use of the object store."""

    pss_mb: float
    """Largest memory of all processes together."""

    spilled_mb: float


def make_shards(folder: Path, num_objects: int) -> Shards:
    """Writes shards, checks them and plans their streaming."""
    mb = write_copies(folder, num_objects)
    config = data_config(folder)
    files = list_shards(str(folder), TRAIN_COLUMNS)
    check = check_shards(str(folder), files, config, view_size=VIEW_SIZE)
    pairs = stream_pairs(
        str(folder), config, columns=TRAIN_COLUMNS, check=check, teacher_views=config.teacher_views
    )
    # One share of one: what a training worker iterates over.
    (share,) = pairs.streaming_split(1, equal=True)
    return Shards(folder, num_objects, mb, share)


def data_config(folder: Path) -> DataConfig:
    """One pair of every object, so that what passes through the store is what the shards hold."""
    return DataConfig(
        shards=str(folder),
        batch_size=BATCH_SIZE,
        num_views=1,
        teacher_views=1,
        shuffle_buffer=4 * BATCH_SIZE,
    )


def read(shards: Shards, seed: int) -> Pass:
    """Reads all shards once, and measures."""
    with Sampler(SAMPLE_S) as sampler:
        began = time.monotonic()
        first, objects = 0.0, 0
        for batch in raw_batches(
            shards.pairs,
            data_config(shards.folder),
            batch_size=BATCH_SIZE,
            view_size=VIEW_SIZE,
            seed=seed,
            device=torch.device("cpu"),
        ):
            objects += len(batch.object_id)
            first = first or time.monotonic() - began
        seconds = time.monotonic() - began
    if objects != shards.num_objects:
        raise RuntimeError(f"{shards.num_objects} objects were written and {objects} came back")
    samples = sampler.samples
    return Pass(
        objects_per_s=objects / seconds,
        mb_per_s=shards.mb / seconds,
        first_batch_s=first,
        steady_per_s=(objects - BATCH_SIZE) / (seconds - first),
        store_mb=max(sample.store.used for sample in samples),
        pss_mb=max(sum(sample.pss.values()) for sample in samples),
        spilled_mb=samples[-1].store.spilled - samples[0].store.spilled,
    )


def summary(shards: Shards, passes: Sequence[Pass]) -> dict[str, object]:
    """Medians of all measures, and the least and the most of the throughput."""
    rates = [one.objects_per_s for one in passes]
    values = {
        name: round(statistics.median(getattr(one, name) for one in passes), 2)
        for name in Pass.__dataclass_fields__
    }
    return {
        "objects": shards.num_objects,
        "mb": round(shards.mb, 1),
        "passes": len(passes),
        **values,
        "objects_per_s_from_to": [round(min(rates), 1), round(max(rates), 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store-mb", type=int, default=90, help="Ray takes no less than 75")
    parser.add_argument("--times", type=float, default=10, help="the large shards, in stores")
    parser.add_argument("--passes", type=int, default=2, help="over the large shards")
    args = parser.parse_args()
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=args.store_mb * 10**6,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Whole shards, and with them whole batches.
            probe = write_copies(Path(folder, "probe"), SHARD_OBJECTS)
            sizes = {"fits": SMALL_SHARE * args.store_mb, "large": args.times * args.store_mb}
            data = {
                name: make_shards(Path(folder, name), round(mb / probe) * SHARD_OBJECTS)
                for name, mb in sizes.items()
            }
            read(data["fits"], seed=0)  # starts the processes that all passes use
            passes: dict[str, list[Pass]] = {name: [] for name in data}
            for turn in range(args.passes):
                for name, number in (("fits", SMALL_PASSES), ("large", 1)):
                    passes[name] += [read(data[name], seed=turn) for _ in range(number)]
    finally:
        ray.shutdown()

    summaries = {name: summary(data[name], passes[name]) for name in data}
    print(f"{'':34}{'fits':>16}{'large':>16}")
    for key in summaries["fits"]:
        print(f"{key:34}" + "".join(f"{summaries[name][key]!s:>16}" for name in summaries))
    append_result("stream", {"store_mb": args.store_mb, **summaries})


if __name__ == "__main__":
    main()
