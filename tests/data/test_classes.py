"""Class lists, template sets and the spelling of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import (
    AdaptConfig,
    ConfigError,
    DataConfig,
    check_classes,
    config_dict,
    parse_config,
    resolve_path,
)
from crossmost_ray.data.classes import match_labels

# As the published code writes them, but for the space of Redwood's trash container; the order
# gives the label ids.
REFERENCE = {
    "modelnet40": "airplane bathtub bed bench bookshelf bottle bowl car chair cone cup curtain "
    "desk door dresser flower_pot glass_box guitar keyboard lamp laptop mantel monitor night_stand "
    "person piano plant radio range_hood sink sofa stairs stool table tent toilet tv_stand vase "
    "wardrobe xbox",
    "modelnet40_medium": "cone cup curtain door dresser glass_box mantel monitor night_stand "
    "person plant radio range_hood sink stairs stool tent toilet tv_stand vase wardrobe xbox",
    "modelnet40_hard": "cone curtain door dresser glass_box mantel night_stand person plant radio "
    "range_hood sink stairs tent toilet tv_stand xbox",
    "modelnet10": "bathtub bed chair desk dresser monitor night_stand sofa table toilet",
    "scanobjectnn": "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa "
    "toilet",
    "redwood": "chair table trash_container bench plant sign bicycle motorcycle sofa",
    "co3d": "bench skateboard backpack laptop cup umbrella teddybear bowl cake toyplane remote "
    "orange toaster couch apple bottle donut hairdryer hydrant toytrain pizza motorcycle suitcase "
    "banana toilet sandwich keyboard mouse toytruck handbag broccoli wineglass microwave "
    "baseballglove book carrot ball bicycle chair stopsign vase plant",
    "pix3d": "bed bookcase chair desk sofa table tool wardrobe",
}
COUNTS = {
    "modelnet40": 40,
    "modelnet40_medium": 22,
    "modelnet40_hard": 17,
    "modelnet10": 10,
    "scanobjectnn": 15,
    "redwood": 9,
    "co3d": 42,
    "pix3d": 8,
}
ALL_NAMES = ("modelnet40_64", "scanobjectnn_h5_64", "shapenet_64")


def data_config(**values: Any) -> DataConfig:
    sections = {"name": "first", "model": "m", "data": {"shards": "s", **values}}
    return parse_config(AdaptConfig, sections, "x.yaml").data


def classes_of(value: Any) -> list[str]:
    classes = data_config(classes=value).classes
    assert classes is not None
    return classes


def templates_of(value: Any) -> list[str]:
    return data_config(templates=value).templates


def problem_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        data_config(**values)
    _, line = str(refused.value).splitlines()
    return line.strip()


def names_in(kind: str) -> set[str]:
    return set(yaml.safe_load(resolve_path(f"assets:text/{kind}.yaml").read_text(encoding="utf-8")))


def test_every_list_is_known_here() -> None:
    assert names_in("classes") == COUNTS.keys() == REFERENCE.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_class_lists_have_the_published_classes_in_their_order(name: str) -> None:
    classes = classes_of(name)
    assert len(classes) == COUNTS[name]
    check_classes(classes, name)
    assert not any("_" in entry or entry != entry.strip().lower() for entry in classes)
    # Letters alone are compared, so this holds whatever the spelling, and fails on any other order.
    published = REFERENCE[name].split()
    assert [entry.replace(" ", "") for entry in classes] == [
        entry.replace("_", "") for entry in published
    ]
    assert match_labels(published, classes) == classes
    assert match_labels(classes, published) == published


@pytest.mark.parametrize(
    ("name", "place", "entry"),
    [
        ("modelnet40", 0, "airplane"),
        ("modelnet40", 23, "night stand"),
        ("modelnet40", 39, "xbox"),
        ("modelnet10", 6, "night stand"),
        ("scanobjectnn", 6, "display"),
        ("redwood", 2, "trash container"),
        ("co3d", 6, "teddy bear"),
        ("co3d", 17, "hair dryer"),
        ("co3d", 41, "plant"),
    ],
)
def test_names_are_written_as_in_a_sentence(name: str, place: int, entry: str) -> None:
    assert classes_of(name)[place] == entry


def test_the_smaller_lists_are_parts_of_modelnet40() -> None:
    whole, medium = set(classes_of("modelnet40")), set(classes_of("modelnet40_medium"))
    assert set(classes_of("modelnet40_hard")) < medium < whole
    assert set(classes_of("modelnet10")) < whole


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_large_set_has_64_different_prompts(name: str) -> None:
    templates = templates_of(name)
    assert len(templates) == len(set(templates)) == 64
    assert all(template.count("{}") == 1 for template in templates)
    assert templates == templates_of("modelnet40_64")


@pytest.mark.parametrize(
    ("template", "among"),
    [
        ("a point cloud model of {}.", True),
        ("There is the {} in the scene.", True),
        ("itap of my {}.", True),
        ("a photo of many {}.", True),
        ("a low resolution photo of the {}.", True),
        ("a photo of a hard to see {}.", True),
        ("a black and white photo of a {}", True),
        ("a black and white photo of the {}.", True),
        ("an embroidered {}.", True),
        ("the plushie {}.", True),
        ("a painting of a {}.", True),
        ("a black and white photo of a {}.", False),
        ("a photo of many {} in the scene.", False),
        ("a embroidered {}.", False),
        ("a 3D model of a {}.", False),
    ],
)
def test_the_large_set_has_the_published_prompts(template: str, among: bool) -> None:
    assert (template in templates_of("modelnet40_64")) == among


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("modelnet40", 1),
        ("modelnet10", 1),
        ("redwood", 2),
        ("pix3d", 2),
        ("co3d", 2),
        ("modelnet40_h5", 2),
        ("scanobjectnn_h5", 3),
    ],
)
def test_the_small_sets_hold_no_prompt_twice(name: str, count: int) -> None:
    templates = templates_of(name)
    assert len(templates) == len(set(templates)) == count


def test_every_set_is_one_that_a_config_takes() -> None:
    for name in names_in("templates"):
        assert templates_of(name)


def test_a_list_passes_as_it_is() -> None:
    assert classes_of(["b", "a"]) == ["b", "a"]
    assert templates_of(["a {}."]) == ["a {}."]
    assert templates_of("modelnet40") == ["a 3D model of a {}."] == data_config().templates
    assert data_config(classes=None).classes is None


def test_the_config_spells_a_named_list_out() -> None:
    data = data_config(classes="redwood", templates="co3d")
    written = yaml.safe_load(yaml.safe_dump(config_dict(data)))
    assert written["classes"] == classes_of("redwood")
    assert written["templates"] == ["a photo of a {}.", "a point cloud model of a {}."]
    assert DataConfig(**written) == data


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"classes": "modelnet4"}, "data.classes: there is no list and no file 'modelnet4'; "),
        ({"classes": "scanobject"}, "did you mean scanobjectnn?"),
        ({"classes": "zzz"}, "'zzz' (the lists are modelnet40, "),
        ({"templates": "modelnet40_46"}, "did you mean modelnet40_64 or "),
        ({"templates": "modelnet_64"}, "data.templates: there is no list and no file"),
        # A list of the other collection is none.
        ({"templates": "scanobjectnn"}, "did you mean scanobjectnn_h5"),
        ({"templates": "a {}."}, "one of your own goes into brackets"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(values: dict[str, str], problem: str) -> None:
    assert problem in problem_of(**values)


def test_a_text_file_has_one_entry_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "my_classes.txt"
    path.write_text("# mine\narm chair\r\n\n  lamp  \n# more\nbed", encoding="utf-8")
    assert classes_of(str(path)) == ["arm chair", "lamp", "bed"]
    monkeypatch.chdir(tmp_path)
    assert classes_of("my_classes.txt") == ["arm chair", "lamp", "bed"]
    Path("redwood").write_text("a\nb\n")
    assert len(classes_of("redwood")) == 9, "a list of the package wins over a file"
    Path("prompts").write_text("a {}.\none {}.\n")
    assert templates_of("prompts") == ["a {}.", "one {}."]


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_a_yaml_file_holds_a_list(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine.{suffix}"
    path.write_text("# mine\n- arm chair\n- lamp # the tall one\n", encoding="utf-8")
    assert classes_of(str(path)) == ["arm chair", "lamp"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.yaml", b"a: 1\n", "must hold a list, such as [chair, table]"),
        ("x.yaml", b"", "must hold a list"),
        ("x.yaml", b"[a", "can't be read as a list: "),
        ("x.txt", b"\xff\xfe", "can't be read as a list: "),
        ("x.txt", b"", "data.classes is empty"),
        ("x.txt", b"a\na\n", "names a more than once"),
    ],
)
def test_a_file_without_a_list_is_refused(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        data_config(classes=str(tmp_path / name))
    assert problem in str(refused.value)


def test_a_folder_is_no_list(tmp_path: Path) -> None:
    assert "can't be read as a list" in problem_of(classes=str(tmp_path))


def test_an_entry_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("[chair, 3]", encoding="utf-8")
    assert problem_of(classes=str(path)).startswith("data.classes.1: ")


def test_labels_of_any_spelling_name_their_class() -> None:
    classes = ["night stand", "teddy bear", "sofa"]
    labels = ["night_stand", "nightstand", "teddybear", "sofa", None, "lamp", "night  stand"]
    assert match_labels(labels, classes) == [
        "night stand",
        "night stand",
        "teddy bear",
        "sofa",
        None,
        "lamp",
        "night stand",
    ]
    assert match_labels(["night stand"], ["night_stand", "sofa"]) == ["night_stand"]


def test_a_label_that_could_name_two_classes_names_none() -> None:
    classes = ["tool box", "toolbox"]
    labels = ["tool box", "toolbox", "tool_box"]
    assert match_labels(labels, classes) == labels


@given(st.lists(st.text("ab _", min_size=1), min_size=1, unique=True))
def test_a_class_names_itself(classes: list[str]) -> None:
    assert match_labels(classes, classes) == classes
