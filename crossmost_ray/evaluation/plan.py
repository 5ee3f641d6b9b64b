"""Models and folders of shards in, out come the units of work, and the fingerprint that tells whose
predictions a folder of results holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossmost_ray.config import ConfigError, EvaluationConfig
from crossmost_ray.data.shards import list_shards, shard_store
from crossmost_ray.evaluation.corruptions import SEVERITIES
from crossmost_ray.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from crossmost_ray.storage import Store

EVALUATION_COLUMNS = ("object_id", "label", "points", "views")

FINGERPRINT_NAME = "evaluation.json"
PREDICTIONS_FOLDER = "predictions"

FORMAT = 1
"""Of the files of predictions; another one makes old folders those of another measurement."""

HARMLESS = (
    *("batch_size", "num_actors", "threads_per_actor"),
    *("confident", "corruptions", "bad_rows"),
)
"""Keys of `evaluation` that may change between a stop and going on: no finished file would be
another one, but for the last digits that a batch's size has a say in."""

PLACES = "places"
"""Key of a fingerprint that tells a reader where files lay; it makes no difference."""

CHUNK = 1 << 22

SPLIT_MARK = "{split}"

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption in one severity, as `corruptions.corrupt` takes them."""

    kind: str
    severity: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.severity}"


def expand_corruptions(names: Sequence[str]) -> list[Corruption]:
    """Spells out `noise-3` and `noise`, which stands for all severities; each once."""
    spelled = []
    for name in names:
        kind, _, severity = name.partition("-")
        severities = [int(severity)] if severity else SEVERITIES
        spelled += [Corruption(kind, one) for one in severities]
    return list(dict.fromkeys(spelled))


def variant_name(split: str, corruption: Corruption | None) -> str:
    """Names what the report lists: a split, or a split made worse, such as `test+noise-3`."""
    # Names of splits hold no plus.
    return split if corruption is None else f"{split}+{corruption}"


@dataclass(frozen=True)
class Split:
    """A folder of shards and what the models are asked about its objects."""

    shards: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    num_points: int
    """Points of a cloud that the models see."""


@dataclass(frozen=True)
class Unit:
    """A shard to be asked about as a whole, in one of its variants."""

    split: str
    name: str
    """Of the file, in the folder of the shards and in that of the predictions."""

    corruption: Corruption | None = None

    @property
    def variant(self) -> str:
        """What the report calls it."""
        return variant_name(self.split, self.corruption)

    @property
    def path(self) -> str:
        """Of its predictions, below the folder of results."""
        return f"{PREDICTIONS_FOLDER}/{self.variant}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured; can be sent to another process."""

    models: dict[str, str]
    """Model folders by the name that the report gives them; `{split}` stands for the split."""

    splits: dict[str, Split]
    config: EvaluationConfig

    def folders(self, split: str) -> dict[str, str]:
        """Gives the model folders by name for one split."""
        return {name: path.replace(SPLIT_MARK, split) for name, path in self.models.items()}

    @property
    def variants(self) -> list[tuple[str, Corruption | None]]:
        """Splits as they are and made worse, in the order of the report."""
        kinds = [None, *expand_corruptions(self.config.corruptions)]
        return [(split, kind) for split in self.splits for kind in kinds]


def make_plan(
    models: Mapping[str, str],
    splits: Mapping[str, Split],
    config: EvaluationConfig,
) -> Plan:
    """Makes a plan that means the same in every process, wherever its working directory is.

    Raises:
        ConfigError: If a split's name can't be that of a folder.
    """
    for name in splits:
        if not SPLIT_NAME.fullmatch(name):
            raise ConfigError(
                f"the split '{name}' must be called by letters, digits, dots, underscores and "
                "hyphens, for a folder of predictions takes its name"
            )
    return Plan(
        models={name: Store(path).address for name, path in models.items()},
        splits={
            name: dataclasses.replace(split, shards=shard_store(split.shards).address)
            for name, split in splits.items()
        },
        config=config,
    )


def list_units(plan: Plan) -> list[Unit]:
    """Lists the units in the order of the report.

    Raises:
        ConfigError: If a folder of shards can't be read.
    """
    files = {
        name: list_shards(split.shards, EVALUATION_COLUMNS) for name, split in plan.splits.items()
    }
    return [
        Unit(split, name, corruption)
        for split, corruption in plan.variants
        for name in files[split]
    ]


def fingerprint(plan: Plan, units: Sequence[Unit]) -> dict[str, Any]:
    """Says what the predictions depend on, as plain values for JSON.

    Raises:
        ConfigError: If a model folder can't be read.
    """
    folders = {split: plan.folders(split) for split in plan.splits}
    checksums = {
        path: _model_checksum(path) for path in {p for by in folders.values() for p in by.values()}
    }
    config = dataclasses.asdict(plan.config)
    return {
        "format": FORMAT,
        # As text, for an address may hold keys.
        PLACES: {
            "models": {name: str(Store(path)) for name, path in plan.models.items()},
            "splits": {name: str(Store(split.shards)) for name, split in plan.splits.items()},
        },
        "models": {
            name: {split: checksums[folders[split][name]] for split in plan.splits}
            for name in plan.models
        },
        "splits": {
            name: {
                "shards": _shards_checksum(
                    split.shards, [unit.name for unit in units if unit.variant == name]
                ),
                "classes": list(split.classes),
                "templates": list(split.templates),
                "num_points": split.num_points,
            }
            for name, split in plan.splits.items()
        },
        "evaluation": {key: value for key, value in config.items() if key not in HARMLESS},
    }


def claim(results: Store, told: Mapping[str, Any], *, overwrite: bool) -> None:
    """Makes a folder of results this measurement's, unless it holds another one.

    Args:
        results: The folder.
        told: What `fingerprint` gives.
        overwrite: Removes the predictions of another measurement.

    Raises:
        ConfigError: If it holds another measurement, or can't be read or written.
    """
    stored = results.read(FINGERPRINT_NAME)
    if stored is not None or results.names(PREDICTIONS_FOLDER):
        changed = _differences(_parse(stored or b""), told)
        if not changed:
            return
        if not overwrite:
            raise ConfigError(
                f"{results} holds another measurement, which differs in {', '.join(changed)}; "
                "take another `name`, or set overwrite=true to replace it"
            )
    # In this order, a stop in between leaves no prediction to the wrong fingerprint.
    results.remove(PREDICTIONS_FOLDER)
    results.write(FINGERPRINT_NAME, json.dumps(told, indent=1) + "\n")


def _parse(stored: bytes) -> dict[str, Any]:
    """Reads a fingerprint; what is none differs from every one."""
    try:
        parsed = json.loads(stored)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists the dotted keys whose values differ."""
    keys = []
    for key in dict.fromkeys((*old, *new)):
        if not prefix and key == PLACES:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(f"{prefix}{key}")
    return keys


def _model_checksum(path: str) -> str:
    """Sums up a model's weights and what they mean, without how they came about."""
    store = Store(path, key="model")
    digest = hashlib.sha256()
    try:
        with store.open_input(WEIGHTS_NAME) as weights:
            while chunk := weights.read(CHUNK):
                digest.update(chunk)
        config = json.loads(store.read(CONFIG_NAME) or b"{}")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as broken:
        reason = str(broken).partition("\n")[0]
        raise ConfigError(
            f"the model folder '{path}' can't be read ({reason}); copy it whole"
        ) from None
    config.pop("training", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def _shards_checksum(shards: str, names: Sequence[str]) -> str:
    """Sums up which shards there are, by their names and sizes."""
    sizes = shard_store(shards).sizes()
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {sizes[name]}\n".encode())
    return digest.hexdigest()
