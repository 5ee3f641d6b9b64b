"""One, two and four workers: the same eight pairs give the same gradients, and votes that some cast
are counted on by others."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossmost_ray.models.classifier import build_classifier
from crossmost_ray.schema import PairBatch, RawBatch
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.execution import exchange_options
from crossmost_ray.training.step import weighted_sum
from crossmost_ray.training.votes import VOICES, VoteBox, Votes
from tests.synthetic import CLASSES, adapt_config, fresh_model, raw_batch

PAIRS = 8
IDS = torch.tensor([1, 2, 1, 3, 4, 2, 5, 1])
"""Some objects come twice, on one worker or on two."""


def task_of(threshold: float, wrap: Any = lambda module: module) -> AdaptTask:
    config = adapt_config(
        pseudo_labels={"threshold": threshold, "point_weight": 1.0},
        weights={"entropy_image": 0.1, "entropy_point": 0.1, "agreement": 0.5},
    )
    model = fresh_model()
    for block in model.point.backbone.blocks.blocks:
        block.drop_path = 0.0  # drawn by each worker for itself
    classifier = build_classifier(model, list(CLASSES), config.data.templates)
    return AdaptTask(classifier, model.spec, config, wrap)


def whole_batch(task: AdaptTask) -> tuple[PairBatch, Tensor]:
    """Eight augmented pairs and the groups that are hidden, as one worker would draw them."""
    generator = torch.Generator().manual_seed(5)
    pairs = task.augment(raw_batch(PAIRS, captions=False, seed=3), generator)
    seen = task.bare_student.point.tokenize(pairs.points_strong)
    mask = task.bare_student.point.draw_mask(seen, (0.1, 0.6), generator)
    return pairs._replace(object_id=IDS), mask


def gradients(threshold: float, rank: int, num_workers: int) -> dict[str, Any]:
    """The loss and its gradients, of this worker's share of the eight pairs."""
    wrap: Any = partial(DistributedDataParallel, **exchange_options(1))
    task = task_of(threshold, wrap if num_workers > 1 else lambda module: module)
    pairs, mask = whole_batch(task)
    share = slice(rank * PAIRS // num_workers, (rank + 1) * PAIRS // num_workers)
    own, own_mask = PairBatch(*(part[share] for part in pairs)), mask[share]
    chosen = task.pseudo_labels(own, torch.Generator())["image"].selected.sum()

    def augment(batch: RawBatch, generator: torch.Generator) -> PairBatch:
        return own

    def draw_mask(seen: Any, ratio: Any, generator: Any) -> Tensor:
        return own_mask

    task.augment = augment  # type: ignore[method-assign]
    task.bare_student.point.draw_mask = draw_mask  # type: ignore[method-assign]
    terms = task.losses(raw_batch(1, captions=False), torch.Generator().manual_seed(0))
    total = weighted_sum(terms, task.weights)
    total.backward()
    bare: nn.Module = task.bare_student
    return {
        "chosen": int(chosen),
        "loss": total.detach(),
        "hidden": int(own_mask.sum()),
        "gradients": {n: p.grad for n, p in bare.named_parameters() if p.grad is not None},
    }


OBJECTS = 11
STEPS = 9
"""Of an epoch that one worker begins, several take over after a third, and one ends."""


def cast(box: VoteBox, steps: range, rank: int = 0, num_workers: int = 1) -> None:
    """Casts this worker's share of the votes of some steps."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(OBJECTS, (PAIRS,), generator=generator)
        stable = torch.rand(PAIRS, generator=generator) < 0.5
        logits = {voice: torch.randn(PAIRS, 3, generator=generator) for voice in VOICES}
        share = slice(rank * PAIRS // num_workers, (rank + 1) * PAIRS // num_workers)
        names = tuple(f"object-{place:02d}" for place in ids[share].tolist())
        said = {voice: values[share] for voice, values in logits.items()}
        box.add(ids[share], names, said, stable[share])


def cast_in_one_life(steps: range) -> VoteBox:
    box = VoteBox()
    cast(box, steps)
    return box


def take_over(rank: int, num_workers: int, begun: dict[str, Any]) -> dict[str, Any]:
    """Goes on with what one worker began; gives the checkpoint's part and the outcome."""
    box = VoteBox()
    box.load_state_dict(begun)
    cast(box, range(STEPS // 3, 2 * STEPS // 3), rank, num_workers)
    state, votes = box.state_dict(), box.empty()
    return {"state": state, "votes": votes and (votes.names, votes.prob, votes.stability)}


def worker(rank: int, num_workers: int, threshold: float, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers
    )
    found = gradients(threshold, rank, num_workers)
    begun = torch.load(f"{folder}/begun.pt", weights_only=True)
    torch.save(found | take_over(rank, num_workers, begun), f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def threshold() -> float:
    """Lets three of the eight objects through."""
    task = task_of(0.0)
    pairs, _ = whole_batch(task)
    sure = task.pseudo_labels(pairs, torch.Generator())["image"].confidence.sort().values
    return float((sure[-3] + sure[-4]) / 2)


def assert_same_votes(votes: Votes | None, expected: Votes | None) -> None:
    assert votes is not None
    assert expected is not None
    assert votes.names == expected.names
    torch.testing.assert_close(votes.prob, expected.prob)
    torch.testing.assert_close(votes.stability, expected.stability)


@pytest.fixture(scope="module", params=[2, 4])
def found(
    request: pytest.FixtureRequest, threshold: float, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What two or four workers found."""
    folder: Path = tmp_path_factory.mktemp("workers")
    torch.save(cast_in_one_life(range(STEPS // 3)).state_dict(), folder / "begun.pt")
    mp.spawn(worker, args=(request.param, threshold, str(folder)), nprocs=request.param)
    return [
        torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(request.param)
    ]


def test_votes_survive_a_change_of_the_number_of_workers(found: list[dict[str, Any]]) -> None:
    # The first worker writes the checkpoint.
    first = found[0]
    assert_same_votes(Votes(*first["votes"]), cast_in_one_life(range(2 * STEPS // 3)).empty())
    # One worker ends what the several had taken over.
    last = VoteBox()
    last.load_state_dict(first["state"])
    cast(last, range(2 * STEPS // 3, STEPS))
    assert_same_votes(last.empty(), cast_in_one_life(range(STEPS)).empty())


def test_workers_share_a_batch_without_changing_its_gradient(
    found: list[dict[str, Any]], threshold: float
) -> None:
    alone = gradients(threshold, 0, 1)
    assert alone["chosen"] == 3
    # Unequal shares: means of means would differ from the mean.
    assert len({share["chosen"] for share in found}) > 1
    assert len({share["hidden"] for share in found}) > 1
    loss = torch.stack([share["loss"] for share in found]).mean()
    torch.testing.assert_close(loss, alone["loss"], rtol=1e-5, atol=1e-6)
    for name, gradient in alone["gradients"].items():
        for share in found:
            torch.testing.assert_close(
                share["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name
            )


def epoch_of(task: AdaptTask, seeds: list[int]) -> dict[str, Any]:
    """Two epochs of answers without a step, and what is made of them."""
    for _ in range(2):
        for seed in seeds:
            batch = raw_batch(4, captions=False, seed=seed)
            task.losses(batch, torch.Generator().manual_seed(seed))
        end = task.finish_epoch()
    guard, state = task.guard.state_dict(), task.state_dict()
    return {
        "metrics": end.metrics,
        "votes": None if end.votes is None else end.votes.to_pylist(),
        "guard": [guard["history"], guard["ease"].tolist(), guard["best"], guard["since_best"]],
        "remembered": state["before"] is not None,
    }


def epoch_worker(rank: int, num_workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_workers
    )
    torch.save(epoch_of(task_of(0.0), [rank]), f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def test_an_epoch_is_judged_by_the_first_worker_and_the_others_follow(tmp_path: Path) -> None:
    mp.spawn(epoch_worker, args=(2, str(tmp_path)), nprocs=2)
    first, second = (
        torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert (second["metrics"], second["guard"]) == (first["metrics"], first["guard"])
    assert (len(first["votes"]), second["votes"]) == (8, None)
    assert (first["remembered"], second["remembered"]) == (True, False)
    # As one worker judges who has seen all of it.
    alone = epoch_of(task_of(0.0), [0, 1])
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=1e-5)
    assert [row["object_id"] for row in first["votes"]] == [
        row["object_id"] for row in alone["votes"]
    ]
