"""What trials leave on the disk: what is kept, what is removed, and how much it may come to."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from crossmost_ray.config import AdaptConfig, ConfigError
from crossmost_ray.evaluation.summary import STUDENT, TEACHER
from crossmost_ray.models.pretrained import CONFIG_NAME
from crossmost_ray.storage import Store
from crossmost_ray.training.build import ModelFacts, inspect_model
from crossmost_ray.training.checkpoint import PREFIX, list_checkpoints
from crossmost_ray.training.trainer import SNAPSHOT_NAME, size_text

CHECKPOINTS = 3
"""Of a running trial: the best, the last, and one that is being written."""

KEPT_CHECKPOINTS = 2
"""Of a failed one: the best and the last, to try again from."""


def is_complete(run: Store) -> bool:
    """Whether a trial has nothing left to do: its teacher is written, its checkpoints are gone."""
    return run.has_file(f"{TEACHER}/{CONFIG_NAME}") and not list_checkpoints(run)


def free(run: Store) -> None:
    """Removes what nobody will ask an ended trial for: its checkpoints and its student.

    The teacher, if it was written, the metrics and the votes stay.
    """
    run.remove(STUDENT)
    run.remove(SNAPSHOT_NAME)
    for name in run.names():
        if name.startswith(PREFIX):
            run.remove(name)


def inspect_models(configs: Iterable[AdaptConfig]) -> list[ModelFacts]:
    """Looks at the model of each trial, at each model once, before any trial starts.

    Raises:
        ConfigError: If one can't be loaded, or does not go with what a trial asks of it.
    """
    known: dict[object, ModelFacts] = {}
    facts = []
    for config in configs:
        key = (config.model, config.point_tokenizer, config.mode, config.compat)
        if key not in known:
            known[key] = inspect_model(config)
        facts.append(known[key])
    return facts


def check_space(facts: list[ModelFacts], *, at_once: int, folder: Store) -> str:
    """Estimates what a sweep will leave behind, and what it needs on the way.

    Args:
        facts: Of each trial's model.
        at_once: Trials that run at the same time.
        folder: The sweep's.

    Returns:
        The estimate, in words.

    Raises:
        ConfigError: If the disk has no room for it.
    """
    # A model is exported twice, as teacher and as student; one of the two stays.
    kept = sum(one.exported_bytes // 2 for one in facts)
    largest = max(one.checkpoint_bytes for one in facts)
    running = CHECKPOINTS * largest + max(one.exported_bytes for one in facts)
    whole = kept + at_once * running
    text = (
        f"the trials leave {size_text(kept)} (a model each; one that fails, its last checkpoints: "
        f"{size_text(KEPT_CHECKPOINTS * largest)}) and need {size_text(at_once * running)} while "
        "they run"
    )
    if folder.local is not None:
        place = folder.local
        while not place.exists():
            place = place.parent
        free_bytes = shutil.disk_usage(place).free
        if free_bytes < whole:
            raise ConfigError(
                f"{folder} has {size_text(free_bytes)} free and the sweep may need "
                f"{size_text(whole)}; ask for fewer trials, or mend `output`"
            )
        text += f" ({size_text(free_bytes)} free)"
    return text
