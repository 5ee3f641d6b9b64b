"""A config in, an adapted and measured model out: training, model folders, metrics."""

from __future__ import annotations

from typing import Any

from crossmost_ray.config import AdaptConfig
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.measure import measure
from crossmost_ray.evaluation.oracle import evaluation_config, oracle_checkpoint
from crossmost_ray.evaluation.plan import Split
from crossmost_ray.evaluation.summary import OPEN_SET, ZERO_SHOT
from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.training.checkpoint import best_checkpoint, last_checkpoint
from crossmost_ray.training.export import export_adapted
from crossmost_ray.training.status import working
from crossmost_ray.training.trackers.follow import log_summary
from crossmost_ray.training.trainer import train
from crossmost_ray.training.worker import HISTORY_NAME


def adapt_and_evaluate(
    config: AdaptConfig, *, resume: bool = False
) -> tuple[Store, dict[str, Any]]:
    """Adapts a model, then measures zero-shot, teacher and student on every split.

    Args:
        config: The run.
        resume: Go on with the run of this name.

    Returns:
        The run's folder and its metrics, as `metrics.json` holds them.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    run = train(config, resume=resume)
    with working(run, "evaluating", last=True):
        models = export_run(config, run)
        summary = measure(
            {ZERO_SHOT: config.model, **{name: folder.address for name, folder in models.items()}},
            splits_of(config),
            run,
            config=evaluation_config(config),
            use_gpu=config.cluster.use_gpu,
            # What the folder holds is this run's own, of another checkpoint or other settings.
            overwrite=True,
            env=config.cluster.env,
        )
        log_summary(run, config.trackers, summary)
    return run, summary


def export_run(config: AdaptConfig, run: Store) -> dict[str, Store]:
    """Writes the models of a finished run's result, the checkpoint that `compat.select_on` names.

    Returns:
        The model folders by name, teacher and student.

    Raises:
        ConfigError: If there is no such checkpoint, or it is damaged.
    """
    choice = config.compat.select_on
    if choice == "score":
        scores = {
            int(row["step"]): row[SCORE] for row in run.read_lines(HISTORY_NAME) if SCORE in row
        }
        checkpoint = best_checkpoint(run, scores)
    elif choice == "last":
        checkpoint = last_checkpoint(run)
    else:
        checkpoint = oracle_checkpoint(config, run)
    return export_adapted(config, checkpoint, run)


def splits_of(config: AdaptConfig) -> dict[str, Split]:
    """Lists what a run's models are measured on."""
    folders = {"transductive": config.data.shards}
    if config.data.test_shards is not None:
        folders["test"] = config.data.test_shards
    if config.data.open_set_shards is not None:
        folders[OPEN_SET] = config.data.open_set_shards
    classes = tuple(class_names(config.data.classes, config.data.shards))
    templates, num_points = tuple(config.data.templates), config.data.num_points
    return {name: Split(shards, classes, templates, num_points) for name, shards in folders.items()}
