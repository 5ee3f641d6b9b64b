"""The columns of a shard row and the tensors that travel between stages: what the rest agrees on.

Legend of the shapes, used in every docstring:
    B objects in a batch, V views of an object, N points of a cloud, C classes,
    D width of the shared embedding space, W workers, P patches of an image, G groups of a cloud.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

SHARD_SCHEMA = pa.schema(
    [
        # Stable across preparations: the source's own identifier, prefixed by the source's name.
        pa.field("object_id", pa.string(), nullable=False),
        # Free text: the source's own name for it, then names from a taxonomy where the source has
        # one, the most general last. Pre-training reads them, adaptation never does.
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        # Class name, or null. Read by reports and by nothing else.
        pa.field("label", pa.string()),
        # x-y-z of (N, 3) surface points, area-weighted, normalised into the unit sphere; the
        # manifest states the up axis. Rounded to half precision (the grid is finer than 1e-3 of the
        # radius), which compresses well, and stored as what every reader of Parquet knows.
        pa.field("points", pa.list_(pa.list_(pa.float32(), 3)), nullable=False),
        # (N, 3) sRGB 0-255 of the same points, or null where the source has no colour.
        pa.field("colors", pa.list_(pa.list_(pa.uint8(), 3))),
        # V encoded images (WebP, PNG or JPEG), in the order of the manifest's camera ring.
        pa.field("views", pa.list_(pa.binary()), nullable=False),
        pa.field("source", pa.string()),
        pa.field("author", pa.string()),
        pa.field("license", pa.string()),
    ]
)
"""Arrow schema of one shard; a folder of such Parquet files and a manifest.json is a dataset."""

MANIFEST_NAME = "manifest.json"

UNFINISHED_NAME = "UNFINISHED.json"
"""Lies in a dataset folder whose preparation is still going on, or was stopped."""


class RawBatch(NamedTuple):
    """B objects as they come from the shards, before any augmentation."""

    images: Tensor
    """(B, T, 3, S, S) uint8: T views of each object, the first of them the pair's own. In memory
    the channels lie last, as decoders leave them."""
    points: Tensor
    """(B, N, 3) float32, in the unit sphere, in random order."""
    object_id: Tensor
    """(B,) int64, a hash: equal for two pairs of one object."""
    captions: tuple[tuple[str, ...], ...]
    """The captions of each of the B objects; empty where the task does not read them."""
    names: tuple[str, ...]
    """The ids of the B objects as the shards give them."""


class PairBatch(NamedTuple):
    """Weak and strong augmentation of the same B objects, as tensors on the worker's device."""

    image_weak: Tensor
    """(B, T, 3, R, R) float32, normalised by the image tower's mean and deviation."""
    image_strong: Tensor
    """(B, 3, R, R) float32."""
    points_weak: Tensor
    """(B, T, N, 3) float32, in the unit sphere."""
    points_strong: Tensor
    """(B, N, 3) float32."""
    image_mask: Tensor
    """(B, P) bool, True where the student's patch is hidden."""
    object_id: Tensor
    """(B,) int64."""


class Prediction(NamedTuple):
    """What the two towers say of B objects."""

    image_embed: Tensor
    """(B, D) float32, unit length."""
    point_embed: Tensor
    """(B, D) float32, unit length."""
    image_logits: Tensor
    """(B, C) float32, cosines times exp(logit_scale)."""
    point_logits: Tensor
    """(B, C) float32."""


class PseudoLabels(NamedTuple):
    """One target per object for one tower."""

    target: Tensor
    """(B,) int64 class indices."""
    confidence: Tensor
    """(B,) float32 in [0, 1]."""
    selected: Tensor
    """(B,) bool: whether the object counts in the self-training loss."""
