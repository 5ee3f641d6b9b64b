"""The three towers and their gradients against the numbers of the published modules."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmost_ray.losses import fairness_loss, global_local_loss, masked_modelling_loss
from crossmost_ray.models.backbones.pointbert import PointTokens
from crossmost_ray.models.blocks import BlockForward, BlockRunner
from crossmost_ray.models.classifier import CrossModalClassifier, CrossModalModel
from crossmost_ray.ops.points import (
    farthest_point_sample,
    gather,
    group_points,
    nearest_neighbors,
)
from tests.golden.clip import (
    BATCH_SIZE,
    CLASSES,
    GROUP_SIZE,
    NUM_GROUPS,
    TEMPLATES,
    golden_images,
    golden_points,
    load_golden,
    published_name,
    published_shapes,
    tiny_model,
)
from tests.golden.recipe import unit

Golden = dict[str, npt.NDArray[Any]]

RELATIVE = 2e-5  # of the largest number of a tensor: float32 sums in another order


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden()


@pytest.fixture(scope="module")
def tiny() -> CrossModalModel:
    return tiny_model()


def check(ours: Tensor, expected: npt.NDArray[Any]) -> None:
    """Compares to RELATIVE of the largest expected number."""
    found = ours.detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def masked_terms(model: CrossModalModel, golden: Golden, case: str) -> dict[str, Tensor]:
    """What the published masked pass returns, from the outputs of our towers.

    Masked image modelling is divided there by the number of tokens, CLS included, and not by the
    three channels; masked point modelling predicts the mask token itself, and its sum over the
    channels is divided by the batch, too.
    """
    image_mask = torch.from_numpy(golden["image_mask"]).flatten(1).bool()
    point_mask = torch.from_numpy(golden[f"{case}/pc_mask"])
    image = model.image(golden_images(), image_mask)
    point = model.point(model.point.tokenize(golden_points()), point_mask)
    num_tokens = image_mask.shape[1] + 1
    away = (point.reconstruction - model.point.backbone.mask_token).abs().sum(dim=-1)
    align = {
        tower: (out.local_embed - out.global_embed[:, None]).square().sum(dim=-1)[mask]
        for tower, out, mask in (("image", image, image_mask), ("pc", point, point_mask))
    }
    for tower, out, mask in (("image", image, image_mask), ("pc", point, point_mask)):
        loss = global_local_loss(out.global_embed, out.local_embed, mask)
        torch.testing.assert_close(align[tower].mean(), loss)
    mim = masked_modelling_loss(image.reconstruction, image.target, image_mask)
    cosines = point.embed @ image.embed.t()
    return {
        "image_embed": image.embed,
        "pc_embed": point.embed,
        "loss_mim_image": mim * 3 / num_tokens,
        "loss_mim_pc": (away * point_mask).sum() / point_mask.sum() / BATCH_SIZE,
        "image_align": align["image"].reshape(BATCH_SIZE, -1),
        "pc_align": align["pc"],
        "pc_image_align_logits": cosines,
        "image_pc_align_logits": cosines.t(),
    }


def test_the_inputs_are_the_golden_ones(golden: Golden) -> None:
    for name, ours in (("image", golden_images()), ("points", golden_points())):
        values = ours.double()
        checksum = torch.stack([values.sum(), values.square().sum()])
        torch.testing.assert_close(checksum, torch.from_numpy(golden[f"{name}_checksum"]))


def test_every_published_tensor_has_one_place_in_our_model(tiny: CrossModalModel) -> None:
    shapes = published_shapes()
    ours = {published_name(name): value for name, value in tiny.state_dict().items()}
    assert len(ours) == len(tiny.state_dict())
    assert ours.keys() == shapes.keys()
    for name, value in ours.items():
        assert value.numel() == np.prod(shapes[name]), name


# Text


def test_prompts_become_the_golden_tokens(tiny: CrossModalModel, golden: Golden) -> None:
    prompts = [template.replace("{}", name) for name in CLASSES for template in TEMPLATES]
    tokens = tiny.text.tokenize(prompts).reshape(len(CLASSES), len(TEMPLATES), -1)
    np.testing.assert_array_equal(tokens.numpy(), golden["text_tokens"])


def test_prompts_are_embedded_and_averaged_as_published(
    tiny: CrossModalModel, golden: Golden
) -> None:
    tokens = torch.from_numpy(golden["text_tokens"]).long()
    with torch.no_grad():
        raw = tiny.text.clip.encode_text(tokens.flatten(0, 1))
    check(raw.unflatten(0, tokens.shape[:2]), golden["text_embed_raw"])
    embeds = tiny.text.embed_classes(CLASSES, TEMPLATES, underscores="raw")
    check(embeds.t(), golden["classifier_from_text"])
    spaced = tiny.text.embed_classes(CLASSES, TEMPLATES)
    changed = (spaced - embeds).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == ["_" in name for name in CLASSES]


# Without a mask


@pytest.mark.parametrize("case", ["eval_zerostart", "eval_randomstart"])
def test_groups_are_the_golden_ones(golden: Golden, case: str) -> None:
    points = golden_points()
    start = torch.from_numpy(golden[f"{case}/fps_start"]).long()
    picked = farthest_point_sample(points, NUM_GROUPS, start=start)
    np.testing.assert_array_equal(picked.numpy(), golden[f"{case}/fps_idx"])
    near = nearest_neighbors(gather(points, picked), points, GROUP_SIZE)
    np.testing.assert_array_equal(near.sort(dim=-1).values, golden[f"{case}/knn_idx_sorted"])


@pytest.mark.parametrize("case", ["eval_zerostart", "eval_randomstart"])
def test_features_and_logits_without_a_mask(
    tiny: CrossModalModel, golden: Golden, case: str
) -> None:
    classifier = CrossModalClassifier(tiny, torch.from_numpy(golden["classifier"]).t())
    start = torch.from_numpy(golden[f"{case}/fps_start"]).long()
    with torch.no_grad():
        trunk, backbone = tiny.image.trunk, tiny.point.backbone
        images = golden_images()
        check(trunk.pool(trunk.tokens(trunk.patches(images))), golden[f"{case}/image_features"])
        check(classifier.logits(tiny.image.embed(images)), golden[f"{case}/image_logits"])
        groups, centers = group_points(golden_points(), NUM_GROUPS, GROUP_SIZE, start=start)
        tokens = PointTokens(backbone.reduce_dim(backbone.encoder(groups)), centers)
        check(backbone(tokens).pooled, golden[f"{case}/pc_features"])
        check(classifier.logits(tiny.point(tokens).embed), golden[f"{case}/pc_logits"])
        if case == "eval_zerostart":
            seen = classifier.predict(images, golden_points())
            check(seen.image_logits, golden[f"{case}/image_logits"])
            check(seen.point_logits, golden[f"{case}/pc_logits"])


def test_activations_on_the_way(tiny: CrossModalModel, golden: Golden) -> None:
    prefix = "eval_zerostart/act/"
    expected = {name.removeprefix(prefix): x for name, x in golden.items() if prefix in name}
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: object, inputs: object, output: Tensor) -> None:
            found[name] = output

        return hook

    class Kept(BlockRunner):
        """Image blocks are run by a function of ours, which no hook sees."""

        def __call__(
            self, forward: BlockForward, block: torch.nn.Module, x: Tensor, *more: Any
        ) -> Tensor:
            output = super().__call__(forward, block, x, *more)
            place = next(ours for ours, module in tiny.named_modules() if module is block)
            found[published_name(place)] = output
            return output

    hooks = [
        module.register_forward_hook(keep(published_name(ours)))
        for ours, module in tiny.named_modules()
        if ours.startswith(("image.visual.", "point.backbone."))
        and published_name(ours) in expected
    ]
    tiny.image.trunk.run = Kept()
    with torch.no_grad():
        tiny.image(golden_images())
        tiny.point.embed(golden_points())
    tiny.image.trunk.run = BlockRunner()
    for hook in hooks:
        hook.remove()
    found["visual.conv1"] = found["visual.conv1"].flatten(2).transpose(1, 2)
    assert found.keys() >= expected.keys()
    assert len(expected) == 9
    for name, activation in expected.items():
        check(found[name][:1], activation)  # of the first object


# With a mask


@pytest.mark.parametrize("case", ["eval_masked", "train_masked"])
def test_the_masked_pass(tiny: CrossModalModel, golden: Golden, case: str) -> None:
    classifier = torch.from_numpy(golden["classifier"])
    _, centers = group_points(golden_points(), NUM_GROUPS, GROUP_SIZE)
    np.testing.assert_array_equal(centers, golden[f"{case}/pc_center"])

    # A copy: in training mode, the pass moves the statistics of BatchNorm.
    model = copy.deepcopy(tiny).train(case == "train_masked")
    with torch.no_grad():
        terms = masked_terms(model, golden, case)
    scale = model.logit_scale.detach().exp()
    check(scale * terms.pop("image_embed") @ classifier, golden[f"{case}/image_logits"])
    check(scale * terms.pop("pc_embed") @ classifier, golden[f"{case}/pc_logits"])
    for name, term in terms.items():
        check(term, golden[f"{case}/{name}"])

    prefix = f"{case}/after/"
    after = {published_name(name): value for name, value in model.state_dict().items()}
    moved = {key.removeprefix(prefix): x for key, x in golden.items() if key.startswith(prefix)}
    assert len(moved) == (6 if case == "train_masked" else 0)
    for name, value in moved.items():
        check(after[name], value)


def test_gradients_of_the_whole_objective(tiny: CrossModalModel, golden: Golden) -> None:
    model = copy.deepcopy(tiny).train()
    model.text.requires_grad_(False)
    model.point.backbone.encoder.requires_grad_(False)
    # Its class embeddings are free to change their length there.
    classes = torch.from_numpy(golden["classifier"]).t()
    classifier = CrossModalClassifier(model, classes, unit_classes=False)
    terms = masked_terms(model, golden, "train_masked")

    loss = terms["loss_mim_image"] + terms["loss_mim_pc"]
    loss = loss + 0.2 * terms["image_align"].mean() + 0.2 * terms["pc_align"].mean()
    labels = torch.arange(BATCH_SIZE) % len(CLASSES)
    for tower in ("image", "pc"):
        logits = classifier.logits(terms[f"{tower}_embed"])
        fairness = fairness_loss(logits.softmax(dim=-1).mean(dim=0))
        loss = loss + F.cross_entropy(logits, labels) + fairness
    own = torch.arange(BATCH_SIZE)
    for cosines in (terms["pc_image_align_logits"], terms["image_pc_align_logits"]):
        loss = loss + F.cross_entropy(cosines, own)
    assert loss.item() == pytest.approx(golden["train_masked/grad_loss"].item(), rel=RELATIVE)

    loss.backward()
    gradients = {published_name(name): p.grad for name, p in model.named_parameters()}
    gradients["classifier"] = classifier.class_embed.grad.t()
    names = golden["train_masked/grad_names"].tolist()
    assert {name for name, gradient in gradients.items() if gradient is not None} == {*names}
    assert all(gradients[name] is None for name in golden["train_masked/grad_none_names"])
    norms, probes = golden["train_masked/grad_norm"], golden["train_masked/grad_probe"]
    for name, norm, probe in zip(names, norms, probes, strict=True):
        ours = gradients[name].double().flatten()
        assert ours.norm().item() == pytest.approx(norm, rel=RELATIVE), name
        direction = torch.from_numpy(unit(f"probe.{name}", (len(ours),))).double()
        assert (ours @ direction).item() == pytest.approx(probe, abs=RELATIVE * norm), name
