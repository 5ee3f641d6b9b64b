"""Photographs: which are picked, how they are shrunk, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crossmost_ray.prepare.errors import ObjectError
from crossmost_ray.prepare.photos import (
    MAX_PHOTO_BYTES,
    list_photos,
    read_photos,
    shrink_photo,
    spread,
)

from .layouts_scans import picture, write


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "WEBP"
    return image


def encoded(image: Image.Image, codec: str, **options: object) -> bytes:
    stored = io.BytesIO()
    image.save(stored, codec, **options)  # type: ignore[arg-type]
    return stored.getvalue()


def png_promising(width: int, height: int) -> bytes:
    """The head of a PNG, of a few bytes, whatever size it promises."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels)


def quadrants() -> Image.Image:
    """96 x 64, its upper left quarter red, its upper right green, the rest blue."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[32:, :, 2] = 255
    pixels[:32, :48, 0] = 255
    pixels[:32, 48:, 1] = 255
    return Image.fromarray(pixels)


@given(count=st.integers(0, 300), most=st.integers(1, 80))
def test_files_are_spread_evenly(count: int, most: int) -> None:
    picked = spread(range(count), most)
    assert len(picked) == min(count, most)
    assert picked[:1] == list(range(count))[:1]
    # Round the whole of a closed video, from the last picked file to the first, too.
    steps = np.diff([*picked, count])
    if count:
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


def test_photographs_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("b.JPG", "a10.png", "a02.webp", ".c.jpg", "notes.txt", "d.jpeg"):
        write(tmp_path / name, b"")
    assert [file.name for file in list_photos(tmp_path)] == [
        "a02.webp",
        "a10.png",
        "b.JPG",
        "d.jpeg",
    ]
    assert list_photos(tmp_path / "none") == []
    assert list_photos(tmp_path / "notes.txt") == []


def test_photographs_are_read_as_they_are(tmp_path: Path) -> None:
    first, second = picture(codec="JPEG"), picture(codec="WEBP")
    files = [write(tmp_path / "2.jpg", first), write(tmp_path / "1.png", second)]
    assert read_photos(files) == (first, second)


def test_photographs_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match=r"1\.jpg is missing"):
        read_photos([tmp_path / "1.jpg"])
    os.mkfifo(tmp_path / "2.jpg")
    with pytest.raises(ObjectError, match=r"2\.jpg is missing"):
        read_photos([tmp_path / "2.jpg"])
    with pytest.raises(ObjectError, match=r"3\.jpg is no JPEG, PNG or WebP image"):
        read_photos([write(tmp_path / "3.jpg", "<html>not found</html>")])
    # Formats whose readers run other programs or read other files are not among the three.
    with pytest.raises(ObjectError, match=r"4\.png is no JPEG, PNG or WebP image"):
        read_photos(
            [write(tmp_path / "4.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")]
        )
    large = write(tmp_path / "5.jpg", b"")
    os.truncate(large, MAX_PHOTO_BYTES + 1)
    with pytest.raises(ObjectError, match=r"5\.jpg has 67,108,865 bytes, more than"):
        read_photos([large])


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((640, 480), 256, (256, 192)),
        ((480, 640), 256, (192, 256)),
        ((100, 60), 256, (100, 60)),
        ((3000, 2), 100, (100, 1)),
    ],
)
@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
def test_the_longest_side_is_reduced(
    size: tuple[int, int], longest: int, expected: tuple[int, int], codec: str
) -> None:
    image = decoded(shrink_photo(picture((10, 200, 60), size, codec), longest, 95))
    assert (image.size, image.mode) == (expected, "RGB")
    assert np.abs(np.asarray(image).astype(int) - (10, 200, 60)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    # How a camera stores an upright scene under each orientation, as EXIF 2.3 draws it: the 0th row
    # and column of what is stored are the visual ... of the scene.
    scene = np.asarray(quadrants())
    stored = {
        1: scene,  # top, left
        2: scene[:, ::-1],  # top, right
        3: scene[::-1, ::-1],  # bottom, right
        4: scene[::-1],  # bottom, left
        5: scene.transpose(1, 0, 2),  # left, top
        6: scene[:, ::-1].transpose(1, 0, 2),  # right, top
        7: scene[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: scene[::-1].transpose(1, 0, 2),  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    for codec in ("JPEG", "PNG"):
        shrunk = decoded(shrink_photo(encoded(image, codec, exif=exif), 48, 95))
        assert shrunk.size == (48, 32)
        for place, color in (((6, 6), 0), ((40, 6), 1), ((6, 26), 2), ((40, 26), 2)):
            pixel = shrunk.getpixel(place)
            assert isinstance(pixel, tuple)
            assert int(np.argmax(pixel)) == color
        assert not shrunk.getexif()


def test_nothing_but_the_picture_is_kept() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = encoded(quadrants(), "JPEG", exif=exif, icc_profile=b"profile", comment=b"secret")
    shrunk = shrink_photo(data, 96)
    assert not {"exif", "icc_profile", "xmp", "comment"} & set(decoded(shrunk).info)
    assert b"secret" not in shrunk


def test_behind_transparent_parts_comes_black() -> None:
    # Half of red over black is half a red; white that cannot be seen is not seen.
    for color, expected in (((200, 0, 0, 128), (100, 0, 0)), ((255, 255, 255, 0), (0, 0, 0))):
        pixels = np.asarray(decoded(shrink_photo(picture(color, (16, 16)), 16, 100)))
        assert np.abs(pixels.astype(int) - expected).max() <= 4
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([255, 255, 255, 0, 0, 200])
    data = encoded(palette, "PNG", transparency=0)
    pixels = np.asarray(decoded(shrink_photo(data, 16, 100)))
    assert np.abs(pixels.astype(int) - (0, 0, 200)).max() <= 8


def test_of_sixteen_bits_the_upper_ones_are_kept() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint16)[None] * 1024, 16, axis=0)
    data = encoded(Image.fromarray(ramp), "PNG")
    pixels = np.asarray(decoded(shrink_photo(data, 64, 100))).astype(int)
    assert np.abs(pixels[:, :, 0] - np.arange(64) * 4).max() <= 4
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (60_000, 60_000), (2**31 - 1, 9)])
def test_a_small_file_that_promises_a_large_picture_is_refused(
    tmp_path: Path, width: int, height: int
) -> None:
    data = png_promising(width, height)
    with pytest.raises(ObjectError, match="a photograph is"):
        shrink_photo(data, 64)
    with pytest.raises(ObjectError, match=r"the photograph .*bomb\.png is"):
        read_photos([write(tmp_path / "bomb.png", data)])


@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP"])
def test_a_photograph_cut_short_is_named(codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), codec)
    with pytest.raises(ObjectError, match="photograph 3 is broken"):
        shrink_photo(data[: len(data) // 2], 32, place="photograph 3")


@given(
    codec=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_damaged_photographs_cost_their_object_only(
    codec: str, edits: list[tuple[int, int]]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(quadrants(), codec, exif=exif))
    for position, value in edits:
        data[position % len(data)] = value
    try:
        shrunk = shrink_photo(bytes(data), 32)
    except ObjectError:
        return
    assert max(decoded(shrunk).size) <= 32
