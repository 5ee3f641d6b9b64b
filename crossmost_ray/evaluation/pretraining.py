"""A config in, a pre-trained model folder with its card out."""

from __future__ import annotations

from typing import Any

from crossmost_ray import __version__
from crossmost_ray.config import PretrainConfig
from crossmost_ray.data.shards import class_names, read_manifest
from crossmost_ray.evaluation.measure import measure
from crossmost_ray.evaluation.plan import Split
from crossmost_ray.evaluation.predictor import OPINIONS
from crossmost_ray.evaluation.summary import ZERO_SHOT
from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.pretrained import CARD_NAME, load_model
from crossmost_ray.storage import Store
from crossmost_ray.training.checkpoint import last_checkpoint, load_state
from crossmost_ray.training.export import export_pretrained
from crossmost_ray.training.status import working
from crossmost_ray.training.trainer import train


def pretrain_and_evaluate(config: PretrainConfig, *, command: str, resume: bool = False) -> Store:
    """Pre-trains a model, then writes its folder, with zero-shot accuracies on its card.

    Args:
        config: The run.
        command: What was typed, for the card.
        resume: Go on with the run of this name.

    Returns:
        The model folder.

    Raises:
        ConfigError: For everything that a user can cure.
    """
    run = train(config, resume=resume)
    with working(run, "evaluating", last=True):
        return _measured(config, run, command)


def _measured(config: PretrainConfig, run: Store, command: str) -> Store:
    """Writes the model folder of a finished run."""
    checkpoint = last_checkpoint(run)
    folder = export_pretrained(config, checkpoint, run.child("model"))
    splits: dict[str, Any] = {}
    if config.report:
        classes = class_names(config.data.classes, next(iter(config.report.values())))
        templates, num_points = tuple(config.data.templates), config.data.num_points
        summary = measure(
            {ZERO_SHOT: folder.address},
            {
                name: Split(shards, tuple(classes), templates, num_points)
                for name, shards in config.report.items()
            },
            run,
            config=config.evaluation,
            use_gpu=config.cluster.use_gpu,
            # What the folder holds is this run's own, of another checkpoint or other settings.
            overwrite=True,
            env=config.cluster.env,
        )
        splits = summary["splits"]
    history = load_state(checkpoint)["history"]
    spec = load_model(folder).model.spec
    folder.write(CARD_NAME, _card(config, spec, command, history, splits))
    return folder


def _card(
    config: PretrainConfig,
    spec: ModelSpec,
    command: str,
    history: list[dict[str, float]],
    splits: dict[str, Any],
) -> str:
    minutes = sum(row["seconds"] for row in history) / 60
    manifest = read_manifest(config.data.shards)
    lines = [
        f"# {config.name}",
        "",
        f"Image, text and point tower (`{spec.clip}`, `{spec.point_backbone}`), trained from "
        f"{config.model.start or 'nothing'} by the tri-modal contrastive objective"
        f"{'; frozen: ' + ', '.join(config.freeze) if config.freeze else ''}.",
        "",
        f"- command: `{command}` (crossmost_ray {__version__}, seed {config.seed})",
        f"- data: `{config.data.shards}`, "
        f"{manifest.get('counts', {}).get('rows', 'uncounted')} captioned objects; "
        "no object, caption or label of any other folder",
        f"- time: {minutes:.0f} minutes, {len(history)} epochs, "
        f"{config.cluster.num_workers} worker(s) of {config.cluster.threads_per_worker} thread(s)",
        f"- last epoch: loss {history[-1]['loss']:.3f}",
        "- weights: half precision on disk; the resolved config is in `config.json`",
        "",
    ]
    if splits:
        lines += ["Zero-shot top-1, in percent (nothing was chosen by these numbers):", ""]
        lines += ["| shards | objects | image | points | fused |", "|---|---|---|---|---|"]
        for split, models in splits.items():
            metrics = models[ZERO_SHOT]
            cells = [f"{metrics[name]['top1']:.1f}" for name in OPINIONS if name in metrics]
            lines.append(f"| {split} | {metrics['labelled']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
