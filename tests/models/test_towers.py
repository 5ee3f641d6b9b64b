"""The three towers and the classifier they share."""

from __future__ import annotations

import copy
import math
import socket
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import (
    CrossModalClassifier,
    CrossModalModel,
    ModelSpec,
    build_classifier,
    clamp_logit_scale,
)
from crossmost_ray.models.clip import build_clip, clip_config
from crossmost_ray.models.image_tower import ImageTower
from crossmost_ray.models.text_tower import TextTower, build_tokenizer

CLASSES = ["chair", "night_stand", "sofa"]
TEMPLATES = ["a 3D model of a {}.", "a {} on the floor."]


def clip_image_size(name: str) -> int:
    """Side of the images that the model takes, without its weights."""
    with torch.device("meta"):
        return ImageTower(build_clip(name).visual, name).image_size


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
        plain = model.image(images())
    assert seen.hidden is not None
    assert not seen.hidden.any()
    assert plain.hidden is None
    for ours, theirs in zip(seen[:-1], plain[:-1], strict=True):
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


# Image towers of any kind

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}

# What differs from VISION, in open_clip's terms.
OPEN_CLIP_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "layer_scale": {"ls_init_value": 0.1},
    "no_norm_before": {"no_ln_pre": True},
    "mean_of_patches": {"pool_type": "avg"},
    "norm_after_mean": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "fixed_positions": {"pos_embed_type": "sin_cos_2d"},
    "tokens_beside": {"output_tokens": True},
    "small_eps": {"norm_kwargs": {"eps": 0.1}},
    "custom_blocks": {"qk_norm": True, "scale_attn": True, "scale_fc": True, "scale_heads": True},
}

TIMM_VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "timm_plain": (VisionTransformer, {}),
    "timm_norm_before": (VisionTransformer, {"pre_norm": True}),
    "timm_mean_of_patches": (VisionTransformer, {"global_pool": "avg"}),
    "timm_registers": (VisionTransformer, {"reg_tokens": 3, "no_embed_class": True}),
    "timm_any_size": (VisionTransformer, {"dynamic_img_size": True, "init_values": 0.1}),
    "eva": (Eva, {"global_pool": "token"}),
    "eva_rotary": (Eva, {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True}),
    "eva_rotary_alone": (
        Eva,
        {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "dynamic_img_size": True},
    ),
}


def open_clip_visual(**options: Any) -> nn.Module:
    quick_gelu = options.pop("quick_gelu", False)
    clip = open_clip.model.CLIP(16, VISION | options, TEXT, quick_gelu=quick_gelu)
    visual: nn.Module = clip.visual
    return visual


def timm_visual(kind: type[nn.Module], **options: Any) -> TimmModel:
    visual = TimmModel("test_vit", 16, pool="token", proj="linear")
    options = {"num_heads": 2, "num_classes": 0} | options
    visual.trunk = kind(img_size=32, patch_size=8, embed_dim=32, depth=2, **options)
    visual.head.proj = nn.Linear(32, 16, bias=False)
    return visual


def any_visual(variant: str) -> nn.Module:
    """A small vision half of any kind, in which no two parameters are alike."""
    torch.manual_seed(0)
    visual = (
        open_clip_visual(**OPEN_CLIP_VARIANTS[variant])
        if variant in OPEN_CLIP_VARIANTS
        else timm_visual(TIMM_VARIANTS[variant][0], **TIMM_VARIANTS[variant][1])
    )
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return visual.eval()


def small_images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


any_variant = pytest.mark.parametrize("variant", [*OPEN_CLIP_VARIANTS, *TIMM_VARIANTS])


@any_variant
def test_any_tower_embeds_as_the_library_it_comes_from(variant: str) -> None:
    visual = any_visual(variant)
    tower = ImageTower(visual, variant)
    assert (tower.grid, tower.embed_dim, tower.depth) == (4, 16, 2)
    with torch.no_grad():
        features = visual(small_images())
        expected = F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)
        torch.testing.assert_close(tower.embed(small_images()), expected, atol=1e-5, rtol=0)
        seen = tower(small_images(), torch.zeros(3, 16, dtype=torch.bool))
        torch.testing.assert_close(seen.embed, expected, atol=1e-5, rtol=0)


@any_variant
def test_any_tower_hides_patches_and_tells_where(variant: str) -> None:
    tower = ImageTower(any_visual(variant), variant)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 6] = True  # second row, third column
    painted, elsewhere = small_images(), small_images()
    painted[:, :, 8:16, 16:24] = 3.0
    elsewhere[:, :, 8:16, 8:16] = 3.0
    with torch.no_grad():
        hidden, same, other = (tower(x, mask) for x in (small_images(), painted, elsewhere))
        moved = tower(small_images(), mask.roll(1, dims=1))
    assert hidden.local_embed.shape == (3, 16, 16)
    assert hidden.reconstruction.shape == hidden.target.shape == (3, 16, 192)
    torch.testing.assert_close(hidden.embed, same.embed)
    torch.testing.assert_close(hidden.reconstruction, same.reconstruction)
    changed = (hidden.target != same.target).any(dim=-1)
    assert torch.equal(changed, mask)
    assert not torch.allclose(hidden.embed, other.embed, atol=1e-4)
    assert not torch.allclose(hidden.embed, moved.embed, atol=1e-4)


@any_variant
def test_any_towers_parameters_learn_and_have_a_depth(variant: str) -> None:
    tower = ImageTower(any_visual(variant), variant).train()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, :5] = True
    out = tower(small_images(), mask)
    (out.embed[:, 0].sum() + out.local_embed[..., 0].sum() + out.reconstruction.sum()).backward()
    layers = {name: tower.layer_of(name) for name, _ in tower.named_parameters()}
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    assert set(layers.values()) == {0, 1, 2, 3}
    for name, layer in layers.items():
        blocks = [f"blocks.{k}." in name for k in range(2)]
        assert layer in ((blocks.index(True) + 1,) if any(blocks) else (0, 3)), name
        stem = ("conv1", "patch_embed", "embedding", "token", "pos_embed", "ln_pre", "norm_pre")
        if not any(blocks):
            assert (layer == 0) == any(part in name for part in stem), name


@pytest.mark.parametrize("variant", ["plain", "timm_plain", "eva_rotary"])
def test_a_copied_tower_is_another_tower(variant: str) -> None:
    tower = ImageTower(any_visual(variant), variant)
    copied = copy.deepcopy(tower)
    with torch.no_grad():
        before = tower.embed(small_images())
        for parameter in copied.parameters():
            parameter.mul_(1.5)
        assert torch.equal(tower.embed(small_images()), before)
        assert not torch.allclose(copied.embed(small_images()), before, atol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "timm_plain", "eva_rotary"])
def test_towers_run_in_bfloat16(variant: str) -> None:
    tower = ImageTower(any_visual(variant), variant)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 3] = True
    with torch.no_grad():
        exact = tower(small_images(), mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tower(small_images(), mask)
    torch.testing.assert_close(rough.embed.float(), exact.embed, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"attentional_pool": True}, "pools by attention"),
        ({"pool_type": "none"}, "does not pool its tokens"),
        ({"patch_dropout": 0.5}, "drops patches while training"),
        ({"image_size": (32, 16)}, "not square"),
        ({"layers": [1, 1, 1, 1]}, "it is a ModifiedResNet, no plain vision transformer"),
    ],
)
def test_towers_of_open_clip_that_cannot_be_masked_are_refused(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"image tower of 'x'.*{problem}.*ViT-B-16-quickgelu"):
        ImageTower(open_clip_visual(**options), "x")


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        (VisionTransformer, {"class_token": False, "global_pool": "avg"}, "no CLS token"),
        (VisionTransformer, {"pos_embed": "none"}, "knows no position"),
        (VisionTransformer, {"global_pool": "map"}, "pools by attention"),
        (VisionTransformer, {"patch_drop_rate": 0.5}, "drops patches while training"),
        (Eva, {"patch_drop_rate": 0.5}, "drops patches while training"),
        (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed"}, "differ from block to block"),
    ],
)
def test_towers_of_timm_that_cannot_be_masked_are_refused(
    kind: type[nn.Module], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=rf"image tower of 'x'.*{problem}.*timm:vit_base"):
        ImageTower(timm_visual(kind, **options), "x")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("RN50", "ModifiedResNet"),
        ("timm:resnet18", "ResNet"),
        ("timm:vit_tiny_r_s16_p8_224", "convolutional stem"),
        ("timm:vit_base_patch16_siglip_224", "no CLS token, it pools by attention"),
        ("coca_ViT-B-32", "captioner"),
        ("ViT-B-16-SigLIP", "Hugging Face hub.*ViT-B-16-quickgelu"),
        ("roberta-ViT-B-32", "Hugging Face hub"),
        ("timm:vit_base_patch16_24", "no timm model 'vit_base_patch16_24'.*vit_base_patch16_224"),
        ("timm:vit_tiny_patch16_224+RN5", "no image-text model 'RN5'.*RN50"),
        ("hf-hub:some/model", "no image-text model 'hf-hub:some/model'"),
        ("timm:hf-hub:some/model", "no timm model 'hf-hub:some/model'"),
    ],
)
def test_names_that_cannot_be_used_are_refused_before_any_weight(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        clip_image_size(name)


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


def test_underscores_can_stay_as_they_are(model: CrossModalModel) -> None:
    names = ["night_stand", "sofa"]
    raw = model.text.embed_classes(names, TEMPLATES, underscores="raw")
    with torch.no_grad():
        prompts = [template.replace("{}", "night_stand") for template in TEMPLATES]
        expected = F.normalize(model.text(model.text.tokenize(prompts)).mean(dim=0), dim=0)
    torch.testing.assert_close(raw[0], expected)
    spaced = model.text.embed_classes(names, TEMPLATES)
    assert not torch.allclose(raw[0], spaced[0], atol=1e-4)
    assert torch.equal(raw[1], spaced[1])
    classifier = build_classifier(model, names, TEMPLATES, underscores="raw")
    assert torch.equal(classifier.class_embed, raw)


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


@pytest.mark.parametrize("no_causal_mask", [True, False])
def test_a_text_tower_that_stands_apart_computes_the_same(no_causal_mask: bool) -> None:
    # open_clip builds some models with the text half as a module of its own; ours has one layout.
    torch.manual_seed(0)
    text = TEXT | {"no_causal_mask": no_causal_mask}
    apart = open_clip.model.CustomTextCLIP(16, VISION, text)
    ours = TextTower(open_clip.model.CLIP(16, VISION, text), "vit_small_64")
    ours.clip.load_state_dict(
        {
            name.removeprefix("text."): value
            for name, value in apart.state_dict().items()
            if name.startswith("text.")
        }
    )
    tokens = ours.tokenize(["a chair", "a sofa " * 9])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), apart.encode_text(tokens, normalize=True))


# Table of image-text models


def test_an_unknown_image_text_model_is_refused_with_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no image-text model 'ViT-Z'.*vit_small_64.*list_mode"):
        build_clip("ViT-Z")
    with pytest.raises(ConfigError, match="no image-text model 'ViT-Z'"):
        clip_image_size("ViT-Z")


def test_the_size_of_images_is_known_without_building() -> None:
    assert clip_image_size("vit_small_64") == 64
    assert clip_image_size("ViT-B-16") == 224


@pytest.fixture
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something asked for the net")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("no_net")
@pytest.mark.parametrize("name", ["vit_small_64", "ViT-S-32", "timm:test_vit+vit_small_64"])
def test_no_tower_asks_for_the_net(name: str) -> None:
    with torch.device("meta"):
        build_clip(name)


def test_a_tower_of_timm_stands_beside_any_text_tower() -> None:
    name = "timm:test_vit+vit_small_64"
    assert clip_image_size(name) == 160
    ours = CrossModalModel(ModelSpec(name, "pointbert_small")).eval()
    assert ours.image.embed_dim == 128
    assert ours.text.clip.context_length == 24
    with torch.no_grad():
        images = torch.randn(1, 3, 160, 160)
        expected = F.normalize(ours.image.visual(images), dim=-1)
        torch.testing.assert_close(ours.image.embed(images), expected, atol=1e-5, rtol=0)
        scores = ours.image.embed(images) @ ours.text.embed_classes(CLASSES, TEMPLATES).t()
    assert scores.shape == (1, 3)
    beside_clip = clip_config("timm:test_vit")
    assert beside_clip["text_cfg"] == clip_config("slip_vit_b16")["text_cfg"]
    openai = open_clip.get_model_config("ViT-B-16-quickgelu")
    assert beside_clip["text_cfg"] == openai["text_cfg"]
    assert (beside_clip["embed_dim"], beside_clip["quick_gelu"]) == (openai["embed_dim"], True)


def test_slip_has_the_published_shape() -> None:
    with torch.device("meta"):
        clip = build_clip("slip_vit_b16")
        image, text = ImageTower(clip.visual, "slip_vit_b16"), TextTower(clip, "slip_vit_b16")
    trunk = image.visual.trunk
    names = {name: tuple(value.shape) for name, value in trunk.state_dict().items()}
    assert len(names) == 150
    assert names["cls_token"] == (1, 1, 768)
    assert names["pos_embed"] == (1, 197, 768)
    assert names["patch_embed.proj.weight"] == (768, 3, 16, 16)
    assert names["blocks.11.attn.qkv.weight"] == (2304, 768)
    assert names["norm.bias"] == (768,)
    assert {m.eps for m in trunk.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert isinstance(trunk.blocks[0].mlp.act, nn.GELU)
    assert {n: tuple(p.shape) for n, p in image.visual.head.named_parameters()} == {
        "proj.weight": (512, 768)
    }
    # With the two projections and the scales, the 302 tensors that ULIP's checkpoints share.
    assert len(text.state_dict()) == 149
    assert text.clip.text_projection.shape == (512, 512)
    blocks = text.clip.transformer.resblocks
    assert len(blocks) == 12
    assert type(blocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    assert (image.image_size, image.grid, image.embed_dim) == (224, 14, 512)


@pytest.mark.slow
def test_clip_at_full_size() -> None:
    torch.manual_seed(0)
    name = "ViT-B-16-quickgelu"
    clip = build_clip(name)
    tower = ImageTower(clip.visual, name).eval()
    # The published count leaves out the projection, which lies outside of its image tower.
    total = sum(p.numel() for p in tower.parameters())
    assert total - tower.visual.proj.numel() == 86_392_320
    assert tower.visual.proj.shape == (768, 512)
    assert type(tower.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    mask = torch.zeros(2, 196, dtype=torch.bool)
    mask[:, :60] = True
    with torch.no_grad():
        out = tower(torch.randn(2, 3, 224, 224), mask)
    assert all(field.isfinite().all() for field in out)
    assert out.local_embed.shape == (2, 196, 512)
    assert out.reconstruction.shape == (2, 196, 768)


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
        out = ours(
            images(),
            points(),
            mask,
            most_hidden=24,
            point_ratio=(0.25, 0.25),
            generator=torch.Generator(),
        )
        plain = ours.predict(images(), points())
        assert out.point.hidden.sum(dim=1).tolist() == [8, 8]
        assert out.image.hidden.sum(dim=1).tolist() == [20, 20]
        assert out.image.hidden.shape == (2, 24)
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
            most_hidden=64,
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
