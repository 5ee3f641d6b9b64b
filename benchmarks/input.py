"""What does a pair cost before any model sees it: our way, a plain DataLoader's, sample by sample?

    python benchmarks/input.py [--quick] [--objects 1024] [--passes 3] [--threads 1] [--device cuda]

Reads shards of the embedded objects, with 8,192 points and views of the size that a tower of 224 px
asks for (336 px, sheets of sixteen embedded views, so that detail is as fine as a photograph's), as
JPEG, WebP and PNG, and makes a weak and a strong pair of every object, in three ways, in turns:

    ours         Ray Data, `raw_batches`, batched augmentation
    loader       a plain torch DataLoader over the same files, with the same shuffle buffer,
                 decoding and batched augmentation; of 0, 1 and 2 workers, what costs least
    per sample   the same loader, transforming sample by sample: Pillow, torchvision's resize and
                 crop, timm's `rand-m9-mstd0.5-inc1`, and the published steps on points in NumPy,
                 less the two that change nothing

Prints processor milliseconds of an object, of all processes that take part (medians over the
passes, the least and the most), objects a second, ratios, and what each stage costs by itself;
appends a line to benchmarks/results/input.jsonl. --quick reads JPEG only, and takes a minute.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray reads it: a cluster of our own, on loopback

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from copies import write_copies
from measure import append_result, machine
from memory import processes
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torchvision import transforms

from crossmost_ray.cluster import KEEP_FREED_MEMORY
from crossmost_ray.config import DataConfig, ImageAugmentConfig, PointAugmentConfig
from crossmost_ray.data.augment import (
    normalize_images_,
    sample_points,
    strong_images,
    strong_points,
    weak_images,
    weak_points,
)
from crossmost_ray.data.decode import decode_points, view_size
from crossmost_ray.data.shards import list_shards
from crossmost_ray.data.stream import (
    TRAIN_COLUMNS,
    RawCollate,
    check_shards,
    pair_rows,
    raw_batches,
    stream_pairs,
)
from crossmost_ray.schema import RawBatch

IMAGE_SIZE = 224
NUM_POINTS = 8192
BATCH_SIZE = 32
BUFFER = 8 * BATCH_SIZE
QUALITY = 92
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TICKS = os.sysconf("SC_CLK_TCK")
SHARD_OBJECTS = 512
"""About 64 MB, as `jobs/prepare.py` makes them."""

RNG = np.random.default_rng(0)
WAYS = ("ours", "loader", "per sample")
Cloud = npt.NDArray[np.float32]


def sheet(views: Sequence[bytes], side: int, kind: str) -> bytes:
    """Puts embedded views beside and below each other, as one picture."""
    pictures = [Image.open(io.BytesIO(view)).convert("RGB") for view in views]
    width = pictures[0].width
    whole = Image.new("RGB", (side, side))
    across = -(-side // width)
    for place in range(across**2):
        row, column = divmod(place, across)
        whole.paste(pictures[place % len(pictures)], (column * width, row * width))
    stream = io.BytesIO()
    whole.save(stream, kind, **({} if kind == "PNG" else {"quality": QUALITY}))
    return stream.getvalue()


# Ours --------------------------------------------------------------------------------------------


def data_config(folder: Path, threads: int) -> DataConfig:
    """One pair of every object."""
    return DataConfig(
        shards=str(folder),
        batch_size=BATCH_SIZE,
        num_views=1,
        teacher_views=1,
        shuffle_buffer=BUFFER,
        num_points=NUM_POINTS,
        decode_threads=threads,
    )


def augment(batch: RawBatch, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Does what `AdaptTask.augment` does, less the mask."""
    images, points = ImageAugmentConfig(), PointAugmentConfig()
    views = batch.images[:, 0]
    weak = weak_images(views, IMAGE_SIZE, images, generator)
    strong = strong_images(views, IMAGE_SIZE, images, generator)
    sampled = sample_points(batch.points, NUM_POINTS, generator)
    weak_clouds = weak_points(sampled, points, generator)
    sampled = sample_points(batch.points, NUM_POINTS, generator)
    return (
        normalize_images_(weak, MEAN, STD),
        normalize_images_(strong, MEAN, STD),
        weak_clouds,
        strong_points(sampled, points, generator),
    )


def our_share(folder: Path, threads: int) -> ray.data.DataIterator:
    """Plans the streaming: what a single training worker iterates over."""
    config, files = data_config(folder, threads), list_shards(str(folder), TRAIN_COLUMNS)
    check = check_shards(str(folder), files, config, view_size=view_size(IMAGE_SIZE))
    pairs = stream_pairs(str(folder), config, columns=TRAIN_COLUMNS, check=check, teacher_views=1)
    (share,) = pairs.streaming_split(1, equal=True)
    return share


def ours(share: ray.data.DataIterator, config: DataConfig, device: torch.device, seed: int) -> int:
    """Reads all shards once by our way."""
    generator, objects = torch.Generator(device).manual_seed(seed), 0
    batches = raw_batches(
        share,
        config,
        batch_size=BATCH_SIZE,
        view_size=view_size(IMAGE_SIZE),
        seed=seed,
        device=device,
    )
    for batch in batches:
        objects += len(augment(batch, generator)[0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return objects


# A plain loader ----------------------------------------------------------------------------------


class Rows(IterableDataset[Any]):
    """Rows of Parquet files through a shuffle buffer: batches of them, or each for itself.

    Args:
        files: Divided among the workers.
        batched: Whether to give tables of a batch's rows.
        change: What becomes of a table or of a row, in the worker.
    """

    def __init__(self, files: Sequence[Path], change: Callable[[Any], Any], *, batched: bool):
        self.files, self.change, self.batched = files, change, batched

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        number, place = (1, 0) if worker is None else (worker.num_workers, worker.id)
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        held = None
        mine = self.files[place::number]
        for turn, file in enumerate(mine):
            table = pq.read_table(file, columns=list(TRAIN_COLUMNS))
            table = pair_rows(table, num_views=1, teacher_views=1, left_out=frozenset())
            if held is not None:
                table = pa.concat_tables([held, table])
            order = rng.permutation(len(table))
            last = turn == len(mine) - 1
            if len(table) < BUFFER and not last:
                held = table
                continue
            kept = 0 if last else BUFFER // 2
            table = table.combine_chunks()
            used = len(table) - kept if last else (len(table) - kept) // BATCH_SIZE * BATCH_SIZE
            for first in range(0, used, BATCH_SIZE):
                yield from self._changed(table.take(order[first : first + BATCH_SIZE]))
            held = table.take(order[used:])

    def _changed(self, table: Any) -> Iterator[Any]:
        if self.batched:
            yield self.change(table)
            return
        for cloud, (view,) in zip(
            decode_points(table["points"]), table["views"].to_pylist(), strict=True
        ):
            yield self.change((cloud, view))


def plain_loader(files: Sequence[Path], num_workers: int) -> DataLoader[Any]:
    """Decodes batches in the workers; they are augmented where they arrive."""
    collate = RawCollate(view_size(IMAGE_SIZE))
    kept: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2} if num_workers else {}
    rows = Rows(files, collate, batched=True)
    return DataLoader(rows, batch_size=None, num_workers=num_workers, **kept)


def loaded(loader: DataLoader[Any], seed: int, device: torch.device) -> int:
    """Reads all shards once by the plain loader."""
    torch.manual_seed(seed)
    generator, objects = torch.Generator(device).manual_seed(seed), 0
    for batch in loader:
        there = batch._replace(
            images=batch.images.to(device, non_blocking=True),
            points=batch.points.to(device, non_blocking=True),
        )
        objects += len(augment(there, generator)[0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return objects


# Sample by sample --------------------------------------------------------------------------------


class PerSample:
    """A weak and a strong pair of one row, by Pillow, torchvision, timm and NumPy."""

    def __init__(self) -> None:
        bicubic = transforms.InterpolationMode.BICUBIC
        self.weak = transforms.Compose(
            [
                transforms.Resize(IMAGE_SIZE, interpolation=bicubic),
                transforms.RandomCrop(IMAGE_SIZE),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        # At full strength timm asks for 0 bits, which Pillow refuses.
        auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = posterize_bits
        self.strong = create_transform(
            IMAGE_SIZE,
            is_training=True,
            scale=(0.3, 1.0),
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            mean=MEAN,
            std=STD,
        )

    def __call__(self, row: tuple[Cloud, bytes]) -> tuple[Any, ...]:
        """Decodes and transforms one row."""
        cloud, view = row
        image = Image.open(io.BytesIO(view)).convert("RGB")
        return self.weak(image), self.strong(image), weak_cloud(cloud), strong_cloud(cloud)


def posterize_bits(level: float, hparams: object) -> tuple[int]:
    """Bits that are left at a level of 0 to 10."""
    return (max(1, 4 - int(level / 10 * 4)),)


def unit_sphere(cloud: Cloud) -> Cloud:
    """Centres and scales one cloud."""
    cloud = cloud - cloud.mean(axis=0)
    result: Cloud = cloud / np.sqrt((cloud**2).sum(axis=1)).max()
    return result


def turn(axis: int, angle: float) -> Cloud:
    """Turns about an axis."""
    j, k = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3, dtype=np.float32)
    matrix[j, j] = matrix[k, k] = math.cos(angle)
    matrix[k, j] = math.sin(angle)
    matrix[j, k] = -matrix[k, j]
    return matrix


def weak_cloud(cloud: Cloud) -> Cloud:
    """The published weak steps."""
    cloud = unit_sphere(cloud) * np.float32(RNG.uniform(0.9, 1.1))
    x, y, z = np.clip(RNG.normal(0, 0.06, 3), -0.18, 0.18)
    return cloud @ (turn(2, z) @ turn(1, y) @ turn(0, x)).T.astype(np.float32, copy=False)


def strong_cloud(cloud: Cloud) -> Cloud:
    """The published strong steps, less the crop and the filling up, which change nothing here."""
    cloud = unit_sphere(cloud) * np.float32(RNG.uniform(0.5, 2.0))
    cloud = cloud @ turn(1, RNG.uniform(0, 2 * math.pi)).T
    extent = cloud.max(axis=0) - cloud.min(axis=0)
    cloud = cloud + (RNG.uniform(-0.5, 0.5, 3) * extent).astype(np.float32)
    cloud = cloud + np.clip(RNG.normal(0, 0.01, cloud.shape), -0.05, 0.05)
    dropped = RNG.random(len(cloud)) <= RNG.random() * 0.875
    cloud[dropped] = cloud[0]
    return cloud.astype(np.float32)


def sample_loader(files: Sequence[Path], num_workers: int) -> DataLoader[Any]:
    """Transforms row by row in the workers, and stacks the results."""
    kept: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2} if num_workers else {}
    return DataLoader(
        Rows(files, PerSample(), batched=False),
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        collate_fn=default_collate,
        **kept,
    )


def sampled(loader: DataLoader[Any], seed: int) -> int:
    """Reads all shards once, sample by sample."""
    torch.manual_seed(seed)
    random.seed(seed)
    return sum(len(images) for images, *_ in loader)


# Measuring ---------------------------------------------------------------------------------------


def processor_seconds() -> dict[int, float]:
    """Gives the processor time of this process and all its descendants, by their ids."""
    found = {}
    for pid in processes(os.getpid()):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[pid] = sum(map(int, stat.rpartition(")")[2].split()[11:13])) / TICKS
    return found


@dataclass(frozen=True)
class Pass:
    """One reading of all shards."""

    ms: float
    """Processor milliseconds of an object."""

    per_s: float


def measured(way: Callable[[int], int], seed: int) -> Pass:
    """Times one reading."""
    busy, began = processor_seconds(), time.monotonic()
    objects = way(seed)
    seconds = time.monotonic() - began
    spent = sum(now - busy.get(pid, 0.0) for pid, now in processor_seconds().items())
    return Pass(1e3 * spent / objects, objects / seconds)


def cheapest(
    make: Callable[[int], DataLoader[Any]], read: Callable[[DataLoader[Any], int], int]
) -> tuple[int, Callable[[int], int]]:
    """Picks the number of workers that costs least, in two turns after one that warms up."""
    loaders = {number: make(number) for number in (0, 1, 2)}
    tried: dict[int, list[float]] = defaultdict(list)
    for seed in range(3):
        for number, loader in loaders.items():
            tried[number].append(measured(partial(read, loader), seed).ms)
    number = min(loaders, key=lambda number: min(tried[number][1:]))
    return number, partial(read, loaders[number])


def stages(files: Sequence[Path]) -> dict[str, float]:
    """Times each stage by itself, in this process, in milliseconds of an object."""
    table = pq.read_table(files[0], columns=list(TRAIN_COLUMNS)).slice(0, BATCH_SIZE)
    pairs = pair_rows(table, num_views=1, teacher_views=1, left_out=frozenset())
    collate, generator = RawCollate(view_size(IMAGE_SIZE)), torch.Generator().manual_seed(0)
    batch, images, points = collate(pairs), ImageAugmentConfig(), PointAugmentConfig()
    views, rows = batch.images[:, 0], len(pq.read_table(files[0], columns=["object_id"]))
    encoded = pairs["views"].to_pylist()
    weak = weak_images(views, IMAGE_SIZE, images, generator)
    whole = pq.read_table(files[0], columns=list(TRAIN_COLUMNS))
    order = np.random.default_rng(0).permutation(len(pairs))
    asked: dict[str, tuple[Callable[[], object], int]] = {
        "read": (lambda: pq.read_table(files[0], columns=list(TRAIN_COLUMNS)), rows),
        "cut into pairs": (
            lambda: pair_rows(whole, num_views=1, teacher_views=1, left_out=frozenset()),
            rows,
        ),
        "shuffle": (lambda: pairs.take(order), BATCH_SIZE),
        "decode": (lambda: collate._decode(encoded), BATCH_SIZE),
        "stack points": (lambda: np.stack(decode_points(pairs["points"])), BATCH_SIZE),
        "weak images": (lambda: weak_images(views, IMAGE_SIZE, images, generator), BATCH_SIZE),
        "strong images": (
            lambda: strong_images(views, IMAGE_SIZE, images, generator),
            BATCH_SIZE,
        ),
        "normalise both": (
            lambda: [normalize_images_(weak, MEAN, STD) for _ in range(2)],
            BATCH_SIZE,
        ),
        "resample points twice": (
            lambda: sample_points(batch.points, NUM_POINTS, generator, repeats=2),
            BATCH_SIZE,
        ),
        "weak points": (lambda: weak_points(batch.points, points, generator), BATCH_SIZE),
        "strong points": (lambda: strong_points(batch.points, points, generator), BATCH_SIZE),
    }
    found = {}
    for name, (stage, number) in asked.items():
        stage()
        times = []
        for _ in range(9):
            began = time.process_time()
            stage()
            times.append(1e3 * (time.process_time() - began) / number)
        found[name] = round(statistics.median(times), 3)
    return found


def compare(
    folder: Path, kind: str, number: int, passes: int, threads: int, device: torch.device
) -> dict[str, Any]:
    """Compares the three ways on shards of one format."""
    write_copies(
        folder,
        number,
        view=partial(sheet, side=view_size(IMAGE_SIZE), kind=kind),
        shard_objects=min(SHARD_OBJECTS, number // 4),
    )
    files = sorted(folder.glob("*.parquet"))
    share, config = our_share(folder, threads), data_config(folder, threads)
    ways: dict[str, Callable[[int], int]] = {"ours": partial(ours, share, config, device)}
    workers = {}
    for name, make, read in (
        ("loader", plain_loader, partial(loaded, device=device)),
        ("per sample", sample_loader, sampled),
    ):
        workers[name], ways[name] = cheapest(partial(make, files), read)
    for seed in range(2):
        ways["ours"](seed)  # starts the processes that all passes use
    done: dict[str, list[Pass]] = defaultdict(list)
    for turn_ in range(passes):
        for name in WAYS:
            done[name].append(measured(ways[name], turn_))

    print(f"\n{kind}: {number} objects, {passes} passes of each way")
    print(f"{'':14}{'workers':>8}{'ms of an object':>26}{'objects/s':>12}{'times ours':>12}")
    median = {name: statistics.median(one.ms for one in done[name]) for name in WAYS}
    result: dict[str, Any] = {}
    for name in WAYS:
        times = [one.ms for one in done[name]]
        per_s = statistics.median(one.per_s for one in done[name])
        cell = f"{median[name]:.2f} ({min(times):.2f}-{max(times):.2f})"
        ratio = median[name] / median["ours"]
        print(f"{name:14}{workers.get(name, '-')!s:>8}{cell:>26}{per_s:>12.0f}{ratio:>12.2f}")
        result[name] = {
            "ms": round(median[name], 3),
            "from_to": [round(min(times), 3), round(max(times), 3)],
            "per_s": round(per_s),
            "ratio": round(ratio, 3),
            "workers": workers.get(name),
        }
    result["stages"] = stages(files)
    total = sum(result["stages"].values())
    print("by itself, ms:", ", ".join(f"{k} {v:.2f}" for k, v in result["stages"].items()))
    print(f"sum {total:.2f}; 16 cores at ours: {16e3 / median['ours']:.0f} objects/s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="JPEG only, fewer objects")
    parser.add_argument("--objects", type=int, help="in the shards; 1024, 384 with --quick")
    parser.add_argument("--passes", type=int, help="of each way; 3")
    parser.add_argument("--threads", type=int, default=1, help="that decode and augment in ours")
    parser.add_argument("--device", default="cpu", help="where ours and the loader augment")
    args = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        # What a run's workers are given, for all three ways: read as a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    device = torch.device(args.device)
    number = args.objects or (384 if args.quick else 1024)
    passes = args.passes or 3
    kinds = ("JPEG",) if args.quick else ("JPEG", "WEBP", "PNG")
    torch.set_num_threads(args.threads)
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}; {IMAGE_SIZE} px, {NUM_POINTS} points")
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        object_store_memory=2 * 10**9,
        include_dashboard=False,
        log_to_driver=False,
        # A run's tasks follow one another. Here other ways come between, and each return would pay
        # for new processes.
        _system_config={"idle_worker_killing_time_threshold_ms": 3_600_000},
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = {
                kind: compare(Path(folder, kind), kind, number, passes, args.threads, device)
                for kind in kinds
            }
    finally:
        ray.shutdown()
    facts = {"objects": number, "passes": passes, "threads": args.threads, "device": args.device}
    append_result("input", {"load": os.getloadavg()[0], **facts, **results})


if __name__ == "__main__":
    main()
