"""Votes of a run in, lists of the objects that are worth a look out."""

from __future__ import annotations

import csv
import functools
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from crossmost_ray.dashboard.runs import Run
from crossmost_ray.dashboard.votes import Votes, load_votes, oracle_classes, vote_epochs

Places = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Filter:
    """A reason to look at an object."""

    key: str
    title: str
    question: str
    """Which objects it shows, in a sentence."""


FILTERS = (
    Filter("all", "All", "Every object that the run learns from."),
    Filter("disagree", "Towers disagree", "The teacher's two towers name different classes."),
    Filter("changed", "Changed last epoch", "The label is not that of the epoch before."),
    Filter("never", "Never confident", "No epoch has learned from it: no label was sure enough."),
    Filter(
        "wrong",
        "Wrong (needs labels)",
        "The label is not the true class, which this page knows and the training does not.",
    ),
)

LEAST_SURE = "confidence"
"""How a list is sorted unless told otherwise: what the teacher is least sure of comes first."""

CSV_COLUMNS = (
    *("object_id", "image_class", "image_confidence", "point_class", "point_confidence"),
    *("label", "label_confidence", "selected", "changed", "ever_selected", "epoch"),
)


@dataclass(frozen=True, eq=False)
class Objects:
    """n objects after the last epoch that has votes."""

    votes: Votes
    classes: tuple[str, ...]
    changed: Flags
    """(n,) whether the label is not that of the epoch before."""
    ever_selected: Flags
    """(n,) whether any epoch has learned from the object."""

    def __len__(self) -> int:
        return len(self.votes)

    def name(self, place: int) -> str:
        """Gives the name of a class; empty for a place that is none."""
        return self.classes[place] if 0 <= place < len(self.classes) else ""


@dataclass(frozen=True)
class _Reading:
    """A run as the key of a cache: what was read is good until it has another epoch of votes."""

    run: Run

    def _key(self) -> tuple[object, ...]:
        run = self.run
        return run.root, run.folder, run.about.get("started"), run.version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reading) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def load_objects(run: Run) -> Objects | None:
    """Reads the votes of all epochs of a run; None where there are none.

    Files that can't be read are left out, and named in the run's `problems`.
    """
    return _load(_Reading(run)) if run.epochs and run.epoch_files else None


@functools.lru_cache(maxsize=4)
def _load(reading: _Reading) -> Objects | None:
    run = reading.run
    last: Votes | None = None
    changed = ever = np.zeros(0, bool)
    for epoch in sorted(vote_epochs(run)):
        votes = load_votes(run, epoch)
        if votes is None:
            continue
        before, earlier = last, ever
        changed, ever = np.zeros(len(votes), bool), votes.selected.copy()
        if before is not None:
            place = _find(votes.object_id, before.object_id)
            known = place >= 0
            changed[known] = votes.label[known] != before.label[place[known]]
            ever[known] |= earlier[place[known]]
        last = votes
    return None if last is None else Objects(last, run.classes, changed, ever)


def filter_objects(objects: Objects, key: str, wrong: Flags | None = None) -> Flags:
    """Marks the objects that a filter lets through.

    Args:
        objects: n objects.
        key: Of one of `FILTERS`; any other lets all through.
        wrong: (n,) from `oracle_wrong`; without it none counts as wrong.

    Returns:
        (n,) bool.
    """
    if key == "disagree":
        return objects.votes.disagree
    if key == "changed":
        return objects.changed
    if key == "never":
        return ~objects.ever_selected
    if key == "wrong":
        return np.zeros(len(objects), bool) if wrong is None else wrong
    return np.ones(len(objects), bool)


def oracle_wrong(run: Run, objects: Objects) -> Flags | None:
    """Marks the objects whose label is not their true class; for reports only.

    Returns:
        (n,) bool, False where no label was given or the truth is unknown; None where all of it is.
    """
    return _oracle_wrong(_Reading(run), objects)


@functools.lru_cache(maxsize=4)
def _oracle_wrong(reading: _Reading, objects: Objects) -> Flags | None:
    labels = oracle_classes(reading.run)
    if labels is None:
        return None
    truth = labels.of(objects.votes.object_id)
    said = objects.votes.label
    return (truth >= 0) & (said >= 0) & (truth != said)


def search_objects(objects: Objects, text: str) -> Flags:
    """Marks the objects whose id, votes or label contain a text, in upper or lower case.

    Returns:
        (n,) bool; all True for an empty text.
    """
    wanted = text.strip().lower()
    if not wanted:
        return np.ones(len(objects), bool)
    votes = objects.votes
    found = pc.match_substring(votes.object_id, wanted, ignore_case=True)
    named = [place for place, name in enumerate(objects.classes) if wanted in name.lower()]
    marks: Flags = found.to_numpy(zero_copy_only=False).astype(np.bool_)
    for column in (votes.image_class, votes.point_class, votes.label):
        marks |= np.isin(column, named)
    return marks


def order_objects(objects: Objects, marks: Flags, sort: str, *, down: bool) -> Places:
    """Gives the places of the marked objects in the order of a list.

    Args:
        objects: n objects.
        marks: (n,).
        sort: `id`, `image`, `point`, or, as any other, `LEAST_SURE`: a confidence.
        down: Whether the largest comes first.

    Returns:
        As many places as are marked. Objects without a value come last, and equal ones in the
        order of their ids.
    """
    places = np.flatnonzero(marks)
    votes = objects.votes
    if sort == "id":
        return places[::-1] if down else places
    columns = {"image": votes.image_confidence, "point": votes.point_confidence}
    values = columns.get(sort, votes.label_confidence)[places]
    # NaN comes last either way.
    order: Places = places[np.argsort(-values if down else values, kind="stable")]
    return order


def write_csv(objects: Objects, places: Places) -> str:
    """Writes a list of objects to review, in the order given."""
    votes = objects.votes
    table = {
        "object_id": [_plain(one) for one in votes.object_id.take(pa.array(places)).to_pylist()],
        "label": [objects.name(place) for place in votes.label[places].tolist()],
        "selected": votes.selected[places].astype(int).tolist(),
        "changed": objects.changed[places].astype(int).tolist(),
        "ever_selected": objects.ever_selected[places].astype(int).tolist(),
        "epoch": [votes.epoch] * len(places),
    }
    for tower, classes in (("image", votes.image_class), ("point", votes.point_class)):
        table[f"{tower}_class"] = [objects.name(place) for place in classes[places].tolist()]
    for name, values in (
        ("image_confidence", votes.image_confidence),
        ("point_confidence", votes.point_confidence),
        ("label_confidence", votes.label_confidence),
    ):
        table[name] = ["" if np.isnan(one) else f"{one:.4f}" for one in values[places].tolist()]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(zip(*(table[name] for name in CSV_COLUMNS), strict=True))
    return stream.getvalue()


def _find(wanted: pa.Array, among: pa.Array) -> Places:
    """Gives the place of each string among others, -1 for one that is not there."""
    if wanted.equals(among):
        return np.arange(len(wanted))
    found = pc.fill_null(pc.index_in(wanted, value_set=among), -1)
    places: Places = found.to_numpy().astype(np.int64)
    return places


def _plain(text: str) -> str:
    """Keeps a spreadsheet from taking an id for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
