"""Compiled loops against the tensor operations that other devices take, on fresh random inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossmost_ray.config import ImageAugmentConfig, PointAugmentConfig
from crossmost_ray.data import augment, loops
from crossmost_ray.data.augment import FILL
from tests.data.test_augment import clouds, images, rng, seeds

COORDINATES = 1e-4
"""Places are rounded otherwise, by some 1e-5 of a pixel; neighbours differ by up to 1."""


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def noise(seed: int, batch: int, size: int) -> Tensor:
    """Neighbouring pixels have nothing to do with each other: a wrong place shows."""
    return torch.randint(0, 256, (batch, size, size, 3), generator=rng(seed)).byte()


@given(
    seed=seeds, size=st.integers(1, 40), side=st.integers(1, 40), spread=st.sampled_from([0.2, 1.5])
)
def test_crops_are_the_references(seed: int, size: int, side: int, spread: float) -> None:
    last = noise(seed, 3, side).permute(0, 3, 1, 2)
    matrix = torch.zeros(3, 2, 3)
    # Mirrored, enlarged, and partly or wholly outside.
    matrix[:, 0, 0], matrix[:, 1, 1] = torch.randn(2, 3, generator=rng(seed)) * spread
    matrix[:, :, 2] = torch.randn(3, 2, generator=rng(seed + 1)) * spread
    expected = augment._warp(last, matrix, size)
    for views in (last, last.contiguous(), last.float() / 255):
        found = loops.crop_images(views, matrix, size, FILL)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=COORDINATES, rtol=0)


@given(seed=seeds, side=st.integers(1, 40), spread=st.sampled_from([0.05, 0.5, 2.0]))
def test_warps_are_the_references(seed: int, side: int, spread: float) -> None:
    views = noise(seed, 3, side).permute(0, 3, 1, 2).float() / 255
    matrix = torch.eye(2, 3) + torch.randn(3, 2, 3, generator=rng(seed)) * spread
    found = loops.warp_images(views, matrix, FILL)
    torch.testing.assert_close(found, augment._warp(views, matrix, side), atol=COORDINATES, rtol=0)


@given(seed=seeds, side=st.integers(1, 40), dark=st.floats(0, 1))
def test_equalised_values_are_the_references(seed: int, side: int, dark: float) -> None:
    views = torch.rand(3, 3, side, side, generator=rng(seed)) * dark
    assert torch.equal(loops.equalize_channels(views), augment._rank_values(views))


@given(
    seed=seeds,
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted),
    repeats=st.integers(1, 3),
    values=st.sampled_from([4, 2**12, 2**24]),
)
def test_points_are_taken_by_their_noise_and_equal_ones_in_order(
    seed: int, sizes: list[int], repeats: int, values: int
) -> None:
    number, num_points = sizes
    points = clouds(seed, batch=2, num_points=num_points)
    draws = torch.randint(0, values, (2 * repeats, num_points), generator=rng(seed)) / values
    order = draws.argsort(dim=1, descending=True, stable=True)[:, :number]
    expected = points.repeat_interleave(repeats, dim=0).gather(
        1, order[..., None].expand(-1, -1, 3)
    )
    assert torch.equal(loops.take_points(points, draws, number), expected)


@given(seed=seeds, num_points=st.integers(1, 300), jitter=st.floats(0, 0.1))
def test_clouds_are_roughened_as_by_the_reference(
    seed: int, num_points: int, jitter: float
) -> None:
    points = clouds(seed, num_points=num_points)
    generator = rng(seed)
    arguments = (
        torch.randn(4, 3, 3, generator=generator),
        torch.rand(4, 1, 3, generator=generator) - 0.5,
        torch.randn(4, num_points, 3, generator=generator) * 3,  # some are cut
        jitter,
        torch.rand(4, num_points, generator=generator),
        torch.rand(4, 1, generator=generator),
    )
    expected = augment._roughen_points(points, *arguments)
    torch.testing.assert_close(loops.roughen_points(points, *arguments), expected)


def pair(seed: int, batch: int = 40) -> tuple[Tensor, ...]:
    """Everything that is done to a batch."""
    image, point, generator = ImageAugmentConfig(rand_chance=1.0), PointAugmentConfig(), rng(seed)
    views = (images(seed, batch, 36) * 255).byte()
    sampled = augment.sample_points(clouds(seed, batch), 30, generator, repeats=2)
    return (
        augment.weak_images(views, 24, image, generator),
        augment.strong_images(views, 24, image, generator),
        augment.weak_points(sampled, point, generator),
        augment.strong_points(sampled, point, generator),
    )


@pytest.fixture
def no_loops(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the way of other devices, on the CPU."""
    return lambda: monkeypatch.setattr(augment, "_has_loops", lambda device: False)


def test_any_number_of_threads_gives_the_same(num_threads: Callable[[int], None]) -> None:
    num_threads(1)
    alone = pair(5)
    for number in (2, 3, 7):
        num_threads(number)
        for one, other in zip(alone, pair(5), strict=True):
            assert torch.equal(one, other)


def test_both_ways_draw_the_same_and_do_the_same(no_loops: Callable[[], None]) -> None:
    ours = pair(6)
    no_loops()
    weak, strong, weak_cloud, strong_cloud = pair(6)
    torch.testing.assert_close(ours[0], weak, atol=COORDINATES, rtol=0)
    torch.testing.assert_close(ours[2], weak_cloud)
    torch.testing.assert_close(ours[3], strong_cloud)
    # Two operations on each: a value at the edge of a step, or of a rank, may fall on either side.
    near = (ours[1] - strong).abs() < 1e-3
    assert near.float().mean() > 0.999
    assert near.flatten(1).float().mean(dim=1).min() > 0.95


def test_changing_all_images_and_keeping_some_is_changing_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changed() -> Tensor:
        return augment.rand_augment(
            images(7, 60), num_ops=3, magnitude=9, chance=0.7, generator=rng(7)
        )

    some = changed()
    monkeypatch.setattr(augment, "_replace_rows", augment._replace_where)
    assert torch.equal(some, changed())


class _Asked(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        indices = args[1] if func.overloadpacket.__name__.startswith("index") else ()
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool]
        assert not masks, "a mask as an index is counted first"
        return func(*args, **(kwargs or {}))


WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "unique", "_unique2", "lift_fresh"}
"""For what a GPU has queued; the last is how numbers of the host become a tensor."""


def test_another_device_is_never_waited_for(no_loops: Callable[[], None]) -> None:
    no_loops()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

    def everything() -> None:
        weak, strong, *_ = pair(8)
        for views in (weak, strong):
            augment.normalize_images(views, mean, std)

    everything()  # constants lie on the device from then on
    with _Asked() as asked:
        everything()
    assert {"grid_sampler_2d", "topk", "bmm"} <= asked.names
    assert not asked.names & WAITS


# The distributions of RandAugment, as `rand-m9-mstd0.5-inc1` names them.


def test_operations_are_drawn_evenly_and_their_strength_is_normal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, list[Tensor]] = {}

    def note(place: int) -> augment.ImageOp:
        def operation(pixels: Tensor, level: Tensor, sign: Tensor) -> Tensor:
            seen.setdefault(place, []).append(torch.stack([level, sign]))
            return pixels

        return operation

    number = 30_000
    monkeypatch.setattr(augment, "IMAGE_OPS", tuple(note(place) for place in range(15)))
    pixels = torch.zeros(number, 3, 1, 1)
    augment.rand_augment(pixels, num_ops=2, magnitude=9, chance=0.5, generator=rng(9))
    drawn = {place: torch.cat(parts, dim=1) for place, parts in seen.items()}
    # Of 60,000 draws half are applied: 2,000 of each, of deviation 44.
    assert len(drawn) == 15
    assert all(abs(found.shape[1] - 2000) < 200 for found in drawn.values())
    level, sign = torch.cat(list(drawn.values()), dim=1)
    # N(9, 0.5), of 10, cut at 10: two deviations above the mean. By the closed form of a normal cut
    # from above, the mean loses 0.5 (phi(2) - 2 (1 - Phi(2))) = 0.00425.
    lost = 0.5 * (math.exp(-2) / math.sqrt(2 * math.pi) - 2 * 0.0227501)
    assert level.mean().item() == pytest.approx((9 - lost) / 10, abs=0.0015)
    assert level.median().item() == pytest.approx(0.9, abs=0.002)
    assert (level == 1).float().mean().item() == pytest.approx(0.02275, abs=0.004)
    assert sign.mean().abs() < 0.03
    assert set(sign.tolist()) == {-1.0, 1.0}


def test_sides_of_strong_crops_have_a_log_uniform_ratio() -> None:
    line = (torch.arange(64) + 0.5) / 64
    x, y = line.expand(64, 64), line[:, None].expand(64, 64)
    image = torch.stack([x, y, x])[None].expand(3000, 3, 64, 64)
    found = augment.random_crop(image, 8, scale=0.3, aspect=4 / 3, flip=0.0, generator=rng(10))
    width = (found[:, 0, 4, 5] - found[:, 0, 4, 2]) * 8 / 3
    height = (found[:, 1, 5, 4] - found[:, 1, 2, 4]) * 8 / 3
    whole = (width < 0.99) & (height < 0.99)  # the others are cut to the image
    ratio = (width / height)[whole].log()
    assert ratio.abs().max() < math.log(4 / 3) + 0.02
    # Where no side can be cut, the area is below 3/4: there it is uniform, and so is the logarithm.
    small = ((width * height) < 0.74)[whole]
    assert ratio[small].mean().abs() < 0.02
    expected = 2 * math.log(4 / 3) / math.sqrt(12)
    assert ratio[small].std().item() == pytest.approx(expected, rel=0.05)
    area = (width * height)[whole][small]
    assert area.mean().item() == pytest.approx((0.3 + 0.74) / 2, abs=0.015)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for() -> None:
    device = torch.device("cuda")
    views = torch.zeros(9, 3, 36, 36, dtype=torch.uint8, device=device)
    points = torch.rand(9, 40, 3, device=device)

    def everything() -> None:
        generator, image = torch.Generator(device).manual_seed(1), ImageAugmentConfig()
        augment.weak_images(views, 24, image, generator)
        strong = augment.strong_images(views, 24, image, generator)
        augment.normalize_images_(strong, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        sampled = augment.sample_points(points, 30, generator, repeats=2)
        augment.weak_points(sampled, PointAugmentConfig(), generator)
        augment.strong_points(sampled, PointAugmentConfig(), generator)

    everything()  # constants lie on the device from then on
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
