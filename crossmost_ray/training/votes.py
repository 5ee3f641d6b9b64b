"""What teacher and student say of each object, collected over an epoch's steps and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from crossmost_ray.config import Tower
from crossmost_ray.ops.distributed import (
    gather_on_first,
    most_of_workers,
    num_workers,
    worker_rank,
)
from crossmost_ray.schema import PseudoLabels

VOICES = ("image", "point", "student_image", "student_point")
"""Whose probabilities are collected: the teacher's two towers and the student's."""

VOTES_FOLDER = "votes"

STEPS_HELD = 32
"""Steps whose answers wait on their device: to fetch them each time would stop it each time."""

ROWS_AT_ONCE = 4096
"""Objects whose sums are divided at a time."""

SENT_BYTES = 1 << 26
"""Sums that a worker sends at a time."""

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float64]

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


class _Heap:
    """Sums over views, object by object, in the order in which objects first came.

    Grows in place: to add a step costs what the step holds, however many objects there are.

    Attributes:
        names: Ids of N objects.
        sums: (at least N, 4 C + 2) float64: probabilities by voice, stability, views.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums = np.zeros((0, 0))
        self._row: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ids(self) -> Ids:
        """(N,) hashes of the names."""
        return np.fromiter(self._row, np.int64, len(self))

    def add(self, ids: Ids, names: Sequence[str], rows: Rows) -> None:
        """Adds rows to the sums, one after the other, so that the result repeats itself to the bit.

        Args:
            ids: (n,) hashes of `names`; may repeat themselves.
            names: n ids.
            rows: (n, 4 C + 2).
        """
        for key, name in zip(ids.tolist(), names, strict=True):
            if self._row.setdefault(key, len(self.names)) == len(self.names):
                self.names.append(name)
        if len(self) > len(self.sums):
            # In place, as far as the system allows: a second copy of all sums may not fit.
            room = (max(len(self), len(self.sums) * 5 // 4), rows.shape[1])
            self.sums.resize(room, refcheck=False)
        places = np.fromiter(map(self._row.__getitem__, ids.tolist()), np.int64, len(ids))
        np.add.at(self.sums, places, rows)

    def part(self, number: int, parts: int) -> tuple[Ids, list[str], Rows]:
        """Gives ids, names and sums of one of so many parts, each of about as many objects."""
        ids = self.ids
        chosen = np.flatnonzero(ids % parts == number)
        return ids[chosen], [self.names[place] for place in chosen], self.sums[chosen]


def votes_name(epoch: int) -> str:
    """Names the file of an epoch's votes, below the run's folder."""
    return f"{VOTES_FOLDER}/epoch-{epoch:04d}.parquet"


def bytes_per_object(num_classes: int) -> int:
    """Gives what the sums of one object take, in memory and in a checkpoint within an epoch."""
    return 8 * (len(VOICES) * num_classes + 2)


class VoteBox:
    """Collects answers step by step."""

    def __init__(self) -> None:
        self._heap = _Heap()
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
        names = [name for part in self._waiting for name in part[1]]
        sums = torch.cat([part[2] for part in self._waiting]).cpu().numpy().astype(np.float64)
        self._waiting = []
        self._heap.add(ids, names, sums)

    def state_dict(self) -> dict[str, Any]:
        """Gives the sums of all workers on the first, and nothing on the others, for the first
        writes the checkpoint. Workers meet here: each of them has to call it."""
        whole = self._gathered()
        if not len(whole):
            return {}
        ids = whole.ids
        order = np.argsort(ids)
        return {
            "ids": torch.from_numpy(ids[order]),
            "names": [whole.names[place] for place in order],
            "sums": torch.from_numpy(whole.sums[order]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all workers' sums back, on the first worker: they are counted once."""
        self._heap, self._waiting = _Heap(), []
        if state and worker_rank() == 0:
            self._heap.add(state["ids"].numpy(), state["names"], state["sums"].numpy())

    def empty(self) -> Votes | None:
        """Counts all workers' votes, on the first of them, and starts anew. Workers meet here.

        Returns:
            None if there are no votes, and on all workers but the first: of many objects and
            classes, votes are too large to be held by everyone.
        """
        whole = self._gathered()
        self._heap = _Heap()
        if not len(whole):
            return None
        order = sorted(range(len(whole)), key=whole.names.__getitem__)
        means = torch.empty(len(whole), whole.sums.shape[1] - 1)
        # A few at a time: the sums are the largest thing in memory here.
        for first in range(0, len(order), ROWS_AT_ONCE):
            rows = whole.sums[order[first : first + ROWS_AT_ONCE]]
            means[first : first + ROWS_AT_ONCE] = torch.from_numpy(rows[:, :-1] / rows[:, -1:])
        parts = means[:, :-1].unflatten(1, (len(VOICES), -1)).unbind(dim=1)
        steady = means[:, -1]
        return Votes(
            names=tuple(whole.names[place] for place in order),
            prob=dict(zip(VOICES, parts, strict=True)),
            stability=None if (steady < 0).any() else steady,
        )

    def _gathered(self) -> _Heap:
        """Gives the first worker the sums of all, and the others none of them."""
        self._settle()
        if num_workers() == 1:
            return self._heap
        whole = _Heap()
        # Part by part: what is under way at a time is as small for many objects as for few. An
        # object is in one part on all workers, so that its sums are added in the workers' order.
        parts = round(most_of_workers(-(-self._heap.sums.nbytes // SENT_BYTES)))
        for number in range(parts):
            for ids, names, rows in gather_on_first(self._heap.part(number, parts)):
                if len(ids):
                    whole.add(ids, names, rows)
        return whole


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
