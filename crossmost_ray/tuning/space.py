"""A sweep in, its trials out: names, settings, configs. Nothing here needs Ray."""

from __future__ import annotations

import itertools
import math
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crossmost_ray.config import AdaptConfig, ConfigError, parse_config
from crossmost_ray.storage import Store
from crossmost_ray.tuning.config import Axis, SweepConfig, with_settings

PATHS = ("model", "point_tokenizer", "data.shards", "data.test_shards", "data.open_set_shards")

MOST_CORNERS = 512
"""Corners of a space that are tried; twelve keys alone have 4,096."""

MOST_LINES = 20
"""Errors that are listed; a slip in one key can make thousands of trials bad."""


def trial_name(place: int) -> str:
    """Names the trial at a place, from 0, so that names sort as places do."""
    return f"trial-{place:05d}"


def plan(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Lists the settings of all trials of search grid or random, in their order.

    Written-out settings vary slowest, then the draws, then the grids in the order of `space`.
    A draw depends on the sweep's seed, its number and its key alone: more trials, or another key,
    leave the others' values as they are.
    """
    assert sweep.search != "optuna", "proposes its trials one by one"
    grids = {key: axis.grid for key, axis in sweep.space.items() if axis.grid is not None}
    crossed = [
        dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())
    ]
    settings = []
    for listed in sweep.trials or [{}]:
        for number in range(sweep.num_trials or 1):
            drawn = {
                key: draw(axis, _generator(sweep.seed, number, key))
                for key, axis in sweep.space.items()
                if axis.kind != "grid"
            }
            settings += [{**listed, **drawn, **combination} for combination in crossed]
    return settings


def _generator(seed: int, number: int, key: str) -> np.random.Generator:
    return np.random.default_rng([seed, number, zlib.crc32(key.encode())])


def draw(axis: Axis, generator: np.random.Generator) -> Any:
    """Draws one value from a distribution; numbers to four digits, so that they can be read."""
    if axis.choice is not None:
        return axis.choice[int(generator.integers(len(axis.choice)))]
    if axis.randint is not None:
        low, high = axis.randint
        return int(generator.integers(low, high + 1))
    if axis.loguniform is not None:
        low_end, high_end = axis.loguniform
        value = math.exp(generator.uniform(math.log(low_end), math.log(high_end)))
    else:
        assert axis.uniform is not None, "grids are crossed, not drawn from"
        low_end, high_end = axis.uniform
        value = float(generator.uniform(low_end, high_end))
    return min(max(float(f"{value:.4g}"), low_end), high_end)


def corners(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """Yields the extreme settings of a space: ends of ranges, and every choice."""
    ends = {key: axis.choice or axis.ends or [] for key, axis in sweep.space.items()}
    whole = itertools.product(*ends.values())
    for values in itertools.islice(whole, MOST_CORNERS):
        yield dict(zip(ends, values, strict=True))


def trial_config(
    values: Mapping[str, Any], settings: Mapping[str, Any], *, name: str, folder: Store
) -> AdaptConfig:
    """Builds the run of a trial.

    Args:
        values: The run that is varied, spelled out.
        settings: Values of dotted keys.
        name: Of the trial.
        folder: Takes the runs.

    Raises:
        ConfigError: If the settings don't make a run.
    """
    own = {"name": name, "output": folder.address, "keep_checkpoints": 1}
    config = with_settings(values, {**settings, **own})
    # Its driver runs wherever there is room, in whatever working directory.
    for key in PATHS:
        section, dot, last = key.partition(".")
        holder = config[section] if dot else config
        if isinstance(path := holder.get(last if dot else section), str):
            holder[last if dot else section] = Store(path).address
    return parse_config(AdaptConfig, config, f"{name} ({settings_text(settings)})")


def check_trials(
    values: Mapping[str, Any], planned: Sequence[Mapping[str, Any]], *, folder: Store
) -> list[AdaptConfig]:
    """Builds the runs of all trials, or says of all bad ones what is wrong.

    Raises:
        ConfigError: With a line for each different problem.
    """
    configs: list[AdaptConfig] = []
    problems: dict[str, str] = {}
    for place, settings in enumerate(planned):
        try:
            configs.append(trial_config(values, settings, name=trial_name(place), folder=folder))
        except ConfigError as bad:
            first, _, rest = str(bad).partition("\n")
            problems.setdefault(rest, first.removesuffix(" cannot be run:"))
    if problems:
        lines = [f"  {who}:\n{textwrap.indent(what, '  ')}" for what, who in problems.items()]
        more = len(lines) - MOST_LINES
        said = [*lines[:MOST_LINES], *([f"  and {more} more"] if more > 0 else [])]
        raise ConfigError("\n".join(["these trials cannot be run:", *said]))
    return configs


def typed(settings: Mapping[str, Any], config: AdaptConfig) -> dict[str, Any]:
    """Gives settings with numbers as numbers: YAML takes the 5e-4 of a list for text.

    Args:
        settings: Values of dotted keys, as they were written.
        config: The run that they made.
    """
    values = {}
    for key, value in settings.items():
        parsed: Any = config
        for part in key.split("."):
            parsed = getattr(parsed, part)
        values[key] = parsed if isinstance(parsed, int | float) else value
    return values


def settings_text(settings: Mapping[str, Any]) -> str:
    """Writes settings in one line, such as threshold=0.7 seed=1.

    A key is shortened to its last part where that is enough to tell it from the others.
    """
    if not settings:
        return "as the base"
    lasts = [key.rpartition(".")[2] for key in settings]
    parts = []
    for (key, value), last in zip(settings.items(), lasts, strict=True):
        short = last if lasts.count(last) == 1 else key
        parts.append(f"{short}={value:.4g}" if isinstance(value, float) else f"{short}={value}")
    return " ".join(parts)
