"""Votes: averaged over views, the same however they come in, and kept across a stop."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.schema import PseudoLabels
from crossmost_ray.training import votes as votes_module
from crossmost_ray.training.votes import (
    STEPS_HELD,
    VOICES,
    VOTES_SCHEMA,
    Memory,
    VoteBox,
    Votes,
    votes_name,
    votes_table,
)

C = 3


def logits_of(num: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {voice: 3 * torch.randn(num, C, generator=generator) for voice in VOICES}


def fill(box: VoteBox, steps: range, *, stable: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Casts votes about eight objects, four in each step; gives what was said of each."""
    said: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        places = [(3 * step + k) % 8 for k in range(4)]
        logits = logits_of(4, step)
        same = torch.tensor([(step + k) % 2 == 0 for k in range(4)])
        names = tuple(f"object-{place}" for place in places)
        # The hashes are not in the order of the names.
        box.add(
            torch.tensor([(5 * p) % 8 for p in places]), names, logits, same if stable else None
        )
        for k, name in enumerate(names):
            row = {voice: logits[voice][k].softmax(dim=-1) for voice in VOICES}
            said.setdefault(name, []).append(row | {"stable": float(same[k])})
    return said


def test_votes_are_means_over_all_that_was_said_of_an_object() -> None:
    box = VoteBox()
    # More steps than wait on the device, and not a multiple of them.
    said = fill(box, range(2 * STEPS_HELD + 3))
    votes = box.empty()
    assert votes is not None
    assert votes.names == tuple(sorted(said)) == tuple(f"object-{k}" for k in range(8))
    assert votes.stability is not None
    for place, name in enumerate(votes.names):
        for voice in VOICES:
            mean = torch.stack([row[voice] for row in said[name]]).double().mean(dim=0)
            assert torch.allclose(votes.prob[voice][place].double(), mean, atol=1e-6)
        stable = sum(row["stable"] for row in said[name]) / len(said[name])
        assert votes.stability[place].item() == pytest.approx(stable)
    assert box.empty() is None


def test_one_view_is_not_stable_or_unstable() -> None:
    box = VoteBox()
    fill(box, range(3), stable=False)
    votes = box.empty()
    assert votes is not None
    assert votes.stability is None


@given(stop=st.integers(min_value=0, max_value=70))
def test_going_on_after_a_stop_equals_not_stopping(stop: int) -> None:
    whole, begun, resumed = VoteBox(), VoteBox(), VoteBox()
    fill(whole, range(70))
    fill(begun, range(stop))
    stored = io.BytesIO()
    torch.save(begun.state_dict(), stored)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    # To save is not to forget.
    fill(begun, range(stop, 70))
    fill(resumed, range(stop, 70))
    expected = whole.empty()
    assert expected is not None
    for box in (begun, resumed):
        votes = box.empty()
        assert votes is not None
        assert votes.names == expected.names
        assert all(torch.equal(votes.prob[voice], expected.prob[voice]) for voice in VOICES)


def test_the_table_has_a_row_for_each_object_and_nulls_for_a_tower_that_is_not_trained() -> None:
    prob = {voice: torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]]) for voice in VOICES}
    votes = Votes(("a", "b"), prob, None)
    label = PseudoLabels(
        torch.tensor([1, 2]), torch.tensor([0.9, 0.3]), torch.tensor([True, False])
    )
    table = votes_table(votes, {"image": label})
    assert table.schema == VOTES_SCHEMA
    assert table.to_pylist()[0] == {
        "object_id": "a",
        "image_class": 1,
        "image_confidence": pytest.approx(0.7),
        "point_class": 1,
        "point_confidence": pytest.approx(0.7),
        "image_label": 1,
        "image_selected": True,
        "point_label": None,
        "point_selected": None,
        "label_confidence": pytest.approx(0.9),
        "student_image_class": 1,
        "student_point_class": None,
    }
    both = votes_table(
        votes, {"image": label, "point": label._replace(target=torch.tensor([0, 0]))}
    )
    assert both["point_label"].to_pylist() == [0, 0]
    assert both["image_selected"].to_pylist() == [True, False]


def test_files_sort_as_epochs_do() -> None:
    assert sorted(votes_name(epoch) for epoch in (10, 2, 0)) == [
        "votes/epoch-0000.parquet",
        "votes/epoch-0002.parquet",
        "votes/epoch-0010.parquet",
    ]


def test_what_is_remembered_follows_the_object_not_its_place() -> None:
    memory = Memory(("a", "b", "d"), torch.tensor([4, 5, 6]), {"image": torch.tensor([1, 2, 3])})
    known = Memory.load(memory.state_dict()).of(("d", "c", "a"))
    assert known.opinion.tolist() == [6, -1, 4]
    assert known.targets["image"].tolist() == [3, -1, 1]


@given(seed=st.integers(0, 10_000), objects=st.integers(1, 40), views=st.integers(1, 6))
def test_sums_grow_with_the_objects_and_equal_plain_addition(
    seed: int, objects: int, views: int
) -> None:
    rng = np.random.default_rng(seed)
    # Hashes of any size, and objects that come again in the same step.
    hashes = rng.permutation(2**62 - 1 - np.arange(objects))
    places = rng.integers(0, objects, objects * views)
    logits = {voice: torch.randn(len(places), C) for voice in VOICES}
    box = VoteBox()
    for cut in np.array_split(np.arange(len(places)), 2 * STEPS_HELD + 1):
        names = tuple(f"object-{k}" for k in places[cut])
        said = {voice: logits[voice][cut] for voice in VOICES}
        box.add(torch.from_numpy(hashes[places[cut]]), names, said, None)
    found = box.state_dict()
    prob = torch.cat([logits[voice].softmax(dim=-1) for voice in VOICES], 1).double()
    for key, name, row in zip(found["ids"], found["names"], found["sums"], strict=True):
        place = int(name.removeprefix("object-"))
        assert hashes[place] == key
        expected = torch.zeros(4 * C, dtype=torch.float64)
        for k in np.flatnonzero(places == place):
            expected += prob[k]
        assert torch.equal(row[:-2], expected)
        assert row[-1] == (places == place).sum()
    assert found["ids"].tolist() == sorted(hashes[np.unique(places)].tolist())


WORKERS = 3


def cast(rank: int) -> VoteBox:
    """The votes of one of three workers: some objects are seen by one, by two, or by all."""
    box = VoteBox()
    fill(box, range(40 * rank, 40 * rank + 40 - 35 * (rank == 2)))
    return box


def gather(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS
    )
    votes_module.SENT_BYTES = 200  # so that a worker sends in several parts
    box = cast(rank)
    state = box.state_dict()
    resumed = VoteBox()
    resumed.load_state_dict(state)
    found = [box.empty() for box in (box, resumed)]
    said = [
        None if votes is None else (votes.names, votes.prob, votes.stability) for votes in found
    ]
    torch.save({"state": state, "said": said}, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


def test_the_first_worker_gets_all_votes_in_the_order_of_the_workers(tmp_path: Path) -> None:
    mp.spawn(gather, args=(str(tmp_path),), nprocs=WORKERS)
    first, *others = (
        torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(WORKERS)
    )
    assert all(one == {"state": {}, "said": [None, None]} for one in others)
    parts = [cast(rank).state_dict() for rank in range(WORKERS)]
    state, expected = first["state"], {}
    for part in parts:
        for name, row in zip(part["names"], part["sums"], strict=True):
            expected[name] = expected[name] + row if name in expected else row
    assert state["ids"].tolist() == sorted(state["ids"].tolist())
    assert set(state["names"]) == set(expected)
    for name, row in zip(state["names"], state["sums"], strict=True):
        assert torch.equal(row, expected[name])
    for names, prob, stability in first["said"]:
        assert names == tuple(sorted(expected))
        sums = torch.stack([expected[name] for name in names])
        means = (sums[:, :-1] / sums[:, -1:]).float()
        assert torch.equal(torch.cat([prob[voice] for voice in VOICES], dim=1), means[:, :-1])
        assert torch.equal(stability, means[:, -1])
