"""Photographs of an object in, small views of it out; no file of them is trusted."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from crossmost_ray.prepare.errors import ObjectError

T = TypeVar("T")

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

MAX_PHOTO_BYTES = 64 * 2**20
"""Largest file that is read."""

MAX_PIXELS = 50_000_000
"""Largest image that is decoded: a small file may promise a picture of any size."""

BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""Pillow's readers have no error of their own: they let through whatever breaks first."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each of EXIF's orientations; 1 is upright."""


def list_photos(folder: Path) -> list[Path]:
    """Lists the photographs of a folder by their suffix, sorted by name; none if there is none.

    Raises:
        ObjectError: If the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                # macOS leaves a hidden "._photo.jpg" beside each file that it copies.
                if entry.name.lower().endswith(PHOTO_SUFFIXES) and not entry.name.startswith(".")
            )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as unreadable:
        raise ObjectError(f"the folder {folder} cannot be read: {unreadable}") from None
    return [folder / name for name in names]


def spread(files: Sequence[T], most: int) -> list[T]:
    """Picks at most `most` of `files` in their order, the first among them, in even steps.

    Steps differ by one at most. The last file is not aimed at: a video that goes round an object
    ends where it began.
    """
    if len(files) <= most:
        return list(files)
    return [files[index * len(files) // most] for index in range(most)]


def read_photos(files: Sequence[Path]) -> tuple[bytes, ...]:
    """Reads photographs as they are stored, after a look at the head of each.

    Raises:
        ObjectError: If one is missing, larger than `MAX_PHOTO_BYTES`, of another format than
            `PHOTO_FORMATS`, or promises more than `MAX_PIXELS`.
    """
    photos = []
    for file in files:
        try:
            if not file.is_file():
                raise ObjectError(f"the photograph {file} is missing")
            size = file.stat().st_size
            if size > MAX_PHOTO_BYTES:
                raise ObjectError(
                    f"the photograph {file} has {size:,} bytes, more than {MAX_PHOTO_BYTES:,}"
                )
            data = file.read_bytes()
        except OSError as unreadable:
            raise ObjectError(f"the photograph {file} cannot be read: {unreadable}") from None
        _open(data, f"the photograph {file}")
        photos.append(data)
    return tuple(photos)


def shrink_photo(
    data: bytes, longest: int, quality: int = 90, place: str = "a photograph"
) -> bytes:
    """Encodes a photograph anew as a WebP image without metadata.

    It is turned upright as its EXIF orientation says. Behind transparent parts comes black, which
    is what renders without a background look like to a loader that drops their alpha. Of 16 bits
    the upper 8 are kept.

    Args:
        data: A JPEG, PNG or WebP file; of an animation, the first picture is taken.
        longest: Longest side in pixels to which it is reduced; a smaller one keeps its size.
        quality: Of the codec, in [1, 100].
        place: What an error calls it.

    Raises:
        ObjectError: If it is of another format, broken, cut short, or larger than `MAX_PIXELS`.
    """
    image = _open(data, place)
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        # A JPEG can be decoded at an eighth, a quarter or half of its size, in a fraction of the
        # time; of other formats this does nothing.
        image.draft("RGB", (longest, longest))
        shrunk = _to_rgb(image)
        shrunk.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        if orientation in UPRIGHT:
            shrunk = shrunk.transpose(UPRIGHT[orientation])
        shrunk.info.clear()
        stored = io.BytesIO()
        shrunk.save(stored, "WEBP", quality=quality)
    except BROKEN_IMAGE as broken:
        raise ObjectError(f"{place} is broken: {broken}") from None
    return stored.getvalue()


def _open(data: bytes, place: str) -> Image.Image:
    """Reads the head of an image, not yet its pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=PHOTO_FORMATS)
    except UnidentifiedImageError:
        # Pillow's own message ends with an address in memory.
        raise ObjectError(f"{place} is no JPEG, PNG or WebP image") from None
    except BROKEN_IMAGE as broken:
        raise ObjectError(f"{place} is broken: {broken}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ObjectError(f"{place} is of {width} x {height} pixels, more than {MAX_PIXELS:,}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts off what is above 255, nearly everything.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
