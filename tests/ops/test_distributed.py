"""Collectives in two processes: the losses' gradients are those of one process with all rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossmost_ray.losses import alignment_loss, fairness_loss
from crossmost_ray.ops.distributed import (
    gather_from_workers,
    mean_over_workers,
    num_workers,
    worker_rank,
)
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.execution import exchange_options
from crossmost_ray.training.step import NonFiniteLossError, train_step

WORKERS = 2
ROWS = 6
NAMES = torch.tensor([3, 5, 3, 3, 8, 5])
"""Rows 0, 2 and 3 show one object: two on the first worker, one on the second."""


class Towers(nn.Module):
    """Two linear towers: enough for a loss that couples all rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.point = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, images: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=-1), F.normalize(self.point(points), dim=-1)


def rows() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=rng), torch.randn(ROWS, 3, generator=rng)


def fairness(image: Tensor, point: Tensor, names: Tensor) -> Tensor:
    return fairness_loss(mean_over_workers((8 * image).softmax(-1).mean(0))) + 0 * point.sum()


def alignment(image: Tensor, point: Tensor, names: Tensor) -> Tensor:
    return alignment_loss(
        image,
        point,
        gather_from_workers(image),
        gather_from_workers(point),
        torch.tensor(6.0),
        first=worker_rank() * len(image),
        groups=(names, gather_from_workers(names)),
    )


def local(image: Tensor, point: Tensor, names: Tensor) -> Tensor:
    """Knows of no other worker: shows that the comparison itself is right."""
    return (image * point).sum(-1).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fairness": fairness,
    "alignment": alignment,
    "local": local,
}


class OneTerm:
    """A task of one parameter, whose loss is what the worker is told."""

    def __init__(self, value: float) -> None:
        self.student = DistributedDataParallel(nn.Linear(1, 1, bias=False))
        self.weights = {"term": 1.0}
        self.value = value

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        return {"term": self.student(torch.ones(1, 1)).sum() * self.value}

    def diagnostics(self) -> dict[str, Tensor]:
        return {}

    def after_step(self, step: int) -> None: ...


def error_of_a_broken_step(rank: int) -> str:
    task: Any = OneTerm(float("nan") if rank == 1 else 1.0)
    batch = RawBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1), (), ("a",))
    try:
        train_step(
            task,
            torch.optim.SGD(task.student.parameters(), lr=1.0),
            batch,
            step=4,
            generator=torch.Generator(),
            clip_norm=1.0,
        )
    except NonFiniteLossError as error:
        return str(error)
    return "no error"


class Shares:
    """A task of one weight w, whose loss is w times the mean of the worker's numbers."""

    def __init__(self) -> None:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        self.student = DistributedDataParallel(layer, **exchange_options(2))
        self.weights = {"term": 1.0}

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        return {"term": self.student(batch.object_id.float()[:, None]).mean()}

    def diagnostics(self) -> dict[str, Tensor]:
        return {}

    def after_step(self, step: int) -> None: ...


def weights_of_steps_in_parts(rank: int) -> list[float]:
    """Takes three steps in two parts each, over numbers of this worker's own."""
    task: Any = Shares()
    optimizer = torch.optim.SGD(task.student.parameters(), lr=1.0)
    seen = []
    for step in range(3):
        numbers = torch.arange(4) + 10 * rank + step
        batch = RawBatch(numbers, numbers, numbers, (), tuple("abcd"))
        options = {"step": step, "generator": torch.Generator(), "clip_norm": 1e6}
        train_step(task, optimizer, batch, accumulate=2, **options)
        seen.append(task.student.module.weight.item())
    return seen


def worker(rank: int, folder: str) -> None:
    """What each of the two processes does; what it finds it leaves in a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS
    )
    images, points = rows()
    share = slice(rank * ROWS // WORKERS, (rank + 1) * ROWS // WORKERS)
    found: dict[str, Any] = {"rank": worker_rank(), "workers": num_workers()}
    for name, loss_of in LOSSES.items():
        towers = DistributedDataParallel(Towers())
        loss = loss_of(*towers(images[share], points[share]), NAMES[share])
        loss.backward()
        found[name] = {
            "loss": loss.detach(),
            "gradients": {key: p.grad for key, p in towers.module.named_parameters()},
        }
    found["gathered"] = gather_from_workers(images[share])
    found["mean"] = mean_over_workers(torch.tensor([1.0 + rank, 10.0 * rank]))
    found["error"] = error_of_a_broken_step(rank)
    found["parts"] = weights_of_steps_in_parts(rank)
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two workers found."""
    folder: Path = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, args=(str(folder),), nprocs=WORKERS)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_workers_find_the_gradient_of_one(found: list[dict[str, Any]], name: str) -> None:
    towers = Towers()
    loss = LOSSES[name](*towers(*rows()), NAMES)
    loss.backward()
    mean = torch.stack([worker[name]["loss"] for worker in found]).mean()
    torch.testing.assert_close(mean, loss.detach())
    for key, parameter in towers.named_parameters():
        if name != "fairness" or "image" in key:
            assert parameter.grad.abs().max() > 1e-3, "a gradient of zero would prove nothing"
        for worker in found:
            torch.testing.assert_close(worker[name]["gradients"][key], parameter.grad)


def test_rows_are_gathered_in_the_order_of_the_ranks(found: list[dict[str, Any]]) -> None:
    assert [worker["rank"] for worker in found] == [0, 1]
    for worker in found:
        assert worker["workers"] == 2
        assert torch.equal(worker["gathered"], rows()[0])


def test_the_mean_is_the_same_on_every_worker(found: list[dict[str, Any]]) -> None:
    for worker in found:
        assert worker["mean"].tolist() == [1.5, 5.0]


def test_a_loss_that_is_not_finite_stops_all_workers(found: list[dict[str, Any]]) -> None:
    healthy, broken = (worker["error"] for worker in found)
    assert broken.startswith("step 4: the loss is not finite (term on worker 1); ")
    assert healthy == broken


def test_one_worker_keeps_its_own() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    assert (num_workers(), worker_rank()) == (1, 0)
    for collective in (mean_over_workers, gather_from_workers):
        result = collective(tensor)
        assert torch.equal(result, tensor)
        (gradient,) = torch.autograd.grad(result.square().sum(), tensor)
        assert torch.equal(gradient, 2 * tensor)


def test_a_share_alone_gives_another_gradient() -> None:
    # What the comparison above would miss if the halves happened to agree with the whole.
    images, points = rows()
    towers = Towers()
    halves = []
    for share in (slice(0, 3), slice(3, 6)):
        part = copy.deepcopy(towers)
        alignment(*part(images[share], points[share]), NAMES[share]).backward()
        halves.append(part.image.weight.grad)
    alignment(*towers(images, points), NAMES).backward()
    assert not torch.allclose((halves[0] + halves[1]) / 2, towers.image.weight.grad, rtol=1e-2)


def test_steps_in_parts_exchange_their_gradients_once(found: list[dict[str, Any]]) -> None:
    # Means over both workers: 6.5, 7.5 and 8.5. Each step moves by its mean.
    assert found[0]["parts"] == found[1]["parts"] == pytest.approx([-6.5, -14.0, -22.5])
