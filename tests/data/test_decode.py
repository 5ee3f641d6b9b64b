"""Decoding: formats and sizes of views, broken views, and nested lists cut in any way."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crossmost_ray.data.decode import decode_points, decode_view, hash_id, pack_points
from crossmost_ray.schema import SHARD_SCHEMA
from tests.synthetic import encode

POINTS_TYPE = SHARD_SCHEMA.field("points").type


def picture(width: int = 20, height: int = 20) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("JPEG", 24), ("WEBP", 24)])
def test_views_come_back_channels_first(kind: str, tolerance: int) -> None:
    decoded = decode_view(encode(picture(), kind), 20)
    assert decoded.shape == (3, 20, 20)
    assert decoded.dtype == np.uint8
    expected = np.asarray(picture()).transpose(2, 0, 1).astype(int)
    assert np.abs(decoded - expected).max() <= tolerance


@pytest.mark.parametrize(("width", "height"), [(40, 40), (80, 40), (40, 80), (10, 10), (31, 17)])
@pytest.mark.parametrize("size", [20, 33])
def test_views_of_another_size_are_resized_and_cut_to_their_centre(
    width: int, height: int, size: int
) -> None:
    decoded = decode_view(encode(picture(width, height)), size).astype(int)
    assert decoded.shape == (3, size, size)
    # The middle stays the middle, and of the longer side only the middle share is left.
    assert decoded[:2].mean(axis=(1, 2)) == pytest.approx([127.5, 127.5], abs=6)
    shown = min(width, height) / np.array([width, height])
    steps = [decoded[0, :, -1] - decoded[0, :, 0], decoded[1, -1] - decoded[1, 0]]
    for step, share in zip(steps, shown, strict=True):
        assert step.mean() == pytest.approx(255 * share, abs=24)


def test_the_channels_of_a_view_lie_last_in_memory() -> None:
    assert decode_view(GOOD["PNG"], 20).transpose(1, 2, 0).flags.c_contiguous
    assert decode_view(GOOD["PNG"], 10).transpose(1, 2, 0).flags.c_contiguous


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("width", "height"), [(160, 160), (320, 200), (170, 330), (79, 79)])
def test_a_large_jpeg_is_decoded_at_the_size_needed(mode: str, width: int, height: int) -> None:
    data = encode(picture(width, height).convert(mode), "JPEG")
    # The same, decoded whole: a PNG of its pixels is.
    whole = encode(Image.open(io.BytesIO(data)), "PNG")
    found, expected = (decode_view(one, 40).astype(int) for one in (data, whole))
    assert np.abs(found - expected).max() <= 6
    assert np.abs(found - expected).mean() < 2


def test_grey_and_transparent_views_become_rgb() -> None:
    grey = decode_view(encode(picture().convert("L")), 20)
    assert (grey[0] == grey[1]).all()
    assert decode_view(encode(picture().convert("RGBA")), 20).shape == (3, 20, 20)
    assert decode_view(encode(picture().convert("P")), 20).shape == (3, 20, 20)


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", bytes(200)])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(OSError, match=r"\w"):
        decode_view(data, 20)


def test_a_view_cut_short_is_refused() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encode(picture(), kind)
        with pytest.raises(OSError, match=r"\w"):
            decode_view(data[: len(data) // 2], 20)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(side: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        # Pillow raises a SyntaxError and a ValueError here, which no caller would think of.
        png(header(20), (b"IDAT", zlib.compress(bytes(1220))[:8]), (b"I\xdcND", b"")),
        png((b"IHDR", b"short"), (b"IDAT", b"")),
    ],
)
def test_a_damaged_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(OSError, match=r"\w"):
        decode_view(data, 20)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(OSError, match=r"\w"):
        decode_view(encode(picture(), kind), 20)


def test_the_message_names_no_address_in_memory() -> None:
    with pytest.raises(OSError, match="no WebP, PNG or JPEG image") as refused:
        decode_view(b"no image", 20)
    assert "0x" not in str(refused.value)


def test_an_image_of_absurd_size_is_refused() -> None:
    # A header alone, of a picture that would take 10 GB.
    with pytest.raises(OSError, match=r"\w"):
        decode_view(png(header(60_000), (b"IDAT", zlib.compress(b""))), 20)


GOOD = {kind: encode(picture(), kind) for kind in ("PNG", "JPEG", "WEBP")}


@given(
    kind=st.sampled_from(sorted(GOOD)),
    damage=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10_000),
)
def test_a_damaged_view_is_decoded_or_refused(
    kind: str, damage: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(GOOD[kind])
    for place, value in damage:
        data[place % len(data)] = value
    try:
        decoded = decode_view(bytes(data[: max(cut % (2 * len(data)), 1)]), 20)
    except OSError:
        return
    assert decoded.shape == (3, 20, 20)


# Points


def ragged(lengths: list[int]) -> list[npt.NDArray[np.float16]]:
    rng = np.random.default_rng(0)
    return [rng.random((length, 3)).astype(np.float16) for length in lengths]


def column(clouds: list[npt.NDArray[np.float16]]) -> pa.Array:
    return pa.array([list(cloud) for cloud in clouds], POINTS_TYPE)


def check(decoded: list[npt.NDArray[np.float32]], clouds: list[npt.NDArray[np.float16]]) -> None:
    assert len(decoded) == len(clouds)
    for ours, theirs in zip(decoded, clouds, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs.astype(np.float32))


lengths = st.lists(st.integers(0, 5), max_size=8)


@given(sizes=lengths, first=st.integers(0, 8), count=st.integers(0, 8))
def test_clouds_of_any_length_come_back_from_any_slice(
    sizes: list[int], first: int, count: int
) -> None:
    clouds = ragged(sizes)
    check(decode_points(column(clouds)), clouds)
    check(decode_points(column(clouds).slice(first, count)), clouds[first:][:count])
    table = pa.table({"points": column(clouds)}).slice(first, count)
    check(decode_points(table["points"]), clouds[first:][:count])


@given(sizes=lengths.filter(bool), cut=st.integers(0, 8), first=st.integers(0, 4))
def test_chunks_are_joined(sizes: list[int], cut: int, first: int) -> None:
    clouds = ragged(sizes)
    chunks = pa.chunked_array([column(clouds[:cut]), column(clouds[cut:])], POINTS_TYPE)
    check(decode_points(chunks), clouds)
    check(decode_points(chunks.slice(first)), clouds[first:])


@given(sizes=lengths.filter(bool), first=st.integers(0, 8), count=st.integers(0, 8), data=st.data())
def test_packed_clouds_come_back_wherever_they_are_moved(
    sizes: list[int], first: int, count: int, data: st.DataObject
) -> None:
    clouds = ragged(sizes)
    packed = pack_points(column(clouds).slice(first, count))
    kept = clouds[first:][:count]
    check(decode_points(packed), kept)
    places = data.draw(st.lists(st.integers(0, len(kept) - 1), max_size=6)) if kept else []
    moved = pa.chunked_array([packed]).take(pa.array(places, pa.int64()))
    check(decode_points(moved), [kept[place] for place in places])


def test_clouds_of_other_float_types_come_back() -> None:
    for value_type in (pa.float32(), pa.float64()):
        clouds = pa.array(
            [[[0.5, 1.0, 2.0]], [[3.0, 4.0, 5.0]] * 2], pa.list_(pa.list_(value_type))
        )
        first, second = decode_points(clouds)
        assert first.tolist() == [[0.5, 1.0, 2.0]]
        assert second.shape == (2, 3)


def test_ids_are_hashed_alike_everywhere() -> None:
    # The first eight bytes of `printf synthetic/0-0 | sha256sum`, little-endian, halved.
    assert hash_id("synthetic/0-0") == EXPECTED_HASH
    assert hash_id("synthetic/0-0") != hash_id("synthetic/0-1")
    assert hash_id("stöl") < 2**63


EXPECTED_HASH = int.from_bytes(bytes.fromhex("ab4435c696e5a3ef"), "little") // 2


def test_hashes_fit_a_signed_integer() -> None:
    values = [hash_id(f"object {k}") for k in range(2000)]
    assert len(set(values)) == 2000
    assert min(values) >= 0
    assert max(values) < 2**63
    assert max(values) > 2**62, "all 63 bits are used"


def test_an_encoded_view_is_not_kept_open() -> None:
    stream = io.BytesIO(GOOD["PNG"])
    assert decode_view(stream.getvalue(), 20).shape == (3, 20, 20)
