"""The three towers and the classifier they share."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import (
    CrossModalClassifier,
    CrossModalModel,
    ModelSpec,
    build_classifier,
    clamp_logit_scale,
)
from crossmost_ray.models.clip import build_clip, clip_image_size
from crossmost_ray.models.text_tower import build_tokenizer

CLASSES = ["chair", "night_stand", "sofa"]
TEMPLATES = ["a 3D model of a {}.", "a {} on the floor."]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def points(batch: int = 2) -> Tensor:
    return torch.randn(batch, 90, 3, generator=torch.Generator().manual_seed(0)) / 3


# Image tower


def test_the_image_embedding_is_that_of_open_clip(model: CrossModalModel) -> None:
    with torch.no_grad():
        expected = F.normalize(model.image.visual(images()), dim=-1)
        torch.testing.assert_close(model.image.embed(images()), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model.image(images()).embed, expected, atol=1e-6, rtol=1e-5)


def test_a_mask_of_nothing_hides_nothing(model: CrossModalModel) -> None:
    with torch.no_grad():
        seen = model.image(images(), torch.zeros(2, 64, dtype=torch.bool))
        for ours, theirs in zip(seen, model.image(images()), strict=True):
            assert torch.equal(ours, theirs)


def test_hidden_patches_are_not_seen(model: CrossModalModel) -> None:
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 9] = True  # second row, second column: pixels 8 to 15 both ways
    painted = images()
    painted[0, :, 8:16, 8:16] = 5.0
    with torch.no_grad():
        hidden, same, plain = (
            model.image(images(), mask),
            model.image(painted, mask),
            model.image(images()),
        )
        assert torch.equal(hidden.embed, same.embed)
        assert torch.equal(hidden.reconstruction, same.reconstruction)
        assert not torch.equal(hidden.target, same.target)
        # The image with nothing hidden is as it was, the other one is not.
        torch.testing.assert_close(hidden.embed[1], plain.embed[1])
        assert not torch.allclose(hidden.embed[0], plain.embed[0], atol=1e-4)
        assert not torch.allclose(model.image.embed(painted)[0], plain.embed[0], atol=1e-4)


def test_patches_can_be_put_together_again(model: CrossModalModel) -> None:
    patches = model.image.patchify(images())
    assert patches.shape == (2, 64, 192)
    grid = patches.reshape(2, 8, 8, 3, 8, 8).permute(0, 3, 1, 4, 2, 5)
    assert torch.equal(grid.reshape(2, 3, 64, 64), images())


def test_the_image_towers_outputs_have_unit_length_and_carry_gradients(
    model: CrossModalModel,
) -> None:
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, :9] = True
    seen = model.image(images(), mask)
    for embed in (seen.embed, seen.global_embed, seen.local_embed):
        torch.testing.assert_close(embed.norm(dim=-1), torch.ones(embed.shape[:-1]))
    assert seen.local_embed.shape == (2, 64, 128)
    assert seen.reconstruction.shape == seen.target.shape == (2, 64, 192)
    assert not seen.target.requires_grad
    assert seen.reconstruction.requires_grad


def test_depth_of_the_image_towers_parameters(model: CrossModalModel) -> None:
    layers: dict[int, set[str]] = {}
    for name, _ in model.image.named_parameters():
        layers.setdefault(model.image.layer_of(name), set()).add(name)
    assert sorted(layers) == [0, 1, 2, 3, 4, 5]
    assert layers[0] == {
        "mask_token",
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.conv1.weight",
        "visual.ln_pre.weight",
        "visual.ln_pre.bias",
    }
    for k in range(4):
        assert len(layers[k + 1]) == 12
        assert all(f"resblocks.{k}." in name for name in layers[k + 1])
    assert layers[5] == {
        "visual.proj",
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "ln_patch.weight",
        "ln_patch.bias",
        "decoder.weight",
        "decoder.bias",
    }


# Point tower


def test_the_point_tower_embeds_alike_with_and_without_tokens_at_hand(
    model: CrossModalModel,
) -> None:
    with torch.no_grad():
        seen = model.point.tokenize(points())
        out = model.point(seen)
        torch.testing.assert_close(out.embed, model.point.embed(points()))
        features = model.point.backbone(seen)
        expected = F.normalize(features.pooled @ model.point.projection, dim=-1)
        torch.testing.assert_close(out.embed, expected)
        for embed in (out.embed, out.global_embed, out.local_embed):
            torch.testing.assert_close(embed.norm(dim=-1), torch.ones(embed.shape[:-1]))


def test_the_target_of_a_hidden_group_is_its_token_and_not_the_mask_token(
    model: CrossModalModel,
) -> None:
    seen = model.point.tokenize(points())
    mask = model.point.draw_mask(seen, (0.5, 0.5), torch.Generator().manual_seed(0))
    assert mask.sum(dim=1).tolist() == [16, 16]
    out = model.point(seen, mask)
    assert torch.equal(out.target, seen.tokens)
    assert not out.target.requires_grad
    assert out.reconstruction.shape == out.target.shape
    # Fresh weights make small tokens; measured by their size, hidden groups differ.
    assert out.target[mask].std(dim=0).mean() > 0.1 * out.target.abs().mean()


def test_depth_of_the_point_towers_parameters(model: CrossModalModel) -> None:
    layer = {name: model.point.layer_of(name) for name, _ in model.point.named_parameters()}
    assert set(layer.values()) == {0, 1, 2, 3, 4, 5}
    assert {name for name, k in layer.items() if k == 5} == {
        "projection",
        "local_projection",
        "backbone.norm.weight",
        "backbone.norm.bias",
        "backbone.lm_head.weight",
        "backbone.lm_head.bias",
    }
    assert layer["backbone.encoder.first_conv.0.weight"] == 0
    assert layer["backbone.cls_token"] == layer["backbone.pos_embed.2.bias"] == 0
    assert layer["backbone.blocks.blocks.0.attn.qkv.weight"] == 1
    assert layer["backbone.blocks.blocks.3.norm1.bias"] == 4


# Text tower


def test_class_embeddings_are_normalised_averaged_and_normalised(model: CrossModalModel) -> None:
    embeds = model.text.embed_classes(CLASSES, TEMPLATES)
    rows = []
    with torch.no_grad():
        for name in ("chair", "night stand", "sofa"):
            prompts = [f"a 3D model of a {name}.", f"a {name} on the floor."]
            each = model.text.clip.encode_text(model.text.tokenize(prompts))
            rows.append(F.normalize(F.normalize(each, dim=-1).mean(dim=0), dim=0))
    torch.testing.assert_close(embeds, torch.stack(rows), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    assert not embeds.requires_grad


def test_underscores_are_read_as_spaces(model: CrossModalModel) -> None:
    snake = model.text.embed_classes(["night_stand", "tv_stand_x"], TEMPLATES)
    spaced = model.text.embed_classes(["night stand", "tv stand x"], TEMPLATES)
    assert torch.equal(snake, spaced)


def test_one_template_is_enough(model: CrossModalModel) -> None:
    embeds = model.text.embed_classes(["chair", "sofa"], ["{}"])
    with torch.no_grad():
        expected = model.text(model.text.tokenize(["chair", "sofa"]))
    torch.testing.assert_close(embeds, expected)


def test_the_same_template_twice_is_the_template(model: CrossModalModel) -> None:
    once, twice = (model.text.embed_classes(CLASSES, TEMPLATES[:1] * n) for n in (1, 2))
    torch.testing.assert_close(once, twice)


def test_further_braces_in_a_template_are_text(model: CrossModalModel) -> None:
    # Accepted by the config, which asks for one {} and knows of no format strings.
    embeds = model.text.embed_classes(["chair", "sofa"], ["a {} in {colour}, 50 % {"])
    with torch.no_grad():
        prompts = [f"a {name} in {{colour}}, 50 % {{" for name in ("chair", "sofa")]
        expected = model.text(model.text.tokenize(prompts))
    torch.testing.assert_close(embeds, expected)


def test_many_prompts_are_embedded_in_parts(model: CrossModalModel) -> None:
    classes = [f"thing number {k}" for k in range(130)]
    embeds = model.text.embed_classes(classes, TEMPLATES)  # 260 prompts, in parts of 256
    assert embeds.shape == (130, 128)
    torch.testing.assert_close(embeds[127:], model.text.embed_classes(classes[127:], TEMPLATES))


@pytest.mark.parametrize("classes", [[], ["chair", "chair"], ["chair"], ["chair", " "]])
def test_class_lists_that_make_no_classifier_are_refused(
    model: CrossModalModel, classes: list[str]
) -> None:
    with pytest.raises(ValueError, match="the class list"):
        model.text.embed_classes(classes, TEMPLATES)


def test_a_prompt_too_long_still_ends_with_its_end_token(model: CrossModalModel) -> None:
    short, long = model.text.tokenize(["a chair", "chair " * 60])
    context = model.text.clip.context_length
    assert len(long) == context == 24
    end = short.max()  # the end token is the largest of the vocabulary
    assert end == 49407
    assert long[-1] == end
    assert (long != 0).all()
    assert (long == end).sum() == 1
    with torch.no_grad():
        # Pooled at its end: two prompts that differ only behind the cut are one.
        longer = model.text.tokenize(["chair " * 80])
        assert torch.equal(model.text(long[None]), model.text(longer))


def test_the_text_tower_holds_the_text_half_only(model: CrossModalModel) -> None:
    names = {name for name, _ in model.text.named_parameters()}
    assert not any("visual" in name or "logit_scale" in name for name in names)
    with torch.no_grad():
        norm = model.text(model.text.tokenize(["a chair"])).norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones(1))


# Table of image-text models


def test_an_unknown_image_text_model_is_refused_with_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no image-text model 'ViT-Z'.*vit_small_64.*list_mode"):
        build_clip("ViT-Z")
    with pytest.raises(ConfigError, match="no image-text model 'ViT-Z'"):
        clip_image_size("ViT-Z")


def test_the_size_of_images_is_known_without_building() -> None:
    assert clip_image_size("vit_small_64") == 64
    assert clip_image_size("ViT-B-16") == 224


def test_a_fresh_models_scale_is_clips(model: CrossModalModel) -> None:
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert model.image.embed_dim == 128
    assert ModelSpec("vit_small_64", "pointbert_small").image_mean == pytest.approx(
        (0.48145466, 0.4578275, 0.40821073)
    )


# Classifier


def classifier(model: CrossModalModel) -> CrossModalClassifier:
    return build_classifier(copy.deepcopy(model), CLASSES, TEMPLATES).eval()


def test_logits_are_cosines_times_the_scale(model: CrossModalModel) -> None:
    ours = classifier(model)
    with torch.no_grad():
        seen = ours.predict(images(), points())
        classes = model.text.embed_classes(CLASSES, TEMPLATES)
        for embed, logits in (
            (seen.image_embed, seen.image_logits),
            (seen.point_embed, seen.point_logits),
        ):
            cosine = F.cosine_similarity(embed[:, None], classes[None], dim=-1)
            torch.testing.assert_close(logits, cosine / 0.07, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.image_embed, model.image.embed(images()))
        torch.testing.assert_close(seen.point_embed, model.point.embed(points()))


def test_a_longer_class_embedding_is_no_better(model: CrossModalModel) -> None:
    ours = classifier(model)
    with torch.no_grad():
        before = ours.predict(images(), points())
        ours.class_embed[1] *= 10
        after = ours.predict(images(), points())
    torch.testing.assert_close(before.image_logits, after.image_logits)
    torch.testing.assert_close(before.point_logits, after.point_logits)


def test_the_masked_pass_hides_as_asked(model: CrossModalModel) -> None:
    ours = classifier(model)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, :20] = True
    with torch.no_grad():
        out = ours(images(), points(), mask, point_ratio=(0.25, 0.25), generator=torch.Generator())
        plain = ours.predict(images(), points())
        assert out.point_mask.sum(dim=1).tolist() == [8, 8]
        assert out.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
        torch.testing.assert_close(out.image.embed, model.image(images(), mask).embed)
        torch.testing.assert_close(out.prediction.image_logits, ours.logits(out.image.embed))
        torch.testing.assert_close(out.prediction.point_logits, ours.logits(out.point.embed))
        assert not torch.allclose(out.prediction.image_embed, plain.image_embed, atol=1e-4)
        assert not torch.allclose(out.prediction.point_embed, plain.point_embed, atol=1e-4)


def test_the_masked_pass_with_nothing_hidden_is_the_prediction(model: CrossModalModel) -> None:
    ours = classifier(model)
    with torch.no_grad():
        out = ours(
            images(),
            points(),
            torch.zeros(2, 64, dtype=torch.bool),
            point_ratio=(0.0, 0.0),
            generator=torch.Generator(),
        )
        plain = ours.predict(images(), points())
    for left, right in zip(out.prediction, plain, strict=True):
        torch.testing.assert_close(left, right)


def test_the_towers_are_shared_with_the_model_and_the_embeddings_are_not(
    model: CrossModalModel,
) -> None:
    embeds = model.text.embed_classes(CLASSES, TEMPLATES)
    ours = CrossModalClassifier(model, embeds)
    assert ours.image is model.image
    assert ours.logit_scale is model.logit_scale
    with torch.no_grad():
        ours.class_embed.zero_()
    assert embeds.abs().max() > 0
    assert not any(name.startswith("text") for name, _ in ours.named_parameters())


@pytest.mark.parametrize(("factor", "left"), [(14.0, 14.0), (100.0, 100.0), (250.0, 100.0)])
def test_the_scale_is_kept_at_100_or_below(factor: float, left: float) -> None:
    scale = nn.Parameter(torch.tensor(math.log(factor)))
    clamp_logit_scale(scale)
    assert scale.exp().item() == pytest.approx(left, rel=1e-5)
    assert scale.requires_grad


def test_a_vocabulary_is_read_once() -> None:
    # It takes a quarter of a second; read in every step, it doubled the time of pre-training.
    assert build_tokenizer("vit_small_64") is build_tokenizer("vit_small_64")
