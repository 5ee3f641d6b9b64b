"""Each switch of `compat`: what the published code does, and what ours does instead."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmost_ray.config import REFERENCE_COMPAT, CompatConfig, config_dict
from crossmost_ray.models.classifier import CrossModalModel
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.adapt import REFERENCE_POINTS, AdaptTask
from crossmost_ray.training.build import build_task
from tests.synthetic import CLASSES, adapt_config, raw_batch, tiny_model
from tests.training.test_adapt import rng, task_of


def terms_of(model: CrossModalModel, compat: Any = None, **sections: Any) -> dict[str, Tensor]:
    if compat is not None:
        sections["compat"] = compat
    torch.manual_seed(0)  # stochastic depth draws from the global generator
    return task_of(model, **sections).losses(raw_batch(4, captions=False), rng())


def test_one_word_turns_every_switch() -> None:
    default = config_dict(CompatConfig())
    reference = config_dict(adapt_config(compat="reference").compat)
    assert reference == REFERENCE_COMPAT
    # The reference does not decay the rates of the point tower's layers either.
    assert {key for key in default if default[key] == reference[key]} == {"point_layer_decay"}


def test_masked_images_weigh_a_sixty_sixth(model: CrossModalModel) -> None:
    ours, theirs = terms_of(model), terms_of(model, {"mim_norm": "tokens197"})
    tokens = model.image.grid**2 + 1
    assert (theirs["masked_image"] / ours["masked_image"]).item() == pytest.approx(3 / tokens)


def test_masked_points_are_summed_over_channels(model: CrossModalModel) -> None:
    ours, theirs = terms_of(model), terms_of(model, {"mpm_norm": "upstream"})
    assert (theirs["masked_point"] / ours["masked_point"]).item() == pytest.approx(128 / 4)


def test_a_mask_token_for_a_target_says_nothing_of_the_cloud(model: CrossModalModel) -> None:
    points = raw_batch(2).points[:, :128]
    for choice, tells in (("tokens_detached", True), ("mask_token", False)):
        task = task_of(model, compat={"mpm_target": choice})
        tower = task.bare_student.point
        seen = tower(tower.tokenize(points), torch.ones(2, 32).bool())
        target = task._masked_target("point", seen)
        assert torch.allclose(target[0], target[1]) != tells
        # And the reference's target is itself learned: it can come to meet the reconstruction.
        assert target.requires_grad != tells


def test_hidden_points_can_be_the_target(model: CrossModalModel) -> None:
    task = task_of(model, compat={"mpm_target": "chamfer"})
    batch = raw_batch(4, captions=False)
    terms = task.losses(batch, rng())
    head = task.bare_student.point.point_head
    assert head is not None
    (gradient,) = torch.autograd.grad(terms["masked_point"], head.weight)
    assert gradient.abs().max() > 0
    # Teacher and student have one state, so that the one can follow the other.
    assert task.teacher.module.state_dict().keys() == task.bare_student.state_dict().keys()
    placed = {id(p) for group in task.parameter_groups() for p in group["params"]}  # type: ignore[attr-defined]
    assert id(head.weight) in placed
    assert id(task.bare_student.point.backbone.lm_head.weight) not in placed


def test_without_a_temperature_the_contrast_has_a_floor(model: CrossModalModel) -> None:
    theirs = terms_of(model, {"align_temperature": "none", "align_negatives": "local"})
    # Cosines lie between -1 and 1: each direction costs at least log(1 + (B - 1) e^-2).
    floor = 2 * torch.log1p(3 * torch.exp(torch.tensor(-2.0)))
    assert theirs["alignment"] >= floor


def test_views_of_one_object_are_negatives_in_the_reference_only(model: CrossModalModel) -> None:
    batch = raw_batch(4, captions=False)._replace(object_id=torch.zeros(4, dtype=torch.int64))
    ours = task_of(model).losses(batch, rng())["alignment"]
    theirs = task_of(model, compat={"align_negatives": "local"}).losses(batch, rng())["alignment"]
    assert ours.item() == pytest.approx(0.0, abs=1e-6)
    assert theirs.item() > 0.5


@pytest.mark.parametrize(("mode", "moves"), [("eval", False), ("train", True)])
def test_the_frozen_encoders_statistics(model: CrossModalModel, mode: str, moves: bool) -> None:
    task = task_of(model, compat={"frozen_encoder_bn": mode})
    norm = task.bare_student.point.backbone.encoder.first_conv[1]
    before = norm.running_mean.clone()
    task.losses(raw_batch(4, captions=False), rng())
    assert torch.equal(before, norm.running_mean) != moves


@pytest.mark.parametrize(("clamp", "limit"), [(True, 100.0), (False, 403.43)])
def test_the_scale_is_held_or_not(model: CrossModalModel, clamp: bool, limit: float) -> None:
    task = task_of(model, compat={"clamp_logit_scale": clamp})
    with torch.no_grad():
        task.bare_student.logit_scale.fill_(6.0)
    task.after_step(0)
    assert task.bare_student.logit_scale.exp().item() == pytest.approx(limit, rel=1e-4)


def test_what_decays(model: CrossModalModel) -> None:
    def decayed(choice: str) -> set[str]:
        task = task_of(model, compat={"decay_on": choice})
        held = {
            id(p)
            for group in task.parameter_groups()
            if group["weight_decay"]
            for p in group["params"]  # type: ignore[attr-defined]
        }
        return {name for name, p in task.bare_student.named_parameters() if id(p) in held}

    assert decayed("all_but_vectors") - decayed("matrices") == {"logit_scale", "image.mask_token"}


def test_a_class_that_grows_wins_in_the_reference_only(tmp_path: Any) -> None:
    folder = tiny_model(tmp_path / "model")
    for choice, grows in (("unit", False), ("free", True)):
        config = adapt_config(model=str(folder), compat={"class_embed": choice})
        task = build_task(config, CLASSES)
        assert isinstance(task, AdaptTask)
        embed = torch.nn.functional.normalize(torch.ones(1, 128), dim=-1)
        before = task.bare_student.logits(embed)
        with torch.no_grad():
            task.bare_student.class_embed[2] *= 3
        after = task.bare_student.logits(embed)
        factor = 3.0 if grows else 1.0
        assert after[0, 2].item() == pytest.approx(factor * before[0, 2].item(), rel=1e-4)


def test_strong_clouds_are_filled_up_in_the_reference_only(model: CrossModalModel) -> None:
    for choice, count in (("auto", 128), ("always", REFERENCE_POINTS)):
        pairs = task_of(model, compat={"strong_upsample": choice}).augment(
            raw_batch(2, captions=False), rng()
        )
        assert pairs.points_strong.shape == (2, count, 3)
        assert pairs.points_weak.shape[2] == 128


def test_an_evaluation_of_the_reference_is_not_repeatable(tmp_path: Any) -> None:
    folder = tiny_model(tmp_path / "model")
    points = raw_batch(2).points[:, :128]
    for choice, repeats in (("zero", True), ("random", False)):
        config = adapt_config(model=str(folder), compat={"fps_start": choice})
        task = build_task(config, CLASSES)
        assert isinstance(task, AdaptTask)
        tower = task.teacher.module.point
        torch.manual_seed(0)
        with torch.no_grad():
            first, again = tower.embed(points), tower.embed(points)
        assert torch.equal(first, again) == repeats


@pytest.mark.parametrize("restore", [True, False])
def test_a_resumed_teacher(model: CrossModalModel, restore: bool) -> None:
    task = task_of(model, compat={"ema_restore": restore})
    fresh = copy.deepcopy(task.teacher.module.class_embed)
    with torch.no_grad():
        task.teacher.module.class_embed += 1
    state = copy.deepcopy(task.state_dict())
    resumed = task_of(model, compat={"ema_restore": restore})
    resumed.load_state_dict(state)
    expected = fresh + 1 if restore else fresh
    torch.testing.assert_close(resumed.teacher.module.class_embed, expected)


def test_terms_that_teach_nothing_in_the_reference_have_a_gradient(model: CrossModalModel) -> None:
    weights = {"entropy_image": 1.0, "entropy_point": 1.0, "agreement": 1.0}
    task = task_of(model, weights=weights)
    terms = task.losses(raw_batch(4, captions=False), rng())
    for name in weights:
        (gradient,) = torch.autograd.grad(
            terms[name], task.bare_student.class_embed, retain_graph=True
        )
        assert gradient.abs().max() > 0, name


def test_batches_hold_no_label() -> None:
    assert RawBatch._fields == ("images", "points", "object_id", "captions")
