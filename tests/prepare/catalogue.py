"""A tiny catalogue of Sweet Home 3D, built for the tests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from crossmost_ray.prepare.config import SweetHome3D

BOX = """mtllib box.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl 1 dark wood
f 4/4 3/3 2/2 1/1
f 5/1 6/2 7/3 8/4
f 1/1 2/2 6/3 5/4
f 3/1 4/2 8/3 7/4
f 1/1 5/2 8/3 4/4
f 2/1 3/2 7/3 6/4
f 1 2
"""
# The same surface with a notch, so that it is no copy.
NOTCHED = BOX.replace("v 1 1 1", "v 0.7 0.8 0.9")
MATERIAL = "newmtl 1 dark wood\nKd 0.5 0.3 0.1\nmap_Kd .\\\\wood.png\n"


def entry(number: int, name: str, identifier: str, **more: str) -> str:
    """Lines of the properties for one object of 100 x 50 x 200 cm."""
    values = {
        "id": f"Tiny#{identifier}",
        "name": name,
        "model": f"/tiny/{identifier}/box.obj",
        "width": "100",
        "depth": "50",
        "height": "200",
        "creator": "Ada",
    } | more
    return "".join(f"{key}#{number}={value}\n" for key, value in values.items())


def model(identifier: str, obj: str = BOX) -> dict[str, bytes]:
    """Files of one model, with a texture."""
    wood = io.BytesIO()
    Image.new("RGB", (4, 4), (150, 90, 30)).save(wood, "PNG")
    folder = f"tiny/{identifier}"
    return {
        f"{folder}/box.obj": obj.encode(),
        f"{folder}/box.mtl": MATERIAL.encode(),
        f"{folder}/wood.png": wood.getvalue(),
    }


def write_catalogue(path: Path, properties: str, files: Mapping[str, bytes]) -> Path:
    """Writes a .sh3f file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", properties.encode("latin-1"))
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def catalogue_config(path: Path, name: str = "tiny", **more: Any) -> SweetHome3D:
    """Config of a catalogue under CC0."""
    facts: dict[str, Any] = {"kind": "sweethome3d", "license": "CC0", "package": "tiny-furniture"}
    return SweetHome3D(name=name, path=str(path), title=f"The {name} catalogue", **facts, **more)
