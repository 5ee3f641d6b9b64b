"""A mapping file and the objects of the catalogues in, the class of each object out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import field

from pydantic.dataclasses import dataclass

from crossmost_ray.config import STRICT, ConfigError
from crossmost_ray.prepare.sources.base import Object


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassMapping:
    """Which catalogue names belong to which class."""

    classes: dict[str, dict[str, list[str]]]
    """Class, in the order of the indices; under it catalogue; under that the exact names."""

    exceptions: dict[str, str | None] = field(default_factory=dict)
    """Object id and its class or null, for objects that their name would put wrongly."""

    def __post_init__(self) -> None:
        owners: dict[tuple[str, str], str] = {}
        for label, catalogues in self.classes.items():
            for catalogue, names in catalogues.items():
                for name in names:
                    other = owners.setdefault((catalogue, name), label)
                    if other != label:
                        raise ValueError(f"{catalogue}/{name} is in {other} and in {label}")
        for object_id, exception in self.exceptions.items():
            if exception is not None and exception not in self.classes:
                raise ValueError(f"{object_id} is given the class {exception}, which is not listed")


def label_objects(objects: Sequence[Object], mapping: ClassMapping) -> dict[str, str | None]:
    """Finds the class of each object, or None.

    Raises:
        ConfigError: If the mapping names what no catalogue has; lists all such names.
    """
    by_name = {
        (catalogue, name): label
        for label, catalogues in mapping.classes.items()
        for catalogue, names in catalogues.items()
        for name in names
    }
    known_names = {(item.source, item.captions[0]) for item in objects}
    known_ids = {item.object_id for item in objects}
    captions = sorted({f"{source}/{caption}" for source, caption in known_names})
    wrong = [f"{source}/{name}" for source, name in by_name if (source, name) not in known_names]
    wrong += [object_id for object_id in mapping.exceptions if object_id not in known_ids]
    if wrong:
        lines = []
        for entry in wrong:
            near = difflib.get_close_matches(entry, captions + sorted(known_ids), n=1)
            lines.append(f"  {entry}" + (f"; did you mean {near[0]}?" if near else ""))
        raise ConfigError(
            "\n".join(["the class mapping names what no catalogue has; correct or remove:", *lines])
        )
    return {
        item.object_id: mapping.exceptions.get(
            item.object_id, by_name.get((item.source, item.captions[0]))
        )
        for item in objects
    }
