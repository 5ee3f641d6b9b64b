"""A preparation config in, dataset folders out, with the objects as Ray Data tasks."""

from __future__ import annotations

import logging
import pickle
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray.data

import crossmost_ray
from crossmost_ray.config import ConfigError, config_dict, load_config, resolve_path
from crossmost_ray.prepare.classes import ClassMapping, label_objects
from crossmost_ray.prepare.config import CatalogueConfig, PrepareConfig
from crossmost_ray.prepare.render import RenderError, camera_ring
from crossmost_ray.prepare.rows import Row, build_row
from crossmost_ray.prepare.shards import (
    half_of,
    write_attribution,
    write_dataset,
    write_rejects,
)
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.prepare.sources.base import Object

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 50
TOOLS = ("numpy", "pillow", "pyarrow", "pyvista", "ray", "trimesh", "vtk")
DATASETS = {
    "source": "objects of the source catalogues, with and without a class",
    "target_a": "objects of the target catalogues with a class, half a",
    "target_b": "objects of the target catalogues with a class, half b",
    "target_other": "objects of the target catalogues without a class, for an open-set check",
}


@dataclass(frozen=True)
class Prepared:
    """What a preparation made of the catalogues."""

    folder: Path
    """Holds a folder for each dataset."""

    num_rows: dict[str, int]
    """Rows of each dataset."""

    rejects: list[dict[str, str]]
    """`object_id`, `caption` and `reason` of each object that was left out."""


def prepare(config: PrepareConfig) -> Prepared:
    """Reads the catalogues, builds a row of each object and writes the datasets.

    Raises:
        ConfigError: If a catalogue or the class mapping cannot be read, no worker can render, or
            no object at all became a row: what was written before then stays.
    """
    listed = [
        list(SOURCES[catalogue.kind].read_objects(catalogue)) for catalogue in config.catalogues
    ]
    mapping = load_config(ClassMapping, resolve_path(config.classes))
    # Of all objects, so that the mapping is checked as a whole whatever the limit.
    labels = label_objects([item for items in listed for item in items], mapping)
    objects = [item for items in listed for item in items[: config.limit]]

    results = {result["object_id"]: result for result in build_rows(objects, config)}
    rows, rejects = sort_out(objects, results, labels, config.catalogues)
    if not rows:
        raise ConfigError(
            f"none of the {len(objects)} objects became a row, so nothing was written; "
            f"the first, {rejects[0]['object_id']}: {rejects[0]['reason']}"
        )
    datasets = split_rows(rows, config.catalogues)

    folder = resolve_path(config.output)
    for name, members in datasets.items():
        manifest = describe(name, config, list(mapping.classes), rejects)
        write_dataset(members, folder / name, int(config.shard_mb * 1e6), manifest)
    titles = {catalogue.name: catalogue.title for catalogue in config.catalogues}
    write_attribution(rows, titles, config.licenses, folder)
    write_rejects(rejects, folder)
    return Prepared(folder, {name: len(members) for name, members in datasets.items()}, rejects)


def build_rows(objects: Sequence[Object], config: PrepareConfig) -> list[dict[str, Any]]:
    """Collects what `build_row` makes of each object, in the order in which tasks complete.

    Raises:
        ConfigError: If a worker cannot render at all.
    """

    def build(item: dict[str, Any]) -> dict[str, Any]:
        try:
            result = build_row(pickle.loads(item["object"]), config)
        except RenderError as missing:
            result = {"object_id": "", "fatal": str(missing)}
        return {"result": pickle.dumps(result)}

    # One block an object, so that a crash costs one object.
    items = [{"object": pickle.dumps(item)} for item in objects]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(build)
    # An object that takes its task down is missed afterwards and reported; the rest goes on.
    dataset.context.max_errored_blocks = -1
    dataset.context.enable_progress_bars = False

    results = []
    for row in dataset.iter_rows():
        result = pickle.loads(row["result"])
        if "fatal" in result:
            raise ConfigError(f"a worker cannot render: {result['fatal']}")
        results.append(result)
        if len(results) % PROGRESS_EVERY == 0:
            logger.info("%d of %d objects", len(results), len(objects))
    return results


def sort_out(
    objects: Sequence[Object],
    results: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str | None],
    catalogues: Sequence[CatalogueConfig],
) -> tuple[list[Row], list[dict[str, str]]]:
    """Parts the labelled rows from the rejects; both in the order of the catalogues."""
    domain = {catalogue.name: catalogue.domain for catalogue in catalogues}
    source_meshes = {
        results[item.object_id].get("mesh_sha256"): item.object_id
        for item in objects
        if domain[item.source] == "source" and item.object_id in results
    }
    rows, rejects = [], []
    for item in objects:
        result = results.get(
            item.object_id, {"row": None, "reason": "its task failed; see Ray's log"}
        )
        row, reason = result["row"], result.get("reason", "")
        twin = source_meshes.get(result.get("mesh_sha256"))
        if row is not None and domain[item.source] == "target" and twin is not None:
            row, reason = None, f"its mesh is that of {twin}, a source object"
        if row is None:
            rejects.append({"object_id": item.object_id, "caption": item.caption, "reason": reason})
        else:
            label = labels[item.object_id]
            # Captions teach, and only source objects may: a target object's class is not among its.
            taxonomy = [label] if label is not None and domain[item.source] == "source" else []
            rows.append({**row, "label": label, "captions": [item.caption, *taxonomy]})
    return rows, rejects


def split_rows(rows: Sequence[Row], catalogues: Sequence[CatalogueConfig]) -> dict[str, list[Row]]:
    """Gives each row to its dataset."""
    domain = {catalogue.name: catalogue.domain for catalogue in catalogues}
    datasets: dict[str, list[Row]] = {name: [] for name in DATASETS}
    for row in rows:
        if domain[row["source"]] == "source":
            datasets["source"].append(row)
        elif row["label"] is None:
            datasets["target_other"].append(row)
        else:
            datasets[f"target_{half_of(row['object_id'])}"].append(row)
    return datasets


def describe(
    dataset: str,
    config: PrepareConfig,
    classes: Sequence[str],
    rejects: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """What the manifest says besides counts and checksums."""
    render = config.render
    domain = "source" if dataset == "source" else "target"
    left_out = {
        catalogue.name: sum(
            reject["object_id"].startswith(f"{catalogue.name}/") for reject in rejects
        )
        for catalogue in config.catalogues
        if catalogue.domain == domain
    }
    return {
        "name": f"{config.name}/{dataset}",
        "description": DATASETS[dataset],
        "classes": list(classes),
        "num_points": config.num_points,
        "up_axis": "+y",
        "front_axis": "+z",
        "half_rule": "a target object is in half a if the last byte of its id's SHA-256 is even",
        "cameras": {
            **config_dict(render),
            "views": [
                {"azimuth": azimuth, "elevation": elevation}
                for azimuth, elevation in camera_ring(render)
            ],
            "light": "ambient, from behind the camera, and from its upper left",
            "codec": "webp",
        },
        "left_out": left_out,
        "seed": config.seed,
        "versions": {
            "crossmost_ray": crossmost_ray.__version__,
            "python": platform.python_version(),
            **{tool: version(tool) for tool in TOOLS},
        },
    }
