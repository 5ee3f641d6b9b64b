"""A sweep's YAML in, a checked `SweepConfig` and the run that it varies out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from crossmost_ray.config import (
    STRICT,
    AdaptConfig,
    ConfigError,
    Count,
    Name,
    Natural,
    Positive,
    config_dict,
    keys_of,
    load_config,
    parse_config,
)

OWN = ("name", "output", "keep_checkpoints")
"""Keys of a run that the sweep sets for its trials."""

COMMON = (
    *("cluster", "evaluation", "trackers"),
    *("data.shards", "data.test_shards", "data.open_set_shards", "data.classes"),
)
"""Keys that all trials share: with other objects or classes, or another share of the cluster, their
scores and their seconds could not be compared."""

KEYS = tuple(keys_of(AdaptConfig))
SECTIONS = frozenset(key for key in KEYS if any(other.startswith(f"{key}.") for other in KEYS))


def flatten(values: Any, prefix: str = "") -> Any:
    """Spells nested keys of a run as dotted ones; what is no mapping passes as it is.

    `{data: {num_views: 4}}` and `{data.num_views: 4}` are the same. A mapping that is the value of
    a key, such as that of `cluster.env`, stays one.
    """
    if not isinstance(values, dict):
        return values
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in SECTIONS and isinstance(value, dict):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _known(refused: tuple[str, ...], values: Any) -> Any:
    """Takes keys of a run, nested or dotted, if there are such keys and a sweep may set them."""
    flat = flatten(values)
    if isinstance(flat, dict):
        problems = [problem for key in flat if (problem := _problem(key, refused))]
        if problems:
            raise ValueError("; ".join(problems))
    return flat


def _problem(key: str, refused: tuple[str, ...]) -> str | None:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        return f"'{key}' is no key of a run" + (f"; did you mean {near[0]}?" if near else "")
    if key in OWN:
        return f"'{key}' is set by the sweep itself; leave it out"
    if any(key == one or key.startswith(f"{one}.") for one in refused):
        return f"'{key}' is the same for all trials; set it under overrides"
    return None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Axis:
    """The values that one key takes: exactly one of these."""

    grid: Annotated[list[Any], Field(min_length=1)] | None = None
    """Each of them, crossed with those of all other grids."""

    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of them, all equally likely."""

    uniform: tuple[float, float] | None = None
    """A number between two."""

    loguniform: tuple[Positive, Positive] | None = None
    """A number between two, its logarithm equally likely everywhere."""

    randint: tuple[int, int] | None = None
    """A whole number between two, both included."""

    def __post_init__(self) -> None:
        kinds = [field.name for field in dataclasses.fields(self)]
        named = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(named) != 1:
            raise ValueError(
                f"takes one of {', '.join(kinds)}, and has {' and '.join(named) or 'none'}; "
                "write, say, {grid: [0.6, 0.8]}"
            )
        if (ends := self.ends) is not None and ends[0] >= ends[1]:
            raise ValueError(f"{self.kind} {list(ends)} must name the smaller number first")

    @property
    def kind(self) -> str:
        """Which one it is."""
        return next(
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        )

    @property
    def ends(self) -> tuple[float, float] | None:
        """The two numbers of a distribution over numbers; None of a list."""
        return self.uniform or self.loguniform or self.randint


Settings = Annotated[dict[str, Any], BeforeValidator(partial(_known, COMMON))]
Overrides = Annotated[dict[str, Any], BeforeValidator(partial(_known, ()))]
Space = Annotated[dict[str, Axis], BeforeValidator(partial(_known, COMMON))]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """Many runs of label-free adaptation that differ in some keys, compared without labels."""

    name: Name
    """Name of the sweep, and of its folder below `output`."""

    base: str
    """YAML file of the run that is varied."""

    overrides: Overrides = dataclasses.field(default_factory=dict)
    """Keys of the run that are set for all trials, nested or dotted."""

    trials: Annotated[list[Settings], Field(min_length=1)] | None = None
    """Settings, written out; crossed with `space` where both are given."""

    space: Space = dataclasses.field(default_factory=dict)
    """Keys of the run and the values that they take."""

    search: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination. random: `num_trials` draws from the distributions, each with every
    combination of the grids. optuna: `num_trials` trials, each proposed from the scores of those
    before it."""

    num_trials: Count | None = None
    """How many are drawn or proposed; not for search grid, whose number follows."""

    scheduler: Literal["none", "asha", "median"] = "none"
    """asha: at epochs `grace_epochs`, twice that, and so on, the worse half stops. median: a trial
    stops whose best score is below the median of the others' means."""

    grace_epochs: Count = 1
    """Epochs that every trial may run."""

    metric: str = "selection/score"
    """Score by which trials are stopped and ranked, higher being better; it reads no label."""

    max_concurrent: Count | None = None
    """Trials that run at once; None: as many as the cluster has room for, never more."""

    seed: Natural = 0
    """Of the draws. The trials' own is the key `seed` of the run."""

    output: str = "runs"
    """Folder of sweeps: a path that all nodes share, or an address such as `s3://bucket/runs`."""

    evaluate: bool = True
    """Whether the finished trials' teachers are measured at the end, for the report alone."""

    def __post_init__(self) -> None:
        if not self.metric.startswith("selection/"):
            raise ValueError(
                f"metric '{self.metric}' is no label-free score; take selection/score or another "
                "one whose name begins with selection/"
            )
        drawn = sorted(key for key, axis in self.space.items() if axis.kind != "grid")
        gridded = sorted(self.space.keys() - set(drawn))
        if not self.space and self.trials is None:
            raise ValueError("there is nothing to vary: give space, or trials, or both")
        if self.search == "grid":
            if drawn:
                raise ValueError(
                    f"search grid has no values to take for {', '.join(drawn)}; write them as "
                    "grid, or set search: random and num_trials"
                )
            if self.num_trials is not None:
                raise ValueError("num_trials of search grid follows from the grids; leave it out")
        elif self.num_trials is None:
            raise ValueError(f"search {self.search} needs num_trials")
        elif not drawn:
            raise ValueError(
                f"search {self.search} has nothing to draw from: no key of space has a choice, "
                "uniform, loguniform or randint; set search: grid"
            )
        if self.search == "optuna" and (gridded or self.trials is not None):
            raise ValueError(
                "search optuna proposes every value: write choice in place of grid "
                f"({', '.join(gridded) or 'trials'}), and no trials"
            )
        listed = {key for settings in self.trials or () for key in settings}
        if both := sorted(listed & self.space.keys()):
            raise ValueError(f"trials and space both set {', '.join(both)}; keep one of them")
        if both := sorted((listed | self.space.keys()) & self.overrides.keys()):
            raise ValueError(f"overrides also sets {', '.join(both)}, which varies; take it out")


def load_base(sweep: SweepConfig) -> AdaptConfig:
    """Reads the run that a sweep varies, its overrides applied.

    Raises:
        ConfigError: If the file is missing or the run has an error, or if the scheduler could never
            stop a trial of so few epochs.
    """
    values = config_dict(load_config(AdaptConfig, sweep.base))
    config = parse_config(
        AdaptConfig, with_settings(values, sweep.overrides), f"{sweep.base} with overrides"
    )
    longest = max((config.optim.epochs, *_values_of(sweep, "optim.epochs")))
    if sweep.scheduler != "none" and sweep.grace_epochs >= longest:
        raise ConfigError(
            f"grace_epochs is {sweep.grace_epochs} and a trial has {longest} epoch(s): scheduler "
            f"{sweep.scheduler} could never stop one; lower grace_epochs, raise "
            "overrides.optim.epochs, or set scheduler: none"
        )
    return config


def _values_of(sweep: SweepConfig, key: str) -> Iterator[int]:
    """Yields the numbers that a sweep names for a key."""
    axis = sweep.space.get(key)
    listed = [settings[key] for settings in sweep.trials or () if key in settings]
    named = [] if axis is None else axis.grid or axis.choice or axis.ends or []
    # What is no number is refused where the trials are checked.
    yield from (int(value) for value in (*listed, *named) if isinstance(value, int | float))


def with_settings(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a spelled-out config with some of its dotted keys set; the given one stays as it is."""
    copy: dict[str, Any] = {
        name: dict(value) if isinstance(value, dict) else value for name, value in values.items()
    }
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if dot:
            copy[section][name] = value
        else:
            copy[section] = value
    return copy


def sweep_values(sweep: SweepConfig, base: AdaptConfig) -> dict[str, Any]:
    """Spells a sweep out as plain values, the run that it varies under `base_config`."""
    space = {key: {axis.kind: getattr(axis, axis.kind)} for key, axis in sweep.space.items()}
    return {**config_dict(sweep), "space": space, "base_config": config_dict(base)}
