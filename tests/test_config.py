"""Configs: what is refused and how, overrides, and that no field and no file lies idle."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import crossmost_ray
from crossmost_ray.config import (
    AdaptConfig,
    ConfigError,
    EvaluateConfig,
    LossWeights,
    PretrainConfig,
    PretrainWeights,
    check_classes,
    config_dict,
    keys_of,
    load_config,
    parse_config,
    resolve_path,
)

PACKAGE = Path(crossmost_ray.__file__).parent
PROJECT = PACKAGE.parent
CLASS_OF_FOLDER = {"adapt": AdaptConfig, "pretrain": PretrainConfig, "evaluate": EvaluateConfig}
CONFIG_FILES = [
    file
    for folder in CLASS_OF_FOLDER
    for file in sorted((PROJECT / "configs" / folder).glob("*.yaml"))
]


def parse(**sections: Any) -> AdaptConfig:
    """Parses a config of the fewest keys, with these sections added."""
    values = {"name": "first", "model": "m", "data": {"shards": "s"}}
    data = {"data": {"shards": "s", **sections.pop("data", {})}}
    return parse_config(AdaptConfig, values | data | sections, "x.yaml")


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        parse(**sections)
    return str(refused.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = "name: first\nmodel: m\ndata:\n  shards: s\n"


def test_all_slips_are_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name: first
        mode: crossmots
        sed: 1
        data: {shards: s, bach_size: 8, num_points: many}
        pseudo_labels: {threshold: 84}
        ema: {start: 0.999, end: 0.99}
        zzzzzz: 1
        """,
    )
    with pytest.raises(ConfigError) as refused:
        load_config(AdaptConfig, path)
    first, *lines = str(refused.value).splitlines()
    assert first == f"{path} cannot be run:"
    problems = dict(line.strip().split(": ", 1) for line in lines)
    assert problems.keys() == {
        "model",
        "mode",
        "sed",
        "data.bach_size",
        "data.num_points",
        "pseudo_labels.threshold",
        "ema",
        "zzzzzz",
    }
    assert problems["model"] == "is needed and missing"
    assert problems["sed"] == "no such key; did you mean seed?"
    assert problems["data.bach_size"] == "no such key; did you mean data.batch_size?"
    assert problems["zzzzzz"] == "no such key"
    assert "'crossmost'" in problems["mode"]
    assert problems["mode"].endswith("got 'crossmots'")
    assert problems["data.num_points"].endswith("got 'many'")
    assert "less than or equal to 1" in problems["pseudo_labels.threshold"]
    assert problems["ema"] == "start 0.999 is above end 0.99"


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../up"}, "name"),
        ({"mode": "both"}, "mode"),
        ({"data": None}, "data"),
        ({"optim": []}, "optim"),
        ({"data": {"batch_size": 0}}, "data.batch_size"),
        ({"data": {"batch_size": 1.5}}, "data.batch_size"),
        ({"data": {"classes": "chair"}}, "data.classes"),
        ({"data": {"classes": ["a", 3]}}, "data.classes.1"),
        ({"data": {"bad_rows": "ignore"}}, "data.bad_rows"),
        ({"image_augment": {"rand_magnitude": 10.5}}, "image_augment.rand_magnitude"),
        ({"point_augment": {"dropout": 1.0}}, "point_augment.dropout"),
        ({"mask": {"image_ratio": float("nan")}}, "mask.image_ratio"),
        ({"weights": {"alignment": -0.1}}, "weights.alignment"),
        ({"optim": {"lr": 0}}, "optim.lr"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"layer_decay": 0.0}}, "optim.layer_decay"),
        ({"optim": {"layer_decay": 1.01}}, "optim.layer_decay"),
        ({"cluster": {"precision": "float16"}}, "cluster.precision"),
        ({"cluster": {"use_gpu": "perhaps"}}, "cluster.use_gpu"),
        ({"evaluation": {"confident": 1.2}}, "evaluation.confident"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(
    sections: dict[str, Any], key: str
) -> None:
    values = {"name": "first", "model": "m", "data": {"shards": "s"}}
    for name, value in sections.items():
        both = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if both else value  # type: ignore[dict-item]
    with pytest.raises(ConfigError) as refused:
        parse_config(AdaptConfig, values, "x.yaml")
    _, line = str(refused.value).splitlines()
    assert line.startswith(f"  {key}: ")


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        (
            {"pseudo_labels": {"threshold": 0.95}},
            "point_weight 0.9 is below threshold 0.95: no point prediction could ever be selected",
        ),
        ({"point_augment": {"scale_low": 3}}, "scale_low 3.0 is above scale_high 2.0"),
        ({"mask": {"point_ratio_low": 0.5}}, "point_ratio_low 0.5 is above point_ratio_high 0.4"),
        ({"ema": {"end": 0.5}}, "start 0.99 is above end 0.5"),
        ({"optim": {"lr": 1e-7}}, "min_lr 1e-06 is above lr 1e-07"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(sections: dict[str, Any], rule: str) -> None:
    (section,) = sections
    assert refusal(**sections).splitlines()[1:] == [f"  {section}: {rule}"]


def test_more_parts_than_a_worker_has_pairs_are_refused() -> None:
    told = refusal(
        data={"shards": "s", "batch_size": 32},
        optim={"accumulate": 9},
        cluster={"num_workers": [1, 4]},
    )
    assert "optim.accumulate 9 cuts a worker's 8 pairs of data.batch_size 32 into more" in told


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ([], "is empty"),
        (["chair"], "holds one class only"),
        (["chair", "table", "chair", "sofa", "sofa"], "names chair, sofa more than once"),
        (["chair", " "], "holds a blank name"),
        (["chair", ""], "holds a blank name"),
    ],
)
def test_classes_that_make_no_classifier_are_refused(classes: list[str], problem: str) -> None:
    assert f"data.classes {problem}" in refusal(data={"classes": classes})
    with pytest.raises(ValueError, match=f"^the list of Ada {problem}"):
        check_classes(classes, "the list of Ada")


@pytest.mark.parametrize("templates", [[], ["a chair."], ["a {}.", "{"], ["a {} and a {}."], [""]])
def test_templates_without_one_place_for_the_name_are_refused(templates: list[str]) -> None:
    assert "template" in refusal(data={"templates": templates})


def test_a_number_written_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 2e-5, without a dot, as text.
    path = write(tmp_path, MINIMAL + "optim: {lr: 2e-5, min_lr: 1E-7}\n")
    assert load_config(AdaptConfig, path).optim.lr == 2e-5
    assert load_config(AdaptConfig, path, ["optim.lr=3e-4"]).optim.lr == 3e-4
    assert load_config(AdaptConfig, path).optim.min_lr == 1e-7


def test_overrides_win_and_make_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "seed: 1\n")
    overrides = ["seed=2", "data.batch_size=8", "data.classes=[a, b]", "optim.epochs=3", "seed=5"]
    config = load_config(AdaptConfig, path, overrides)
    assert (config.seed, config.data.batch_size, config.optim.epochs) == (5, 8, 3)
    assert config.data.classes == ["a", "b"]
    assert config.data.shards == "s"
    assert load_config(AdaptConfig, path, ["data.test_shards=null"]).data.test_shards is None
    assert load_config(AdaptConfig, path, ["output=a=b"]).output == "a=b"


@pytest.mark.parametrize("override", ["seed", "=1", ""])
def test_what_is_no_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is no override; write dotted\.key=value"):
        load_config(AdaptConfig, write(tmp_path, MINIMAL), [override])


def test_an_override_through_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'name\.x=1': name holds a value, not keys"):
        load_config(AdaptConfig, write(tmp_path, MINIMAL), ["name.x=1"])


def test_an_override_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'data.classes=\[a': the value is not YAML"):
        load_config(AdaptConfig, write(tmp_path, MINIMAL), ["data.classes=[a"])


def test_an_override_of_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.bach_size: .* did you mean data\.batch_size\?"):
        load_config(AdaptConfig, write(tmp_path, MINIMAL), ["data.bach_size=2"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    for missing in (path, tmp_path):
        with pytest.raises(ConfigError, match=f"there is no config file '{missing}'"):
            load_config(AdaptConfig, missing)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tname: x"])
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"{path} is not a YAML file: "):
        load_config(AdaptConfig, path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8name")
    with pytest.raises(ConfigError, match=f"{path} is not a YAML file: "):
        load_config(AdaptConfig, path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "first\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must hold keys and values, such as 'name: first-try'"):
        load_config(AdaptConfig, write(tmp_path, text))


def test_yaml_is_read_without_running_anything(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, f"name: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ConfigError):
        load_config(AdaptConfig, path)
    assert not mark.exists()


def test_paths() -> None:
    assert resolve_path("assets:furniture/x") == PACKAGE / "assets" / "furniture" / "x"
    assert resolve_path("~/x") == Path.home() / "x"
    assert resolve_path("some/x") == Path.cwd() / "some" / "x"
    assert resolve_path("/some/x") == Path("/some/x")


def test_keys_of_names_sections_and_what_is_in_them() -> None:
    keys = list(keys_of(AdaptConfig))
    assert {"seed", "data", "data.batch_size", "optim", "optim.lr"} < set(keys)
    assert len(keys) == len(set(keys))
    assert all("." in key or hasattr(parse(), key) for key in keys)


@pytest.mark.parametrize("cls", [AdaptConfig, PretrainConfig])
def test_a_config_spelled_out_reads_back_as_itself(cls: type[Any]) -> None:
    values = {"name": "first", "data": {"shards": "s", "classes": ["a", "b"]}}
    if cls is AdaptConfig:
        values["model"] = "m"
    config = parse_config(cls, values, "x.yaml")
    plain = yaml.safe_load(yaml.safe_dump(config_dict(config)))
    assert parse_config(cls, plain, "x.yaml") == config
    leaves = {key for key in keys_of(cls) if not any(k.startswith(f"{key}.") for k in keys_of(cls))}
    assert {key for key in leaves if key.startswith("optim.")} == {
        f"optim.{name}" for name in plain["optim"]
    }


def fields_of(cls: Any) -> Iterator[tuple[str, str]]:
    """Yields (class, field) of a config and its sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield cls.__name__, field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name])


def test_every_field_is_read() -> None:
    # A key that nothing reads misleads whoever sets it. The weights are read all together, by
    # name; that each has its term is what tests/training/ says.
    read = {
        node.attr
        for folder in (PACKAGE, PROJECT / "jobs")
        for file in folder.rglob("*.py")
        if file != PACKAGE / "config.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    weights = {LossWeights.__name__, PretrainWeights.__name__}
    idle = {
        f"{cls}.{name}"
        for config in (AdaptConfig, PretrainConfig, EvaluateConfig)
        for cls, name in fields_of(config)
        if cls not in weights and name not in read
    }
    assert not idle


@pytest.mark.parametrize(
    "path", CONFIG_FILES, ids=[f"{file.parent.name}/{file.name}" for file in CONFIG_FILES]
)
def test_the_config_files_load(path: Path) -> None:
    config: Any = load_config(CLASS_OF_FOLDER[path.parent.name], path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "a config opens with what it is for"
    assert f"python jobs/{path.parent.name}.py configs/{path.parent.name}/{path.name}" in text
    for line in text.splitlines():
        _, _, asset = line.partition("assets:")
        if asset:
            assert resolve_path(f"assets:{asset}").is_dir(), asset
    assert config.name


# Dataset: objects to train on (None: unpublished), passes over a view of each, objects in a step.
PUBLISHED_DATA = {
    "modelnet40": (9843, 200, 512),
    "modelnet10": (3991, 200, 512),
    "modelnet40depth": (9840, 200, 512),
    "co3d": (None, 150, 512),
    "redwood": (None, 200, 256),
    "scanobjectnn": (2309, 200, 512),
    "scanobjectnn_withbg": (2309, 200, 512),
    "scanobjectnn_hardest": (11416, 200, 512),
}
# Dataset: threshold and weight of the points' confidence of the joint labels; thresholds of the
# image tower and of the point tower on its own.
PUBLISHED_LABELS = {
    "modelnet40": (0.84, 0.9, 0.80, 0.82),
    "modelnet10": (0.84, 0.9, 0.84, 0.84),
    "modelnet40depth": (0.84, 0.9, 0.84, 0.84),
    "co3d": (0.84, 0.9, 0.80, 0.82),
    "redwood": (0.82, 1.0, 0.82, 0.82),
    "scanobjectnn": (0.82, 1.0, 0.80, 0.82),
    "scanobjectnn_withbg": (0.82, 1.0, 0.60, 0.60),
    "scanobjectnn_hardest": (0.82, 1.0, 0.60, 0.60),
}
NUM_CLASSES = {"co3d": 42, "redwood": 9, "modelnet40": 40, "modelnet40depth": 40, "modelnet10": 10}


def published(dataset: str, mode: str) -> AdaptConfig:
    return load_config(AdaptConfig, PROJECT / "configs" / "adapt" / f"{dataset}_{mode}.yaml")


@pytest.mark.parametrize("mode", ["crossmost", "baseline"])
@pytest.mark.parametrize("dataset", PUBLISHED_DATA)
def test_the_published_settings(dataset: str, mode: str) -> None:
    config = published(dataset, mode)
    assert (config.name, config.mode) == (f"{dataset}_{mode}", mode)
    assert config.data.shards == f"data/{dataset}/train"
    assert config.data.test_shards == f"data/{dataset}/test"
    assert config.data.classes is not None
    assert len(config.data.classes) == NUM_CLASSES.get(dataset, 15)
    assert (len(config.data.templates), config.data.teacher_views) == (64, 1)
    joint, weight, image, point = PUBLISHED_LABELS[dataset]
    labels = config.pseudo_labels
    if mode == "crossmost":
        assert (labels.threshold, labels.point_weight) == (joint, weight)
    else:
        assert (labels.threshold_image, labels.threshold_point) == (image, point)
    weights = dataclasses.asdict(config.weights)
    assert weights | {"global_local_image": 0.2, "global_local_point": 0.2} == weights
    for term in ("self_training", "fairness", "masked"):
        assert (weights[f"{term}_image"], weights[f"{term}_point"]) == (1, 1)
    assert weights["alignment"] == 1
    assert (config.ema.start, config.ema.end, config.ema.ramp_steps) == (0.99, 0.9998, 400)
    assert (config.mask.image_ratio, config.mask.image_cell) == (0.3, 2)
    assert (config.mask.point_ratio_low, config.mask.point_ratio_high) == (0.3, 0.4)
    assert (config.optim.layer_decay, config.optim.weight_decay) == (0.65, 0.05)


@pytest.mark.parametrize("mode", ["crossmost", "baseline"])
@pytest.mark.parametrize("dataset", PUBLISHED_DATA)
def test_the_published_schedules(dataset: str, mode: str) -> None:
    config = published(dataset, mode)
    objects, passes, batch = PUBLISHED_DATA[dataset]
    data, optim = config.data, config.optim
    assert data.batch_size == batch
    # The published rates are multiplied by the share of 256 objects in a step.
    assert optim.lr == pytest.approx(2e-5 * batch / 256)
    assert optim.min_lr == pytest.approx(1e-6 * batch / 256)
    if objects is None:
        assert optim.epochs * data.num_views == passes
        assert optim.warmup_epochs * data.num_views == pytest.approx(1)
        return
    # Every worker drops what does not fill its last batch.
    workers = config.cluster.num_workers
    theirs = -(-objects // workers) // (batch // workers)
    ours = objects * data.num_views // workers // (batch // workers)
    # 810 steps stand for 800, 3,910 for 3,800.
    assert ours * optim.epochs == pytest.approx(theirs * passes, rel=0.03)
    assert round(optim.warmup_epochs * ours) == theirs
