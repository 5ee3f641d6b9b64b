"""Which trials a sweep has: closed forms and properties."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import AdaptConfig, ConfigError, config_dict, load_config
from crossmost_ray.storage import Store
from crossmost_ray.tuning.config import Axis
from crossmost_ray.tuning.space import (
    check_trials,
    corners,
    draw,
    plan,
    settings_text,
    trial_config,
    typed,
)
from tests.tuning.test_config import FURNITURE, sweep

GRIDS = st.dictionaries(
    st.sampled_from(["seed", "ema.end", "optim.lr", "weights.alignment"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    min_size=1,
)


@given(GRIDS)
def test_a_grid_is_crossed_fully(grids: dict[str, list[int]]) -> None:
    planned = plan(sweep(space={key: {"grid": values} for key, values in grids.items()}))
    assert len(planned) == math.prod(map(len, grids.values()))
    assert len({tuple(settings.items()) for settings in planned}) == len(planned)
    for key, values in grids.items():
        assert {settings[key] for settings in planned} == set(values)


def test_the_order_is_that_of_the_file_with_the_last_key_fastest() -> None:
    two = {"ema.end": {"grid": [0.9, 1.0]}, "seed": {"grid": [0, 1]}}
    planned = plan(sweep(space=two, trials=[{}, {"weights.alignment": 0}]))
    assert [settings["seed"] for settings in planned] == [0, 1] * 4
    assert [settings["ema.end"] for settings in planned] == [0.9, 0.9, 1.0, 1.0] * 2
    assert ["weights.alignment" in settings for settings in planned] == [False] * 4 + [True] * 4


RANDOM: dict[str, Any] = {
    "optim.lr": {"loguniform": [1e-5, 1e-2]},
    "ema.end": {"uniform": [0.9, 1.0]},
    "seed": {"randint": [3, 5]},
    "mode": {"choice": ["crossmost", "baseline"]},
}


@given(st.integers(1, 20), st.integers(0, 3))
def test_more_draws_leave_the_first_as_they_are(number: int, seed: int) -> None:
    few = plan(sweep(search="random", space=RANDOM, num_trials=number, seed=seed))
    many = plan(sweep(search="random", space=RANDOM, num_trials=number + 5, seed=seed))
    assert many[:number] == few
    assert many != plan(sweep(search="random", space=RANDOM, num_trials=number + 5, seed=seed + 1))


def test_another_key_leaves_the_draws_of_the_first_as_they_are() -> None:
    less = {key: axis for key, axis in RANDOM.items() if key != "seed"}
    with_seed = plan(sweep(search="random", space=RANDOM, num_trials=4))
    without = plan(sweep(search="random", space=less, num_trials=4))
    assert [{key: one[key] for key in less} for one in with_seed] == without


def test_each_draw_meets_every_combination_of_the_grids() -> None:
    space = {"optim.lr": {"uniform": [0.1, 0.9]}, "seed": {"grid": [0, 1, 2]}}
    planned = plan(sweep(search="random", space=space, num_trials=4))
    assert [settings["seed"] for settings in planned] == [0, 1, 2] * 4
    rates = [settings["optim.lr"] for settings in planned]
    assert rates[0] == rates[1] == rates[2] != rates[3]


def test_draws_follow_their_distributions() -> None:
    generator = np.random.default_rng(0)
    whole = [draw(Axis(randint=(3, 5)), generator) for _ in range(300)]
    assert set(whole) == {3, 4, 5}
    assert all(type(value) is int for value in whole)
    logs = np.log10([draw(Axis(loguniform=(1e-5, 1e-1)), generator) for _ in range(2000)])
    assert logs.min() >= -5
    assert logs.max() <= -1
    # Of a uniform distribution over a range of 4: mean -3, deviation 4 / sqrt(12).
    assert logs.mean() == pytest.approx(-3, abs=0.1)
    assert logs.std() == pytest.approx(4 / math.sqrt(12), abs=0.05)
    flat = np.array([draw(Axis(uniform=(-1, 3)), generator) for _ in range(2000)])
    assert flat.mean() == pytest.approx(1, abs=0.1)
    picked = [draw(Axis(choice=["a", None]), generator) for _ in range(400)]
    assert picked.count("a") == pytest.approx(200, abs=40)


@given(st.floats(1e-9, 1e3), st.floats(1.0001, 1e4), st.integers(0, 99))
def test_a_draw_stays_between_the_ends_however_it_is_rounded(
    low: float, factor: float, seed: int
) -> None:
    ends = (low, low * factor)
    for axis in (Axis(uniform=ends), Axis(loguniform=ends)):
        assert ends[0] <= draw(axis, np.random.default_rng(seed)) <= ends[1]


def test_corners_are_the_ends_and_all_choices() -> None:
    space = {"optim.lr": {"uniform": [0.1, 0.2]}, "seed": {"choice": [1, 2, 3]}}
    found = [
        tuple(one.values()) for one in corners(sweep(search="optuna", num_trials=1, space=space))
    ]
    assert sorted(found) == [(rate, seed) for rate in (0.1, 0.2) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return config_dict(load_config(AdaptConfig, FURNITURE))


def test_a_trial_is_the_base_but_for_its_settings_and_its_place(
    base: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"weights.alignment": 0.5, "model": "runs/a/teacher"}
    config = config_dict(
        trial_config(base, settings, name="trial-00001", folder=Store(str(tmp_path)))
    )
    expected = {**base, "name": "trial-00001", "output": str(tmp_path), "keep_checkpoints": 1}
    expected["weights"] = {**base["weights"], "alignment": 0.5}
    # Wherever its driver runs, the folder is the same one.
    expected["model"] = str(Path.cwd() / "runs/a/teacher")
    assert config == expected
    assert config["data"]["shards"] == "assets:furniture/target_a"


def test_every_bad_trial_is_told_of_before_one_starts(base: dict[str, Any]) -> None:
    planned = plan(
        sweep(
            space={
                "pseudo_labels.threshold": {"grid": [0.5, 1.1]},
                "ema.start": {"grid": [0.9, 0.999]},
            }
        )
    )
    with pytest.raises(ConfigError) as caught:
        check_trials(base, planned, folder=Store("runs"))
    said = str(caught.value)
    assert "trial-00001 (threshold=0.5 start=0.999)" in said
    assert "start 0.999 is above end 0.99" in said
    assert "trial-00002 (threshold=1.1 start=0.9)" in said
    assert "less than or equal to 1" in said


def test_numbers_that_yaml_took_for_text_become_numbers(base: dict[str, Any]) -> None:
    settings = {"optim.lr": "5e-4", "seed": 1, "mode": "baseline", "weights.alignment": 0}
    config = trial_config(base, settings, name="trial-00000", folder=Store("runs"))
    assert typed(settings, config) == {**settings, "optim.lr": 5e-4, "weights.alignment": 0.0}


def test_settings_are_shortened_where_that_is_unambiguous() -> None:
    assert settings_text({}) == "as the base"
    assert settings_text({"optim.lr": 0.00050001, "seed": 1}) == "lr=0.0005 seed=1"
    both = {"data.batch_size": 8, "evaluation.batch_size": 4}
    assert settings_text(both) == "data.batch_size=8 evaluation.batch_size=4"
