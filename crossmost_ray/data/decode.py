"""Encoded views and nested lists of a shard in, arrays out."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

FORMATS = ("WEBP", "PNG", "JPEG")
"""What a view may be encoded as."""

POINT_BYTES = 12


def view_size(image_size: int) -> int:
    """Gives the side that views are decoded to: half as large again, so that crops stay sharp."""
    return image_size * 3 // 2


def decode_view(encoded: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decodes one view.

    Args:
        encoded: WebP, PNG or JPEG.
        size: S; a view of another size is resized by its shorter side and cropped to its centre.

    Returns:
        (3, S, S) uint8; in memory, the channels lie last.

    Raises:
        OSError: If the bytes are no image that Pillow reads.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        # A JPEG of twice the size or more is decoded at a half, a quarter or an eighth of it.
        image.draft(None, (size, size))
        image.load()
        # What is RGB already would be copied.
        image = image if image.mode == "RGB" else image.convert("RGB")
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
    """Gives one (N, 3) float32 array per row of a column of nested lists, or of packed points.

    Packed points are not copied, so their arrays can't be written to.
    """
    if pa.types.is_large_binary(column.type):
        return [np.frombuffer(row.as_buffer(), np.float32).reshape(-1, 3) for row in column]
    flat, ends = _flatten_points(column)
    return np.split(flat.reshape(-1, 3), ends)[:-1]


def pack_points(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Turns a column of nested lists into one of bytes, which Arrow moves ten times as fast."""
    flat, ends = _flatten_points(column)
    offsets = np.concatenate([[0], ends]).astype(np.int64) * POINT_BYTES
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.large_binary(), len(column), buffers)


def _flatten_points(
    column: pa.Array | pa.ChunkedArray,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Gives all coordinates of all rows, and after how many points each row ends."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32, copy=False), np.cumsum(lengths, dtype=np.int64)


def ring_views(num_used: int, num_stored: int) -> list[int]:
    """Picks views evenly over a ring."""
    return [place * num_stored // num_used for place in range(num_used)]


def hash_id(object_id: str) -> int:
    """Hashes an object's id to 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(object_id.encode()).digest()[:8], "little") >> 1
