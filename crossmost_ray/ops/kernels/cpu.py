"""The point kernels as compiled loops for the CPU: a cloud is sorted into buckets of near points,
and a bucket is only looked into where its box says that it can matter."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossmost_ray.ops.compiled import compiled, on_threads

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

BUCKET = 64
"""Points of a bucket. More make each look into one dearer, fewer make for more boxes to compare."""

CELLS = 64
"""Along each axis of a cloud, by which its points are sorted: far smaller than a bucket's box."""

DIGIT_BITS = 9
DIGIT = 2**DIGIT_BITS
"""What the sort counts at once; two digits hold the number of a cell."""

SPREAD = np.array([int(f"{cell:b}", 8) for cell in range(CELLS)], np.int32)
"""The bits of a cell's coordinate, two zeros before each: binary digits, read as octal ones."""

SORT_FROM = 128
"""Samples from which on sorting a cloud pays; below, buckets are taken as the points come."""

WORK_OF_A_THREAD = 2**18
"""Points of a batch below which no second thread is started: it costs 0.1 ms."""

NOTHING = np.float32(0.0)
MAGNITUDE = np.int32(2**31 - 1)
"""All bits but the sign; and more than the bits of any distance."""


class Buckets(NamedTuple):
    """A cloud of N points in M buckets. What fills the last one up lies at infinity."""

    points: Floats
    """(M, 3, BUCKET)."""
    origin: Integers
    """(M, BUCKET), which point of the cloud it is; N or more where there is none."""
    low: Floats
    """(3, M), the least coordinates of a bucket's points."""
    high: Floats
    """(3, M), the largest."""


@compiled
def _curve_places(points: Floats) -> Integers:
    """Numbers the cells of (N, 3) points' bounding cube along a Z-shaped curve.

    Source:
        Morton (1966): the bits of a cell's three coordinates, interleaved, are its number.
    """
    N = points.shape[0]
    low_x = high_x = points[0, 0]
    low_y = high_y = points[0, 1]
    low_z = high_z = points[0, 2]
    for n in range(N):
        low_x, high_x = min(low_x, points[n, 0]), max(high_x, points[n, 0])
        low_y, high_y = min(low_y, points[n, 1]), max(high_y, points[n, 1])
        low_z, high_z = min(low_z, points[n, 2]), max(high_z, points[n, 2])
    extent = max(max(high_x - low_x, high_y - low_y), high_z - low_z)
    # Just below the number of cells, so that the largest coordinate falls into the last of them.
    scale = np.float32(CELLS - 0.01) / extent if extent > 0 else NOTHING
    place = np.empty(N, np.int32)
    for n in range(N):
        x = np.int32((points[n, 0] - low_x) * scale) & (CELLS - 1)
        y = np.int32((points[n, 1] - low_y) * scale) & (CELLS - 1)
        z = np.int32((points[n, 2] - low_z) * scale) & (CELLS - 1)
        place[n] = SPREAD[x] | (SPREAD[y] << 1) | (SPREAD[z] << 2)
    return place


@compiled
def _order(place: Integers) -> Integers:
    """Sorts numbers below CELLS**3, equal ones by where they stand; gives where each stood.

    A radix sort, with two digits.
    """
    N = place.shape[0]
    low, high = np.zeros(DIGIT, np.int32), np.zeros(DIGIT, np.int32)
    for n in range(N):
        low[place[n] & (DIGIT - 1)] += 1
        high[place[n] >> DIGIT_BITS] += 1
    before_low = before_high = np.int32(0)
    for value in range(DIGIT):
        low[value], before_low = before_low, before_low + low[value]
        high[value], before_high = before_high, before_high + high[value]
    halfway, order = np.empty(N, np.int32), np.empty(N, np.int32)
    for n in range(N):
        value = place[n] & (DIGIT - 1)
        halfway[low[value]] = n
        low[value] += 1
    for m in range(N):
        value = place[halfway[m]] >> DIGIT_BITS
        order[high[value]] = halfway[m]
        high[value] += 1
    return order


@compiled
def _fill_buckets(points: Floats, order: Integers) -> Buckets:
    """Puts (N, 3) points into buckets in the given order."""
    N = points.shape[0]
    number = (N + BUCKET - 1) // BUCKET
    places = np.full((number, 3, BUCKET), np.inf, np.float32)
    origin = np.full((number, BUCKET), np.int32(N), np.int32)
    low, high = np.empty((3, number), np.float32), np.empty((3, number), np.float32)
    bits, low_bits, high_bits = places.view(np.int32), low.view(np.int32), high.view(np.int32)
    for b in range(number):
        size = min(BUCKET, N - b * BUCKET)
        for j in range(size):
            n = order[b * BUCKET + j]
            origin[b, j] = n
            places[b, 0, j] = points[n, 0]
            places[b, 1, j] = points[n, 1]
            places[b, 2, j] = points[n, 2]
        for axis in range(3):
            # As integers in the floats' order, whose least is found eight at a time.
            least, most = np.int32(2**31 - 1), np.int32(-(2**31))
            for j in range(size):
                value = bits[b, axis, j]
                value ^= (value >> 31) & MAGNITUDE
                least, most = min(least, value), max(most, value)
            low_bits[axis, b] = least ^ ((least >> 31) & MAGNITUDE)
            high_bits[axis, b] = most ^ ((most >> 31) & MAGNITUDE)
    return Buckets(places, origin, low, high)


@compiled
def _buckets(points: Floats) -> Buckets:
    """Sorts (N, 3) points into buckets of near ones."""
    return _fill_buckets(points, _order(_curve_places(points)))


@compiled
def _bounds(buckets: Buckets, x: np.float32, y: np.float32, z: np.float32, bound: Floats) -> None:
    """Writes for each bucket a squared distance to (x, y, z) that no point of it comes below.

    That holds for distances as they are rounded, too: a difference, a square and a sum round
    monotonically, and they are taken here as they are taken of points.
    """
    low, high = buckets.low, buckets.high
    for b in range(bound.shape[0]):
        dx = max(max(low[0, b] - x, x - high[0, b]), NOTHING)
        dy = max(max(low[1, b] - y, y - high[1, b]), NOTHING)
        dz = max(max(low[2, b] - z, z - high[2, b]), NOTHING)
        bound[b] = (dx * dx + dy * dy) + dz * dz


@compiled
def _sample(points: Floats, buckets: Buckets, picked: Places) -> None:
    """Picks farthest points of one cloud, the first of which is `picked[0]`.

    Source:
        Han et al. (2023), QuickFPS: a bucket whose points are all nearer to earlier samples than
        they can be to the new one is left alone.
    """
    N = points.shape[0]
    places, origin = buckets.points, buckets.origin
    number, size = origin.shape
    flat = np.full(number * size, np.inf, np.float32)
    flat[N:] = -1.0  # what fills the last bucket up is never farthest
    nearest = flat.reshape(number, size)
    # Floats from 0 on are in the order of their bits, and the largest of many integers is found
    # eight at a time.
    nearest_bits = nearest.view(np.int32)
    farthest = np.full(number, np.inf, np.float32).view(np.int32)
    bound = np.empty(number, np.float32)
    bound_bits = bound.view(np.int32)
    last = picked[0]
    for i in range(1, picked.shape[0]):
        x, y, z = points[last, 0], points[last, 1], points[last, 2]
        _bounds(buckets, x, y, z, bound)
        for b in range(number):
            if bound_bits[b] < farthest[b]:
                # To a length known only when it runs: of a constant one, LLVM makes 64 scalars.
                for j in range(size):
                    dx, dy, dz = places[b, 0, j] - x, places[b, 1, j] - y, places[b, 2, j] - z
                    nearest[b, j] = min(nearest[b, j], (dx * dx + dy * dy) + dz * dz)
                most = np.int32(-1)
                for j in range(size):
                    most = max(most, nearest_bits[b, j])
                farthest[b] = most
        most = np.int32(0)
        for b in range(number):
            most = max(most, farthest[b])
        if most == 0:
            # All points are picked, or coincide with one that is: the first of them is next, and
            # always will be.
            picked[i:] = 0
            return
        last = np.int64(N)
        for b in range(number):
            if farthest[b] == most:
                for j in range(size):
                    if nearest_bits[b, j] == most:
                        last = min(last, np.int64(origin[b, j]))
        picked[i] = last


@compiled
def _keep_least(keys: Places, count: int, number: int) -> None:
    """Brings the `number` least of `count` keys to the front; the last of them is the largest.

    Source:
        Hoare (1961), Find.
    """
    low, high = 0, count - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if number - 1 <= j:
            high = j
        elif number - 1 >= i:
            low = i
        else:
            return


@compiled
def _write_least(keys: Places, found: Places) -> None:
    """Writes the lower halves of the least keys, in their order; no two are equal."""
    for i in range(keys.shape[0]):
        # Counting the keys below each takes more comparisons than sorting does, eight at a time.
        key, rank = keys[i], 0
        for j in range(keys.shape[0]):
            rank += int(keys[j] < key)
        if rank < found.shape[0]:
            found[rank] = key & 0xFFFFFFFF


@compiled
def _search(buckets: Buckets, queries: Floats, found: Places) -> None:
    """Finds the nearest points of one cloud's queries; what is as near comes by its index."""
    places, origin = buckets.points, buckets.origin
    number, size = origin.shape
    num_neighbors = found.shape[1]
    bound = np.empty(number, np.float32)
    bound_bits = bound.view(np.int32)
    distance = np.empty(size, np.float32)
    bits = distance.view(np.int32)
    keys = np.empty(num_neighbors + 2 * size, np.int64)
    for q in range(queries.shape[0]):
        x, y, z = queries[q, 0], queries[q, 1], queries[q, 2]
        _bounds(buckets, x, y, z, bound)
        least = MAGNITUDE
        for b in range(number):
            least = min(least, bound_bits[b])
        home = 0
        while bound_bits[home] > least:
            home += 1
        limit, count = MAGNITUDE, 0
        for turn in range(number):
            # From the box that holds the query on, then back: near on the curve is near in space,
            # so that the limit soon becomes small.
            b = home + turn if home + turn < number else number - 1 - turn
            if bound_bits[b] > limit:
                continue
            for j in range(size):
                dx, dy, dz = places[b, 0, j] - x, places[b, 1, j] - y, places[b, 2, j] - z
                distance[j] = (dx * dx + dy * dy) + dz * dz
            for j in range(size):
                # Written anyway, counted where it is near: a branch would be guessed wrong.
                keys[count] = (np.int64(bits[j]) << 32) | np.int64(origin[b, j])
                count += int(bits[j] <= limit)
            if count >= num_neighbors + size or (limit == MAGNITUDE and count >= num_neighbors):
                _keep_least(keys, count, num_neighbors)
                count = num_neighbors
                limit = np.int32(keys[count - 1] >> 32)
        if count > 3 * num_neighbors:
            _keep_least(keys, count, num_neighbors)
            count = num_neighbors
        _write_least(keys[:count], found[q])


@compiled
def _search_balls(
    buckets: Buckets, num_points: int, queries: Floats, limit: int, found: Places
) -> None:
    """Finds the first points of one cloud in each ball.

    Within is what has a squared distance whose bits, as an integer, are at most `limit`.
    """
    places, origin = buckets.points, buckets.origin
    number, size = origin.shape
    num_neighbors = found.shape[1]
    bound = np.empty(number, np.float32)
    bound_bits = bound.view(np.int32)
    distance = np.empty(size, np.float32)
    bits = distance.view(np.int32)
    keys = np.empty(num_neighbors + 2 * size, np.int64)
    for q in range(queries.shape[0]):
        x, y, z = queries[q, 0], queries[q, 1], queries[q, 2]
        _bounds(buckets, x, y, z, bound)
        # What fills the last bucket up is never within, even where all distances are.
        last, count = np.int64(num_points - 1), 0
        for b in range(number):
            if bound_bits[b] > limit:
                continue
            for j in range(size):
                dx, dy, dz = places[b, 0, j] - x, places[b, 1, j] - y, places[b, 2, j] - z
                distance[j] = (dx * dx + dy * dy) + dz * dz
            for j in range(size):
                keys[count] = np.int64(origin[b, j])
                count += int(bits[j] <= limit and origin[b, j] <= last)
            if count >= num_neighbors + size:
                _keep_least(keys, count, num_neighbors)
                count = num_neighbors
                last = keys[count - 1]
        if count > num_neighbors:
            _keep_least(keys, count, num_neighbors)
            count = num_neighbors
        found[q] = 0
        _write_least(keys[:count], found[q, :count])
        found[q, count:] = found[q, 0]


@compiled
def _sample_clouds(points: Floats, picked: Places) -> None:
    """Samples the clouds of a batch."""
    for cloud in range(points.shape[0]):
        if picked.shape[1] < SORT_FROM:
            order = np.arange(points.shape[1]).astype(np.int32)
            buckets = _fill_buckets(points[cloud], order)
        else:
            buckets = _buckets(points[cloud])
        _sample(points[cloud], buckets, picked[cloud])


@compiled
def _search_clouds(queries: Floats, points: Floats, found: Places) -> None:
    """Searches the clouds of a batch for nearest neighbours."""
    for cloud in range(points.shape[0]):
        buckets = _buckets(points[cloud])
        _search(buckets, queries[cloud], found[cloud])


@compiled
def _search_balls_of_clouds(queries: Floats, points: Floats, limit: int, found: Places) -> None:
    """Searches the clouds of a batch for what lies in balls."""
    for cloud in range(points.shape[0]):
        buckets = _buckets(points[cloud])
        _search_balls(buckets, points.shape[1], queries[cloud], limit, found[cloud])


@compiled
def _group_clouds(points: Floats, picked: Places, found: Places) -> None:
    """Samples the clouds of a batch, and searches for the samples' neighbours."""
    for cloud in range(points.shape[0]):
        buckets = _buckets(points[cloud])
        _sample(points[cloud], buckets, picked[cloud])
        _search(buckets, points[cloud][picked[cloud]], found[cloud])


def _most_threads(points: Tensor) -> int:
    return points.shape[0] * points.shape[1] // WORK_OF_A_THREAD


def _places(*shape: int) -> Places:
    return np.empty(shape, np.int64)


def farthest_point_sample(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
    """Picks farthest points; see `reference`."""
    clouds = points.numpy()
    picked = _places(len(clouds), num_samples)
    picked[:, 0] = start.numpy()
    on_threads(_sample_clouds, _most_threads(points), clouds, picked)
    return torch.from_numpy(picked)


def nearest_neighbors(queries: Tensor, points: Tensor, num_neighbors: int) -> Tensor:
    """Finds nearest neighbours; see `reference`."""
    found = _places(*queries.shape[:2], num_neighbors)
    on_threads(_search_clouds, _most_threads(points), queries.numpy(), points.numpy(), found)
    return torch.from_numpy(found)


def ball_query(
    queries: Tensor, points: Tensor, radius: float, num_neighbors: int, *, inclusive: bool
) -> Tensor:
    """Finds what lies in balls; see `reference`."""
    found = _places(*queries.shape[:2], num_neighbors)
    # One below the bits of the squared radius are those of the float before it.
    squared = torch.tensor(radius * radius, dtype=torch.float32)
    limit = int(squared.view(torch.int32)) - (not inclusive)

    def loop(queries: Floats, points: Floats, found: Places) -> None:
        _search_balls_of_clouds(queries, points, limit, found)

    on_threads(loop, _most_threads(points), queries.numpy(), points.numpy(), found)
    return torch.from_numpy(found)


def sample_and_search(
    points: Tensor, start: Tensor, num_samples: int, num_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Picks farthest points and finds their neighbours; the cloud is sorted once for both."""
    clouds = points.numpy()
    picked = _places(len(clouds), num_samples)
    picked[:, 0] = start.numpy()
    found = _places(len(clouds), num_samples, num_neighbors)
    on_threads(_group_clouds, _most_threads(points), clouds, picked, found)
    return torch.from_numpy(picked), torch.from_numpy(found)
