"""Which object goes where, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crossmost_ray.config import ConfigError, parse_config
from crossmost_ray.prepare.config import PrepareConfig
from crossmost_ray.prepare.plan import chunks_of, make_plan
from crossmost_ray.prepare.shards import shuffle_key

from .catalogue import catalogue_config, entry, model, write_catalogue


def write(folder: Path, name: str, *captions: str) -> Path:
    entries = "".join(
        entry(place, caption, f"o{place}") for place, caption in enumerate(captions, start=1)
    )
    return write_catalogue(folder / f"{name}.sh3f", entries, model("o1"))


def config(folder: Path, *sources: Any, **more: Any) -> PrepareConfig:
    mapping = {"classes": {"chair": {"s": ["Chair"]}}}
    (folder / "classes.yaml").write_text(yaml.safe_dump(mapping))
    values: dict[str, Any] = {
        "class_mapping": str(folder / "classes.yaml"),
        "licenses": {"CC0": "x"},
        "output": str(folder / "out"),
    }
    return PrepareConfig(name="tiny", sources=sources, **{**values, **more})


@pytest.mark.parametrize(("teach", "captions"), [(True, ("Chair", "chair")), (False, ("Chair",))])
def test_only_sources_that_teach_put_the_class_among_the_captions(
    tmp_path: Path, teach: bool, captions: tuple[str, ...]
) -> None:
    path = write(tmp_path, "s", "Chair", "Rug")
    plan = make_plan(config(tmp_path, catalogue_config(path, "s", teach_labels=teach)))
    found = {item.object_id: item for item in plan.datasets["all"]}
    assert (found["s/o1"].captions, found["s/o1"].label) == (captions, "chair")
    assert (found["s/o2"].captions, found["s/o2"].label) == (("Rug",), None)
    assert plan.classes == ("chair",)


def test_labels_can_be_left_out(tmp_path: Path) -> None:
    source = catalogue_config(write(tmp_path, "s", "Chair"), "s", teach_labels=True)
    plan = make_plan(config(tmp_path, source, ignore_labels=True))
    (only,) = plan.datasets["all"]
    assert (only.label, only.captions) == (None, ("Chair",))


def test_a_split_can_be_parted_into_halves(tmp_path: Path) -> None:
    path = write(tmp_path, "s", *["Chair"] * 12, "Rug")
    plan = make_plan(config(tmp_path, catalogue_config(path, "s", split="t", halves=True)))
    assert plan.datasets.keys() == {"t_a", "t_b", "t_other"}
    assert [item.object_id for item in plan.datasets["t_other"]] == ["s/o13"]
    assert plan.num_objects == 13


def test_rows_lie_in_an_order_of_their_own_and_shards_follow_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, "s", *["Chair"] * 7)
    plan = make_plan(config(tmp_path, catalogue_config(path, "s")))
    ids = [item.object_id for item in plan.datasets["all"]]
    assert ids == sorted(ids, key=shuffle_key) != sorted(ids)
    chunks = chunks_of(plan, 3)
    assert [(chunk.name, len(chunk.objects)) for chunk in chunks] == [
        ("part-00000", 3),
        ("part-00001", 3),
        ("part-00002", 1),
    ]
    assert [item.object_id for chunk in chunks for item in chunk.objects] == ids


def test_the_fingerprint_tells_what_would_be_written(tmp_path: Path) -> None:
    source = catalogue_config(write(tmp_path, "s", "Chair", "Rug"), "s")
    same = make_plan(config(tmp_path, source)).fingerprint
    elsewhere = config(tmp_path, source, output=str(tmp_path / "other"), overwrite=True)
    assert make_plan(elsewhere).fingerprint == same
    assert make_plan(config(tmp_path, source, num_points=99)).fingerprint != same
    write(tmp_path, "s", "Chair", "Carpet")
    assert make_plan(config(tmp_path, source)).fingerprint != same


def test_an_id_that_occurs_twice_is_named(tmp_path: Path) -> None:
    path = write_catalogue(
        tmp_path / "s.sh3f", entry(1, "Chair", "o1") + entry(2, "Rug", "o1"), model("o1")
    )
    with pytest.raises(ConfigError, match="the id s/o1 occurs twice"):
        make_plan(config(tmp_path, catalogue_config(path, "s")))


def test_slips_of_the_config_are_listed_at_once() -> None:
    values: dict[str, Any] = {
        "name": "x",
        "output": "out",
        "sources": [
            {"kind": "modelnet_off", "name": "m", "path": "p", "axes": "yyq", "license": "MIT"},
            {"kind": "folder", "name": "m", "path": "p", "halves": True},
        ],
    }
    with pytest.raises(ConfigError) as slip:
        parse_config(PrepareConfig, values, "the test")
    assert "sources.0.modelnet_off.axes" in str(slip.value)
    values["sources"][0]["axes"] = "yzx"
    with pytest.raises(ConfigError, match="sources names m more than once"):
        parse_config(PrepareConfig, values, "the test")
    values["sources"][0]["name"] = "n"
    with pytest.raises(ConfigError, match="licenses lacks MIT"):
        parse_config(PrepareConfig, values, "the test")
    values["licenses"] = {"MIT": "x"}
    with pytest.raises(ConfigError, match="sources m: `halves` needs a `split`"):
        parse_config(PrepareConfig, values, "the test")
