"""The mapping from catalogue names to classes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.classes import ClassMapping, label_objects
from crossmost_ray.prepare.sources.base import Object


def item(source: str, identifier: str, caption: str) -> Object:
    return Object(f"{source}/{identifier}", source, "all", (caption,))


OBJECTS = [item("one", "c1", "Chair"), item("one", "c2", "Chair"), item("two", "c1", "Chair")]


def test_a_name_counts_only_in_the_catalogue_it_is_listed_for() -> None:
    mapping = ClassMapping(classes={"chair": {"one": ["Chair"]}})
    assert label_objects(OBJECTS, mapping) == {"one/c1": "chair", "one/c2": "chair", "two/c1": None}


def test_an_exception_wins_over_the_name() -> None:
    mapping = ClassMapping(
        classes={"chair": {"one": ["Chair"]}, "stool": {}},
        exceptions={"one/c1": "stool", "one/c2": None},
    )
    assert label_objects(OBJECTS, mapping) == {"one/c1": "stool", "one/c2": None, "two/c1": None}


def test_names_that_match_nothing_are_listed_all_at_once() -> None:
    mapping = ClassMapping(
        classes={"chair": {"one": ["Chairs"], "tow": ["Chair"]}}, exceptions={"one/c9": None}
    )
    with pytest.raises(ConfigError) as error:
        label_objects(OBJECTS, mapping)
    assert "one/Chairs; did you mean one/Chair?" in str(error.value)
    assert "tow/Chair; did you mean two/Chair?" in str(error.value)
    assert "one/c9" in str(error.value)


def test_a_name_cannot_be_in_two_classes() -> None:
    with pytest.raises(ValidationError, match="one/Chair is in chair and in seat"):
        ClassMapping(classes={"chair": {"one": ["Chair"]}, "seat": {"one": ["Chair"]}})


def test_an_exception_needs_a_listed_class() -> None:
    with pytest.raises(ValidationError, match="one/c1 is given the class sofa, which is not"):
        ClassMapping(classes={"chair": {"one": ["Chair"]}}, exceptions={"one/c1": "sofa"})


def test_the_mapping_of_the_embedded_data_loads() -> None:
    mapping = load_config(ClassMapping, "configs/classes/furniture.yaml")
    assert len(mapping.classes) >= 14
    assert list(mapping.classes) == sorted(mapping.classes)
