"""Files of votes in, what the teacher said of each object in each epoch out.

What joins votes with labels says `oracle` in its name: it is for reports, and for nothing else.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard.configs import lookup
from crossmost_ray.dashboard.files import fingerprint, problem
from crossmost_ray.dashboard.runs import Run
from crossmost_ray.data.shards import open_shard, shard_store
from crossmost_ray.storage import Store

TOWERS = ("image", "point")

Classes = npt.NDArray[np.int16]
"""(n,) numbers of classes; -1 where a tower says nothing."""

CLASS_COLUMNS = (
    *("image_class", "point_class", "image_label", "point_label"),
    *("student_image_class", "student_point_class"),
)
CONFIDENCE_COLUMNS = ("image_confidence", "point_confidence", "label_confidence")
FLAG_COLUMNS = ("image_selected", "point_selected")

UNREADABLE = (pa.ArrowException, OSError, KeyError)
"""What reading a damaged file of votes raises."""


@dataclass(frozen=True)
class Votes:
    """What was said of n objects in one epoch, in the order of their ids.

    Attributes:
        epoch: Which, from 0.
        object_id: n ids.
        image_class: The teacher's image tower's class.
        image_confidence: (n,) float32 probability of it; NaN where the tower says nothing.
        point_class: The point tower's.
        point_confidence: As `image_confidence`.
        image_label: Class that the student's image tower learned from.
        image_selected: (n,) bool, whether the object counted in its loss.
        point_label: As `image_label`, of the point tower; equal to it where the rule is joint.
        point_selected: As `image_selected`.
        label_confidence: (n,) float32 confidence of the label, as the rule weighs it.
        student_image_class: The student's image tower's class.
        student_point_class: The student's point tower's.
    """

    epoch: int
    object_id: pa.StringArray
    image_class: Classes
    image_confidence: npt.NDArray[np.float32]
    point_class: Classes
    point_confidence: npt.NDArray[np.float32]
    image_label: Classes
    image_selected: npt.NDArray[np.bool_]
    point_label: Classes
    point_selected: npt.NDArray[np.bool_]
    label_confidence: npt.NDArray[np.float32]
    student_image_class: Classes
    student_point_class: Classes

    def __len__(self) -> int:
        return len(self.object_id)

    @property
    def label(self) -> Classes:
        """The joint label; where a run has only one tower, or two rules, the first there is."""
        return np.where(self.image_label >= 0, self.image_label, self.point_label)

    @property
    def selected(self) -> npt.NDArray[np.bool_]:
        """Whether the object counted in the loss of any tower."""
        return self.image_selected | self.point_selected

    @property
    def disagree(self) -> npt.NDArray[np.bool_]:
        """Whether both towers vote, for different classes."""
        both = (self.image_class >= 0) & (self.point_class >= 0)
        return both & (self.image_class != self.point_class)

    def labels_of(self, tower: str) -> tuple[Classes, npt.NDArray[np.bool_]]:
        """Gives the labels that a tower learned from, and which of them counted."""
        if tower == "image":
            return self.image_label, self.image_selected
        return self.point_label, self.point_selected


def vote_epochs(run: Run) -> dict[int, str]:
    """Gives the name of the file of each epoch that has one."""
    found = {}
    for name in run.epoch_files:
        if said := re.fullmatch(r"epoch-(\d+)\.parquet", name):
            found[int(said[1])] = name
    return found


def read_votes(run: Run, epoch: int) -> pa.Table:
    """Reads the votes of one epoch, as the file holds them.

    Returns:
        One row per object, in the order of `object_id`; null where a tower says nothing.

    Raises:
        ConfigError: If the epoch has no votes, or they can't be read.
    """
    name = vote_epochs(run).get(epoch)
    if name is None:
        raise ConfigError(
            f"{run.name} has no votes of epoch {epoch}; an epoch's are there once it is finished"
        )
    path = posixpath.join(run.folder, "votes", name)
    try:
        with pq.ParquetFile(run.root.open_input(path)) as file:
            return file.read()
    except (pa.ArrowException, OSError) as broken:
        said = problem(posixpath.join(run.name, "votes", name), broken)
        raise ConfigError(f"{said}; remove it, and the epoch is left out") from None


def load_votes(run: Run, epoch: int) -> Votes | None:
    """Reads the votes of one epoch as arrays; None where there are none, or they can't be read.

    What can't be read is named in the run's `problems`.
    """
    name = vote_epochs(run).get(epoch)
    if name is None:
        return None
    file = _stamped(run, name)
    try:
        return _load(run.root, epoch, file)
    except UNREADABLE as broken:
        run.note_problem(problem(file[0], broken))
        return None


def _stamped(run: Run, name: str) -> tuple[str, str]:
    """Gives the path of a file of votes, and what tells one version of it from another."""
    path = posixpath.join(run.folder, "votes", name)
    return path, fingerprint(run.root, path, run.problems)


@functools.lru_cache(maxsize=4)
def _load(root: Store, epoch: int, file: tuple[str, str]) -> Votes:
    """Few are kept: of a hundred thousand objects each takes megabytes."""
    with pq.ParquetFile(root.open_input(file[0])) as parquet:
        table = parquet.read()
    columns: dict[str, Any] = {}
    for name in CLASS_COLUMNS:
        columns[name] = pc.fill_null(table[name], -1).to_numpy().astype(np.int16)
    for name in CONFIDENCE_COLUMNS:
        columns[name] = pc.fill_null(table[name], float("nan")).to_numpy().astype(np.float32)
    for name in FLAG_COLUMNS:
        columns[name] = pc.fill_null(table[name], False).to_numpy().astype(np.bool_)
    ids = table["object_id"].combine_chunks().cast(pa.string())
    return Votes(epoch=epoch, object_id=ids, **columns)


@dataclass(frozen=True)
class VoteCounts:
    """What is counted of the votes of one epoch, by tower that learned.

    Attributes:
        epoch: Which, from 0.
        objects: Objects voted on.
        labels: (C,) objects with each class as label, by tower.
        selected: (C,) those of them that counted in the tower's loss.
        flips: Share of objects, 0 to 1, whose joint label is another one than in the epoch before;
            None where that has no votes, or not of the same objects.
    """

    epoch: int
    objects: int
    labels: Mapping[str, npt.NDArray[np.int64]]
    selected: Mapping[str, npt.NDArray[np.int64]]
    flips: float | None


def count_votes(run: Run) -> tuple[VoteCounts, ...]:
    """Counts the votes of every epoch that has any; what can't be read is left out, and named."""
    counted = []
    files: dict[int, tuple[str, str]] = {}
    for epoch, name in vote_epochs(run).items():
        file = _stamped(run, name)
        try:
            counts = _count(run.root, epoch, file, files.get(epoch - 1), len(run.classes))
        except UNREADABLE as broken:
            run.note_problem(problem(file[0], broken))
            continue
        counted.append(counts)
        files[epoch] = file
    return tuple(counted)


@functools.lru_cache(maxsize=1024)
def _count(
    root: Store, epoch: int, file: tuple[str, str], before: tuple[str, str] | None, C: int
) -> VoteCounts:
    votes = _load(root, epoch, file)
    towers = [tower for tower in TOWERS if (votes.labels_of(tower)[0] >= 0).any()]
    labels, selected = {}, {}
    for tower in towers:
        label, counts = votes.labels_of(tower)
        labels[tower] = _histogram(label, C)
        selected[tower] = _histogram(label[counts], C)
    flips = None
    if before is not None:
        earlier = _load(root, epoch - 1, before)
        if len(votes) and earlier.object_id.equals(votes.object_id):
            flips = float((earlier.label != votes.label).mean())
    return VoteCounts(epoch, len(votes), labels, selected, flips)


def _histogram(classes: Classes, C: int) -> npt.NDArray[np.int64]:
    return np.bincount(classes[(classes >= 0) & (classes < C)], minlength=C).astype(np.int64)


@dataclass(frozen=True)
class OracleClasses:
    """True classes of the objects that a run adapts to. For reports only."""

    object_id: pa.StringArray
    classes: Classes

    def of(self, object_id: pa.StringArray) -> Classes:
        """Gives the classes of objects; -1 where the label is unknown or none of the classes."""
        place: Any = pc.fill_null(pc.index_in(object_id, value_set=self.object_id), -1).to_numpy()
        known = place >= 0
        classes = np.full(len(place), -1, np.int16)
        classes[known] = self.classes[place[known]]
        return classes


def oracle_labels(run: Run) -> dict[str, str]:
    """Reads the labels of the objects that a run adapts to, by object, for a report.

    Returns:
        Labels by object id, those that are none of the classes included; empty where nothing is
        labelled, or the shards are not within reach of this machine.
    """
    table = _labels_of(run)
    if table is None:
        return {}
    pairs = zip(table["object_id"].to_pylist(), table["label"].to_pylist(), strict=True)
    return {object_id: label for object_id, label in pairs if label is not None}


def oracle_classes(run: Run) -> OracleClasses | None:
    """Reads the labels of the objects that a run adapts to as numbers of classes, for a report.

    Returns:
        None where no label is one of the classes, or the shards are not within reach.
    """
    table = _labels_of(run)
    if table is None or not run.classes:
        return None
    place = pc.index_in(table["label"], value_set=pa.array(run.classes), skip_nulls=True)
    classes = pc.fill_null(place, -1).to_numpy().astype(np.int16)
    ids = table["object_id"].combine_chunks().cast(pa.string())
    return OracleClasses(ids, classes) if (classes >= 0).any() else None


def _labels_of(run: Run) -> pa.Table | None:
    shards = lookup(run.config, "data.shards")
    if not isinstance(shards, str):
        return None
    try:
        return _read_labels(shards)
    except (ConfigError, pa.ArrowException, OSError, KeyError):
        # Results are often looked at where their shards are not: there, no label is known.
        return None


@functools.lru_cache(maxsize=4)
def _read_labels(shards: str) -> pa.Table | None:
    parts = []
    for name in shard_store(shards).names():
        if name.endswith(".parquet"):
            with open_shard(shards, name) as shard:
                parts.append(shard.read(columns=["object_id", "label"]))
    return pa.concat_tables(parts).combine_chunks() if parts else None


@dataclass(frozen=True)
class OracleAccuracy:
    """How many votes of one epoch are right, in percent of the labelled objects they are about.

    None where nothing was said. For reports only.
    """

    epoch: int
    objects: int
    image: float | None
    point: float | None
    label: float | None
    selected: float | None
    """Of the labels that counted in a loss."""


def oracle_accuracy(run: Run) -> tuple[OracleAccuracy, ...]:
    """Compares the votes of every epoch with the labels; empty where none is labelled."""
    labels = oracle_classes(run)
    if labels is None:
        return ()
    compared = []
    for epoch in vote_epochs(run):
        votes = load_votes(run, epoch)
        if votes is None:
            continue
        truth = labels.of(votes.object_id)
        compared.append(
            OracleAccuracy(
                epoch,
                int((truth >= 0).sum()),
                image=_share_right(votes.image_class, truth),
                point=_share_right(votes.point_class, truth),
                label=_share_right(votes.label, truth),
                selected=_share_right(np.where(votes.selected, votes.label, -1), truth),
            )
        )
    return tuple(compared)


def _share_right(said: Classes, truth: Classes) -> float | None:
    """Gives the share of votes that are right, in percent; None without a vote on a known one."""
    counts = (said >= 0) & (truth >= 0)
    return 100 * float((said == truth)[counts].mean()) if counts.any() else None
