"""A model and a folder of shards in, the axes and colours that the model understands best out.

Wrong axes and swapped colours raise no error: accuracy is low, and that is all one sees. So the
model is asked about the same objects as they are stored and under the mistakes that are common, and
the answers are compared without a label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
from crossmost_ray.data.shards import class_names, list_shards, open_shard, read_manifest
from crossmost_ray.evaluation.conventions import (
    IMAGE_CONVENTIONS,
    IMAGE_CURES,
    mirror_of,
    sorted_ups,
    turn_up,
    write_axes,
)
from crossmost_ray.evaluation.verdict import (
    Choice,
    Probabilities,
    Scores,
    Verdict,
    judge,
    score,
)
from crossmost_ray.models.classifier import CrossModalClassifier, ModelSpec
from crossmost_ray.models.pretrained import load_model

COLUMNS = ("object_id", "label", "points", "colors", "views")

NUM_POINTS = 1024

NUM_VIEWS = 4

BATCH_SIZE = 16

GREY_SPREAD = 8
"""Views whose pixels' channels differ by no more than this are grey, and lossily stored."""


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
    sample = read_sample(
        config.shards, files, config.objects, view_size(classifier.image.image_size)
    )
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


def read_sample(shards: str, files: Sequence[str], num_objects: int, size: int) -> Sample:
    """Reads objects spread evenly over the shards: of each, those of the lowest hashes.

    Args:
        shards: Folder of Parquet files.
        files: Names of those to read; one at a time is in memory.
        num_objects: Most objects to read.
        size: S, side that views are decoded to.

    Raises:
        ConfigError: If they hold no object, or a row can't be used.
    """
    ends = np.cumsum([open_shard(shards, name).metadata.num_rows for name in files])
    total = int(ends[-1])
    if total == 0:
        raise ConfigError(f"the shards in {shards} hold no object; prepare them anew")
    # A shard of r of all T rows gives r * n / T, rounded such that the sum is n.
    quotas = np.diff(ends * min(num_objects, total) // total, prepend=0)
    clouds: list[npt.NDArray[np.float32]] = []
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[str | None] = []
    colored = 0
    for name, quota in zip(files, quotas.tolist(), strict=True):
        if quota == 0:
            continue
        with open_shard(shards, name) as shard:
            ids = shard.read(columns=["object_id"])["object_id"].to_pylist()
            rows = np.sort(np.argsort([hash_id(str(object_id)) for object_id in ids])[:quota])
            table = shard.read(columns=list(COLUMNS)).take(rows)
        stored = zip(rows, decode_points(table["points"]), table["views"].to_pylist(), strict=True)
        for row, cloud, views in stored:
            try:
                clouds.append(_check_cloud(cloud))
                images.append(_decode_views(views, size))
            except (OSError, TypeError, ValueError) as broken:
                raise ConfigError(
                    f"{shards}/{name}, row {row} ({ids[row]}) can't be used: {broken}; "
                    "prepare it anew"
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
