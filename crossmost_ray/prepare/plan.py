"""A preparation config in, which object goes into which shard out; decided before any is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import crossmost_ray
from crossmost_ray.config import ConfigError, config_dict, load_config, resolve_path
from crossmost_ray.prepare.classes import ClassMapping, label_objects
from crossmost_ray.prepare.config import PrepareConfig, kind_of
from crossmost_ray.prepare.shards import half_of, shuffle_key
from crossmost_ray.prepare.sources import SOURCES
from crossmost_ray.prepare.sources.base import Object


@dataclass(frozen=True)
class Plan:
    """What a preparation is going to do."""

    datasets: dict[str, tuple[Object, ...]]
    """Labelled objects of each dataset folder, in the order of their rows."""

    classes: tuple[str, ...]
    """For the manifests, in the order of the indices."""

    fingerprint: str
    """Two plans with the same one write the same datasets."""

    @property
    def num_objects(self) -> int:
        """Of all datasets together."""
        return sum(len(objects) for objects in self.datasets.values())


@dataclass(frozen=True)
class Chunk:
    """The objects of one shard: a unit of work, and of what is done again after a stop."""

    dataset: str
    index: int
    objects: tuple[Object, ...]

    @property
    def name(self) -> str:
        """Of its shard, without the suffix."""
        return f"part-{self.index:05d}"


def make_plan(config: PrepareConfig) -> Plan:
    """Lists the sources' objects, gives them their labels and their places.

    Raises:
        ConfigError: If a source or the class mapping cannot be read, an id occurs twice, or there
            is no object at all.
    """
    listed = [list(SOURCES[kind_of(source)].list_objects(source)) for source in config.sources]
    objects = [item for items in listed for item in items]
    _check_ids(objects)
    labels: Mapping[str, str | None] = {item.object_id: item.label for item in objects}
    classes = sorted({label for label in labels.values() if label is not None})
    if config.class_mapping is not None:
        mapping = load_config(ClassMapping, resolve_path(config.class_mapping))
        # Of all objects, so that the mapping is checked as a whole whatever the limit.
        labels, classes = label_objects(objects, mapping), list(mapping.classes)
    if config.ignore_labels:
        labels = dict.fromkeys(labels)
    if config.classes is not None:
        classes = config.classes

    datasets: dict[str, list[Object]] = {}
    for items in listed:
        for item in items[: config.limit]:
            named = _labelled(item, labels[item.object_id], config)
            datasets.setdefault(dataset_of(named, config), []).append(named)
    if not datasets:
        raise ConfigError(
            f"the sources {', '.join(source.name for source in config.sources)} hold no object at "
            "all; mend their paths"
        )
    ordered = {
        name: tuple(sorted(members, key=lambda item: shuffle_key(item.object_id)))
        for name, members in datasets.items()
    }
    return Plan(ordered, tuple(classes), _fingerprint(ordered, config))


def dataset_of(item: Object, config: PrepareConfig) -> str:
    """Names the dataset folder of a labelled object."""
    source = config.source(item.source)
    split = item.split if source.split is None else source.split
    if not source.halves:
        return split
    return f"{split}_other" if item.label is None else f"{split}_{half_of(item.object_id)}"


def chunks_of(plan: Plan, objects_per_shard: int) -> list[Chunk]:
    """Cuts every dataset into the objects of its shards."""
    return [
        Chunk(name, index, objects[first : first + objects_per_shard])
        for name, objects in plan.datasets.items()
        for index, first in enumerate(range(0, len(objects), objects_per_shard))
    ]


def _labelled(item: Object, label: str | None, config: PrepareConfig) -> Object:
    if config.ignore_labels and item.label is not None:
        # Some collections know nothing of an object but its class, and caption it so.
        told = tuple(caption for caption in item.captions if caption != item.label)
        return replace(item, label=None, captions=told or (item.object_id,))
    # Captions teach. An object to be judged by does not carry its class among them.
    teach = label is not None and config.source(item.source).teach_labels
    captions = (*item.captions, label) if teach and label is not None else item.captions
    return replace(item, label=label, captions=captions)


def _check_ids(objects: Sequence[Object]) -> None:
    seen: set[str] = set()
    for item in objects:
        if item.object_id in seen:
            raise ConfigError(
                f"the id {item.object_id} occurs twice; give the sources that share it other names"
            )
        seen.add(item.object_id)


def _fingerprint(datasets: Mapping[str, Sequence[Object]], config: PrepareConfig) -> str:
    told: dict[str, Any] = {
        key: value
        for key, value in config_dict(config).items()
        if key not in ("output", "overwrite")
    }
    digest = hashlib.sha256(json.dumps([crossmost_ray.__version__, told], sort_keys=True).encode())
    for name, objects in datasets.items():
        for item in objects:
            digest.update(f"{name}\0{item.object_id}\0{item.label}\0{item.captions}\0".encode())
    return digest.hexdigest()
