"""Each switch of `compat`: what the published code does, and what ours does instead."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossmost_ray.config import (
    REFERENCE_COMPAT,
    AdaptConfig,
    CompatConfig,
    ConfigError,
    config_dict,
)
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.point_tokenizer import PointTokenizer, save_tokenizer
from crossmost_ray.models.pretrained import load_model, save_model
from crossmost_ray.schema import RawBatch
from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import REFERENCE_POINTS, AdaptTask
from crossmost_ray.training.build import build_task, inspect_model
from crossmost_ray.training.checkpoint import save_state
from crossmost_ray.training.export import export_adapted
from tests.models.test_point_tokenizer import SMALL, small_tokenizer
from tests.synthetic import CLASSES, adapt_config, raw_batch, tiny_model
from tests.training.test_adapt import EASY, optimizer_of, rng, take_steps, task_of


def terms_of(model: CrossModalModel, compat: Any = None, **sections: Any) -> dict[str, Tensor]:
    if compat is not None:
        sections["compat"] = compat
    torch.manual_seed(0)  # stochastic depth draws from the global generator
    return task_of(model, **sections).losses(raw_batch(4, captions=False), rng())


def test_one_word_turns_every_switch() -> None:
    default = config_dict(CompatConfig())
    labelled = {"data": {"test_shards": "no/such/shards"}, "keep_checkpoints": 200}
    reference = config_dict(adapt_config(compat="reference", **labelled).compat)
    assert reference == REFERENCE_COMPAT
    kept = {"preset": "reference", "select_on": "last", "tie": "image"}
    mixed = config_dict(adapt_config(compat=kept).compat)
    assert mixed == REFERENCE_COMPAT | {"select_on": "last", "tie": "image"}
    with pytest.raises(ConfigError, match="no preset 'old', only 'reference'"):
        adapt_config(compat="old")
    # The reference does not decay the rates of the point tower's layers either.
    assert {key for key in default if default[key] == reference[key]} == {"point_layer_decay"}


def test_a_config_can_be_copied_with_its_switches() -> None:
    config = adapt_config(compat={"tie": "point"})
    assert dataclasses.replace(config, seed=7).compat == config.compat


def test_choosing_by_test_labels_needs_them_and_every_checkpoint() -> None:
    compat = {"select_on": "oracle_test_points"}
    with pytest.raises(ConfigError, match=r"labels of data.test_shards, which is not set"):
        adapt_config(compat=compat)
    with pytest.raises(ConfigError, match=r"set keep_checkpoints=3, or"):
        adapt_config(compat=compat, data={"test_shards": "x"}, optim={"epochs": 3})


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


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the small backbone's groups."""
    folder: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    save_tokenizer(folder, small_tokenizer(), card="")
    return folder


@pytest.fixture
def by_ids(model: CrossModalModel, tokenizer_folder: Path, tmp_path: Path) -> AdaptTask:
    """A task whose student predicts ids."""
    save_model(tmp_path / "model", model, card="")
    task = build_task(ids_config(tmp_path / "model", tokenizer_folder), CLASSES)
    assert isinstance(task, AdaptTask)
    return task


def ids_config(model: Path, tokenizer: Path) -> AdaptConfig:
    return adapt_config(
        model=str(model),
        point_tokenizer=str(tokenizer),
        compat={"mpm_target": "token_ids"},
        pseudo_labels=EASY,
    )


def test_ids_and_their_tokenizer_go_together() -> None:
    with pytest.raises(ConfigError, match=r"point_tokenizer is not set; .*dVAE.pth --as-tokenizer"):
        adapt_config(compat={"mpm_target": "token_ids"})
    with pytest.raises(ConfigError, match=r"is 'x', but compat.mpm_target is chamfer.*leave"):
        adapt_config(compat={"mpm_target": "chamfer"}, point_tokenizer="x")
    mixed = {"preset": "reference", "mpm_target": "token_ids", "select_on": "last"}
    assert adapt_config(compat=mixed, point_tokenizer="x").compat.mpm_norm == "upstream"


@pytest.mark.parametrize(
    ("backbone", "group_size", "said"),
    [
        ("pointnet2_ssg", 16, "token_ids needs a PointBERT.*is PointNet2"),
        ("pointbert_small", 32, r"groups of 32 points, .* groups of 16: take a model"),
        ("pointbert_small", None, "there is no tokenizer folder"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_any_worker_starts(
    tmp_path: Path, backbone: str, group_size: int | None, said: str
) -> None:
    save_model(tmp_path / "model", CrossModalModel(ModelSpec("vit_small_64", backbone)), card="")
    if group_size is not None:
        spec = dataclasses.replace(SMALL, group_size=group_size)
        save_tokenizer(tmp_path / "tokenizer", PointTokenizer(spec), card="")
    with pytest.raises(ConfigError, match=said):
        inspect_model(ids_config(tmp_path / "model", tmp_path / "tokenizer"))


def test_ids_of_hidden_groups_can_be_the_target(by_ids: AdaptTask) -> None:
    term = by_ids.losses(raw_batch(4, captions=False), rng())["masked_point"]
    assert 0.5 * math.log(64) < term.item() < 2 * math.log(64)
    term.backward()
    point, tokenizer = by_ids.bare_student.point, by_ids.tokenizer
    assert tokenizer is not None
    assert not any(module.training for module in tokenizer.modules())
    for parameter in (
        point.token_id_head.weight,
        point.backbone.mask_token,
        point.backbone.blocks.blocks[0].attn.qkv.weight,
    ):
        assert parameter.grad.abs().max() > 0
    still = [*tokenizer.parameters(), *point.backbone.lm_head.parameters()]
    still += point.backbone.encoder.parameters()
    assert all(parameter.grad is None for parameter in still)
    placed = {id(p) for group in by_ids.parameter_groups() for p in group["params"]}  # type: ignore[attr-defined]
    assert id(point.token_id_head.weight) in placed
    assert placed.isdisjoint(map(id, still))


def test_the_ids_are_those_of_the_strong_cloud_in_full_precision(by_ids: AdaptTask) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    tokenizer = by_ids.tokenizer
    assert tokenizer is not None
    named = tokenizer.token_ids
    tokenizer.token_ids = lambda *cloud: seen.append(cloud) or named(*cloud)  # type: ignore
    batch = raw_batch(3, captions=False)
    by_ids.bare_student.precision = torch.bfloat16
    by_ids.losses(batch, rng())
    by_ids.bare_student.precision = torch.float32
    points = by_ids.augment(batch, rng()).points_strong
    ((groups, centers),) = seen
    assert (groups.shape, centers.shape) == ((3, 32, 16, 3), (3, 32, 3))
    assert groups.dtype == centers.dtype == torch.float32
    for k in range(3):
        whole = (groups[k] + centers[k][:, None]).flatten(0, 1)
        for part in (whole, centers[k]):
            assert (part[:, None] - points[k]).norm(dim=-1).amin(dim=1).max() < 1e-5


def test_only_hidden_groups_count(by_ids: AdaptTask) -> None:
    point = by_ids.bare_student.point.eval()
    tokens = point.tokenize(raw_batch(2).points[:, :128])
    hidden = torch.arange(32).expand(2, 32) % 3 == torch.tensor([[0], [1]])
    seen = point(tokens, hidden)
    ids = torch.arange(64).reshape(2, 32)

    def term(token_ids: Tensor, count: float = 21.0) -> float:
        by_ids.tokenizer.token_ids = lambda *_: token_ids  # type: ignore
        return by_ids._masked_term("point", seen, hidden, torch.tensor(count)).item()

    assert hidden.sum() == 22
    log_prob = seen.reconstruction.log_softmax(dim=-1)
    own = log_prob.gather(2, ids[..., None])[..., 0]
    assert term(ids) == pytest.approx(-own[hidden].sum().item() / 21, rel=1e-5)
    assert term(torch.where(hidden, ids, 63 - ids)) == term(ids)
    assert term(torch.where(hidden, 63 - ids, ids)) != pytest.approx(term(ids), rel=1e-3)
    # The count is of all workers: half as many hidden elsewhere make these weigh twice as much.
    assert term(ids, 10.5) == pytest.approx(2 * term(ids), rel=1e-5)
    with torch.no_grad():
        point.token_id_head.weight.zero_()
        point.token_id_head.bias.zero_()
    seen = point(tokens, hidden)
    assert term(ids, 22.0) == pytest.approx(math.log(64), rel=1e-5)


def test_a_run_that_predicts_ids_goes_on_with_its_head(
    by_ids: AdaptTask, model: CrossModalModel, tmp_path: Path, tokenizer_folder: Path
) -> None:
    head = "point.token_id_head.weight"
    fresh = by_ids.bare_student.state_dict()[head].clone()
    named = copy.deepcopy(by_ids.tokenizer.state_dict())
    optimizer = optimizer_of(by_ids)
    take_steps(by_ids, optimizer, range(2))
    state = copy.deepcopy({"task": by_ids.state_dict(), "optimizer": optimizer.state_dict()})
    take_steps(by_ids, optimizer, range(2, 3))
    assert not torch.equal(state["task"]["student"][head], fresh)
    assert state["task"]["student"].keys() == state["task"]["teacher"].keys()
    own = model.point.state_dict().keys() | {"token_id_head.weight", "token_id_head.bias"}
    points = {name for name in state["task"]["student"] if name.startswith("point.")}
    assert points == {f"point.{name}" for name in own}, "the tokenizer is no part of it"
    assert all(torch.equal(x, named[name]) for name, x in by_ids.tokenizer.state_dict().items())

    config = by_ids.config
    resumed = build_task(config, CLASSES)
    assert isinstance(resumed, AdaptTask)
    again = optimizer_of(resumed)
    resumed.load_state_dict(state["task"])
    again.load_state_dict(state["optimizer"])
    take_steps(resumed, again, range(2, 3))
    ours, theirs = (task.bare_student.state_dict() for task in (resumed, by_ids))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_state(checkpoint, {**state, "history": [{"epoch": 0}]})
    written = export_adapted(config, Store(str(checkpoint)), Store(str(tmp_path / "out")))
    exported = load_model(written["student"]).model.point.state_dict()
    assert exported.keys() == model.point.state_dict().keys()
    name = "backbone.mask_token"
    assert torch.equal(exported[name], state["task"]["student"][f"point.{name}"])


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
    assert RawBatch._fields == ("images", "points", "object_id", "captions", "names")
