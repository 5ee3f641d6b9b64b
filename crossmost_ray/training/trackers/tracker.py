"""What a run tells a tracker, and what is asked of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from crossmost_ray.storage import Store, is_remote

PROJECT = "crossmost_ray"
"""MLflow's experiment and W&B's project, unless their own environment variables name another."""

Parameter = str | int | float | bool | None


@dataclass(frozen=True)
class Enrolment:
    """What is known of a run in one tracker; survives in the run's folder."""

    name: str
    """The run's name."""

    parameters: Mapping[str, Parameter]
    """The config by dotted key."""

    id: str | None = None
    """What the tracker calls the run; None where a tracker needs no name for it."""

    step: int = 0
    """The last step that the tracker has."""


class Tracker(Protocol):
    """A place where the numbers of a run are shown; open until it is finished or has failed."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to each curve; returns once it is stored, or left to who will store it."""
        ...

    def summarize(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds what is known at the end."""
        ...

    def finish(self) -> None:
        """Marks the run as finished, and lets go of it. It may be opened again."""
        ...


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Gives the curves' points in a row of metrics: its numbers, but for the step itself."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def parameters_of(config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Spells a config out by dotted key; lists as JSON.

    What may be secret stays here: environment variables, and what an address tells the file system.
    """
    return dict(_leaves(config, ""))


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Parameter]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key == "cluster.env":
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, str):
            yield key, str(Store(value)) if is_remote(value) else value
        elif value is None or isinstance(value, bool | int | float):
            yield key, value
        else:
            yield key, json.dumps(value)


def top1_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Gives the accuracies in the metrics of an evaluation.

    Args:
        summary: The content of `metrics.json`.

    Returns:
        Top-1 in percent as `eval/<split>/<model>/<opinion>/top1`; nothing of a split without
        labels.
    """
    return {
        f"eval/{split}/{model}/{opinion}/top1": float(part["top1"])
        for split, models in summary.get("splits", {}).items()
        for model, metrics in models.items()
        for opinion, part in metrics.items()
        if isinstance(part, Mapping) and isinstance(part.get("top1"), int | float)
    }
