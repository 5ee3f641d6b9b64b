"""What a sweep's YAML may say, and what is said back where it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crossmost_ray.config import AdaptConfig, ConfigError, config_dict, load_config, parse_config
from crossmost_ray.storage import Store
from crossmost_ray.tuning.config import SweepConfig, flatten, load_base, sweep_values, with_settings
from crossmost_ray.tuning.space import check_trials, corners, plan

ROOT = Path(__file__).parents[2]
FURNITURE = str(ROOT / "configs/adapt/furniture.yaml")
GRID: dict[str, Any] = {"seed": {"grid": [0, 1]}}


def sweep(**values: Any) -> SweepConfig:
    given = {"name": "sweep", "base": FURNITURE, "space": GRID, **values}
    return parse_config(SweepConfig, given, "the test")


def test_nested_and_dotted_keys_are_the_same() -> None:
    nested = {"data": {"num_views": 4}, "mode": "baseline", "cluster": {"env": {"A": "b"}}}
    dotted = {"data.num_views": 4, "mode": "baseline", "cluster.env": {"A": "b"}}
    assert flatten(nested) == dotted == flatten(dotted)
    assert sweep(overrides=nested).overrides == sweep(overrides=dotted).overrides
    space = {"pseudo_labels": {"threshold": {"grid": [0.6, 0.8]}}}
    assert list(sweep(space=space).space) == ["pseudo_labels.threshold"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"space": {"pseudo_labels.treshold": {"grid": [1]}}}, "pseudo_labels.threshold?"),
        ({"overrides": {"optim": {"epoch": 3}}}, "optim.epochs?"),
        ({"trials": [{"weight.alignment": 0}]}, "weights.alignment?"),
        ({"space": {"data.shards": {"grid": ["a", "b"]}}}, "set it under overrides"),
        ({"space": {"cluster.num_workers": {"grid": [1, 2]}}}, "set it under overrides"),
        ({"overrides": {"name": "x"}}, "set by the sweep itself"),
        ({"metric": "top1/fused"}, "no label-free score"),
        ({"metric": "oracle/top1_fused"}, "no label-free score"),
        ({"space": {}}, "nothing to vary"),
        ({"space": {"seed": {"grid": [0], "choice": [1]}}}, "has grid and choice"),
        ({"space": {"seed": {}}}, "has none"),
        ({"space": {"seed": {"uniform": [1, 0]}}}, "smaller number first"),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, "greater than 0"),
        ({"space": {"seed": {"grid": []}}}, "at least 1 item"),
        ({"space": {"seed": {"randint": [0, 9]}}}, "set search: random"),
        ({"num_trials": 3}, "follows from the grids"),
        ({"search": "random", "num_trials": 3}, "nothing to draw from"),
        ({"search": "random", "space": {"seed": {"choice": [0]}}}, "needs num_trials"),
        (
            {"search": "optuna", "num_trials": 3, "space": {**GRID, "ema.end": {"choice": [1]}}},
            "write choice in place of grid (seed)",
        ),
        ({"trials": [{"seed": 3}]}, "trials and space both set seed"),
        ({"overrides": {"seed": 3}}, "overrides also sets seed"),
        ({"scheduler": "hyperband"}, "'none', 'asha' or 'median'"),
    ],
)
def test_a_slip_is_named_with_the_way_out(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(**values)
    assert words in str(caught.value)


def test_slips_in_several_keys_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(overrides={"sed": 1}, space={"ema.strt": {"grid": [0.9]}, "emma": {"grid": [1]}})
    said = str(caught.value)
    assert "seed?" in said
    assert "ema.start?" in said
    assert "'emma'" in said


def test_a_base_takes_its_overrides_and_nothing_else_changes() -> None:
    plain = load_config(AdaptConfig, FURNITURE)
    base = load_base(sweep(overrides={"optim.epochs": 2, "weights.alignment": 0}))
    expected = config_dict(plain)
    expected["optim"]["epochs"], expected["weights"]["alignment"] = 2, 0.0
    assert config_dict(base) == expected


def test_a_scheduler_that_could_never_stop_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"grace_epochs is 4 and a trial has 4 epoch"):
        load_base(sweep(scheduler="asha", grace_epochs=4))
    load_base(sweep(scheduler="asha", grace_epochs=3))
    longer = {"optim.epochs": {"grid": [4, 8]}}
    load_base(sweep(scheduler="median", grace_epochs=4, space=longer))


def test_setting_keys_leaves_the_given_config_as_it_is() -> None:
    values = {"seed": 0, "optim": {"lr": 1.0, "epochs": 2}}
    changed = with_settings(values, {"seed": 1, "optim.lr": 2.0})
    assert changed == {"seed": 1, "optim": {"lr": 2.0, "epochs": 2}}
    assert values == {"seed": 0, "optim": {"lr": 1.0, "epochs": 2}}


def test_a_sweep_is_written_down_such_that_another_one_differs() -> None:
    one = sweep(overrides={"optim.epochs": 2})
    values = yaml.safe_load(yaml.safe_dump(sweep_values(one, load_base(one))))
    assert values["space"] == GRID
    assert values["base_config"]["optim"]["epochs"] == 2
    parse_config(AdaptConfig, values["base_config"], "what was written")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_ready_sweep_makes_only_runs_that_can_be_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    ready = load_config(SweepConfig, path)
    assert path.read_text().startswith("# ")
    assert f"#   python jobs/sweep.py configs/sweep/{path.name}" in path.read_text()
    base = load_base(ready)
    planned = list(corners(ready)) if ready.search == "optuna" else plan(ready)
    configs = check_trials(config_dict(base), planned, folder=Store(str(tmp_path)))
    assert len({config.name for config in configs}) == len(planned) > 1
    assert {config.keep_checkpoints for config in configs} == {1}
