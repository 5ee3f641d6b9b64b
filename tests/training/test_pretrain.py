"""The tri-modal objective: its terms, its reach, and that a dozen steps teach something."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from crossmost_ray.config import ConfigError, PretrainWeights, config_dict
from crossmost_ray.data.augment import normalize_images, resize_images, to_float
from crossmost_ray.models.classifier import CrossModalModel, build_classifier
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.optim import build_optimizer, set_learning_rate
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.build import build_task
from crossmost_ray.training.pretrain import PretrainTask
from crossmost_ray.training.step import train_step
from tests.synthetic import CLASSES, pretrain_config, raw_batch, tiny_model


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses_of(task: PretrainTask, batch: RawBatch) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of the dropped branches
    return task.losses(batch, rng())


def test_every_weight_has_its_term_and_every_parameter_its_gradient(
    model: CrossModalModel,
) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    terms = losses_of(task, raw_batch(4, num_views=1))
    assert terms.keys() == config_dict(PretrainWeights()).keys()
    assert all(term.isfinite() and term > 0 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    # DDP waits for ever for a parameter that the loss does not reach.
    idle = [name for name, p in task.model.named_parameters() if p.grad is None]
    assert not idle
    unmoved = [name for name, p in task.model.named_parameters() if p.grad.abs().max() == 0]
    assert not unmoved


def test_all_layers_learn_alike(model: CrossModalModel) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    groups = task.parameter_groups()
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert sum(len(group["params"]) for group in groups) == len(list(task.model.parameters()))  # type: ignore[arg-type]


def test_objects_of_one_caption_are_no_negatives_of_its_text(model: CrossModalModel) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    batch = raw_batch(4, num_views=1)
    apart = losses_of(task, batch)
    same = losses_of(task, batch._replace(captions=(("box",),) * 4))
    for name in ("point_text", "image_text"):
        assert apart[name].item() > 0.5
        assert same[name].item() == pytest.approx(0.0, abs=1e-6)
    # Between images and points it is the object that counts.
    assert same["point_image"].item() == pytest.approx(apart["point_image"].item(), rel=1e-5)


def test_views_of_one_object_are_no_negatives(model: CrossModalModel) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    batch = raw_batch(4, num_views=1)
    same = losses_of(task, batch._replace(object_id=torch.zeros(4, dtype=torch.int64)))
    assert same["point_image"].item() == pytest.approx(0.0, abs=1e-6)
    assert same["point_text"].item() > 0.5


def test_captions_are_put_into_the_templates(
    model: CrossModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = ["a {}.", "one {} (of {many"]
    task = PretrainTask(copy.deepcopy(model), pretrain_config(data={"templates": templates}))
    prompts: list[str] = []
    tokenize = task.model.text.tokenize
    monkeypatch.setattr(
        task.model.text, "tokenize", lambda texts: prompts.extend(texts) or tokenize(texts)
    )
    captions = (("a {} b",), ("red chair", "chair"), ("x",), ("y", "z")) * 3
    losses_of(task, raw_batch(12, num_views=1)._replace(captions=captions))
    allowed = [{t.replace("{}", text, 1) for t in templates for text in of} for of in captions]
    assert all(prompt in options for prompt, options in zip(prompts, allowed, strict=True))
    assert len({prompt for prompt in prompts if "chair" in prompt}) > 1, "both captions are drawn"
    assert len({prompt.startswith("one") for prompt in prompts}) == 2, "both templates are drawn"


def test_the_scale_is_logged_and_held_at_100(model: CrossModalModel) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    assert task.diagnostics()["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        task.model.logit_scale.fill_(9.0)
    task.after_step(0)
    assert task.diagnostics()["logit_scale"].item() == pytest.approx(100.0, rel=1e-4)


def test_a_state_comes_back(model: CrossModalModel) -> None:
    task = PretrainTask(copy.deepcopy(model), pretrain_config())
    state = copy.deepcopy(task.state_dict())
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1.0)
    task.load_state_dict(state)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def image_accuracy(model: CrossModalModel, batch: RawBatch) -> float:
    """Zero-shot accuracy on objects that training never saw."""
    classifier = build_classifier(model.eval(), list(CLASSES), ["a {}."])
    views = resize_images(to_float(batch.images[:, 0]), 64)
    images = normalize_images(views, model.spec.image_mean, model.spec.image_std)
    with torch.no_grad():
        best = classifier.logits(model.image.embed(images)).argmax(dim=-1)
    return (best == torch.arange(len(best)) % 4).float().mean().item()


def test_a_dozen_steps_teach_four_easy_classes(model: CrossModalModel) -> None:
    config = pretrain_config(
        data={"templates": ["a {}."]},
        point_augment={"dropout": 0.0, "scale_low": 0.9, "scale_high": 1.1, "shift": 0.05},
    )
    task = PretrainTask(copy.deepcopy(model), config)
    optimizer = build_optimizer(task.parameter_groups(), config.optim)
    set_learning_rate(optimizer, 1e-3)
    unseen = raw_batch(24, num_views=1, seed=99)
    before = image_accuracy(task.model, unseen)
    losses = []
    for step in range(12):
        torch.manual_seed(step)
        scalars = train_step(
            task,
            optimizer,
            raw_batch(12, num_views=1, seed=step + 1),
            step=step,
            generator=rng(step),
            clip_norm=10.0,
        )
        losses.append(scalars["loss"].item())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    assert before < 0.5
    assert image_accuracy(task.model, unseen) >= 0.75


# Around given towers


def test_frozen_towers_stand_still_while_the_point_tower_learns(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "start", seed=3)
    config = pretrain_config(
        model={"start": str(folder)}, freeze=["image", "text"], freeze_scale=True
    )
    task = build_task(config, ())
    assert isinstance(task, PretrainTask)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    optimizer = build_optimizer(task.parameter_groups(), config.optim)
    set_learning_rate(optimizer, 1e-3)
    train_step(
        task,
        optimizer,
        raw_batch(4, num_views=1),
        step=0,
        generator=rng(),
        clip_norm=10.0,
    )
    moved = {n for n, value in task.model.state_dict().items() if not torch.equal(value, before[n])}
    assert {name.partition(".")[0] for name in moved} == {"point"}
    assert "point.projection" in moved
    terms = losses_of(task, raw_batch(4, num_views=1))
    assert not terms.keys() & {"image_text", "masked_image", "global_local_image"}
    assert terms.keys() >= {"point_text", "point_image", "masked_point"}


@pytest.mark.parametrize("fresh", [True, False])
def test_a_given_models_towers_are_taken(tmp_path: Path, fresh: bool) -> None:
    folder = tiny_model(tmp_path / "start", seed=3)
    config = pretrain_config(model={"start": str(folder), "fresh_point": fresh})
    task = build_task(config, ())
    assert isinstance(task, PretrainTask)
    given = load_model(folder).model.state_dict()
    for name, value in task.model.state_dict().items():
        taken = not name.startswith("point.") or not fresh
        assert torch.equal(value, given[name]) or not taken, name
    assert torch.equal(task.model.point.projection, given["point.projection"]) != fresh


def test_another_backbone_is_built_beside_given_towers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "start")
    config = pretrain_config(
        model={"start": str(folder), "point_backbone": "pointnet2_ssg"},
        data={"num_points": 512},
        freeze=["image", "text"],
    )
    task = build_task(config, ())
    assert isinstance(task, PretrainTask)
    assert task.model.spec.point_backbone == "pointnet2_ssg"
    terms = losses_of(task, raw_batch(4, num_views=1, num_points=512))
    # It has no tokens: the terms that need them are left out.
    assert terms.keys() == {"point_text", "point_image"}


def test_freezing_what_was_never_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"freeze names image.*model\.start names no folder"):
        pretrain_config(freeze=["image"])
