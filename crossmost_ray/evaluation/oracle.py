"""What the published code does with test labels: offered to reproduce its numbers, never a default.

Nothing that learns or chooses reads a label elsewhere in this package.
"""

from __future__ import annotations

from dataclasses import replace

from crossmost_ray.config import AdaptConfig, EvaluationConfig
from crossmost_ray.data.shards import class_names
from crossmost_ray.evaluation.measure import measure
from crossmost_ray.evaluation.plan import Split
from crossmost_ray.storage import Store
from crossmost_ray.training.checkpoint import checkpoint_name, list_checkpoints
from crossmost_ray.training.export import export_adapted
from crossmost_ray.training.worker import HISTORY_NAME

SCRATCH_FOLDER = ".oracle"


def evaluation_config(config: AdaptConfig) -> EvaluationConfig:
    """Gives the evaluation of a run, as `compat.test_view` and `data.bad_rows` want it."""
    skips = "skip" in (config.evaluation.bad_rows, config.data.bad_rows)
    return replace(
        config.evaluation,
        random_view=config.evaluation.random_view or config.compat.test_view == "random",
        bad_rows="skip" if skips else "refuse",
    )


def oracle_checkpoint(config: AdaptConfig, run: Store) -> Store:
    """Finds the checkpoint whose student names most objects of the test split by their points.

    It reads the labels of the split that the report is about: the number it leads to is no
    estimate of anything, and stands here because published numbers were chosen so.

    Args:
        config: The run's, with `data.test_shards`.
        run: Its folder, with a checkpoint for each epoch.

    Returns:
        The first of the best checkpoints.

    Raises:
        ConfigError: If a checkpoint or the split can't be read.
    """
    assert config.data.test_shards is not None, "the config has seen to it"
    classes = tuple(class_names(config.data.classes, config.data.shards))
    data = config.data
    test = Split(config.data.test_shards, classes, tuple(data.templates), data.num_points)
    # Corruptions have no say in the choice.
    settings = replace(evaluation_config(config), corruptions=[])
    # Not a temporary folder of this machine: the actors may be elsewhere.
    scratch = run.child(SCRATCH_FOLDER)
    accuracy = {}
    ends = {checkpoint_name(int(row["step"])) for row in run.read_lines(HISTORY_NAME)}
    try:
        # Not those within an epoch: where they lie follows from what befell the run.
        for name in filter(ends.__contains__, list_checkpoints(run)):
            student = export_adapted(config, run.child(name), scratch)["student"]
            summary = measure(
                {"student": student.address},
                {"test": test},
                scratch,
                config=settings,
                use_gpu=config.cluster.use_gpu,
                overwrite=True,
                env=config.cluster.env,
            )
            accuracy[name] = summary["splits"]["test"]["student"]["point"]["top1"]
    finally:
        run.remove(SCRATCH_FOLDER)
    return run.child(max(accuracy, key=accuracy.__getitem__))
