"""CrossMoST at its published size: learning rates of its layers, and two steps of it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from crossmost_ray.models.classifier import CrossModalClassifier, CrossModalModel, ModelSpec
from crossmost_ray.models.foreign.crossmost import TOWER_RULES
from crossmost_ray.optim import build_optimizer, set_learning_rate
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.step import train_step
from tests.synthetic import adapt_config, raw_batch

SPEC = ModelSpec("ViT-B-16-quickgelu", "pointbert")
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "layer_decay.json").read_text()
)
CLASSES = [f"class {k}" for k in range(40)]


def ours(theirs: str) -> str:
    """Our name of a parameter of the reference."""
    if theirs in ("classifier", "logit_scale"):
        return {"classifier": "class_embed"}.get(theirs, theirs)
    return next(rule.place(theirs) for rule in TOWER_RULES if rule.match(theirs))


def test_every_parameter_learns_and_decays_as_in_the_reference() -> None:
    with torch.device("meta"):
        classifier = CrossModalClassifier(CrossModalModel(SPEC), torch.empty(40, 512))
    config = adapt_config(
        compat={"preset": "reference", "select_on": "last"},
        optim={"weight_decay": 0.05, "layer_decay": 0.65},
        data={"classes": CLASSES},
    )
    task = AdaptTask(classifier, SPEC, config)
    groups = task.parameter_groups()
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    named = dict(task.bare_student.named_parameters())
    expected = {
        ours(theirs): (facts["lr_scale"], facts["weight_decay"])
        for theirs, facts in GOLDEN["params"].items()
    }
    assert expected.keys() == {name for name, p in named.items() if p.requires_grad}
    for name, (lr_scale, weight_decay) in expected.items():
        assert found[id(named[name])] == (pytest.approx(lr_scale), weight_decay), name
    trainable = sum(p.numel() for p in named.values() if p.requires_grad)
    assert trainable == 108_974_081


@pytest.mark.slow
def test_two_steps_at_full_size_are_finite_and_fit_into_sixteen_gigabytes() -> None:
    torch.manual_seed(0)
    model = CrossModalModel(SPEC)
    embed = torch.nn.functional.normalize(torch.randn(40, 512), dim=-1)
    config = adapt_config(
        data={"classes": CLASSES, "num_points": 8192, "teacher_views": 1},
        pseudo_labels={"threshold": 0.0},
    )
    task = AdaptTask(CrossModalClassifier(model, embed), SPEC, config)
    optimizer = build_optimizer(task.parameter_groups(), config.optim)
    set_learning_rate(optimizer, 1e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        batch = raw_batch(4, num_views=1, num_points=8192, view_size=336, captions=False, seed=step)
        scalars = train_step(
            task,
            optimizer,
            batch,
            step=step,
            generator=generator,
            clip_norm=10.0,
        )
        assert all(value.isfinite() for value in scalars.values()), scalars
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert peak_gb < 16, peak_gb
