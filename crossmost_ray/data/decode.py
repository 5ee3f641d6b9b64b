"""Encoded views and nested lists of a shard in, arrays out."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError


def view_size(image_size: int) -> int:
    """Gives the side that views are decoded to: half as large again, so that crops stay sharp."""
    return image_size * 3 // 2


def decode_view(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decodes one view.

    Args:
        encoded: WebP, PNG or JPEG.
        size: S; a view of another size is resized by its shorter side and cropped to its centre.

    Returns:
        (3, S, S) uint8.

    Raises:
        OSError: If the bytes are no image that Pillow reads.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=("WEBP", "PNG", "JPEG"))
        image = image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message ends with an address in memory.
        raise OSError("it is no WebP, PNG or JPEG image") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as broken:
        # What Pillow says of damaged chunks, of damaged headers and of absurd sizes.
        raise OSError(str(broken)) from None
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def decode_points(column: pa.Array | pa.ChunkedArray) -> list[npt.NDArray[np.float32]]:
    """Turns a column of nested lists into one (N, 3) float32 array per row."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return np.split(flat.reshape(-1, 3), np.cumsum(lengths))[:-1]


def ring_views(num_used: int, num_stored: int) -> list[int]:
    """Picks views evenly over a ring."""
    return [place * num_stored // num_used for place in range(num_used)]


def hash_id(object_id: str) -> int:
    """Hashes an object's id to 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(object_id.encode()).digest()[:8], "little") >> 1
