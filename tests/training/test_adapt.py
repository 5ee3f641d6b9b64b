"""The self-training objective: its terms, what moves and what does not, and what it never sees."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmost_ray.config import LossWeights, config_dict
from crossmost_ray.models.classifier import CrossModalModel, build_classifier
from crossmost_ray.optim import build_optimizer, set_learning_rate
from crossmost_ray.schema import PairBatch
from crossmost_ray.training.adapt import TOWERS_OF_MODE, AdaptTask
from crossmost_ray.training.step import train_step
from tests.synthetic import CLASSES, adapt_config, raw_batch

MODES = ("crossmost", "baseline", "image_only", "points_only")
EASY = {"threshold": 0.0, "threshold_image": 0.0, "threshold_point": 0.0}
"""Every object counts, so that every term has a gradient."""


def task_of(model: CrossModalModel, **sections: Any) -> AdaptTask:
    sections.setdefault("pseudo_labels", EASY)
    config = adapt_config(**sections)
    classifier = build_classifier(copy.deepcopy(model), list(CLASSES), config.data.templates)
    return AdaptTask(classifier, model.spec, config)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def take_steps(task: AdaptTask, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        train_step(
            task,
            optimizer,
            raw_batch(4, captions=False, seed=step),
            step=step,
            generator=rng(step),
            clip_norm=10.0,
        )


def optimizer_of(task: AdaptTask) -> torch.optim.Optimizer:
    optimizer = build_optimizer(task.parameter_groups(), task.config.optim)
    set_learning_rate(optimizer, 1e-3)
    return optimizer


def test_the_modes_differ_in_their_towers() -> None:
    assert {mode: set(towers) for mode, towers in TOWERS_OF_MODE.items()} == {
        "crossmost": {"image", "point"},
        "baseline": {"image", "point"},
        "image_only": {"image"},
        "points_only": {"point"},
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_its_terms_and_reaches_its_parameters(model: CrossModalModel, mode: str) -> None:
    task = task_of(model, mode=mode)
    # The batch holds no caption, and no batch ever holds a label.
    terms = task.losses(raw_batch(4, captions=False), rng())
    kinds = ("self_training", "fairness", "masked", "global_local")
    expected = {f"{kind}_{tower}" for kind in kinds for tower in TOWERS_OF_MODE[mode]}
    assert terms.keys() == expected | ({"alignment"} if mode == "crossmost" else set())
    assert terms.keys() <= task.weights.keys()
    assert all(term.ndim == 0 and term.isfinite() and term > 0 for term in terms.values())

    torch.stack(list(terms.values())).sum().backward()
    reached = {
        name
        for name, parameter in task.bare_student.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    frozen = {
        name
        for name, _ in task.bare_student.named_parameters()
        if name.startswith("point.backbone.encoder.")
        or (name.startswith("point.") and mode == "image_only")
        or (name.startswith("image.") and mode == "points_only")
    }
    names = {name for name, _ in task.bare_student.named_parameters()}
    assert reached == names - frozen
    assert {name for name, p in task.bare_student.named_parameters() if not p.requires_grad} == (
        frozen
    )
    grouped = [id(p) for group in task.parameter_groups() for p in group["params"]]  # type: ignore[attr-defined]
    trainable = {id(p) for p in task.bare_student.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable


def test_every_weight_has_its_term(model: CrossModalModel) -> None:
    optional = {"entropy_image": 0.1, "entropy_point": 0.1, "agreement": 0.1}
    plain = task_of(model, mode="crossmost").losses(raw_batch(4), rng())
    terms = task_of(model, mode="crossmost", weights=optional).losses(raw_batch(4), rng())
    assert terms.keys() == config_dict(LossWeights()).keys()
    assert plain.keys() == terms.keys() - optional.keys()


def test_layer_decay_tells_the_towers_from_the_rest(model: CrossModalModel) -> None:
    task = task_of(model, compat={"point_layer_decay": 0.65})
    scale = {
        id(p): group["lr_scale"]
        for group in task.parameter_groups()
        for p in group["params"]  # type: ignore[attr-defined]
    }
    student = task.bare_student
    assert scale[id(student.class_embed)] == 1.0
    assert scale[id(student.logit_scale)] == 1.0
    assert scale[id(student.image.visual.conv1.weight)] == pytest.approx(0.65**5)
    assert scale[id(student.point.backbone.cls_token)] == pytest.approx(0.65**5)
    assert scale[id(student.point.backbone.blocks.blocks[3].norm1.weight)] == pytest.approx(0.65)
    assert scale[id(student.point.projection)] == 1.0


def test_the_point_tower_has_a_rate_of_its_own(model: CrossModalModel) -> None:
    scales = []
    for factor in (1.0, 0.2):
        task = task_of(model, optim={"point_lr_scale": factor})
        scale = {
            id(p): group["lr_scale"]
            for group in task.parameter_groups()
            for p in group["params"]  # type: ignore[attr-defined]
        }
        named = task.bare_student.named_parameters()
        scales.append({name: scale[id(p)] for name, p in named if id(p) in scale})
    for name, scale in scales[0].items():
        factor = 0.2 if name.startswith("point.") else 1.0
        assert scales[1][name] == pytest.approx(factor * scale), name


def test_the_tokenizer_stands_still_and_the_rest_moves(model: CrossModalModel) -> None:
    task = task_of(model)
    student, teacher = task.bare_student, task.teacher.module
    before = {name: value.clone() for name, value in student.state_dict().items()}
    taught = {name: value.clone() for name, value in teacher.state_dict().items()}
    take_steps(task, optimizer_of(task), range(2))
    assert student.training
    assert not student.point.backbone.encoder.training
    for name, value in student.state_dict().items():
        still = name.startswith("point.backbone.encoder.")  # BatchNorm's statistics included
        assert torch.equal(value, before[name]) == still, name
    for name, value in teacher.state_dict().items():
        still = name.startswith("point.backbone.encoder.")
        assert torch.equal(value, taught[name]) == still, name
        # The teacher moves less than the student does.
        if not still and value.is_floating_point() and value.ndim > 1:
            moved = (value - taught[name]).norm()
            assert moved < 0.1 * (student.state_dict()[name] - before[name]).norm(), name
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_scale_is_held_at_100(model: CrossModalModel) -> None:
    task = task_of(model)
    with torch.no_grad():
        task.bare_student.logit_scale.fill_(math.log(150.0))
    task.after_step(0)
    assert task.bare_student.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-4)


def test_captions_and_ids_change_no_label(model: CrossModalModel) -> None:
    task = task_of(model, mode="baseline")
    batch = raw_batch(4)
    seen = []
    for captions in ((), (("box",),) * 4, batch.captions):
        torch.manual_seed(0)
        seen.append(task.losses(batch._replace(captions=captions), rng()))
    for name, term in seen[0].items():
        assert torch.equal(term, seen[1][name])
        assert torch.equal(term, seen[2][name])


def test_augmented_pairs_have_their_shapes(model: CrossModalModel) -> None:
    task = task_of(model)
    batch = raw_batch(5, num_views=3)
    pairs = task.augment(batch, rng())
    assert pairs.image_weak.shape == (5, 3, 3, 64, 64)
    assert pairs.image_strong.shape == (5, 3, 64, 64)
    assert pairs.points_weak.shape == (5, 3, 128, 3)
    assert pairs.points_strong.shape == (5, 128, 3)
    assert pairs.image_mask.sum(dim=1).tolist() == [20] * 5  # ceil(0.3 * 16) cells of 4 patches
    assert torch.equal(pairs.object_id, batch.object_id)
    for left, right in zip(pairs, task.augment(batch, rng()), strict=True):
        assert torch.equal(left, right)
    # Normalised by CLIP's mean and deviation: black and white lie at -1.8 and 2.2.
    for images in (pairs.image_weak, pairs.image_strong):
        assert images.min() >= -1.8
        assert images.max() <= 2.2
        assert images.min() < -0.5
    # The teacher's clouds are nearly those of the shard, each sampled anew.
    norms = pairs.points_weak.norm(dim=-1)
    assert norms.max() < 1.1 + 1e-4
    assert not torch.equal(pairs.points_weak[:, 0], pairs.points_weak[:, 1])


def opinions(image: Tensor, point: Tensor) -> Any:
    """Stands in for a teacher: these logits for each object, whatever it sees."""

    class Opinion:
        def predict(self, images: Tensor, points: Tensor) -> Any:
            views = len(images) // len(image)
            logits = {"image_logits": image, "point_logits": point}
            return type(
                "Seen", (), {k: v.repeat_interleave(views, dim=0) for k, v in logits.items()}
            )

    return Opinion()


def pairs_of(B: int, T: int = 2) -> PairBatch:
    return PairBatch(
        torch.zeros(B, T, 3, 64, 64),
        torch.zeros(B, 3, 64, 64),
        torch.zeros(B, T, 8, 3),
        torch.zeros(B, 8, 3),
        torch.zeros(B, 64, dtype=torch.bool),
        torch.arange(B),
    )


SURE_IMAGE = torch.tensor([[9.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.1, 0]])
SURE_POINT = torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 9.0], [0, 0, 0, 0.2]])


def test_in_mode_crossmost_both_towers_learn_the_same_labels(model: CrossModalModel) -> None:
    task = task_of(model, mode="crossmost", pseudo_labels={})
    task.teacher.module = opinions(SURE_IMAGE, SURE_POINT)
    labels = task.pseudo_labels(pairs_of(3), rng())
    assert labels["image"] is labels["point"]
    assert labels["image"].target[:2].tolist() == [0, 3]
    assert labels["image"].selected.tolist() == [True, True, False]
    scalars = task.diagnostics()
    assert scalars["teacher/agreement"].item() == 0.0
    assert scalars["pseudo/selected_image"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("mode", ["baseline", "image_only", "points_only"])
def test_in_the_other_modes_each_tower_learns_its_own(model: CrossModalModel, mode: str) -> None:
    task = task_of(model, mode=mode, pseudo_labels={})
    task.teacher.module = opinions(SURE_IMAGE, SURE_POINT)
    labels = task.pseudo_labels(pairs_of(3), rng())
    assert labels["image"].target.tolist() == [0, 1, 2]
    assert labels["point"].target.tolist() == [1, 3, 3]
    assert labels["image"].selected.tolist() == [True, False, False]
    assert labels["point"].selected.tolist() == [False, True, False]
    assert {name for name in task.diagnostics() if name.startswith("pseudo/")} == {
        f"pseudo/selected_{tower}" for tower in TOWERS_OF_MODE[mode]
    }


def test_each_towers_own_threshold_is_used(model: CrossModalModel) -> None:
    # softmax of (3, 0, 0, 0) has its maximum at 0.870
    logits = torch.tensor([[3.0, 0, 0, 0]])
    for image, point in ((0.86, 0.88), (0.88, 0.86)):
        thresholds = {"threshold_image": image, "threshold_point": point}
        task = task_of(model, mode="baseline", pseudo_labels=thresholds)
        task.teacher.module = opinions(logits, logits)
        labels = task.pseudo_labels(pairs_of(1), rng())
        assert labels["image"].selected.item() == (image < 0.87)
        assert labels["point"].selected.item() == (point < 0.87)


def test_the_teachers_logits_are_averaged_over_its_views(model: CrossModalModel) -> None:
    task = task_of(model, mode="baseline", pseudo_labels={})
    first, second = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0, 5.0, 0, 0]])

    class Torn:
        def predict(self, images: Tensor, points: Tensor) -> Any:
            both = torch.cat([first, second])
            return type("Seen", (), {"image_logits": both, "point_logits": both})

    task.teacher.module = Torn()  # type: ignore[assignment]
    labels = task.pseudo_labels(pairs_of(1), rng())
    expected = ((first + second) / 2).softmax(dim=-1).max(dim=-1)
    assert labels["image"].target.tolist() == expected.indices.tolist() == [1]
    torch.testing.assert_close(labels["image"].confidence, expected.values)


def test_the_teacher_sees_whole_weak_pairs_in_evaluation_mode(model: CrossModalModel) -> None:
    task = task_of(model)
    pairs = task.augment(raw_batch(3), rng())
    first, again = (task.pseudo_labels(pairs, rng()) for _ in range(2))
    assert torch.equal(first["image"].confidence, again["image"].confidence)
    with torch.no_grad():
        seen = [
            task.teacher.module.predict(pairs.image_weak[:, view], pairs.points_weak[:, view])
            for view in range(2)
        ]
    image = torch.stack([s.image_logits for s in seen]).mean(dim=0).softmax(-1).amax(-1)
    point = torch.stack([s.point_logits for s in seen]).mean(dim=0).softmax(-1).amax(-1)
    confidence = torch.maximum(image, 0.9 * point)
    torch.testing.assert_close(first["image"].confidence, confidence, atol=1e-5, rtol=1e-4)


def test_with_nothing_selected_the_other_terms_still_teach(model: CrossModalModel) -> None:
    task = task_of(
        model, mode="baseline", pseudo_labels={"threshold_image": 1.0, "threshold_point": 1.0}
    )
    terms = task.losses(raw_batch(4), rng())
    assert terms["self_training_image"].item() == terms["self_training_point"].item() == 0.0
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad for p in task.bare_student.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_views_of_one_object_are_no_negatives(model: CrossModalModel) -> None:
    task = task_of(model)
    batch = raw_batch(4)
    torch.manual_seed(0)
    apart = task.losses(batch, rng())
    torch.manual_seed(0)
    same = task.losses(batch._replace(object_id=torch.zeros(4, dtype=torch.int64)), rng())
    assert same["alignment"].item() == pytest.approx(0.0, abs=1e-6)  # no negative is left
    assert apart["alignment"].item() > 0.5
    for name in apart.keys() - {"alignment"}:
        assert torch.equal(apart[name], same[name])


def test_the_up_axis_of_the_model_is_used(model: CrossModalModel) -> None:
    import dataclasses

    task = task_of(
        model,
        point_augment={"scale_low": 1, "scale_high": 1, "shift": 0, "jitter": 0, "dropout": 0},
    )
    cloud = raw_batch(4)
    for up_axis, place in (("y", 1), ("z", 2)):
        task.spec = dataclasses.replace(model.spec, up_axis=up_axis)
        strong = task.augment(cloud, rng()).points_strong
        heights = strong[..., place].sort(dim=1).values
        known = cloud.points[..., place]
        assert all(
            (h[:, None] - k[None]).abs().amin(dim=1).max() < 1e-5
            for h, k in zip(heights, known, strict=True)
        )


def test_going_on_from_a_state_equals_never_having_stopped(model: CrossModalModel) -> None:
    whole = task_of(model)
    optimizer = optimizer_of(whole)
    take_steps(whole, optimizer, range(2))
    state = copy.deepcopy({"task": whole.state_dict(), "optimizer": optimizer.state_dict()})
    take_steps(whole, optimizer, range(2, 3))

    resumed = task_of(model)
    again = optimizer_of(resumed)
    resumed.load_state_dict(state["task"])
    again.load_state_dict(state["optimizer"])
    take_steps(resumed, again, range(2, 3))
    for ours, theirs in (
        (resumed.bare_student.state_dict(), whole.bare_student.state_dict()),
        (resumed.teacher.module.state_dict(), whole.teacher.module.state_dict()),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(whole.bare_student.class_embed, whole.teacher.module.class_embed), (
        "a student and its teacher that are one would hide a mix-up"
    )


def test_a_few_steps_on_one_batch_lower_its_objective(model: CrossModalModel) -> None:
    task = task_of(model, ema={"start": 0.999, "end": 0.999})
    optimizer = optimizer_of(task)
    set_learning_rate(optimizer, 3e-4)
    seen = []
    for step in range(8):
        torch.manual_seed(0)  # the same batch, crops and masks each time
        scalars = train_step(
            task,
            optimizer,
            raw_batch(6, num_views=1),
            step=step,
            generator=rng(),
            clip_norm=10.0,
        )
        seen.append(scalars)
    assert seen[-1]["loss"] < 0.9 * seen[0]["loss"]
    for name in ("self_training_image", "masked_image", "global_local_image", "alignment"):
        assert seen[-1][f"loss/{name}"] < seen[0][f"loss/{name}"], name


def test_every_weak_and_strong_pair_shows_its_own_object(model: CrossModalModel) -> None:
    still = {"scale_low": 1, "scale_high": 1, "turn": 0, "shift": 0, "jitter": 0, "dropout": 0}
    task = task_of(
        model,
        point_augment={"weak_scale": 0, "weak_angle": 0, **still},
        image_augment={"rand_ops": 0, "flip": 0},
    )
    batch = raw_batch(4, num_views=3)
    # View t of object k is a plain grey of its own.
    grey = (torch.arange(12) * 20).reshape(4, 3).to(torch.uint8)
    images = grey[:, :, None, None, None].expand(4, 3, 3, 96, 96)
    pairs = task.augment(batch._replace(images=images), rng())
    mean, std = model.spec.image_mean[0], model.spec.image_std[0]
    weak = (pairs.image_weak[:, :, 0, 20:40, 20:40] * std + mean).mean(dim=(2, 3)) * 255
    strong = (pairs.image_strong[:, 0, 20:40, 20:40] * std + mean).mean(dim=(1, 2)) * 255
    torch.testing.assert_close(weak, grey.float(), atol=0.1, rtol=0)
    torch.testing.assert_close(strong, grey[:, 0].float(), atol=0.1, rtol=0)
    for k, cloud in enumerate(batch.points):
        for sample in (*pairs.points_weak[k], pairs.points_strong[k]):
            nearest = (sample[:, None] - cloud[None]).norm(dim=-1).amin(dim=1)
            assert nearest.max() < 1e-5
