"""What takes augmentation long on a CPU, as compiled loops over one image or cloud after the other.

`augment` draws what is random, and holds the same as tensor operations, for other devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossmost_ray.ops.compiled import compiled, on_threads

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]

IMAGES_OF_A_THREAD = 4
"""Images below which no further thread is started: one takes 0.2 ms, a start 0.1."""

CLOUDS_OF_A_THREAD = 8

DIGIT_BITS = 12
DIGIT = 2**DIGIT_BITS
"""What the sort counts at once; two digits are the 24 bits that torch draws of a number."""

ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)


@compiled
def _taps(scale: float, offset: float, side: int, place: Integers, share: Floats) -> None:
    """Writes for each pixel of a line the first of the two that it lies between, and how far on.

    The first is -1 where that lies before the line, and at most `side`, behind its end.
    """
    step = np.float32(2.0) / np.float32(place.shape[0])
    for k in range(place.shape[0]):
        center = ((np.float32(k) + HALF) * step - ONE) * scale + offset
        at = ((center + ONE) * np.float32(side) - ONE) * HALF
        at = min(max(at, -ONE), np.float32(side))
        first = np.floor(at)
        place[k] = np.int32(first)
        share[k] = at - first


@compiled
def _crop_images(
    images: npt.NDArray[Any], matrix: Floats, fill: Floats, unit: float, out: Floats
) -> None:
    """Crops (B, H, 3 W) lines of pixels as (B, 2, 3) maps without a turn say, to (B, 3, R, R).

    Pixels are multiplied by `unit`; `fill` is in theirs.
    """
    height, width, size = images.shape[1], images.shape[2] // 3, out.shape[2]
    row, row_share = np.empty(size, np.int32), np.empty(size, np.float32)
    column, column_share = np.empty(size, np.int32), np.empty(size, np.float32)
    # One pixel before the line's first, and two behind its last, for those that lie between.
    line = np.empty((width + 3) * 3, np.float32)
    mixed = line[3 : 3 * width + 3]
    for k in range(3):
        line[k] = line[3 * width + 3 + k] = line[3 * width + 6 + k] = fill[k]
    for b in range(images.shape[0]):
        _taps(matrix[b, 1, 1], matrix[b, 1, 2], height, row, row_share)
        _taps(matrix[b, 0, 0], matrix[b, 0, 2], width, column, column_share)
        for i in range(size):
            first, share = row[i], row_share[i]
            if first >= 0 and first < height - 1:
                above, below = images[b, first], images[b, first + 1]
                for k in range(3 * width):
                    value = np.float32(above[k])
                    mixed[k] = value + share * (np.float32(below[k]) - value)
            else:
                for k in range(3 * width):
                    value = np.float32(images[b, first, k]) if 0 <= first < height else fill[k % 3]
                    other = (
                        np.float32(images[b, first + 1, k]) if first < height - 1 else fill[k % 3]
                    )
                    mixed[k] = value + share * (other - value)
            for channel in range(3):
                for j in range(size):
                    at = 3 * column[j] + 3 + channel
                    value = line[at] + column_share[j] * (line[at + 3] - line[at])
                    out[b, channel, i, j] = min(max(value * np.float32(unit), ZERO), ONE)


def crop_images(images: Tensor, matrix: Tensor, size: int, fill: tuple[float, ...]) -> Tensor:
    """Samples (B, 3, S, S) uint8, or floats of 0 to 1, at the places that maps without a turn give.

    Args:
        images: Read without a copy where the channels lie last in memory.
        matrix: (B, 2, 3) affine, as of `torch.nn.functional.affine_grid`; what would turn or shear
            is not looked at.
        size: R.
        fill: Colour from 0 to 1 of what lies outside.

    Returns:
        (B, 3, R, R) float32, 0 to 1.
    """
    B, _, height, width = images.shape
    unit = 1.0 if images.is_floating_point() else 1 / 255
    lines = images.permute(0, 2, 3, 1).contiguous().numpy().reshape(B, height, 3 * width)
    out = torch.empty(B, 3, size, size)

    def loop(lines: npt.NDArray[Any], matrix: Floats, out: Floats) -> None:
        _crop_images(lines, matrix, np.array(fill, np.float32) / np.float32(unit), unit, out)

    on_threads(loop, B // IMAGES_OF_A_THREAD, lines, matrix.numpy(), out.numpy())
    return out


@compiled
def _warp_images(images: Floats, matrix: Floats, fill: Floats, out: Floats) -> None:
    """Samples (B, 3, S, S) images at the places that (B, 2, 3) maps give."""
    side = out.shape[2]
    # With one line before the first and two behind the last, for pixels that lie between.
    wide = side + 3
    framed = np.empty((3, wide * wide), np.float32)
    place = np.empty(side, np.int32)
    right, low = np.empty(side, np.float32), np.empty(side, np.float32)
    step, extent = np.float32(2.0) / np.float32(side), np.float32(side)
    for b in range(images.shape[0]):
        for channel in range(3):
            framed[channel] = fill[channel]
            for i in range(side):
                framed[channel, (i + 1) * wide + 1 : (i + 2) * wide - 2] = images[b, channel, i]
        for i in range(side):
            y = (np.float32(i) + HALF) * step - ONE
            across = matrix[b, 0, 1] * y + matrix[b, 0, 2] + ONE
            down = matrix[b, 1, 1] * y + matrix[b, 1, 2] + ONE
            for j in range(side):
                x = (np.float32(j) + HALF) * step - ONE
                u = ((matrix[b, 0, 0] * x + across) * extent - ONE) * HALF
                v = ((matrix[b, 1, 0] * x + down) * extent - ONE) * HALF
                u, v = min(max(u, -ONE), extent), min(max(v, -ONE), extent)
                left, top = np.int32(np.floor(u)), np.int32(np.floor(v))
                right[j], low[j] = u - np.float32(left), v - np.float32(top)
                place[j] = (top + 1) * wide + left + 1
            for channel in range(3):
                for j in range(side):
                    at = place[j]
                    above, below = framed[channel, at], framed[channel, at + wide]
                    above += right[j] * (framed[channel, at + 1] - above)
                    below += right[j] * (framed[channel, at + wide + 1] - below)
                    value = above + low[j] * (below - above)
                    out[b, channel, i, j] = min(max(value, ZERO), ONE)


def warp_images(images: Tensor, matrix: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Samples (B, 3, S, S) floats of 0 to 1 at the places that (B, 2, 3) affine maps give.

    Args:
        images: Of any strides.
        matrix: As of `torch.nn.functional.affine_grid`.
        fill: Colour of what lies outside.

    Returns:
        (B, 3, S, S) float32, 0 to 1.
    """
    out = torch.empty_like(images, memory_format=torch.contiguous_format)

    def loop(images: Floats, matrix: Floats, out: Floats) -> None:
        _warp_images(images, matrix, np.array(fill, np.float32), out)

    arrays = (images.contiguous().numpy(), matrix.contiguous().numpy(), out.numpy())
    on_threads(loop, len(images) // IMAGES_OF_A_THREAD, *arrays)
    return out


@compiled
def _equalize_channels(channels: Floats, out: Floats) -> None:
    """Puts in the place of each value of 256 its rank among those of its channel, (B, P)."""
    P = channels.shape[1]
    counts, rank = np.empty(256, np.int32), np.empty(256, np.float32)
    value = np.empty(P, np.int32)
    for b in range(channels.shape[0]):
        counts[:] = 0
        for k in range(P):
            value[k] = np.int32(np.rint(channels[b, k] * np.float32(255.0)))
        for k in range(P):
            counts[value[k]] += 1
        below = ZERO
        for level in range(256):
            count = np.float32(counts[level])
            below += count
            rank[level] = (below - count * HALF) / np.float32(P)
        for k in range(P):
            out[b, k] = rank[value[k]]


def equalize_channels(images: Tensor) -> Tensor:
    """Spreads the values of each channel of (B, 3, S, S) floats of 0 to 1 evenly."""
    channels = images.flatten(2).flatten(0, 1).contiguous()
    out = torch.empty_like(channels)
    most = len(images) // IMAGES_OF_A_THREAD
    on_threads(_equalize_channels, most, channels.numpy(), out.numpy())
    return out.reshape(images.shape)


@compiled
def _take_points(points: Floats, noise: Floats, source: Integers, out: Floats) -> None:
    """Writes of each `source` cloud the points with the most noise, the most first.

    A radix sort with two digits, stable: of equal noise, the earlier point comes first.
    """
    N, number = noise.shape[1], out.shape[1]
    low, high = np.empty(DIGIT, np.int32), np.empty(DIGIT, np.int32)
    key, halfway = np.empty(N, np.int32), np.empty(N, np.int32)
    for b in range(noise.shape[0]):
        low[:] = 0
        high[:] = 0
        for n in range(N):
            key[n] = np.int32(DIGIT * DIGIT - 1) - np.int32(noise[b, n] * np.float32(DIGIT * DIGIT))
            low[key[n] & (DIGIT - 1)] += 1
            high[key[n] >> DIGIT_BITS] += 1
        before_low = before_high = np.int32(0)
        for value in range(DIGIT):
            low[value], before_low = before_low, before_low + low[value]
            high[value], before_high = before_high, before_high + high[value]
        for n in range(N):
            value = key[n] & (DIGIT - 1)
            halfway[low[value]] = n
            low[value] += 1
        for m in range(N):
            n = halfway[m]
            value = key[n] >> DIGIT_BITS
            place = high[value]
            high[value] += 1
            if place < number:
                for axis in range(3):
                    out[b, place, axis] = points[source[b], n, axis]


def take_points(points: Tensor, noise: Tensor, num_points: int) -> Tensor:
    """Takes of each cloud the points with the most noise.

    Args:
        points: (B, N, 3) float32.
        noise: (B * T, N) float32, from 0 to below 1, of which 24 bits count.
        num_points: At most N.

    Returns:
        (B * T, num_points, 3), the most noise first; of equal noise, the earlier point.
    """
    clouds = points.contiguous().numpy()
    out = torch.empty(len(noise), num_points, 3)
    source = np.repeat(np.arange(len(points), dtype=np.int32), len(noise) // max(len(points), 1))

    def loop(noise: Floats, source: Integers, out: Floats) -> None:
        _take_points(clouds, noise, source, out)

    on_threads(loop, len(noise) // CLOUDS_OF_A_THREAD, noise.numpy(), source, out.numpy())
    return out


@compiled
def _roughen_points(
    points: Floats,
    turn: Floats,
    shift: Floats,
    noise: Floats,
    draws: Floats,
    ratio: Floats,
    jitter: Floats,
    out: Floats,
) -> None:
    """Roughens clouds; `jitter` is (B,)."""
    N = points.shape[1]
    for b in range(points.shape[0]):
        deviation, cut = jitter[b], np.float32(5.0) * jitter[b]
        for axis in range(3):
            u, v, w = turn[b, axis, 0], turn[b, axis, 1], turn[b, axis, 2]
            least, most = np.float32(np.inf), np.float32(-np.inf)
            for n in range(N):
                value = points[b, n, 0] * u + points[b, n, 1] * v + points[b, n, 2] * w
                out[b, n, axis] = value
                least, most = min(least, value), max(most, value)
            move = (most - least) * shift[b, 0, axis]
            for n in range(N):
                rough = min(max(noise[b, n, axis] * deviation, -cut), cut)
                out[b, n, axis] = out[b, n, axis] + move + rough
        for n in range(N):
            if draws[b, n] < ratio[b, 0]:
                for axis in range(3):
                    out[b, n, axis] = out[b, 0, axis]


def roughen_points(
    points: Tensor,
    turn: Tensor,
    shift: Tensor,
    noise: Tensor,
    jitter: float,
    draws: Tensor,
    ratio: Tensor,
) -> Tensor:
    """Turns clouds, moves them by a share of their extent, roughens and thins them.

    Args:
        points: (B, N, 3) float32.
        turn: (B, 3, 3), by which each point is multiplied.
        shift: (B, 1, 3), shares of the turned cloud's extent.
        noise: (B, N, 3) of deviation 1.
        jitter: What it is multiplied by; it is cut at five times that.
        draws: (B, N), from 0 to 1: where below `ratio`, the first point takes the point's place.
        ratio: (B, 1).

    Returns:
        (B, N, 3) float32.
    """
    out = torch.empty(points.shape)
    arrays = (array.contiguous().numpy() for array in (points, turn, shift, noise, draws, ratio))
    deviations = np.full(len(points), jitter, np.float32)
    most = len(points) // CLOUDS_OF_A_THREAD
    on_threads(_roughen_points, most, *arrays, deviations, out.numpy())
    return out
