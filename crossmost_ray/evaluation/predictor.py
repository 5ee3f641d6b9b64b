"""Rows of a shard in, every model's ranked classes out, and what reports need of each opinion."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from crossmost_ray.config import ConfigError, EvaluationConfig
from crossmost_ray.data.augment import normalize_images, resize_images, to_float
from crossmost_ray.data.classes import match_labels
from crossmost_ray.data.decode import decode_points, decode_view, hash_id, ring_views, view_size
from crossmost_ray.data.shards import BadRow
from crossmost_ray.evaluation.corruptions import corrupt
from crossmost_ray.evaluation.plan import Corruption
from crossmost_ray.models.classifier import CrossModalClassifier, ModelSpec
from crossmost_ray.models.pretrained import ModelFolder
from crossmost_ray.schema import Prediction

OPINIONS = ("image", "point", "fused")
"""Whose opinion a prediction is: one tower's, or both towers' together."""


class EvaluationBatch(NamedTuple):
    """B objects, decoded, on the CPU."""

    object_id: list[str]
    label: list[str | None]
    """Spelled as the class that they name, if they name one."""
    samples: Tensor
    """(B, P, N, 3) float32: P samples of N points of each cloud."""
    images: dict[int, Tensor]
    """By side S: (T, 3, S, S) uint8, the views of all objects, one object after the other."""
    num_views: list[int]
    """How many of the T views are each object's."""
    left_out: list[BadRow]
    """Rows that can't be used; they are not among the B."""


class Answers(NamedTuple):
    """What the models say of a batch."""

    table: pa.Table
    """One row per object and model, by the predictor's `schema`."""
    probability: dict[str, dict[str, npt.NDArray[np.float64]]]
    """By model and opinion: (C,) sum of the objects' probabilities, which no row holds whole."""


@functools.lru_cache(maxsize=64)
def sample_places(num_stored: int, num_points: int, point_samples: int) -> npt.NDArray[np.int64]:
    """Draws places of a cloud's points, the same ones for all clouds of a size.

    Clouds are in random order, so that is a fair sample; and it depends neither on the machine nor
    on the objects that share a batch.

    Args:
        num_stored: Points of the cloud, at least one.
        num_points: Points of a sample; a smaller cloud gives some of them twice.
        point_samples: Samples.

    Returns:
        (point_samples, num_points).
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(num_stored, generator=generator).numpy() for _ in range(point_samples)]
    return np.stack([np.resize(order, num_points) for order in orders])


@torch.inference_mode()
def predict_batch(
    classifier: CrossModalClassifier,
    spec: ModelSpec,
    images: Tensor,
    num_views: Sequence[int],
    samples: Tensor,
) -> Prediction:
    """Classifies objects, averaged over views and over samples of points.

    Args:
        classifier: In evaluation mode.
        spec: Says how the towers want their inputs.
        images: (T, 3, S, S) uint8, the views of B objects, one object after the other.
        num_views: How many of them are each object's.
        samples: (B, P, N, 3) float32.

    Returns:
        Means over each object's views and over its samples. A mean of embeddings is shorter than
        1, and its product with the class embeddings, times the scale, is the mean of the logits.
        Nothing is random: the same objects get the same answers.
    """
    views = resize_images(to_float(images), classifier.image.image_size)
    image_embeds = classifier.image.embed(normalize_images(views, spec.image_mean, spec.image_std))
    image_logits = classifier.logits(image_embeds)
    B, P = samples.shape[:2]
    point_embeds = classifier.point.embed(samples.flatten(0, 1))
    point_logits = classifier.logits(point_embeds)

    def by_object(values: Tensor) -> Tensor:
        # Not `index_add_`, whose sums come in any order on a GPU.
        return torch.stack([part.mean(dim=0) for part in values.split(list(num_views))]).float()

    return Prediction(
        image_embed=by_object(image_embeds),
        point_embed=point_embeds.unflatten(0, (B, P)).mean(dim=1).float(),
        image_logits=by_object(image_logits),
        point_logits=point_logits.unflatten(0, (B, P)).mean(dim=1).float(),
    )


def fuse(image_logits: Tensor, point_logits: Tensor) -> Tensor:
    """Averages both towers' probabilities: (B, C) and (B, C) logits to (B, C) probabilities."""
    return (image_logits.softmax(dim=-1) + point_logits.softmax(dim=-1)) / 2


class Predictor:
    """Asks several models about the same rows.

    Args:
        models: Models by the name that the report gives them.
        classes: C names.
        templates: Prompts of the zero-shot classifiers.
        num_points: Points of a sample.
        config: Views and samples to average over, and what to store.
        use_gpu: Whether the models go to the GPU of this process.

    Raises:
        ConfigError: If there is no GPU to go to.
    """

    def __init__(
        self,
        models: Mapping[str, ModelFolder],
        classes: Sequence[str],
        templates: Sequence[str],
        num_points: int,
        config: EvaluationConfig,
        *,
        use_gpu: bool = False,
    ) -> None:
        if use_gpu and not torch.cuda.is_available():
            raise ConfigError(
                "use_gpu asks for GPUs, and torch finds none on a node that Ray says has one; "
                "install the build of torch that suits its driver, or set use_gpu=false"
            )
        self.classes = list(classes)
        self.num_points = num_points
        self.config = config
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.models = {
            name: (
                folder.classifier(classes, templates).eval().to(self.device),
                folder.model.spec,
            )
            for name, folder in models.items()
        }
        self.sizes = {
            name: view_size(classifier.image.image_size)
            for name, (classifier, _) in self.models.items()
        }
        self.schema = prediction_schema(config)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Gives one row per object and model: its best classes by each opinion.

        Raises:
            ConfigError: If a row can't be used and `bad_rows` is "refuse".
        """
        return self.ask(self.decode(table)).table

    def decode(
        self,
        table: pa.Table,
        *,
        corruption: Corruption | None = None,
        shard: str = "the table",
        first: int = 0,
    ) -> EvaluationBatch:
        """Decodes rows of a shard; runs in a thread beside the models.

        Args:
            table: Rows with the columns `EVALUATION_COLUMNS`.
            corruption: What to do to the objects.
            shard: What errors call it.
            first: Place of the first row in it.

        Raises:
            ConfigError: If a row can't be used and `bad_rows` is "refuse".
        """
        ids: list[str] = []
        labels: list[str | None] = []
        samples: list[npt.NDArray[np.float32]] = []
        counts: list[int] = []
        left_out: list[BadRow] = []
        images: dict[int, list[npt.NDArray[np.uint8]]] = {size: [] for size in self.sizes.values()}
        names = table["object_id"].to_pylist()
        known = match_labels(table["label"].to_pylist(), self.classes)
        stored = zip(
            names, known, decode_points(table["points"]), table["views"].to_pylist(), strict=True
        )
        for row, (object_id, label, cloud, encoded) in enumerate(stored, start=first):
            try:
                points = self._check_points(cloud)
                views = self._decode_views(object_id, encoded)
            except (OSError, TypeError, ValueError) as broken:
                bad = BadRow(shard, row, str(object_id), str(broken))
                if self.config.bad_rows == "refuse":
                    raise ConfigError(
                        f"{bad}; prepare it anew, or leave such rows out with "
                        "evaluation.bad_rows=skip"
                    ) from None
                left_out.append(bad)
                continue
            if corruption is not None:
                points, views = _spoil(points, views, corruption, object_id)
            places = sample_places(len(points), self.num_points, self.config.point_samples)
            ids.append(object_id)
            labels.append(label)
            samples.append(points[places])
            counts.append(len(next(iter(views.values()))))
            for size, shown in views.items():
                images[size].append(shown)
        return EvaluationBatch(
            object_id=ids,
            label=labels,
            samples=torch.from_numpy(np.stack(samples)) if ids else torch.empty(0),
            images={
                size: torch.from_numpy(np.concatenate(shown)) if ids else torch.empty(0)
                for size, shown in images.items()
            },
            num_views=counts,
            left_out=left_out,
        )

    def ask(self, batch: EvaluationBatch) -> Answers:
        """Asks every model about a batch; one without objects gets no rows."""
        tables, sums = [self.schema.empty_table()], {}
        samples = batch.samples.to(self.device)
        images = {size: views.to(self.device) for size, views in batch.images.items()}
        for name, (classifier, spec) in self.models.items() if batch.object_id else ():
            prediction = predict_batch(
                classifier, spec, images[self.sizes[name]], batch.num_views, samples
            )
            probabilities = {
                "image": prediction.image_logits.softmax(dim=-1),
                "point": prediction.point_logits.softmax(dim=-1),
                "fused": fuse(prediction.image_logits, prediction.point_logits),
            }
            tables.append(self._rows(batch, name, prediction, probabilities))
            sums[name] = {
                opinion: probability.double().sum(dim=0).cpu().numpy()
                for opinion, probability in probabilities.items()
            }
        return Answers(pa.concat_tables(tables), sums)

    def _rows(
        self,
        batch: EvaluationBatch,
        model: str,
        prediction: Prediction,
        probabilities: Mapping[str, Tensor],
    ) -> pa.Table:
        B = len(batch.object_id)
        columns: dict[str, pa.Array] = {
            "object_id": pa.array(batch.object_id, pa.string()),
            "label": pa.array(batch.label, pa.string()),
            "model": pa.array([model] * B, pa.string()),
        }
        names = pa.array(self.classes, pa.string())
        for opinion, probability in probabilities.items():
            best = probability.topk(min(self.config.top_k, len(self.classes)), dim=-1)
            columns[f"ranked_{opinion}"] = _lists(
                names.take(pa.array(best.indices.flatten().cpu().numpy())), B
            )
            columns[f"confidence_{opinion}"] = pa.array(best.values[:, 0].cpu().numpy())
            columns[f"entropy_{opinion}"] = pa.array(
                torch.special.entr(probability).sum(dim=-1).cpu().numpy()
            )
        stored = {
            "logits_image": prediction.image_logits,
            "logits_point": prediction.point_logits,
            "embedding_image": prediction.image_embed,
            "embedding_point": prediction.point_embed,
        }
        for name, values in stored.items():
            if name in self.schema.names:
                columns[name] = _lists(pa.array(values.flatten().cpu().numpy()), B)
        return pa.table(columns, schema=self.schema)

    def _check_points(self, cloud: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if len(cloud) < self.num_points:
            raise ValueError(f"{len(cloud)} points, num_points asks for {self.num_points}")
        unfit = int((~np.isfinite(cloud).all(axis=1)).sum())
        if unfit:
            raise ValueError(f"{unfit} of {len(cloud)} points are NaN or infinite")
        return cloud

    def _decode_views(
        self, object_id: str, encoded: Sequence[bytes] | None
    ) -> dict[int, npt.NDArray[np.uint8]]:
        """Decodes the views that are used: by side, (V, 3, S, S)."""
        if not encoded:
            raise ValueError("it has no view")
        used = ring_views(min(self.config.num_views, len(encoded)), len(encoded))
        if self.config.random_view:
            # By lot, and yet the same on every machine and for every model.
            used = [used[hash_id(object_id) % len(used)]]
        views = {}
        for size in set(self.sizes.values()):
            shown = []
            for place in used:
                try:
                    shown.append(decode_view(encoded[place], size))
                except (OSError, TypeError, ValueError) as broken:
                    raise ValueError(f"view {place} can't be decoded ({broken})") from None
            views[size] = np.stack(shown)
        return views


def _spoil(
    points: npt.NDArray[np.float32],
    views: Mapping[int, npt.NDArray[np.uint8]],
    corruption: Corruption,
    object_id: str,
) -> tuple[npt.NDArray[np.float32], dict[int, npt.NDArray[np.uint8]]]:
    """Corrupts a cloud and its views of every side."""
    spoilt = {
        size: corrupt(points, shown, corruption.kind, corruption.severity, object_id)
        for size, shown in views.items()
    }
    # The views have no say in what becomes of the points.
    first = next(iter(spoilt.values()))[0]
    return first, {size: shown for size, (_, shown) in spoilt.items()}


def _lists(values: pa.Array, length: int) -> pa.ListArray:
    """Cuts values into lists of equal length."""
    step = len(values) // length
    offsets = np.arange(0, len(values) + 1, step, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def prediction_schema(config: EvaluationConfig) -> pa.Schema:
    """Gives the columns of a table of predictions."""
    floats = pa.list_(pa.float32())
    fields: list[tuple[str, pa.DataType]] = [
        ("object_id", pa.string()),
        ("label", pa.string()),
        ("model", pa.string()),
    ]
    for opinion in OPINIONS:
        fields += [
            (f"ranked_{opinion}", pa.list_(pa.string())),
            (f"confidence_{opinion}", pa.float32()),
            (f"entropy_{opinion}", pa.float32()),
        ]
    for kind, column in (("logits", "logits"), ("embeddings", "embedding")):
        if kind in config.store:
            fields += [(f"{column}_image", floats), (f"{column}_point", floats)]
    return pa.schema(fields)
