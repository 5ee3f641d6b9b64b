"""Which damage to a view is seen without decoding it, and that nothing sound is called damaged."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crossmost_ray.data.decode import decode_view
from crossmost_ray.data.whole import looks_whole
from tests.synthetic import broken_pixels


def picture(side: int = 40) -> Image.Image:
    """Noise on a ramp: pixels that take many bytes."""
    rng = np.random.default_rng(side)
    ramp = np.linspace(0, 200, side)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 55, (side, side, 3))).astype(np.uint8))


def encode(kind: str, **how: object) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, kind, **how)
    return stream.getvalue()


def with_thumbnail() -> bytes:
    """A photograph as cameras write it: a small whole picture lies before its own pixels."""
    small = io.BytesIO()
    picture(8).save(small, "JPEG")
    photo = encode("JPEG")
    segment = b"Exif\0\0" + small.getvalue()
    return photo[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + photo[2:]


VIEWS = {
    "WebP": encode("WEBP"),
    "WebP without loss": encode("WEBP", lossless=True),
    "PNG": encode("PNG"),
    "JPEG": encode("JPEG"),
    "JPEG in several scans": encode("JPEG", progressive=True),
    "JPEG with a thumbnail": with_thumbnail(),
}


def decodes(view: bytes) -> bool:
    try:
        decode_view(view, 20)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("kind", VIEWS)
def test_a_whole_view_looks_whole(kind: str) -> None:
    assert decodes(VIEWS[kind])
    assert looks_whole(VIEWS[kind])
    # Some programs pad what they write.
    assert looks_whole(VIEWS[kind] + bytes(7)) or not decodes(VIEWS[kind] + bytes(7))


@given(kind=st.sampled_from(sorted(VIEWS)), share=st.floats(0, 1, exclude_max=True))
def test_a_view_cut_short_is_seen(kind: str, share: float) -> None:
    cut = VIEWS[kind][: int(share * len(VIEWS[kind]))]
    assert not looks_whole(cut) or decodes(cut)


@given(place=st.integers(33, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_png_is_seen(place: int, bit: int) -> None:
    damaged = bytearray(VIEWS["PNG"])
    # Not behind the last chunk's name and checksum, where nobody looks.
    damaged[place % (len(damaged) - 12)] ^= 1 << bit
    assert not looks_whole(bytes(damaged))


@given(
    kind=st.sampled_from(sorted(VIEWS)),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
)
def test_any_damage_is_answered(kind: str, damage: list[tuple[int, int]]) -> None:
    data = bytearray(VIEWS[kind])
    for place, value in damage:
        data[place % len(data)] = value
    assert looks_whole(bytes(data)) in (True, False)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", bytes(200)])
def test_what_is_no_image_is_not_whole(data: bytes) -> None:
    assert not looks_whole(data)


def test_other_formats_are_not_whole() -> None:
    assert not looks_whole(encode("GIF"))


def test_what_only_decoding_shows_looks_whole() -> None:
    """The limit of looking: were this to fail, the documents could promise more."""
    broken = broken_pixels()
    assert looks_whole(broken)
    assert not decodes(broken)
