"""A preparation config in, dataset folders out, a shard a task; goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray.data

from crossmost_ray.cluster import connect
from crossmost_ray.config import ConfigError
from crossmost_ray.prepare.config import PrepareConfig
from crossmost_ray.prepare.manifest import Record, describe
from crossmost_ray.prepare.plan import Chunk, Plan, chunks_of, make_plan
from crossmost_ray.prepare.render import RenderError
from crossmost_ray.prepare.rows import Built, build_row
from crossmost_ray.prepare.shards import (
    attribution,
    checksum,
    decode_shard,
    encode_shard,
    row_bytes,
)
from crossmost_ray.schema import MANIFEST_NAME, UNFINISHED_NAME
from crossmost_ray.storage import Store

logger = logging.getLogger(__name__)

ATTRIBUTION_NAME = "ATTRIBUTION.md"
REJECTS_NAME = "rejects.json"
RECORDS = ".records"
PLAN_NAME = "plan.json"
SAMPLED = 8
"""Objects built beforehand, to learn how many make up a shard."""

LEAST_SHARDS = 8
"""Of all datasets together, however small they are: each is a unit of parallel work."""


@dataclass(frozen=True)
class Prepared:
    """What a preparation made of its sources."""

    address: str
    """Holds a folder for each dataset."""

    manifests: dict[str, dict[str, Any]]
    """Of each dataset."""

    rejects: list[dict[str, str]]
    """`object_id`, `caption` and `reason` of each object that was left out."""

    seconds: float
    """That it took; what was done before a stop is not counted."""

    num_built: int
    """Objects that were looked at in that time."""


def prepare(config: PrepareConfig) -> Prepared:
    """Reads the sources, builds a row of each object and writes the datasets.

    A shard is written once its objects are done, and is not done again if the preparation is
    stopped and started anew with the same config.

    Raises:
        ConfigError: If a source or the class mapping cannot be read, the output holds something
            else or can't be written, no worker can render, or no object at all became a row.
    """
    start = time.monotonic()
    plan, store = make_plan(config), Store(config.output)
    num_built = 0
    if not _is_finished(plan, store):
        _claim(plan, store, overwrite=config.overwrite)
        chunks = chunks_of(plan, _objects_per_shard(plan, config, store))
        todo = [chunk for chunk in chunks if store.read(_record_name(chunk)) is None]
        if len(todo) < len(chunks):
            logger.info("going on: %d of %d shards are there", len(chunks) - len(todo), len(chunks))
        num_built = sum(len(chunk.objects) for chunk in todo)
        _write_chunks(todo, config, store)
        _finish(plan, config, store, chunks)
    manifests = {name: _read_json(store, f"{name}/{MANIFEST_NAME}") for name in plan.datasets}
    return Prepared(
        address=config.output,
        manifests=manifests,
        rejects=_read_json(store, REJECTS_NAME)["rejects"],
        seconds=time.monotonic() - start,
        num_built=num_built,
    )


def build_chunk(chunk: Chunk, config: PrepareConfig) -> list[Built]:
    """Builds the rows of a shard, one object after the other.

    Raises:
        RenderError: If this machine cannot render at all.
    """
    built = []
    for item in chunk.objects:
        try:
            built.append(build_row(item, config))
        except RenderError:
            raise
        # Whatever else an object brings about is a bug of ours, and no reason to stop the rest.
        except Exception as bug:  # noqa: BLE001
            built.append(Built(item.object_id, None, f"{type(bug).__name__}: {bug}"))
    return built


def write_chunk(
    chunk: Chunk, built: Sequence[Built], config: PrepareConfig, store: Store
) -> Record:
    """Writes a shard, and after it the record that says so."""
    rows = [result.row for result in built if result.row is not None]
    kept = [result for result in built if result.row is not None]
    by_id = {item.object_id: item for item in chunk.objects}
    record: Record = {
        "rejects": [
            {
                "object_id": result.object_id,
                "caption": by_id[result.object_id].captions[0],
                "reason": result.reason,
                "source": by_id[result.object_id].source,
            }
            for result in built
            if result.row is None
        ],
        "rows": len(rows),
        "meshes": {r.object_id: r.mesh_sha256 for r in kept if r.mesh_sha256 is not None},
        "views": dict(Counter(result.kind_of_views for result in kept)),
        "num_views": dict(Counter(str(len(row["views"])) for row in rows)),
        "with_colors": sum(row["colors"] is not None for row in rows),
        "credits": [
            {"caption": row["captions"][0]}
            | {key: row[key] or "unknown" for key in ("object_id", "source", "author", "license")}
            for row in rows
            if row["license"] is not None
        ],
        **{
            f"{column}s": dict(Counter(str(row[column] or "null") for row in rows))
            for column in ("label", "source", "license")
        },
    }
    if rows:
        data = encode_shard(rows, config.compression_level)
        name = f"{chunk.name}.parquet"
        store.write(f"{chunk.dataset}/{name}", data)
        record["shard"] = {
            "file": name,
            "rows": len(rows),
            "bytes": len(data),
            "sha256": checksum(data),
        }
    store.write(_record_name(chunk), _json(record))
    return record


def _is_finished(plan: Plan, store: Store) -> bool:
    return all(
        (manifest := _read_json(store, f"{name}/{MANIFEST_NAME}")) is not None
        and manifest.get("fingerprint") == plan.fingerprint
        and store.read(f"{name}/{UNFINISHED_NAME}") is None
        for name in plan.datasets
    )


def _claim(plan: Plan, store: Store, *, overwrite: bool) -> None:
    """Marks the dataset folders as this plan's, unless they hold something else."""
    for name in plan.datasets:
        # A finished one is ours, too: the run was stopped while it took the marks away.
        told = [_read_json(store, f"{name}/{file}") for file in (UNFINISHED_NAME, MANIFEST_NAME)]
        ours = any(one is not None and one.get("fingerprint") == plan.fingerprint for one in told)
        if store.names(name) and not ours:
            if not overwrite:
                raise ConfigError(
                    f"{store.address}/{name} holds another preparation; take another `output`, or "
                    "set overwrite=true to replace it"
                )
            store.remove(name)
        store.write(f"{name}/{UNFINISHED_NAME}", _json({"fingerprint": plan.fingerprint}))


def _objects_per_shard(plan: Plan, config: PrepareConfig, store: Store) -> int:
    """Learns from a few objects how many make up a shard; told once, then remembered."""
    name = f"{next(iter(plan.datasets))}/{RECORDS}/{PLAN_NAME}"
    remembered = _read_json(store, name)
    if remembered is None:
        objects = [item for members in plan.datasets.values() for item in members]
        few = objects[:: max(1, len(objects) // SAMPLED)][:SAMPLED]
        chunks = [Chunk("", place, (item,)) for place, item in enumerate(few)]
        sizes = [
            row_bytes(result.row)
            for _, built in _run(chunks, config, None)
            for result in built
            if result.row is not None
        ]
        mean = sum(sizes) / len(sizes) if sizes else config.shard_mb * 1e6
        by_size = int(config.shard_mb * 1e6 / mean)
        most = max(1, min(by_size, -(-plan.num_objects // LEAST_SHARDS)))
        remembered = {"objects_per_shard": most}
        store.write(name, _json(remembered))
    return int(remembered["objects_per_shard"])


def _write_chunks(chunks: Sequence[Chunk], config: PrepareConfig, store: Store) -> None:
    """Builds and writes shards as tasks; an object that takes its task down is done without."""
    progress = _Progress(sum(len(chunk.objects) for chunk in chunks))
    done = set()
    for chunk, built in _run(chunks, config, store):
        done.add((chunk.dataset, chunk.index))
        progress.show(len(chunk.objects), sum(result.row is None for result in built))
    for chunk in chunks:
        if (chunk.dataset, chunk.index) in done:
            continue
        # Its process died, for the sake of one object: which one, each by itself will tell.
        logger.info("the task of %s/%s died: its objects one by one", chunk.dataset, chunk.name)
        singles = [Chunk(chunk.dataset, place, (item,)) for place, item in enumerate(chunk.objects)]
        found = {single.index: built[0] for single, built in _run(singles, config, None)}
        built = [
            found.get(place, Built(item.object_id, None, "its process died; see Ray's log"))
            for place, item in enumerate(chunk.objects)
        ]
        write_chunk(chunk, built, config, store)
        progress.show(len(chunk.objects), sum(result.row is None for result in built))


def _run(
    chunks: Sequence[Chunk], config: PrepareConfig, store: Store | None
) -> Iterator[tuple[Chunk, list[Built]]]:
    """Builds chunks as Ray Data tasks, and writes them where a store is given.

    Yields:
        The chunks whose task ended well, in the order in which they do, with what was built;
        without the rows where they were written.

    Raises:
        ConfigError: If a worker cannot render at all, or the store can't be written.
    """
    if not chunks:
        return
    connect()

    def work(item: dict[str, Any]) -> dict[str, Any]:
        chunk: Chunk = pickle.loads(item["chunk"])
        fatal = ""
        built: list[Built] = []
        try:
            built = build_chunk(chunk, config)
            if store is not None:
                write_chunk(chunk, built, config, store)
                # Rows don't travel: they are written.
                built = [replace(r, row=None if r.row is None else {}) for r in built]
        except RenderError as missing:
            fatal = f"a worker cannot render: {missing}"
        except ConfigError as refused:
            fatal = str(refused)
        return {"place": item["place"], "fatal": fatal, "built": pickle.dumps(built)}

    # Pickled, for Arrow has no say in what an object is; by tasks of our own, from our own driver.
    items = [{"place": place, "chunk": pickle.dumps(c)} for place, c in enumerate(chunks)]
    # A task whose process died is tried once more: Ray Data would go on with it for ever.
    listed = ray.data.from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():
        # Ray will take this argument away in 2.64 and has no other for it yet.
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
        dataset = listed.map(work, ray_remote_args_fn=lambda: {"max_retries": 1})
    dataset.context.max_errored_blocks = -1
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        if row["fatal"]:
            raise ConfigError(row["fatal"])
        yield chunks[row["place"]], pickle.loads(row["built"])


def _finish(plan: Plan, config: PrepareConfig, store: Store, chunks: Sequence[Chunk]) -> None:
    """Writes manifests, rejects and attribution, and takes the marks away.

    Raises:
        ConfigError: If no object became a row.
    """
    records = {(c.dataset, c.index): _read_json(store, _record_name(c)) or {} for c in chunks}
    _drop_twins(chunks, records, config, store)
    rejects = [reject for record in records.values() for reject in record["rejects"]]
    if not any(record["rows"] for record in records.values()):
        for name in plan.datasets:
            store.remove(name)
        raise ConfigError(
            f"none of the {plan.num_objects} objects became a row, so nothing was written; "
            f"the first, {rejects[0]['object_id']}: {rejects[0]['reason']}"
        )
    for name in plan.datasets:
        manifest = describe(
            name, plan, config, [records[c.dataset, c.index] for c in chunks if c.dataset == name]
        )
        listed = {shard["file"] for shard in manifest["shards"]}
        for file in store.names(name):
            # A shard that has lost its last row to a twin.
            if file.endswith(".parquet") and file not in listed:
                store.remove(f"{name}/{file}")
        store.write(f"{name}/{MANIFEST_NAME}", _json(manifest))
    credits = [credit for record in records.values() for credit in record["credits"]]
    if credits:
        titles = {source.name: source.title or source.name for source in config.sources}
        text = attribution(credits, titles, config.licenses)
        store.write(ATTRIBUTION_NAME, text.encode())
    told = ("object_id", "caption", "reason")
    store.write(
        REJECTS_NAME, _json({"rejects": [{key: item[key] for key in told} for item in rejects]})
    )
    # In this order, a stop in between costs nothing.
    for name in plan.datasets:
        store.remove(f"{name}/{UNFINISHED_NAME}")
    for name in plan.datasets:
        store.remove(f"{name}/{RECORDS}")


def _drop_twins(
    chunks: Sequence[Chunk],
    records: dict[tuple[str, int], Record],
    config: PrepareConfig,
    store: Store,
) -> None:
    """Takes from the parted sources what is a copy of another source's mesh: it would be known."""
    parted = {source.name for source in config.sources if source.halves}
    owner = {item.object_id: item.source for chunk in chunks for item in chunk.objects}
    known: dict[str, str] = {}
    for record in records.values():
        for object_id, mesh in record["meshes"].items():
            if owner[object_id] not in parted:
                known[mesh] = min(object_id, known.get(mesh, object_id))
    for chunk in chunks:
        record = records[chunk.dataset, chunk.index]
        twins = {
            object_id: f"its mesh is that of {known[mesh]}, of another source"
            for object_id, mesh in record["meshes"].items()
            if owner[object_id] in parted and mesh in known
        }
        if not twins:
            continue
        data = store.read(f"{chunk.dataset}/{chunk.name}.parquet")
        assert data is not None, "the record says that it was written"
        rows = {row["object_id"]: row for row in decode_shard(data)}
        # What a view is made of is not in the shard.
        kind = " or ".join(record["views"])
        reasons = {reject["object_id"]: reject["reason"] for reject in record["rejects"]} | twins
        built = [
            Built(item.object_id, None, reasons[item.object_id])
            if item.object_id in reasons
            else Built(item.object_id, rows[item.object_id], kind_of_views=kind)
            for item in chunk.objects
        ]
        records[chunk.dataset, chunk.index] = write_chunk(chunk, built, config, store)


def _record_name(chunk: Chunk) -> str:
    return f"{chunk.dataset}/{RECORDS}/{chunk.name}.json"


def _read_json(store: Store, name: str) -> Any:
    data = store.read(name)
    return None if data is None else json.loads(data)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


class _Progress:
    """A line now and then: how many objects, how many were left out, how fast, how long still."""

    EVERY_S = 5.0

    def __init__(self, total: int) -> None:
        self.total, self.done, self.rejected = total, 0, 0
        self.start = self.shown = time.monotonic()

    def show(self, objects: int, rejected: int) -> None:
        self.done += objects
        self.rejected += rejected
        now = time.monotonic()
        if now - self.shown < self.EVERY_S and self.done < self.total:
            return
        self.shown = now
        rate = self.done / max(now - self.start, 1e-9)
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        logger.info(
            "%d of %d objects, %d left out, %.1f objects/s, %d:%02d to go",
            *(self.done, self.total, self.rejected, rate, minutes, seconds),
        )
