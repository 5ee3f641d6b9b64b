"""Four shapes that a small model can tell apart: as shards, as batches, and a model to go with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from crossmost_ray.config import AdaptConfig, PretrainConfig, parse_config
from crossmost_ray.data.decode import decode_view
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.pretrained import save_model
from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA, RawBatch

CLASSES = ("ball", "box", "cone", "pillar")
COLORS = ((220, 40, 40), (40, 200, 40), (50, 60, 230), (230, 220, 30))
VIEW_SIZE = 48

Fault = Literal["nan", "few_points", "no_points", "few_views", "bad_view", "null_view"]


def cloud(shape: int, num_points: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(N, 3) surface points of shape 0 to 3 in the unit sphere, y up, in random order."""
    u, v, face = rng.uniform(-1, 1, num_points), rng.uniform(-1, 1, num_points), rng.random()
    if shape == 0:
        points = rng.normal(size=(num_points, 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif shape == 1:
        points = rng.uniform(-1, 1, (num_points, 3))
        axis, side = rng.integers(0, 3, num_points), rng.choice([-1.0, 1.0], num_points)
        points[np.arange(num_points), axis] = side
    elif shape == 2:
        radius, angle = np.sqrt(np.abs(u)), np.pi * v
        points = np.stack([radius * np.cos(angle), 1 - 2 * radius, radius * np.sin(angle)], 1)
    else:
        angle = np.pi * v
        points = np.stack([0.15 * np.cos(angle), u, 0.15 * np.sin(angle)], 1)
    points = points * (0.9 + 0.1 * face)
    points -= points.mean(axis=0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def view(shape: int, place: int, rng: np.random.Generator) -> Image.Image:
    """Draws shape 0 to 3 in its colour, a little to the side of the middle."""
    image = Image.new("RGB", (VIEW_SIZE, VIEW_SIZE), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    left, top = (int(x) for x in 4 + rng.integers(0, 8, 2))
    right, bottom = left + 30 + place % 4, top + 32
    color = tuple(int(x) for x in np.clip(np.add(COLORS[shape], rng.integers(-15, 16, 3)), 0, 255))
    if shape == 0:
        draw.ellipse((left, top, right, bottom), fill=color)
    elif shape == 1:
        draw.rectangle((left, top, right, bottom), fill=color)
    elif shape == 2:
        draw.polygon(((left + 15, top), (right, bottom), (left, bottom)), fill=color)
    else:
        draw.rectangle((left + 11, top, left + 19, bottom), fill=color)
    return image


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_shards(
    folder: Path,
    *,
    num_objects: int = 16,
    num_points: int = 128,
    num_views: int = 4,
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    num_files: int = 2,
    labels: bool = True,
    captions: bool = True,
    corrupt: Mapping[int, Fault] | None = None,
) -> Path:
    """Writes shards and their manifest.

    Args:
        folder: Made if it is missing.
        num_objects: Object k is called `synthetic/<seed>-<k>` and is of class k modulo C.
        num_points: Of each cloud.
        num_views: Of each object.
        classes: At most four; the first looks like a ball, then box, cone and pillar.
        seed: Other objects for another one.
        num_files: Shards `part-00000.parquet` and so on, of objects in order.
        labels: False leaves the labels null.
        captions: False leaves the captions out.
        corrupt: What is wrong with which object.

    Returns:
        The folder.
    """
    rows = []
    for place in range(num_objects):
        rng = np.random.default_rng([seed, place])
        shape = place % len(classes)
        points = cloud(shape, num_points, rng).astype(np.float16)
        views: list[bytes | None] = [encode(view(shape, k, rng)) for k in range(num_views)]
        fault = (corrupt or {}).get(place)
        if fault == "nan":
            points[3] = np.nan
        elif fault == "few_points":
            points = points[:7]
        elif fault == "no_points":
            points = points[:0]
        elif fault == "few_views":
            views = views[:1]
        elif fault == "bad_view":
            views[-1] = b"no image at all"
        elif fault == "null_view":
            views[-1] = None
        rows.append(
            {
                "object_id": f"synthetic/{seed}-{place}",
                "captions": [classes[shape]] if captions else [],
                "label": classes[shape] if labels else None,
                "points": list(points),
                "colors": [COLORS[shape]] * len(points),
                "views": views,
                "source": "synthetic",
                "author": "the tests",
                "license": "CC0-1.0",
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(num_objects), num_files)):
        table = pa.Table.from_pylist([rows[k] for k in part], schema=SHARD_SCHEMA)
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    manifest = {"name": folder.name, "classes": list(classes), "num_objects": num_objects}
    manifest |= {"num_points": num_points, "up_axis": "+y"}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def broken_pixels() -> bytes:
    """A view that looks whole, and that the decoder does not take."""
    sound = encode(view(0, 0, np.random.default_rng(0)), "WEBP")
    for place in range(30, len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x55
        try:
            decode_view(bytes(damaged), VIEW_SIZE)
        except OSError:
            return bytes(damaged)
    raise AssertionError("the decoder takes every damaged view")


def replace_view(shard: Path, *, row: int, place: int, view: bytes) -> None:
    """Puts another view into a shard, at a place of a row."""
    table = pq.read_table(shard)
    views = table["views"].to_pylist()
    views[row][place] = view
    field = SHARD_SCHEMA.field("views")
    column = table.schema.get_field_index("views")
    pq.write_table(table.set_column(column, field, pa.array(views, field.type)), shard)


def raw_batch(
    num_objects: int = 8,
    *,
    num_views: int = 2,
    num_points: int = 160,
    view_size: int = 96,
    captions: bool = True,
    seed: int = 0,
) -> RawBatch:
    """A batch as it comes from shards: object k is of class k modulo 4."""
    images, points = [], []
    for place in range(num_objects):
        rng = np.random.default_rng([seed, place])
        points.append(cloud(place % 4, num_points, rng))
        drawn = [view(place % 4, k, rng).resize((view_size, view_size)) for k in range(num_views)]
        images.append(np.stack([np.asarray(image).transpose(2, 0, 1) for image in drawn]))
    return RawBatch(
        images=torch.from_numpy(np.stack(images)),
        points=torch.from_numpy(np.stack(points)),
        object_id=torch.arange(num_objects) + 1000 * seed,
        captions=tuple((CLASSES[k % 4],) for k in range(num_objects)) if captions else (),
        names=tuple(f"synthetic/{seed}-{k}" for k in range(num_objects)),
    )


def fresh_model(seed: int = 0) -> CrossModalModel:
    """The smallest model there is, in evaluation mode; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CrossModalModel(ModelSpec("vit_small_64", "pointbert_small")).eval()


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """Saves a fresh model as a model folder."""
    save_model(folder, fresh_model(seed), card="# a model for tests\n")
    return folder


def adapt_config(**sections: Any) -> AdaptConfig:
    """A config small enough for `raw_batch`; `sections` are merged into it."""
    values: dict[str, Any] = {
        "name": "test",
        "model": "no/such/model",
        "data": {"shards": "no/such/shards", "num_points": 128, "classes": list(CLASSES)},
    }
    return parse_config(AdaptConfig, _merged(values, sections), "the test")


def pretrain_config(**sections: Any) -> PretrainConfig:
    """The same for pre-training."""
    values: dict[str, Any] = {
        "name": "test",
        "data": {"shards": "no/such/shards", "num_points": 128},
    }
    return parse_config(PretrainConfig, _merged(values, sections), "the test")


def _merged(values: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    return values | {
        name: {**values.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
