"""Rows of a shard in, every model's ranked classes out: the actor that holds the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from crossmost_ray.config import EvaluationConfig
from crossmost_ray.data.augment import normalize_images, resize_images, to_float
from crossmost_ray.data.classes import match_labels
from crossmost_ray.data.decode import decode_points, decode_view, hash_id, ring_views, view_size
from crossmost_ray.models.classifier import CrossModalClassifier, ModelSpec
from crossmost_ray.models.pretrained import load_model

OPINIONS = ("image", "point", "fused")
"""Whose opinion a prediction is: one tower's, or both towers' together."""

NUM_RANKED = 5


@torch.no_grad()
def predict_logits(
    classifier: CrossModalClassifier,
    spec: ModelSpec,
    images: Tensor,
    points: Tensor,
    *,
    num_points: int,
    point_samples: int,
) -> tuple[Tensor, Tensor]:
    """Classifies objects, averaged over views and over samples of points.

    Args:
        classifier: In evaluation mode.
        spec: Says how the towers want their inputs.
        images: (B, V, 3, S, S) uint8.
        points: (B, N, 3) float32 in random order.
        num_points: Points of a sample; at most N.
        point_samples: Samples to average over.

    Returns:
        (B, C) logits of the image tower and (B, C) of the point tower: means over the views and
        over the samples. Nothing is random: the same objects get the same logits.
    """
    (B, V), N = images.shape[:2], points.shape[1]
    views = resize_images(to_float(images.flatten(0, 1)), classifier.image.image_size)
    views = normalize_images(views, spec.image_mean, spec.image_std)
    image_logits = classifier.logits(classifier.image.embed(views)).unflatten(0, (B, V)).mean(dim=1)

    # The same places of every cloud: clouds are in random order, so that is a fair sample, and it
    # does not depend on which objects share a batch.
    generator = torch.Generator().manual_seed(0)
    index = torch.stack(
        [torch.randperm(N, generator=generator)[:num_points] for _ in range(point_samples)]
    ).to(points.device)
    samples = points[:, index].flatten(0, 1)
    embeds = classifier.point.embed(samples)
    point_logits = classifier.logits(embeds).unflatten(0, (B, point_samples)).mean(dim=1)
    return image_logits.float(), point_logits.float()


def fuse(image_logits: Tensor, point_logits: Tensor) -> Tensor:
    """Averages both towers' probabilities: (B, C) and (B, C) logits to (B, C) probabilities."""
    return (image_logits.softmax(dim=-1) + point_logits.softmax(dim=-1)) / 2


class Predictor:
    """Holds several models and asks each about the same rows.

    Args:
        models: Model folders by the name that the report gives them.
        classes: C names.
        templates: Prompts of the zero-shot classifier.
        num_points: Points of a sample.
        config: Views and samples to average over.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        classes: Sequence[str],
        templates: Sequence[str],
        num_points: int,
        config: EvaluationConfig,
    ) -> None:
        self.classes = list(classes)
        self.num_points = num_points
        self.config = config
        torch.set_num_threads(config.threads_per_actor)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.models = {}
        for name, path in models.items():
            folder = load_model(path)
            classifier = folder.classifier(classes, templates).eval().to(self.device)
            self.models[name] = (classifier, folder.model.spec)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Gives one row per object and model: its best classes by each opinion."""
        clouds = decode_points(table["points"])
        shortest = min(len(cloud) for cloud in clouds)
        points = torch.from_numpy(np.stack([cloud[:shortest] for cloud in clouds])).to(self.device)
        columns: dict[str, list[object]] = {"object_id": [], "label": [], "path": [], "model": []}
        for opinion in OPINIONS:
            columns |= {f"ranked_{opinion}": [], f"confidence_{opinion}": []}
        for name, (classifier, spec) in self.models.items():
            size = view_size(classifier.image.image_size)
            images = np.stack(
                [
                    self._views(object_id.as_py(), views.as_py(), size)
                    for object_id, views in zip(table["object_id"], table["views"], strict=True)
                ]
            )
            image_logits, point_logits = predict_logits(
                classifier,
                spec,
                torch.from_numpy(images).to(self.device),
                points,
                num_points=self.num_points,
                point_samples=self.config.point_samples,
            )
            probabilities = {
                "image": image_logits.softmax(dim=-1),
                "point": point_logits.softmax(dim=-1),
                "fused": fuse(image_logits, point_logits),
            }
            columns["object_id"] += table["object_id"].to_pylist()
            columns["label"] += match_labels(table["label"].to_pylist(), self.classes)
            columns["path"] += table["path"].to_pylist()
            columns["model"] += [name] * table.num_rows
            for opinion, probability in probabilities.items():
                best = probability.topk(min(NUM_RANKED, len(self.classes)), dim=-1)
                columns[f"ranked_{opinion}"] += [
                    [self.classes[place] for place in row] for row in best.indices.tolist()
                ]
                columns[f"confidence_{opinion}"] += best.values[:, 0].tolist()
        return pa.table(columns, schema=PREDICTION_SCHEMA)

    def _views(self, object_id: str, views: Sequence[bytes], size: int) -> npt.NDArray[np.uint8]:
        used = ring_views(min(self.config.num_views, len(views)), len(views))
        if self.config.random_view:
            # By lot, and yet the same on every machine and for every model.
            used = [used[hash_id(object_id) % len(used)]]
        return np.stack([decode_view(views[place], size) for place in used])


PREDICTION_SCHEMA = pa.schema(
    [
        ("object_id", pa.string()),
        ("label", pa.string()),
        ("path", pa.string()),
        ("model", pa.string()),
        *(
            field
            for opinion in OPINIONS
            for field in (
                (f"ranked_{opinion}", pa.list_(pa.string())),
                (f"confidence_{opinion}", pa.float32()),
            )
        ),
    ]
)
