"""Units of work, and whose predictions a folder holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError, EvaluateConfig, EvaluationConfig, parse_config
from crossmost_ray.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from crossmost_ray.evaluation.plan import (
    FINGERPRINT_NAME,
    Corruption,
    Plan,
    Split,
    claim,
    expand_corruptions,
    fingerprint,
    list_units,
    make_plan,
)
from crossmost_ray.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from crossmost_ray.storage import Store
from tests.synthetic import CLASSES, write_shards


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_shards(tmp_path / "shards", num_objects=4)
    model = tmp_path / "model"
    model.mkdir()
    (model / WEIGHTS_NAME).write_bytes(b"weights")
    (model / CONFIG_NAME).write_text(json.dumps({"spec": 1, "training": {"seed": 0}}))
    return make_plan(
        {"m": str(model)},
        {"s": Split(str(tmp_path / "shards"), CLASSES, ("a {}.",), 128)},
        EvaluationConfig(),
    )


def told(plan: Plan) -> dict[str, object]:
    return fingerprint(plan, list_units(plan))


def test_the_config_knows_every_kind_of_corruption() -> None:
    for kind in CORRUPTIONS:
        config = EvaluationConfig(corruptions=[kind, f"{kind}-{SEVERITIES[-1]}"])
        expected = [Corruption(kind, severity) for severity in SEVERITIES]
        assert expand_corruptions(config.corruptions) == expected
    for wrong in ("fog", "noise-0", "noise-6", "noise-", "noise-3-1"):
        values = {
            "name": "n",
            "models": {"m": "m"},
            "splits": {"s": "s"},
            "evaluation": {"corruptions": [wrong]},
        }
        with pytest.raises(ConfigError, match=r"evaluation\.corruptions\.0"):
            parse_config(EvaluateConfig, values, "x.yaml")


def test_every_shard_is_a_unit_as_it_is_and_made_worse(plan: Plan) -> None:
    config = replace(plan.config, corruptions=["noise-2", "rotation-1"])
    units = list_units(replace(plan, config=config))
    assert [unit.path for unit in units] == [
        f"predictions/{variant}/part-0000{place}.parquet"
        for variant in ("s", "s+noise-2", "s+rotation-1")
        for place in (0, 1)
    ]


def test_a_split_is_a_folder_or_keys_with_classes_of_its_own() -> None:
    values = {
        "name": "n",
        "models": {"m": "m"},
        "splits": {"a": "x", "b": {"shards": "y", "classes": ["one", "two"]}},
    }
    config = parse_config(EvaluateConfig, values, "x.yaml")
    assert (config.splits["a"].shards, config.splits["a"].classes) == ("x", None)
    assert config.splits["b"].classes == ["one", "two"]
    with pytest.raises(ConfigError, match="must be called by letters"):
        make_plan({}, {"a+b": Split("x", (), (), 1)}, EvaluationConfig())


def test_the_same_measurement_is_gone_on_with_and_another_is_refused(
    plan: Plan, tmp_path: Path
) -> None:
    results = Store(str(tmp_path / "out"))
    claim(results, told(plan), overwrite=False)
    results.write("predictions/s/part-00000.parquet", b"one")
    faster = replace(plan.config, num_actors=4, batch_size=8, corruptions=["noise"])
    claim(results, told(replace(plan, config=faster)), overwrite=False)
    assert results.names("predictions/s") == ["part-00000.parquet"]

    asked = {"s": replace(plan.splits["s"], num_points=64)}
    other = replace(plan, splits=asked, config=replace(plan.config, num_views=1))
    with pytest.raises(
        ConfigError,
        match=r"in splits.s.num_points, evaluation.num_views; take another `name`, or set overwr",
    ):
        claim(results, told(other), overwrite=False)
    assert results.names("predictions/s") == ["part-00000.parquet"]
    claim(results, told(other), overwrite=True)
    assert results.names("predictions") == []
    claim(results, told(other), overwrite=False)


def test_other_weights_and_other_shards_make_another_measurement(
    plan: Plan, tmp_path: Path
) -> None:
    before = told(plan)
    config = tmp_path / "model" / CONFIG_NAME
    config.write_text(json.dumps({"spec": 1, "training": {"seed": 5}}))
    assert told(plan) == before, "how a model came about says nothing of what it answers"
    (tmp_path / "model" / WEIGHTS_NAME).write_bytes(b"weightz")
    changed = told(plan)
    assert changed["models"] != before["models"]
    assert changed["splits"] == before["splits"]
    write_shards(tmp_path / "shards", num_objects=6)
    assert told(plan)["splits"] != before["splits"]


def test_a_path_may_name_the_split(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "model").rename(tmp_path / "s-model")
    for_each = replace(plan, models={"m": f"{tmp_path}/{{split}}-model"})
    assert for_each.folders("s") == {"m": f"{tmp_path}/s-model"}
    results = Store(str(tmp_path / "out"))
    claim(results, told(for_each), overwrite=False)
    claim(results, told(replace(plan, models={"m": f"{tmp_path}/s-model"})), overwrite=False)


def test_files_that_moved_are_the_same_measurement(plan: Plan, tmp_path: Path) -> None:
    results = Store(str(tmp_path / "out"))
    claim(results, told(plan), overwrite=False)
    for name in ("model", "shards"):
        (tmp_path / name).rename(tmp_path / f"{name}-moved")
    moved = replace(
        plan,
        models={"m": str(tmp_path / "model-moved")},
        splits={"s": replace(plan.splits["s"], shards=str(tmp_path / "shards-moved"))},
    )
    claim(results, told(moved), overwrite=False)


def test_predictions_of_nobody_knows_whom_are_refused(plan: Plan, tmp_path: Path) -> None:
    results = Store(str(tmp_path / "out"))
    results.write("predictions/s/part-00000.parquet", b"one")
    for text in (None, b"{", b"[]"):
        if text is not None:
            results.write(FINGERPRINT_NAME, text)
        with pytest.raises(ConfigError, match="holds another measurement"):
            claim(results, told(plan), overwrite=False)
