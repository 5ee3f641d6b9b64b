"""Tiny ModelNets and ScanObjectNNs in the published layouts, built for the tests."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("chair", "night_stand")
NAMES = {
    "train": ("chair_0001", "night_stand_0001", "night_stand_0002"),
    "test": ("chair_0890",),
}
# As ModelNet has it: the counts are glued to the keyword.
TETRAHEDRON = "OFF4 4 6\n0 0 0\n2 0 0\n0 3 0\n0 0 5\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def class_of(name: str) -> str:
    return name.rpartition("_")[0]


def cloud(seed: int, num_points: int = 32, columns: int = 3) -> NDArray[np.float32]:
    """(num_points, columns) in [-1, 1)."""
    values = np.random.default_rng(seed).uniform(-1, 1, (num_points, columns))
    return values.astype(np.float32)


def picture(red: int) -> bytes:
    """A PNG of one colour that tells pictures apart."""
    stored = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(stored, "PNG")
    return stored.getvalue()


def red_of(photo: bytes) -> int:
    return Image.open(io.BytesIO(photo)).getpixel((0, 0))[0]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lists(folder: Path, prefix: str = "modelnet40") -> None:
    """The name lists of modelnet40_normal_resampled; the last line has no end, as published."""
    write(folder / f"{prefix}_shape_names.txt", "\n".join(CLASSES))
    for split, names in NAMES.items():
        write(folder / f"{prefix}_{split}.txt", "\r\n".join(names))


def write_off(folder: Path, images: Path | None = None) -> Path:
    """ModelNet40.zip unpacked; chair_0001 has views 1, 2 and 10."""
    for split, names in NAMES.items():
        for name in names:
            write(folder / class_of(name) / split / f"{name}.off", TETRAHEDRON)
    write(folder / ".DS_Store", b"\0")
    write(folder / "chair" / "train" / "._chair_0001.off", b"\0")
    if images is not None:
        for number, text in ((10, "010"), (2, "002"), (1, "001")):
            write(images / "train" / "chair" / f"chair_0001_{text}.png", picture(number))
    return folder


def write_text(folder: Path, prefix: str = "modelnet40") -> Path:
    """modelnet40_normal_resampled.zip unpacked; each cloud is that of its place in the lists."""
    write_lists(folder, prefix)
    for seed, name in enumerate(name for names in NAMES.values() for name in names):
        lines = [",".join(f"{value:.6f}" for value in row) for row in cloud(seed, columns=6)]
        write(folder / class_of(name) / f"{name}.txt", "\n".join(lines) + "\n")
    return folder


def write_h5(path: Path, labels: Sequence[int], *, column: bool = False, seed: int = 0) -> Path:
    """A file of clouds and labels; row r is `cloud(seed + r)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        clouds = [cloud(seed + row) for row in range(len(labels))]
        file.create_dataset("data", data=np.stack(clouds), compression="gzip")
        stored = np.array(labels, np.uint8)
        file["label"] = stored[:, None] if column else stored
        file["mask"] = np.full((len(labels), 32), -1, np.int8)
    return path


def write_hdf5(folder: Path, *, names: bool = False) -> Path:
    """modelnet40_ply_hdf5_2048.zip unpacked: the lists hold paths of another machine."""
    write(folder / "shape_names.txt", "\n".join(CLASSES) + "\n")
    for split, labels in (("train", (0, 1, 1)), ("test", (0,))):
        file = f"ply_data_{split}0.h5"
        write_h5(folder / file, labels, column=True, seed=len(labels))
        write(folder / f"{split}_files.txt", f"data/modelnet40_ply_hdf5_2048/{file}\n")
        if names:
            meshes = [f"{class_of(name)}/{name}.ply" for name in NAMES[split]]
            write(folder / f"ply_data_{split}_0_id2file.json", json.dumps(meshes))
    for number in (0, 9, 10):
        write(folder / "image_data_train0" / "2" / f"{number}.png", picture(number))
    return folder


def write_pickle(folder: Path, protocol: int = 4) -> Path:
    """ULIP's modelnet40_normal_resampled; row r of a split is `cloud(r, columns=6)`."""
    write_lists(folder)
    for split, names in NAMES.items():
        clouds = [cloud(row, columns=6) for row in range(len(names))]
        labels = [np.array([CLASSES.index(class_of(name))], np.int32) for name in names]
        stored = pickle.dumps([clouds, labels], protocol=protocol)
        write(folder / f"modelnet40_{split}_8192pts_fps.dat", stored)
    return folder


def write_release(folder: Path) -> Path:
    """ScanObjectNN's h5_files.zip unpacked; chairs and toilets, another seed for each variant."""
    for seed, (part, suffix) in enumerate(
        [("main_split_nobg", ""), ("main_split", ""), ("main_split", "_augmentedrot_scale75")]
    ):
        for stem, labels in (("training", (4, 14)), ("test", (14,))):
            path = folder / part / f"{stem}_objectdataset{suffix}.h5"
            write_h5(path, labels, seed=100 * seed + len(labels))
    return folder
