"""The records of a dataset's shards in, its manifest out."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import crossmost_ray
from crossmost_ray.config import config_dict
from crossmost_ray.prepare.config import PrepareConfig, kind_of
from crossmost_ray.prepare.depth import depth_cameras
from crossmost_ray.prepare.plan import Plan
from crossmost_ray.prepare.render import camera_ring

TOOLS = ("numpy", "pillow", "pyarrow", "pyvista", "ray", "trimesh", "vtk")

Record = dict[str, Any]
"""What is known of a written shard: its file, its rows, and the objects that have none."""


def describe(
    dataset: str, plan: Plan, config: PrepareConfig, records: Sequence[Record]
) -> dict[str, Any]:
    """What a dataset's manifest says."""
    sources = {item.source for item in plan.datasets[dataset]}
    views = _sum(record["views"] for record in records)
    return {
        "name": f"{config.name}/{dataset}",
        "fingerprint": plan.fingerprint,
        "classes": list(plan.classes),
        "num_points": config.num_points,
        "up_axis": "+y",
        "front_axis": "+z",
        "normalisation": "centroid at 0, farthest point at 1",
        "colors": {
            "objects_with": sum(record["with_colors"] for record in records),
            "elsewhere": "null",
        },
        "sources": {
            source.name: {
                "kind": kind_of(source),
                "axes": source.axes,
                "unit": source.unit,
                **({} if source.title is None else {"title": source.title}),
            }
            for source in config.sources
            if source.name in sources
        },
        **(
            {"half_rule": "an object is in half a if the last byte of its id's SHA-256 is even"}
            if any(source.halves for source in config.sources)
            else {}
        ),
        "cameras": _cameras(config, views),
        "counts": {
            "rows": sum(record["rows"] for record in records),
            "classes": _sum(record["labels"] for record in records),
            "sources": _sum(record["sources"] for record in records),
            "licenses": _sum(record["licenses"] for record in records),
            "views": views,
            "views_of_an_object": _sum(record["num_views"] for record in records),
        },
        "left_out": _sum(
            {reject["source"]: 1} for record in records for reject in record["rejects"]
        ),
        "seed": config.seed,
        "versions": {
            "crossmost_ray": crossmost_ray.__version__,
            "python": platform.python_version(),
            **{tool: version(tool) for tool in TOOLS},
        },
        "shards": [record["shard"] for record in records if "shard" in record],
    }


def _cameras(config: PrepareConfig, views: Mapping[str, int]) -> dict[str, Any]:
    """How views came about, by what they are."""
    told: dict[str, Any] = {}
    kinds = " ".join(views)
    if "photos" in kinds:
        told["photos"] = {"longest_side": config.photo_resolution}
    if "renders" in kinds:
        told |= {
            **config_dict(config.render),
            "views": [
                {"azimuth": azimuth, "elevation": elevation}
                for azimuth, elevation in camera_ring(config.render)
            ],
            "lights": "ambient, from behind the camera, and from its upper left",
            "codec": "webp",
        }
    if "depth" in kinds:
        told["depth"] = depth_cameras(config.depth)
    return told


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
