"""Tiny ShapeNet-55, Redwood and CO3D collections in the published layouts, built for the tests."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossmost_ray.prepare.config import CO3D, Redwood, ShapeNet55

PLANE, BIN, SCREEN = "02691156", "02747177", "03211117"
TAXONOMY = [
    {
        "synsetId": PLANE,
        "name": "airplane,aeroplane,plane",
        "children": ["02690373"],
        "numInstances": 4045,
    },
    {"synsetId": "02690373", "name": "airliner", "children": [], "numInstances": 1490},
    {"synsetId": BIN, "name": "ashcan, trashcan,bin", "children": [], "numInstances": 343},
    {"synsetId": SCREEN, "name": "display,video display", "children": [], "numInstances": 1093},
]


def cloud(seed: int = 0, columns: int = 3) -> NDArray[np.float32]:
    """(32, columns) in [0, 1)."""
    return np.random.default_rng(seed).random((32, columns), dtype=np.float32)


def picture(
    color: tuple[int, ...] = (200, 30, 30), size: tuple[int, int] = (8, 6), codec: str = "PNG"
) -> bytes:
    """An image of one colour; `color` has 3 or 4 channels."""
    stored = io.BytesIO()
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(stored, codec)
    return stored.getvalue()


def write(path: Path, data: str | bytes | NDArray[np.float32]) -> Path:
    """Writes text, bytes or an array, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, np.ndarray):
        np.save(path, data)
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def render_name(model: str, degree: int, *, depth: bool = False) -> str:
    """What ULIP calls a render of a model."""
    return f"{model}_r_{degree:03d}{'_depth0001' if depth else ''}.png"


def write_shapenet(root: Path) -> ShapeNet55:
    """Two models to train on, one to test on; the first plane has all its 60 images.

    The red of a colour render is its number (0 to 29), that of a depth one 100 more.
    """
    models = {
        "train": [f"{PLANE}-b2", f"{PLANE}-a1-left"],
        "test": [f"{BIN}-c3"],
    }
    for split, names in models.items():
        write(root / f"{split}.txt", "".join(f"{name}.npy\n" for name in names))
        for seed, name in enumerate(names):
            write(root / "shapenet_pc" / f"{name}.npy", cloud(seed))
    write(root / "taxonomy.json", json.dumps(TAXONOMY))
    model = models["train"][1]
    for number in range(30):
        for depth in (False, True):
            name = render_name(model, 12 * number, depth=depth)
            image = picture((number + 100 * depth, 0, 0), (4, 4))
            write(root / "rendered_images" / model / name, image)
    return ShapeNet55(name="shapenet", kind="shapenet55", path=str(root))


def write_redwood(root: Path) -> Redwood:
    """Scan 00033 to train on with five frames, 00071 to test on without; 00099 of no category."""
    write(root / "train_set80.txt", "00099\n00033\n")
    write(root / "test_set80.txt", "00071\n")
    write(
        root / "categories.json",
        json.dumps({"trash_container": ["00071", "05555"], "chair": ["00033"], "atm": ["00002"]}),
    )
    write(root / "points" / "00033.npy", cloud(33, 6))
    write(root / "points" / "00071.npy", cloud(71))
    for number in range(5):
        frame = root / "images" / "00033" / f"{number:07d}-{33366 * number:012d}.jpg"
        write(frame, picture((40 * number, 0, 0), codec="JPEG"))
    write(root / "images" / "00033" / "._0000000-000000000000.jpg", b"left by a copy")
    write(root / "images" / "00033" / "readme.txt", "no frame")
    return Redwood(
        name="redwood",
        kind="redwood",
        path=str(root / "points"),
        images=str(root / "images"),
        categories=str(root / "categories.json"),
    )


def write_co3d(root: Path) -> CO3D:
    """A teddy bear to train on with seven frames; a kite, which no list has, without any."""
    write(root / "train_set_80.txt", "teddybear/34_1479_4753\n")
    write(root / "test_set_80.txt", "kite/399_51022_100078\n")
    write(root / "points" / "teddybear" / "34_1479_4753" / "pointcloud1.npy", cloud(34, 6))
    write(root / "points" / "kite" / "399_51022_100078" / "pointcloud1.npy", cloud(399))
    for number in range(7):
        frame = f"frame{number + 1:06d}.jpg"
        write(
            root / "images" / "teddybear" / "34_1479_4753" / "images" / frame,
            picture((30 * number, 0, 0), codec="JPEG"),
        )
    return CO3D(name="co3d", kind="co3d", path=str(root / "points"), images=str(root / "images"))
