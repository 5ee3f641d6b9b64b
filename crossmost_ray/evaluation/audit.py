"""A model and a folder of shards in, the axes and colours that the model understands best out.

Wrong axes and swapped colours raise no error: accuracy is low, and that is all one sees. So the
model is asked about the same objects as they are stored and under the mistakes that are common, and
the answers are compared without a label.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from pydantic.dataclasses import dataclass
from rich.table import Table
from torch import Tensor

from crossmost_ray.config import (
    STRICT,
    Classes,
    ConfigError,
    Count,
    Templates,
    check_classes,
    check_templates,
)
from crossmost_ray.data.augment import normalize_images, resize_images, to_float
from crossmost_ray.data.classes import match_labels
from crossmost_ray.data.decode import decode_points, decode_view, hash_id, view_size
from crossmost_ray.data.shards import class_names, list_shards, read_manifest
from crossmost_ray.models.classifier import CrossModalClassifier, ModelSpec
from crossmost_ray.models.pretrained import load_model

Probabilities = npt.NDArray[np.float64]
"""(n, C): of each object, what a tower holds of each class."""

COLUMNS = ("object_id", "label", "points", "colors", "views")
NUM_POINTS = 1024
NUM_VIEWS = 4
BATCH_SIZE = 16

SURE = 0.9
"""Least share of resamples that a convention must win for the verdict to name it."""

GREY_SPREAD = 8
"""Views whose pixels' channels differ by no more than this are grey, and lossily stored."""

LEAST_OBJECTS = 16
"""With fewer, resamples of the same few objects agree with one another whatever the truth is."""

NUM_RESAMPLES = 1000

MARGIN = 0.05
"""What a convention must score above the stored one to win a resample. Under the mirror, say, a
model answers almost alike, and always a little better on one side: no reason to mend anything."""

UP_AXES = ("+y", "-y", "+z", "-z", "+x", "-x")

IMAGE_CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as stored": lambda images: images,
    "channels swapped": lambda images: images.flip(-3),
    "upside down": lambda images: images.flip(-2),
    "inverted": lambda images: 255 - images,
}
"""What is done to (..., 3, S, S) uint8 before a model sees them; doing it twice undoes it."""

IMAGE_CURES = {
    "channels swapped": "save them as RGB (OpenCV reads and writes BGR)",
    "upside down": "save them with the top row first",
    "inverted": "save 255 minus each value",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuditConfig:
    """One audit: what the command line says."""

    model: str
    """Model folder."""

    shards: str
    """Folder of shards."""

    objects: Count = 64
    """Most objects that are looked at."""

    classes: Classes | None = None
    """As `data.classes`; None takes the manifest's."""

    templates: Templates = dataclasses.field(default_factory=lambda: ["a 3D model of a {}."])
    """As `data.templates`."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_classes(self.classes, "classes")
        check_templates(self.templates)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The objects that are looked at, n of them."""

    points: Tensor
    """(n, N, 3) float32, as stored."""
    images: Tensor
    """(n, V, 3, S, S) uint8."""
    labels: list[str | None]
    """Read for the column that says oracle, and for nothing else."""
    colored: int
    """Objects whose points have colours."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a tower answers under one convention."""

    confidence: float
    """Mean of the best class's probability, in percent."""
    entropy: float
    """Mean over the objects, in nats: low where answers are sure."""
    information: float
    """Entropy of the mean answer minus mean entropy, in percent of log C: high where answers are
    sure and differ from object to object."""
    agreement: float
    """Mean chance, in percent, that this tower and the other one, under the convention that the
    verdict chose for it, name the same class if each draws one by its probabilities."""
    oracle_top1: float | None
    """Accuracy by the labels, in percent; None without labels. The verdict does not know it."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The convention that scores best, and how far that is luck."""

    best: str
    shares: dict[str, float]
    """For each convention, the share of resamples of the objects that it wins. In those that none
    wins, one scores above the stored one, but not by `MARGIN`."""
    num_objects: int

    @property
    def is_sure(self) -> bool:
        """Whether the verdict may name it."""
        return self.num_objects >= LEAST_OBJECTS and self.shares[self.best] >= SURE

    @property
    def doubt(self) -> str:
        """Says why it is not sure."""
        if self.num_objects < LEAST_OBJECTS:
            return f"{self.num_objects} objects are too few, at least {LEAST_OBJECTS} are needed"
        ranked = sorted(self.shares, key=self.shares.__getitem__, reverse=True)
        first, second = (f"{name} wins {100 * self.shares[name]:.0f} %" for name in ranked[:2])
        return f"of {NUM_RESAMPLES} resamples, {first} and {second}; {100 * SURE:.0f} % are needed"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which conventions suit the model; the first of each kind is the stored one."""

    up: Choice
    """Which of the stored axes points up."""
    mirrored: Choice
    """Whether left and right are swapped besides: plain or mirrored."""
    images: Choice


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit has shown."""

    num_objects: int
    model_up: str
    points: dict[str, Scores]
    images: dict[str, Scores]
    verdict: Verdict
    facts: list[str]


def audit(config: AuditConfig) -> Audit:
    """Asks a model about some objects of a folder under every convention.

    Raises:
        ConfigError: If the model or the shards can't be read or used.
    """
    files = list_shards(config.shards, COLUMNS)
    classes = class_names(config.classes, config.shards)
    folder = load_model(config.model)
    classifier = folder.classifier(classes, config.templates).eval()
    classifier.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    spec = folder.model.spec
    sample = read_sample(files, config.objects, view_size(classifier.image.image_size))
    matrices = {up: turn_up(up, spec.up_axis) for up in sorted_ups(spec.up_axis)}
    plain = {up: ask_points(classifier, sample.points, turn) for up, turn in matrices.items()}
    mirror = mirror_of(spec.up_axis)
    mirrored = {
        up: ask_points(classifier, sample.points, mirror @ turn) for up, turn in matrices.items()
    }
    images = {
        name: ask_images(classifier, spec, sample.images, convert)
        for name, convert in IMAGE_CONVENTIONS.items()
    }
    verdict = judge(plain, mirrored, images)
    points = {f"{up} up": answer for up, answer in plain.items()}
    points |= {f"{up} up, mirrored": answer for up, answer in mirrored.items()}
    label = class_places(sample.labels, classes)
    best_points, best_images = plain[verdict.up.best], images[verdict.images.best]
    return Audit(
        num_objects=len(sample.points),
        model_up=spec.up_axis,
        points={name: score(answer, best_images, label) for name, answer in points.items()},
        images={name: score(answer, best_points, label) for name, answer in images.items()},
        verdict=verdict,
        facts=state_facts(sample, read_manifest(config.shards), spec),
    )


# Objects -----------------------------------------------------------------------------------------


def read_sample(files: Sequence[Path], num_objects: int, size: int) -> Sample:
    """Reads objects spread evenly over the shards: of each, those of the lowest hashes.

    Args:
        files: Shards of one folder; one at a time is in memory.
        num_objects: Most objects to read.
        size: S, side that views are decoded to.

    Raises:
        ConfigError: If they hold no object, or a row can't be used.
    """
    ends = np.cumsum([pq.read_metadata(file).num_rows for file in files])
    total = int(ends[-1])
    if total == 0:
        raise ConfigError(f"the shards in {files[0].parent} hold no object; prepare them anew")
    # A shard of r of all T rows gives r * n / T, rounded such that the sum is n.
    quotas = np.diff(ends * min(num_objects, total) // total, prepend=0)
    clouds: list[npt.NDArray[np.float32]] = []
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[str | None] = []
    colored = 0
    for file, quota in zip(files, quotas.tolist(), strict=True):
        if quota == 0:
            continue
        ids = pq.read_table(file, columns=["object_id"])["object_id"].to_pylist()
        rows = np.sort(np.argsort([hash_id(str(name)) for name in ids])[:quota])
        table = pq.read_table(file, columns=list(COLUMNS)).take(rows)
        stored = zip(rows, decode_points(table["points"]), table["views"].to_pylist(), strict=True)
        for row, cloud, views in stored:
            try:
                clouds.append(_check_cloud(cloud))
                images.append(_decode_views(views, size))
            except (OSError, TypeError, ValueError) as broken:
                raise ConfigError(
                    f"{file}, row {row} ({ids[row]}) can't be used: {broken}; prepare it anew"
                ) from None
        labels += table["label"].to_pylist()
        colored += table.num_rows - table["colors"].null_count
    # A prefix of a cloud is a fair sample of it, for its points are in random order.
    shortest = min(NUM_POINTS, *map(len, clouds))
    return Sample(
        points=torch.from_numpy(np.stack([cloud[:shortest] for cloud in clouds])),
        images=torch.from_numpy(np.stack(images)),
        labels=labels,
        colored=colored,
    )


def _check_cloud(cloud: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not len(cloud):
        raise ValueError("it has no points")
    if not np.isfinite(cloud).all():
        raise ValueError("points are NaN or infinite")
    return cloud


def _decode_views(views: Sequence[bytes] | None, size: int) -> npt.NDArray[np.uint8]:
    if not views:
        raise ValueError("it has no view")
    # Evenly over the ring; an object of fewer views shows some of them twice.
    used = [views[place * len(views) // NUM_VIEWS] for place in range(NUM_VIEWS)]
    return np.stack([decode_view(view, size) for view in used])


def class_places(labels: Sequence[str | None], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Gives (n,) places of the labels among the classes; -1 for none of them."""
    place = {name: index for index, name in enumerate(classes)}
    return np.array([place.get(name or "", -1) for name in match_labels(labels, classes)], np.int64)


# Conventions -------------------------------------------------------------------------------------


def sorted_ups(model_up: str) -> list[str]:
    """Lists the axes that may point up, the model's own first: what is stored wins a tie."""
    return sorted(UP_AXES, key=lambda up: up != f"+{model_up}")


def _unit(axis: str) -> npt.NDArray[np.float64]:
    unit = np.zeros(3)
    unit["xyz".index(axis[-1])] = -1 if axis[0] == "-" else 1
    return unit


def turn_up(up: str, model_up: str) -> npt.NDArray[np.float64]:
    """Builds the shortest turn that brings a stored axis to where the model expects up.

    The turn leaves the front open, but models are trained on clouds turned at random about the up
    axis. Where up only has to be turned round, the axis after it (z for y) stays.

    Args:
        up: Stored axis, such as "+z".
        model_up: x, y or z.

    Returns:
        (3, 3) of -1, 0 and 1, determinant 1, for `points @ turn.T`.
    """
    source, target = _unit(up), _unit(model_up)
    if (source == target).all():
        return np.eye(3)
    if (source == -target).all():
        return 2 * np.diag(_unit("xyz"[("xyz".index(model_up) + 1) % 3])) - np.eye(3)
    across = np.cross(source, target)
    # Source to target, target to minus source, and the axis of the turn stays.
    return np.outer(target, source) - np.outer(source, target) + np.outer(across, across)


def mirror_of(model_up: str) -> npt.NDArray[np.float64]:
    """Builds the (3, 3) mirror of the axis before up: x for y. All mirrors whose plane holds the up
    axis are the same but for a turn about it."""
    return np.eye(3) - 2 * np.diag(_unit("xyz"[("xyz".index(model_up) + 2) % 3]))


def write_axes(matrix: npt.NDArray[np.floating[Any]]) -> str:
    """Writes a matrix of -1, 0 and 1 as a source's `axes`, such as "yzx" or "x-zy"."""
    letters = []
    for row in matrix:
        place = int(np.abs(row).argmax())
        letters.append(("-" if row[place] < 0 else "") + "xyz"[place])
    return "".join(letters)


# The model's answers -----------------------------------------------------------------------------


@torch.no_grad()
def ask_points(
    classifier: CrossModalClassifier, points: Tensor, turn: npt.NDArray[np.float64]
) -> Probabilities:
    """Classifies (n, N, 3) clouds, turned by (3, 3)."""
    device = classifier.class_embed.device
    matrix = torch.from_numpy(turn.T).float()
    logits = [
        classifier.logits(classifier.point.embed((clouds @ matrix).to(device)))
        for clouds in points.split(BATCH_SIZE)
    ]
    return _softmax(logits)


@torch.no_grad()
def ask_images(
    classifier: CrossModalClassifier,
    spec: ModelSpec,
    images: Tensor,
    convert: Callable[[Tensor], Tensor],
) -> Probabilities:
    """Classifies objects by (n, V, 3, S, S) uint8 views, converted; their logits are averaged."""
    device, size = classifier.class_embed.device, classifier.image.image_size
    logits = []
    for views in images.split(BATCH_SIZE):
        resized = resize_images(to_float(convert(views).to(device).flatten(0, 1)), size)
        embeds = classifier.image.embed(normalize_images(resized, spec.image_mean, spec.image_std))
        logits.append(classifier.logits(embeds).unflatten(0, views.shape[:2]).mean(dim=1))
    return _softmax(logits)


def _softmax(logits: Sequence[Tensor]) -> Probabilities:
    answers: Probabilities = torch.cat(list(logits)).double().softmax(dim=-1).cpu().numpy()
    return answers


# The verdict -------------------------------------------------------------------------------------


def entropy(answers: Probabilities) -> Probabilities:
    """Gives the entropy of (..., C) probabilities in nats: (...)."""
    logs = np.log(answers.clip(min=np.finfo(np.float64).tiny))
    return -(answers * logs).sum(axis=-1)


def information(weights: Probabilities, answers: Probabilities) -> Probabilities:
    """Measures how much the answers tell of the objects: H(mean answer) - mean H(answer).

    It is high where answers are sure and differ from object to object, and 0 where all are the
    same, however sure.

    Args:
        weights: (R, n), of the objects in each of R resamples; rows sum to 1.
        answers: (K, n, C), under each of K conventions.

    Returns:
        (R, K), as a share of log C, its greatest value.

    Source:
        Bridle, Heading and MacKay (1991): mutual information of inputs and class decisions.
    """
    mean = np.tensordot(weights, answers, axes=(1, 1))
    return (entropy(mean) - weights @ entropy(answers).T) / math.log(answers.shape[-1])


def judge(
    plain: Mapping[str, Probabilities],
    mirrored: Mapping[str, Probabilities],
    images: Mapping[str, Probabilities],
) -> Verdict:
    """Chooses the conventions of points and images, without a label.

    A pair of conventions scores the information of the points' answers, plus that of the images'
    answers, plus their agreement: the mean chance that both towers name one class if each draws one
    by its probabilities. (The share of equal best classes says the same with more noise.) The pair
    that scores best is chosen. Only then the chosen axis is compared with its mirror image: most
    objects are so symmetric that the two would share the resamples, and neither win enough.

    Args:
        plain: (n, C) of the points by the axis taken for up; the stored one comes first.
        mirrored: The same, with left and right swapped.
        images: (n, C) of the images by their convention; the stored one comes first.
    """
    n = len(next(iter(images.values())))
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    # The objects as they are come first, then the resamples.
    weights = np.concatenate([np.ones((1, n)), drawn]) / n

    totals = _totals(weights, list(plain.values()), list(images.values()))
    pairs = totals.reshape(len(weights), -1).argmax(axis=1)
    best_up, best_kind = np.unravel_index(pairs, totals.shape[1:])
    resamples = np.arange(len(weights))
    up = _choice(list(plain), totals[resamples, :, best_kind], n)
    kind = _choice(list(images), totals[resamples, best_up], n)
    sides = _totals(weights, [plain[up.best], mirrored[up.best]], [images[kind.best]])
    return Verdict(up=up, mirrored=_choice(["plain", "mirrored"], sides[:, :, 0], n), images=kind)


def _totals(
    weights: Probabilities, points: Sequence[Probabilities], images: Sequence[Probabilities]
) -> Probabilities:
    """Scores (R, K, L) pairs of K conventions of points and L of images in R resamples."""
    by_points, by_images = np.stack(points), np.stack(images)
    agreement = np.einsum("knc,lnc->nkl", by_points, by_images)
    totals = (
        information(weights, by_points)[:, :, None]
        + information(weights, by_images)[:, None, :]
        + np.tensordot(weights, agreement, axes=1)
    )
    # Grey images are the same with their channels swapped: a tie, and not for rounding to decide.
    return totals.round(9)


def _choice(names: Sequence[str], totals: Probabilities, num_objects: int) -> Choice:
    """Counts what wins by (R, K) totals; the first of both are the whole and the stored one."""
    best = totals.argmax(axis=1)
    wins = (best == 0) | (totals.max(axis=1) - totals[:, 0] >= MARGIN)
    shares = {name: float(((best == place) & wins)[1:].mean()) for place, name in enumerate(names)}
    return Choice(best=names[best[0]], shares=shares, num_objects=num_objects)


def score(answers: Probabilities, others: Probabilities, labels: npt.NDArray[np.int64]) -> Scores:
    """Sums a tower's (n, C) answers up, beside the other tower's and (n,) labels, -1 for none."""
    n, known = len(answers), labels >= 0
    named = answers.argmax(axis=-1)
    return Scores(
        confidence=100 * float(answers.max(axis=-1).mean()),
        entropy=float(entropy(answers).mean()),
        information=100 * float(information(np.full((1, n), 1 / n), answers[None])[0, 0]),
        agreement=100 * float((answers * others).sum(axis=-1).mean()),
        oracle_top1=100 * float((named == labels)[known].mean()) if known.any() else None,
    )


# The report --------------------------------------------------------------------------------------


def state_facts(sample: Sample, manifest: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Says what can be read off without asking the model."""
    stated, expected = manifest.get("up_axis"), f"+{spec.up_axis}"
    if stated is None:
        up = f"not stated by a manifest; {expected} in the model's training"
    elif stated in (expected, spec.up_axis):
        up = f"{stated} in the manifest, as in the model's training"
    else:
        up = f"{stated} in the manifest, BUT {expected} in the model's training"
    n = len(sample.points)
    radii = sample.points.norm(dim=-1).amax(dim=1)
    offset = sample.points.mean(dim=1).norm(dim=-1).max()
    # Of a part of a cloud's points: the farthest may be missing, and their mean is not quite 0.
    unit = bool(radii.min() > 0.8 and radii.max() < 1.01 and offset < 0.15)
    images = sample.images.int()
    spread = (images.amax(dim=2) - images.amin(dim=2)).flatten(1).amax(dim=1)
    return [
        f"up axis: {up}",
        f"scale: the clouds lie {'' if unit else 'NOT '}in the unit sphere, where models are "
        f"trained; radii {radii.min():.2f} to {radii.max():.2f}, centroids up to {offset:.2f} off",
        "images: normalised for the model by "
        f"mean {_triple(spec.image_mean)} and deviation {_triple(spec.image_std)}",
        f"colour: in the views of {int((spread > GREY_SPREAD).sum())} of {n} objects, and on the "
        f"points of {sample.colored}, where the point tower does not look",
    ]


def _triple(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def conclude(result: Audit, axes: npt.NDArray[np.floating[Any]]) -> list[str]:
    """Says what suits the model and what does not, and how to mend it.

    Args:
        result: Of `audit`.
        axes: (3, 3) of the `axes` that the shards were prepared with: what is to be set goes from
            the source to the model, and not from the shards.
    """
    verdict = result.verdict
    stored = f"+{result.model_up}"
    if not verdict.up.is_sure:
        lines = [f"points: cannot tell which axis is up: {verdict.up.doubt}"]
    else:
        turn = turn_up(verdict.up.best, result.model_up)
        swapped = verdict.mirrored.is_sure and verdict.mirrored.best == "mirrored"
        if swapped:
            turn = mirror_of(result.model_up) @ turn
        if verdict.up.best == stored and not swapped:
            lines = [f"points: the stored orientation suits the model ({stored} up)"]
        else:
            lines = [
                "points: the model understands these objects better with "
                f"{verdict.up.best} up{', mirrored left to right' if swapped else ''}: "
                f"set `axes: {write_axes(turn @ axes)}` in the source's config "
                f"(now `{write_axes(axes)}`)"
            ]
        if not verdict.mirrored.is_sure:
            lines.append(
                f"points: cannot tell whether left and right are swapped: {verdict.mirrored.doubt}"
            )
    return [*lines, _conclude_images(verdict.images)]


def _conclude_images(choice: Choice) -> str:
    if not choice.is_sure:
        return f"images: cannot tell how they are meant: {choice.doubt}"
    if choice.best not in IMAGE_CURES:
        return "images: as stored, they suit the model"
    return (
        f"images: the model understands these objects better with their images {choice.best}: "
        f"{IMAGE_CURES[choice.best]}, and prepare the shards anew"
    )


def audit_table(result: Audit) -> Table:
    """Lays the scores out, with the share of resamples that each convention wins."""
    table = Table(title=f"{result.num_objects} objects under each convention", title_justify="left")
    heads = ("confidence", "entropy", "information", "agreement", "wins", "oracle top-1")
    for column in ("", "convention", *heads):
        table.add_column(column, justify="right" if column in heads else "left", no_wrap=True)
    verdict = result.verdict
    shares = {f"{up} up": share for up, share in verdict.up.shares.items()}
    shares[f"{verdict.up.best} up, mirrored"] = verdict.mirrored.shares["mirrored"]
    shares |= verdict.images.shares
    for tower, rows in (("points", result.points), ("images", result.images)):
        for name, scores in rows.items():
            table.add_row(
                tower,
                name,
                f"{scores.confidence:.1f} %",
                f"{scores.entropy:.2f}",
                f"{scores.information:.1f} %",
                f"{scores.agreement:.1f} %",
                f"{100 * shares[name]:.0f} %" if name in shares else "",
                "" if scores.oracle_top1 is None else f"{scores.oracle_top1:.1f} %",
            )
        table.add_section()
    return table
