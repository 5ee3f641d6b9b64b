"""What teacher and student say of each object, collected over an epoch's steps and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from crossmost_ray.config import Tower
from crossmost_ray.ops.distributed import gather_objects, worker_rank
from crossmost_ray.schema import PseudoLabels

VOICES = ("image", "point", "student_image", "student_point")
"""Whose probabilities are collected: the teacher's two towers and the student's."""

VOTES_FOLDER = "votes"

STEPS_HELD = 32
"""Steps whose answers wait on their device: to fetch them each time would stop it each time."""

VOTES_SCHEMA = pa.schema(
    [
        pa.field("object_id", pa.string(), nullable=False),
        pa.field("image_class", pa.int16()),
        pa.field("image_confidence", pa.float32()),
        pa.field("point_class", pa.int16()),
        pa.field("point_confidence", pa.float32()),
        pa.field("image_label", pa.int16()),
        pa.field("image_selected", pa.bool_()),
        pa.field("point_label", pa.int16()),
        pa.field("point_selected", pa.bool_()),
        pa.field("label_confidence", pa.float32()),
        pa.field("student_image_class", pa.int16()),
        pa.field("student_point_class", pa.int16()),
    ]
)
"""Columns of `votes/epoch-*.parquet`: the teacher's answers, the labels that followed from them,
and the student's answers. Those of a tower that is not trained are null."""


@dataclass(frozen=True)
class Votes:
    """An epoch's answers about N objects, averaged over the views that each was seen by."""

    names: tuple[str, ...]
    """Ids of the objects, in ascending order."""
    prob: dict[str, Tensor]
    """For each of `VOICES`, (N, C) float32."""
    stability: Tensor | None
    """(N,) float32: how often two weak views of the object were given one class; None where the
    teacher sees one view only."""


@dataclass(frozen=True)
class _Heap:
    """Sums over views, object by object, in ascending order of the ids' hashes."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    names: tuple[str, ...]
    sums: np.ndarray[Any, np.dtype[np.float64]]
    """(N, 4 C + 2): probabilities by voice, stability, views."""


def votes_name(epoch: int) -> str:
    """Names the file of an epoch's votes, below the run's folder."""
    return f"{VOTES_FOLDER}/epoch-{epoch:04d}.parquet"


class VoteBox:
    """Collects answers step by step."""

    def __init__(self) -> None:
        self._heap: _Heap | None = None
        self._waiting: list[tuple[Tensor, tuple[str, ...], Tensor]] = []

    @torch.no_grad()
    def add(
        self,
        object_id: Tensor,
        names: tuple[str, ...],
        logits: dict[str, Tensor],
        stability: Tensor | None,
    ) -> None:
        """Counts the answers of one step.

        Args:
            object_id: (B,) int64, hashes of `names`.
            names: Of the B objects.
            logits: (B, C) for each of `VOICES`.
            stability: (B,) 1 where two weak views were given one class, else 0; None without two.
        """
        prob = torch.cat([logits[voice].detach().float().softmax(dim=-1) for voice in VOICES], 1)
        seen = torch.ones_like(prob[:, :1])
        steady = -seen if stability is None else stability.float()[:, None]
        self._waiting.append((object_id, names, torch.cat([prob, steady, seen], dim=1)))
        if len(self._waiting) >= STEPS_HELD:
            self._settle()

    def _settle(self) -> None:
        """Adds what waits to the sums."""
        if not self._waiting:
            return
        ids = torch.cat([part[0] for part in self._waiting]).cpu().numpy()
        names = tuple(name for part in self._waiting for name in part[1])
        sums = torch.cat([part[2] for part in self._waiting]).cpu().numpy().astype(np.float64)
        self._waiting = []
        heaps = [_Heap(ids, names, sums)]
        self._heap = _merge(heaps if self._heap is None else [self._heap, *heaps])

    def state_dict(self) -> dict[str, Any]:
        """Gives the sums of all workers. Workers meet here: each of them has to call it."""
        whole = self._gathered()
        if whole is None:
            return {}
        return {
            "ids": torch.from_numpy(whole.ids),
            "names": list(whole.names),
            "sums": torch.from_numpy(whole.sums),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all workers' sums back, on the first worker: they are counted once."""
        self._heap, self._waiting = None, []
        if state and worker_rank() == 0:
            self._heap = _Heap(
                state["ids"].numpy(), tuple(state["names"]), state["sums"].numpy().copy()
            )

    def empty(self) -> Votes | None:
        """Counts all workers' votes, and starts anew; None if there are none. Workers meet here."""
        whole = self._gathered()
        self._heap = None
        if whole is None:
            return None
        order = sorted(range(len(whole.names)), key=whole.names.__getitem__)
        means = torch.from_numpy((whole.sums[:, :-1] / whole.sums[:, -1:])[order]).float()
        parts = means[:, :-1].unflatten(1, (len(VOICES), -1)).unbind(dim=1)
        steady = means[:, -1]
        return Votes(
            names=tuple(whole.names[place] for place in order),
            prob=dict(zip(VOICES, parts, strict=True)),
            stability=None if (steady < 0).any() else steady,
        )

    def _gathered(self) -> _Heap | None:
        self._settle()
        parts = [part for part in gather_objects(self._heap) if part is not None]
        return _merge(parts) if parts else None


def _merge(heaps: Sequence[_Heap]) -> _Heap:
    """Adds sums up, in the order of the heaps, so that the result repeats itself to the bit."""
    ids, first, place = np.unique(
        np.concatenate([heap.ids for heap in heaps]), return_index=True, return_inverse=True
    )
    names = [name for heap in heaps for name in heap.names]
    rows = np.concatenate([heap.sums for heap in heaps])
    sums = np.zeros((len(ids), rows.shape[1]))
    np.add.at(sums, place, rows)
    return _Heap(ids, tuple(names[k] for k in first), sums)


@dataclass(frozen=True)
class Memory:
    """What an epoch's votes came to, object by object, for the epoch after it."""

    names: tuple[str, ...]
    """Ids of N objects, in ascending order."""
    opinion: Tensor
    """(N,) int64 class of the towers' mean answer."""
    targets: dict[str, Tensor]
    """(N,) int64 class of the label that each tower learned."""

    def of(self, names: Sequence[str]) -> Memory:
        """Gives the same of other objects; -1 for those that are not remembered."""
        place = {name: k for k, name in enumerate(self.names)}
        # One more place, that of the unknown.
        chosen = torch.tensor([place.get(name, -1) for name in names])

        def take(values: Tensor) -> Tensor:
            return torch.cat([values, values.new_tensor([-1])])[chosen]

        targets = {tower: take(values) for tower, values in self.targets.items()}
        return Memory(tuple(names), take(self.opinion), targets)

    def state_dict(self) -> dict[str, Any]:
        """Gives tensors and plain values."""
        return {"names": list(self.names), "opinion": self.opinion, "targets": self.targets}

    @classmethod
    def load(cls, state: dict[str, Any]) -> Memory:
        """Takes back what `state_dict` gave."""
        return cls(tuple(state["names"]), state["opinion"], dict(state["targets"]))


def votes_table(votes: Votes, labels: dict[Tower, PseudoLabels]) -> pa.Table:
    """Lists an epoch's votes, a row for each object.

    Args:
        votes: What was said.
        labels: What each trained tower was to learn from it.
    """

    def column(values: Tensor | None, kind: pa.DataType) -> pa.Array:
        if values is None:
            return pa.nulls(len(votes.names), kind)
        return pa.array(values.cpu().numpy()).cast(kind)

    columns: dict[str, pa.Array] = {"object_id": pa.array(votes.names, pa.string())}
    sure = [label.confidence for label in labels.values()]
    for tower in ("image", "point"):
        confidence, best = votes.prob[tower].max(dim=-1)
        label = labels.get(tower)
        columns[f"{tower}_class"] = column(best, pa.int16())
        columns[f"{tower}_confidence"] = column(confidence, pa.float32())
        columns[f"{tower}_label"] = column(label and label.target, pa.int16())
        columns[f"{tower}_selected"] = column(label and label.selected, pa.bool_())
        student = votes.prob[f"student_{tower}"].argmax(dim=-1) if label else None
        columns[f"student_{tower}_class"] = column(student, pa.int16())
    columns["label_confidence"] = column(torch.stack(sure).amax(dim=0), pa.float32())
    return pa.table([columns[name] for name in VOTES_SCHEMA.names], schema=VOTES_SCHEMA)
