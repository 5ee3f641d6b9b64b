"""How does the cost grow with objects, points, batch, classes, models and datasets, and workers?

    python benchmarks/growth.py [QUESTION ...] [--quick] [--turns 3]

Prints a table for each question, with exponents: the slope of the line through the logarithms of
size and cost, 1 where cost grows as the size does. Appends one line for each to
benchmarks/results/growth.jsonl and draws docs/images/growth-QUESTION.svg; with --quick, which takes
smaller sizes and less than 2 minutes, it draws nothing and leaves `workers` out. All of it takes
about 20 minutes and 2 GB of memory on 2 cores.

Seconds are processor time of one process, one thread; memory is the most that the process held
beyond what it had held before. What a hundred thousand objects cost is measured part by part, for a
training over them would take days here: shards and predictions are the same few files under many
names, which are all read and counted.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray reads it: a cluster of our own, on loopback

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from apart import Watch, apart
from copies import SHARD_OBJECTS, write_copies
from measure import append_result, machine
from memory import processes, pss_mb
from plot import Lines, exponent, svg
from ray.cluster_utils import Cluster

from crossmost_ray.cluster import ENVIRONMENT
from crossmost_ray.config import AdaptConfig, EvaluationConfig, parse_config
from crossmost_ray.data.shards import check_file, list_shards
from crossmost_ray.data.stream import TRAIN_COLUMNS
from crossmost_ray.evaluation.actor import SUMS_KEY, ShardPredictor
from crossmost_ray.evaluation.counts import count_units
from crossmost_ray.evaluation.plan import PREDICTIONS_FOLDER, Split, Unit, list_units, make_plan
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.summary import summarize
from crossmost_ray.models.classifier import CrossModalClassifier
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.optim import build_optimizer, set_learning_rate
from crossmost_ray.schema import RawBatch
from crossmost_ray.storage import Store
from crossmost_ray.tally import paired_bootstrap
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.step import train_step
from crossmost_ray.training.trainer import train
from crossmost_ray.training.votes import VOICES, VoteBox
from crossmost_ray.training.worker import HISTORY_NAME

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MODEL = "assets:models/furniture-start"
SHARDS = "assets:furniture/target_a"
VIEW_SIZE = 96

CLASSES = 40
VIEWS = 12
BATCH = 32
POINTS = 1024
OBJECTS = 10_000
"""What a question holds fixed where it does not ask about it."""

EPOCH_VIEWS = 4
"""Of each object, in the epochs whose votes are collected: a third of the default's."""

KEPT_SHARDS = 16
"""Different files; more of them are further names of these."""


def linked(folder: Path, files: Sequence[Path], number: int) -> list[str]:
    """Gives files so many names in a folder, each as often as the others."""
    folder.mkdir(parents=True)
    names = [f"part-{place:05d}.parquet" for place in range(number)]
    for place, name in enumerate(names):
        os.link(files[place % len(files)], folder / name)
    return names


def check(watch: Watch, folder: Path, num_objects: int, *, full: bool) -> None:
    """What is looked at before a worker starts, by one process."""
    shards = folder / f"shards-{num_objects}"
    if not shards.exists():
        kept = folder / "kept"
        if not kept.exists():
            write_copies(kept, KEPT_SHARDS * SHARD_OBJECTS, num_views=VIEWS)
        linked(shards, sorted(kept.glob("*.parquet")), -(-num_objects // SHARD_OBJECTS))
    with watch.part("list shards"):
        names = list_shards(str(shards), TRAIN_COLUMNS)
    asked = {"num_points": POINTS, "num_views": VIEWS, "view_size": VIEW_SIZE}
    with watch.part("check, decoding every view" if full else "check"):
        for name in names:
            assert not check_file(str(shards), name, TRAIN_COLUMNS, full=full, **asked).bad


def task_of(num_classes: int, **data: Any) -> AdaptTask:
    """The embedded model as a task, with classes at random."""
    values = {
        "name": "growth",
        "model": MODEL,
        "data": {"shards": SHARDS, "classes": [f"c{k}" for k in range(num_classes)], **data},
    }
    start = load_model(MODEL)
    embed = torch.randn(num_classes, start.model.image.embed_dim)
    classifier = CrossModalClassifier(start.model, torch.nn.functional.normalize(embed, dim=-1))
    return AdaptTask(classifier, start.model.spec, parse_config(AdaptConfig, values, "growth"))


def cast(box: VoteBox, num_objects: int, num_classes: int) -> None:
    """Votes about all objects, a few views of each, in the order of the shards."""
    rng = np.random.default_rng(0)
    names = [f"copies/{place}" for place in range(num_objects)]
    ids = torch.from_numpy(rng.permutation(np.arange(num_objects) * 2**40))
    logits = {voice: 3 * torch.randn(BATCH, num_classes) for voice in VOICES}
    stable = torch.ones(BATCH)
    for first in range(0, num_objects * EPOCH_VIEWS - BATCH + 1, BATCH):
        places = np.arange(first, first + BATCH) // EPOCH_VIEWS
        box.add(ids[places], tuple(names[place] for place in places), logits, stable)


def epoch_end(watch: Watch, num_objects: int, num_classes: int) -> None:
    """What an epoch costs beside its steps, in the first worker."""
    torch.set_num_threads(1)
    task = task_of(num_classes)
    with watch.part("collect votes"):
        cast(task._box, num_objects, num_classes)
    with watch.part("save votes"):
        stored = io.BytesIO()
        torch.save(task._box.state_dict(), stored)
    watch.note("checkpoint MB", stored.tell() / 1e6)
    del stored
    with watch.part("judge epoch"):
        end = task.finish_epoch()
    assert end.votes is not None
    with watch.part("write votes"):
        sink = pa.BufferOutputStream()
        pq.write_table(end.votes, sink, compression="zstd")


def predictions(folder: Path, models: Sequence[str], classes: Sequence[str]) -> Path:
    """A file of answers by chance about one shard."""
    rng = np.random.default_rng(0)
    rows = []
    for model in models:
        for place in range(SHARD_OBJECTS):
            row: dict[str, Any] = {
                "object_id": str(place),
                "label": str(rng.choice(classes)),
                "model": model,
            }
            for opinion in OPINIONS:
                row |= {
                    f"ranked_{opinion}": rng.choice(classes, 5, replace=False).tolist(),
                    f"confidence_{opinion}": rng.random(),
                    f"entropy_{opinion}": rng.random(),
                }
            rows.append(row)
    even = {opinion: [1.0] * len(classes) for opinion in OPINIONS}
    sums = {"probability": dict.fromkeys(models, even), "left_out": []}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({SUMS_KEY: json.dumps(sums)})
    return path


def count(watch: Watch, folder: Path, num_objects: int, num_classes: int, num_models: int) -> None:
    """Predictions about so many objects, counted, divided out, and compared."""
    models = [f"model-{place}" for place in range(num_models)]
    classes = tuple(f"class {place}" for place in range(num_classes))
    here = folder / f"count-{num_objects}-{num_classes}-{num_models}-{time.monotonic_ns()}"
    kept = [predictions(here / "kept", models, classes)]
    names = linked(here / PREDICTIONS_FOLDER / "all", kept, -(-num_objects // SHARD_OBJECTS))
    split = Split("s", classes, ("{}",), POINTS)
    plan = make_plan(dict.fromkeys(models, "m"), {"all": split}, EvaluationConfig())
    units = [Unit("all", name) for name in names]
    with watch.part("count predictions"):
        counted = count_units(units, plan, Store(str(here)), confident=0.8)
        summarize(counted, {"all": classes}, models)
    answers = np.random.default_rng(0).random((2, num_objects))
    with watch.part("bootstrap"):
        paired_bootstrap(answers[0] < 0.5, answers[1] < 0.6)


def step(watch: Watch, *, num_points: int = POINTS, batch: int = BATCH, num_classes: int) -> None:
    """Training steps of the embedded model on noise, the median of three after the first."""
    torch.set_num_threads(1)
    task = task_of(num_classes, num_points=num_points, batch_size=batch)
    optimizer = build_optimizer(task.parameter_groups(), task.config.optim)
    set_learning_rate(optimizer, 1e-5)
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(batch, num_points, 3), dim=-1)
    images = torch.randint(0, 256, (batch, 2, 3, VIEW_SIZE, VIEW_SIZE), dtype=torch.uint8)
    names = tuple(f"o{place}" for place in range(batch))
    raw = RawBatch(images, points, torch.arange(batch), (), names)
    seconds = []
    for number in range(4):
        with watch.part("step"):
            train_step(
                task,
                optimizer,
                raw,
                step=number,
                generator=generator,
                clip_norm=1.0,
            )
        seconds.append(watch.found["step s"])
    watch.note("step s", statistics.median(seconds[1:]))


def classifier(watch: Watch, num_classes: int) -> None:
    """The zero-shot classifier of so many classes, four prompts each, made when a run starts."""
    torch.set_num_threads(1)
    start = load_model(MODEL)
    names = [f"a thing of kind {place}" for place in range(num_classes)]
    with watch.part("embed classes"):
        start.classifier(names, ["a {}.", "a photo of a {}.", "a 3D model of a {}.", "one {}."])


def evaluate(watch: Watch, folder: Path, num_models: int, num_splits: int) -> None:
    """Every model asked about 32 objects of every split, by one process as an actor would."""
    here = folder / f"evaluate-{num_models}-{num_splits}-{time.monotonic_ns()}"
    shards = here / "shards"
    shards.mkdir(parents=True)
    source = pq.read_table(Path(str(Store(SHARDS))) / "part-00000.parquet").slice(0, 16)
    for place in range(2):
        pq.write_table(source, shards / f"part-{place}.parquet")
    # A name for each, so that none is loaded for another.
    models = {f"model-{place}": str(here / f"model-{place}") for place in range(num_models)}
    for path in models.values():
        os.symlink(str(Store(MODEL)), path)
    split = Split(str(shards), tuple(f"c{place}" for place in range(CLASSES)), ("a {}.",), POINTS)
    config = EvaluationConfig(num_views=2, point_samples=1)
    splits = {f"split-{place}": split for place in range(num_splits)}
    plan = make_plan(models, splits, config)
    results = Store(str(here / "results"))
    units = list_units(plan)
    with watch.part("evaluate"):
        actor = ShardPredictor(plan, results, use_gpu=False)
        for unit in units:
            actor.run(unit)
    with watch.part("report"):
        counted = count_units(units, plan, results, confident=0.8)
        summarize(counted, dict.fromkeys(splits, split.classes), list(models))


@dataclass(frozen=True)
class Crew:
    """Workers of a run, and the nodes that they are on."""

    name: str
    nodes: int
    workers: int


HEAD = "127.0.0.9"
"""Where the head answers, which has no CPU. Each node has an address of its own on this machine;
127.0.0.1 would be turned into the machine's."""

CREWS = (
    Crew("1 worker", 1, 1),
    Crew("2 workers", 1, 2),
    Crew("2 nodes with a worker each", 2, 2),
)


def train_with(crew: Crew, folder: Path) -> dict[str, float]:
    """Trains two short epochs on a cluster of its own; one thread for each worker."""
    head = {"num_cpus": 0, "node_ip_address": HEAD, "dashboard_host": HEAD}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for place in range(crew.nodes):
            cluster.add_node(
                num_cpus=crew.workers // crew.nodes, node_ip_address=f"127.0.0.{10 + place}"
            )
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=HEAD)
        values = {
            "name": f"{crew.nodes}-{crew.workers}",
            "model": MODEL,
            "output": str(folder / "runs"),
            "data": {"shards": SHARDS, "num_views": 4, "batch_size": BATCH},
            "optim": {"epochs": 3},
            "cluster": {"num_workers": crew.workers},
        }
        began = time.monotonic()
        with Memory() as memory:
            run = train(parse_config(AdaptConfig, values, "growth"))
        whole = time.monotonic() - began
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = [json.loads(line) for line in (run.read(HISTORY_NAME) or b"").splitlines()]
    return {
        # The first epoch pays for what is set up on the way.
        "pairs/s": statistics.median(row["pairs_per_s"] for row in rows[1:]),
        "waiting share": statistics.median(row["data/wait_share"] for row in rows[1:]),
        "worker MB": rows[-1]["system/memory_mb"],
        "all processes MB": memory.most,
        "run s": whole,
        "beside steps s": whole - sum(row["seconds"] for row in rows),
    }


class Memory:
    """Follows what this process and all that it started hold together, as long as it is entered."""

    def __init__(self) -> None:
        self.most = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(2.0):
            held = [pss_mb(pid) or 0.0 for pid in processes(os.getpid())]
            self.most = max(self.most, sum(held))


def ask_workers(folder: Path, turns: int) -> dict[str, dict[str, float]]:
    """Trains with every crew in turns; gives medians."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seen: dict[str, dict[str, list[float]]] = {crew.name: {} for crew in CREWS}
    for turn in range(turns):
        for crew in CREWS:
            for name, number in train_with(crew, folder / f"turn-{turn}").items():
                seen[crew.name].setdefault(name, []).append(number)
    return {
        crew: {name: statistics.median(values) for name, values in found.items()}
        for crew, found in seen.items()
    }


def workers_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Lays out what was measured of each crew as Markdown."""
    measures = next(iter(found.values()))
    text = [f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    text += [
        f"| {name} | {' | '.join(f'{one[name]:.3g}' for one in found.values())} |"
        for name in measures
    ]
    return "\n".join(text)


@dataclass(frozen=True)
class Row:
    """All measures at one size."""

    size: float
    found: dict[str, float]


@dataclass(frozen=True)
class Question:
    """A size that grows, and what is measured at each."""

    label: str
    sizes: Sequence[int]
    quick: Sequence[int]
    works: Callable[[int], list[functools.partial[None]]]
    """Pieces of work at a size, each of which is measured in a process of its own."""


def questions(folder: Path, *, quick: bool) -> dict[str, Question]:
    """Lists what is asked; files go into the folder."""
    objects = 2000 if quick else OBJECTS

    def of_objects(n: int) -> list[functools.partial[None]]:
        works = [
            functools.partial(check, folder=folder, num_objects=n, full=False),
            functools.partial(epoch_end, num_objects=n, num_classes=CLASSES),
            functools.partial(
                count, folder=folder, num_objects=n, num_classes=CLASSES, num_models=3
            ),
        ]
        if n <= OBJECTS:
            works.append(functools.partial(check, folder=folder, num_objects=n, full=True))
        return works

    def of_classes(c: int) -> list[functools.partial[None]]:
        return [
            functools.partial(classifier, num_classes=c),
            functools.partial(step, num_classes=c),
            functools.partial(epoch_end, num_objects=objects, num_classes=c),
            functools.partial(
                count, folder=folder, num_objects=objects, num_classes=c, num_models=3
            ),
        ]

    return {
        "objects": Question("objects", (1000, 10_000, 100_000), (500, 2000, 8000), of_objects),
        "points": Question(
            "points of a cloud",
            (1024, 2048, 4096, 8192, 16_384),
            (1024, 4096),
            lambda n: [functools.partial(step, num_points=n, num_classes=CLASSES)],
        ),
        "batch": Question(
            "pairs in a batch",
            (4, 8, 16, 32, 64, 128),
            (8, 32),
            lambda n: [functools.partial(step, batch=n, num_classes=CLASSES)],
        ),
        "classes": Question("classes", (10, 100, 1000), (10, 100, 1000), of_classes),
        "models": Question(
            "models, of 2 datasets",
            (1, 2, 4, 8),
            (1, 2),
            lambda n: [functools.partial(evaluate, folder=folder, num_models=n, num_splits=2)],
        ),
        "datasets": Question(
            "datasets, for 2 models",
            (1, 2, 4, 8),
            (1, 2),
            lambda n: [functools.partial(evaluate, folder=folder, num_models=2, num_splits=n)],
        ),
    }


def ask(question: Question, *, quick: bool, turns: int) -> list[Row]:
    """Measures at every size, the sizes in turns; gives medians."""
    sizes = question.quick if quick else question.sizes
    seen: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    for _ in range(turns):
        for size in sizes:
            for work in question.works(size):
                for name, value in apart(work).items():
                    seen[size].setdefault(name, []).append(value)
    return [
        Row(size, {name: statistics.median(values) for name, values in found.items()})
        for size, found in seen.items()
    ]


def lines(rows: Sequence[Row], unit: str) -> dict[str, list[tuple[float, float]]]:
    """Gives the measures of one unit, `s` or `MB`, by name."""
    names = dict.fromkeys(name for row in rows for name in row.found if name.endswith(f" {unit}"))
    return {
        name.removesuffix(f" {unit}"): [
            (row.size, row.found[name]) for row in rows if name in row.found
        ]
        for name in names
    }


def table(label: str, rows: Sequence[Row]) -> str:
    """Lays the measures out as Markdown, with the exponent over all sizes and over the largest two:
    what is always paid hides in the first how the rest grows."""
    text = [
        f"| {label} | {' | '.join(f'{row.size:,g}' for row in rows)} | exponent | at the end |",
        f"|---|{'---|' * (len(rows) + 2)}",
    ]
    for name in dict.fromkeys(name for row in rows for name in row.found):
        points = [(row.size, row.found[name]) for row in rows if name in row.found]
        slopes = [exponent(points), exponent(points[-2:])]
        cells = [f"{row.found[name]:.3g}" if name in row.found else "" for row in rows]
        told = " | ".join("" if slope is None else f"{slope:.2f}" for slope in slopes)
        what, _, unit = name.rpartition(" ")
        text.append(f"| {what}, {unit} | {' | '.join(cells)} | {told} |")
    return "\n".join(text)


def draw(name: str, label: str, rows: Sequence[Row]) -> None:
    """Draws docs/images/growth-NAME.svg."""
    panels: dict[str, Lines] = {"seconds": lines(rows, "s"), "MB": lines(rows, "MB")}
    shown = {unit: found for unit, found in panels.items() if found}
    (IMAGES / f"growth-{name}.svg").write_text(svg(label, shown), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", nargs="*", help="all of them if none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=1)
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        known = questions(Path(temporary), quick=args.quick)
        unknown = sorted(set(args.questions) - set(known) - {"workers"})
        if unknown:
            parser.error(f"no question {unknown}; there are {[*known, 'workers']}")
        asked = args.questions or [*known, *(() if args.quick else ("workers",))]
        # Last: once threads have run, no process can be copied any more.
        for name in sorted(asked, key=lambda one: one == "workers"):
            if name == "workers":
                found = ask_workers(Path(temporary), args.turns)
                print(f"\n{workers_table(found)}")
                crews = {crew: rounded(one) for crew, one in found.items()}
                append_result("growth", {"question": name, "turns": args.turns, "crews": crews})
                continue
            began = time.monotonic()
            rows = ask(known[name], quick=args.quick, turns=args.turns)
            print(f"\n{table(known[name].label, rows)}\n({time.monotonic() - began:.0f} s)")
            append_result(
                "growth",
                {
                    "question": name,
                    "quick": args.quick,
                    "turns": args.turns,
                    "rows": [{"size": row.size, **rounded(row.found)} for row in rows],
                },
            )
            if not args.quick:
                draw(name, known[name].label, rows)


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Leaves of each figure what can be believed."""
    return {name: float(f"{value:.4g}") for name, value in found.items()}


if __name__ == "__main__":
    main()
