"""An encoded view in, whether all of it is there out, without decoding a pixel."""

from __future__ import annotations

import io

from PIL import Image

from crossmost_ray.data.decode import FORMATS

START_OF_SCAN, END_OF_IMAGE = 0xDA, b"\xff\xd9"
"""Markers of a JPEG: what comes before its pixels, and what after them."""


def looks_whole(encoded: bytes) -> bool:
    """Looks at the parts that an image says it has, and not at its pixels.

    Costs 10 to 70 microseconds, where decoding costs milliseconds.

    Args:
        encoded: WebP, PNG or JPEG.

    Returns:
        False for what can't be opened, for what is cut short, and for a PNG any of whose checksums
        is wrong. Some of what decodes is False, too: ask the decoder before refusing it. True for
        some of what doesn't: WebP and JPEG have no checksums, so that damage among their pixels
        shows in decoding at most.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.format == "PNG":
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    # A WebP is opened only if it is as long as it says.
    return image.format in ("PNG", "WEBP") or END_OF_IMAGE in encoded[_scan(encoded) :]


def _scan(encoded: bytes) -> int:
    """Finds where the pixels of a JPEG begin: before that, a small picture may end."""
    place = 2
    while place + 4 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == START_OF_SCAN:
            return place
        # One may be preceded by any number of 0xFF; others are followed by their length.
        length = int.from_bytes(encoded[place + 2 : place + 4])
        place += 1 if marker == 0xFF else 2 + length
    return len(encoded)
