"""Point kernels against the reference: the same indices, to the last, on clouds of all kinds."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.config import ConfigError
from crossmost_ray.ops import compiled, kernels
from crossmost_ray.ops.kernels import cpu, reference
from crossmost_ray.ops.points import (
    ball_query,
    farthest_point_sample,
    gather,
    group_points,
    nearest_neighbors,
)

seeds = st.integers(0, 2**31 - 1)
KINDS = ["ball", "sphere", "grid", "line", "repeated", "same", "far", "endless", "tiny", "flat"]


def cloud(kind: str, num_points: int, seed: int, batch: int = 2) -> Tensor:
    """Clouds that are easy to get wrong: ties, empty extents, numbers near the ends of float32."""
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, num_points, 3, generator=rng)
    match kind:
        case "sphere":
            return points / points.norm(dim=-1, keepdim=True)
        case "grid":
            return points.round()
        case "line":
            return points[..., :1] * torch.tensor([1.0, -2.0, 0.5])
        case "repeated":
            # As random dropout leaves them: most are copies of the first.
            kept = torch.rand(batch, num_points, 1, generator=rng) < 0.3
            return torch.where(kept, points, points[:, :1])
        case "same":
            return points[:, :1].expand(-1, num_points, -1).contiguous()
        case "far":
            return points * 1e15 + 1e16
        case "endless":
            # Squares that overflow: all distances but those to oneself are infinite, and tie.
            return points * 1e25
        case "tiny":
            # Squares that vanish in float32.
            return points * 1e-23
        case "flat":
            return points * torch.tensor([1.0, 0.0, 1e-6])
        case _:
            return points


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of clouds, queries (some of them points of the clouds) and starts."""
    kind, seed = draw(st.sampled_from(KINDS)), draw(seeds)
    num_points = draw(st.integers(1, 300))
    points = cloud(kind, num_points, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    among = gather(points, torch.randint(num_points, (2, 5), generator=rng))
    queries = torch.cat([among, cloud(kind, 4, seed + 2)], dim=1)
    return points, queries, torch.randint(num_points, (2,), generator=rng)


@given(case=cases(), share=st.floats(0, 1))
def test_compiled_loops_sample_what_the_reference_samples(
    case: tuple[Tensor, Tensor, Tensor], share: float
) -> None:
    points, _, start = case
    num_samples = max(1, round(share * points.shape[1]))
    expected = reference.farthest_point_sample(points, start, num_samples)
    assert torch.equal(cpu.farthest_point_sample(points, start, num_samples), expected)


@given(case=cases(), share=st.floats(0, 1))
def test_compiled_loops_find_the_references_neighbours(
    case: tuple[Tensor, Tensor, Tensor], share: float
) -> None:
    points, queries, _ = case
    number = max(1, round(share * points.shape[1]))
    expected = reference.nearest_neighbors(queries, points, number)
    assert torch.equal(cpu.nearest_neighbors(queries, points, number), expected)


@given(
    case=cases(),
    radius=st.sampled_from([1e-30, 1e-23, 0.1, 0.5, 1.0, 2.0, 1e16, 1e30]),
    number=st.integers(1, 200),
    inclusive=st.booleans(),
)
def test_compiled_loops_fill_the_references_balls(
    case: tuple[Tensor, Tensor, Tensor], radius: float, number: int, inclusive: bool
) -> None:
    points, queries, _ = case
    arguments = (queries, points, radius, number)
    expected = reference.ball_query(*arguments, inclusive=inclusive)
    assert torch.equal(cpu.ball_query(*arguments, inclusive=inclusive), expected)


@given(case=cases(), num_samples=st.integers(1, 300), number=st.integers(1, 40))
def test_compiled_loops_group_as_the_reference_does(
    case: tuple[Tensor, Tensor, Tensor], num_samples: int, number: int
) -> None:
    points, _, start = case
    num_samples, number = (min(n, points.shape[1]) for n in (num_samples, number))
    ours = cpu.sample_and_search(points, start, num_samples, number)
    theirs = reference.sample_and_search(points, start, num_samples, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["ball", "sphere", "grid", "repeated"])
def test_large_clouds_agree_too(kind: str) -> None:
    points = cloud(kind, 5000, seed=3)
    picked, near = cpu.sample_and_search(points, torch.tensor([17, 4999]), 700, 33)
    expected = reference.sample_and_search(points, torch.tensor([17, 4999]), 700, 33)
    assert torch.equal(picked, expected[0])
    assert torch.equal(near, expected[1])
    samples = gather(points, picked)
    for radius, inclusive in ((0.1, True), (1.0, False)):
        ours = cpu.ball_query(samples, points, radius, 40, inclusive=inclusive)
        theirs = reference.ball_query(samples, points, radius, 40, inclusive=inclusive)
        assert torch.equal(ours, theirs)


def test_equally_near_points_come_by_their_index() -> None:
    # Of a query at 0: distances 4, 1, 1, 0, 4, 1.
    line = torch.tensor([2.0, -1.0, 1.0, 0.0, -2.0, 1.0])
    points = torch.stack([line, torch.zeros(6), torch.zeros(6)], dim=1)[None]
    found = nearest_neighbors(torch.zeros(1, 1, 3), points, 6)
    assert found.tolist() == [[[3, 1, 2, 5, 0, 4]]]


@pytest.mark.parametrize("at_once", [1, 50])
def test_the_reference_does_not_depend_on_how_much_it_holds(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, queries = cloud("grid", 60, 0), cloud("grid", 7, 1)
    whole = reference.nearest_neighbors(queries, points, 9)
    monkeypatch.setattr(reference, "MAX_DISTANCES", at_once)
    assert torch.equal(reference.nearest_neighbors(queries, points, 9), whole)


def test_threads_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    points = cloud("sphere", 200, seed=1, batch=7)
    expected = reference.sample_and_search(points, torch.arange(7), 20, 9)
    balls = reference.ball_query(points, points, 0.5, 9, inclusive=False)
    used: list[int] = []

    class Pool(compiled.ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            used.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(compiled, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(cpu, "WORK_OF_A_THREAD", 1)
    monkeypatch.setattr(compiled.torch, "get_num_threads", lambda: 3)
    ours = cpu.sample_and_search(points, torch.arange(7), 20, 9)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(cpu.ball_query(points, points, 0.5, 9, inclusive=False), balls)
    assert used == [3, 3]
    assert cpu.nearest_neighbors(points[:0], points[:0], 9).shape == (0, 200, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_points_are_measured_in_float32(dtype: torch.dtype) -> None:
    points = cloud("sphere", 150, seed=5).to(dtype)
    rounded = points.float()
    assert torch.equal(farthest_point_sample(points, 9), farthest_point_sample(rounded, 9))
    near = nearest_neighbors(points[:, :4], points, 9)
    assert torch.equal(near, nearest_neighbors(rounded[:, :4], rounded, 9))
    patches, centers = group_points(points, 5, 6)
    assert patches.dtype == centers.dtype == dtype


def test_points_may_lie_anyhow_in_memory() -> None:
    points = cloud("ball", 150, seed=6)
    scattered = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    for ours, theirs in zip(group_points(scattered, 9, 5), group_points(points, 9, 5), strict=True):
        assert torch.equal(ours, theirs)
    every_other = points[:, ::2]
    balls = ball_query(every_other, every_other, 0.5, 9, inclusive=True)
    solid = every_other.clone()
    assert torch.equal(balls, ball_query(solid, solid, 0.5, 9, inclusive=True))


def test_gradients_reach_the_points_through_patches_and_centres() -> None:
    points = cloud("ball", 40, seed=7).requires_grad_()
    patches, centers = group_points(points, 6, 5)
    weight = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    ((patches * weight).sum() + centers.sum()).backward()
    picked = farthest_point_sample(points, 6)
    near = nearest_neighbors(gather(points, picked), points, 5)
    expected = torch.zeros(2, 40, 3)
    for b in range(2):
        for g, center in enumerate(picked[b]):
            expected[b, center] += 1 - weight[b, g].sum(dim=0)
            for m, place in enumerate(near[b, g]):
                expected[b, place] += weight[b, g, m]
    torch.testing.assert_close(points.grad, expected)


ONE = torch.zeros(1, 8, 3)
BROKEN = ONE.clone()
BROKEN[0, 3, 1] = torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: farthest_point_sample(ONE, 0), "0 points can't be picked out of 8"),
        (lambda: group_points(ONE, 9, 2), "9 points can't be picked out of 8"),
        (lambda: group_points(ONE, 2, 9), "9 neighbours can't be found among 8 points"),
        (lambda: nearest_neighbors(ONE, ONE, 0), "0 neighbours can't be found among 8"),
        (lambda: nearest_neighbors(ONE, ONE[:, :0], 1), "points has shape .* there are no points"),
        (lambda: nearest_neighbors(ONE[0], ONE, 1), r"queries has shape \(8, 3\), expected"),
        (lambda: nearest_neighbors(ONE.expand(2, 8, 3), ONE, 1), "queries for 2 clouds on cpu"),
        (lambda: ball_query(ONE, ONE, 0.0, 1, inclusive=True), "a ball of radius 0.0"),
        (lambda: ball_query(ONE, ONE, -1.0, 1, inclusive=True), "expected both above 0"),
        (lambda: ball_query(ONE, ONE, float("nan"), 1, inclusive=True), "a ball of radius nan"),
        (lambda: ball_query(ONE, ONE, 1.0, 0, inclusive=True), "for 0 points"),
        (lambda: farthest_point_sample(BROKEN, 2), "points holds NaN or infinity"),
        (lambda: nearest_neighbors(BROKEN / 0, ONE, 2), "queries holds NaN or infinity"),
        (
            lambda: farthest_point_sample(ONE, 2, start=torch.tensor([8])),
            r"start is \[8\], expected points from 0 to 7",
        ),
        (lambda: farthest_point_sample(ONE, 2, start=torch.tensor([-1])), r"start is \[-1\]"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Which kernels ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "auto")


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_cuda"),
    [
        ("auto", "numba", "triton"),
        ("reference", "reference", "reference"),
        ("numba", "numba", "triton"),
        ("triton", "numba", "triton"),
        ("pointnet2", "numba", "pointnet2"),
    ],
)
def test_kernels_are_chosen_by_device(
    asked: Any, on_cpu: str, on_cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: True)
    kernels.use_kernels(asked)
    names = [kernels.kernel_name(torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert names == [on_cpu, on_cuda, "reference"]
    assert kernels.kernels_for(torch.device("mps")) is reference


def test_without_triton_the_reference_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: False)
    assert kernels.kernel_name(torch.device("cuda")) == "reference"


def test_kernels_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda package: False)
    with pytest.raises(ConfigError, match="no kernels 'cython'; choose auto, reference, numba"):
        kernels.use_kernels("cython")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'pointnet2' needs pointnet2_ops, which isn't installed"):
        kernels.use_kernels("pointnet2")
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ConfigError, match="CROSSMOST_POINT_KERNELS: there are no kernels 'fast'"):
        farthest_point_sample(ONE, 2)


def test_the_chosen_kernels_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(points: Tensor, start: Tensor, num_samples: int) -> Tensor:
        raise LookupError

    monkeypatch.setattr(cpu, "farthest_point_sample", none)
    with pytest.raises(LookupError):
        farthest_point_sample(ONE, 2)
    kernels.use_kernels("reference")
    assert farthest_point_sample(ONE, 2).tolist() == [[0, 0]]


def test_pointnet2_starts_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of the package, which needs a GPU: its signatures, by the reference.
    utils: Any = types.ModuleType("pointnet2_utils")
    utils.furthest_point_sample = lambda points, number: reference.farthest_point_sample(
        points, torch.zeros(len(points), dtype=torch.int64), number
    ).int()
    utils.ball_query = lambda radius, number, points, queries: reference.ball_query(
        queries, points, radius, number, inclusive=False
    ).int()
    package: Any = types.ModuleType("pointnet2_ops")
    package.pointnet2_utils = utils
    monkeypatch.setitem(sys.modules, "pointnet2_ops", package)
    from crossmost_ray.ops.kernels import pointnet2

    points, start = cloud("sphere", 90, seed=8), torch.tensor([41, 0])
    ours = pointnet2.sample_and_search(points, start, 12, 5)
    theirs = reference.sample_and_search(points, start, 12, 5)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)
    balls = pointnet2.ball_query(points, points, 0.4, 7, inclusive=False)
    assert torch.equal(balls, reference.ball_query(points, points, 0.4, 7, inclusive=False))


# Triton ----------------------------------------------------------------------------------------


INTERPRETED = """
import sys
import torch
from crossmost_ray.ops.kernels import cuda
cases = torch.load(sys.argv[1])
torch.save([getattr(cuda, name)(*values, **named) for name, values, named in cases], sys.argv[2])
"""


def test_triton_programs_agree_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    # Few and small: what a GPU does in a microsecond takes the interpreter a second.
    for kind, num_points in (("ball", 21), ("grid", 13)):
        points = cloud(kind, num_points, seed=9)
        queries, start = points[:, 2:3].contiguous(), torch.tensor([num_points - 1, 3])
        cases += [
            ("farthest_point_sample", (points, start, 6), {}),
            ("nearest_neighbors", (queries, points, 3), {}),
            ("ball_query", (queries, points, 1.0, 3), {"inclusive": kind == "grid"}),
            ("ball_query", (queries + 9, points, 1.0, 3), {"inclusive": True}),
            ("ball_query", (queries, points, 1.0, 11), {"inclusive": False}),
        ]
    torch.save(cases, tmp_path / "cases.pt")
    # In a process of its own: Triton decides when it is imported whether it interprets.
    subprocess.run(
        [sys.executable, "-c", INTERPRETED, tmp_path / "cases.pt", tmp_path / "found.pt"],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    found = torch.load(tmp_path / "found.pt")
    for (name, values, named), ours in zip(cases, found, strict=True):
        assert torch.equal(ours, getattr(reference, name)(*values, **named)), (name, named)


POINTER, NUMBER, PLACES = "*fp32", "i32", "*i64"
PROGRAMS = {
    "_sample": (
        [POINTER, PLACES, PLACES, NUMBER, NUMBER],
        {"BLOCK": 1024},
    ),
    "_search": (
        [POINTER, POINTER, PLACES, NUMBER, NUMBER, NUMBER],
        {"KEPT": 4, "BLOCK": 64},
    ),
    "_fill_ball": (
        [POINTER, POINTER, PLACES, NUMBER, NUMBER, NUMBER, "fp32"],
        {"INCLUSIVE": True, "SLOTS": 32, "BLOCK": 256},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_triton_programs_compile_for_a_gpu_that_is_not_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from crossmost_ray.ops.kernels import cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types_of_arguments, constants = PROGRAMS[name]
    program = getattr(cuda, name)
    names = program.arg_names
    signature = dict(zip(names, types_of_arguments, strict=False))
    source = ASTSource(
        program,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(key),): value for key, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=cuda.EXACT)
    code = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    # A product fused with a sum rounds once instead of twice, and ties break another way.
    assert re.search(r"\bmul(\.rn)?\.f32", code)
    assert not re.search(r"\bfma\.", code)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_points", [1, 33, 1000, 8192, 20_000])
def test_a_gpu_agrees(kind: str, num_points: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    points = cloud(kind, num_points, seed=10)
    queries, start = points[:, :7], torch.tensor([num_points - 1, 0])
    number = min(32, num_points)
    for call in (
        lambda x, q, s: farthest_point_sample(x, min(64, num_points), start=s),
        lambda x, q, s: nearest_neighbors(q, x, number),
        lambda x, q, s: ball_query(q, x, 0.3, 32, inclusive=True),
        lambda x, q, s: ball_query(q, x, 1.0, 32, inclusive=False),
    ):
        on_gpu = call(points.cuda(), queries.cuda(), start.cuda())
        assert torch.equal(on_gpu.cpu(), call(points, queries, start))
