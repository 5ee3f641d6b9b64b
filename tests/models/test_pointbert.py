"""The point backbone: its small PointNet, its mask token, and the names of its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones import PointTokens, build_point_backbone
from crossmost_ray.models.backbones.pointbert import (
    Block,
    FpsStart,
    GroupEncoder,
    PointBert,
    pointbert,
    pointbert_32,
    pointbert_512,
    pointbert_small,
)
from crossmost_ray.ops.points import farthest_point_sample, gather


def tiny(fps_start: FpsStart = "first") -> PointBert:
    torch.manual_seed(0)
    return PointBert(
        num_groups=6,
        group_size=5,
        width=16,
        depth=2,
        heads=2,
        group_width=8,
        fps_start=fps_start,
    ).eval()


def points(batch: int = 3, num_points: int = 40) -> Tensor:
    return torch.randn(batch, num_points, 3, generator=torch.Generator().manual_seed(0))


def plain_encoder(encoder: GroupEncoder, groups: Tensor) -> Tensor:
    """The small PointNet as it is published: convolutions over channels-first groups."""
    B, G, M, _ = groups.shape
    local = encoder.first_conv(groups.reshape(B * G, M, 3).transpose(1, 2))
    overall = local.amax(dim=2, keepdim=True).expand(-1, -1, M)
    encoded = encoder.second_conv(torch.cat([overall, local], dim=1))
    return encoded.amax(dim=2).reshape(B, G, -1)


@pytest.mark.parametrize("training", [True, False])
def test_the_fast_encoder_is_the_published_one(training: bool) -> None:
    torch.manual_seed(0)
    encoder = GroupEncoder(8)
    for norm in (encoder.first_conv[1], encoder.second_conv[1]):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    encoder.train(training)
    groups = torch.randn(2, 3, 5, 3)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    ours = encoder(groups)
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * weights).sum(), list(encoder.parameters()))
    after = {name: value.clone() for name, value in encoder.state_dict().items()}

    encoder.load_state_dict(state)
    plain = plain_encoder(encoder, groups)
    expected = torch.autograd.grad((plain * weights).sum(), list(encoder.parameters()))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(after[name], value)


def test_features_have_their_widths() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    assert seen.tokens.shape == (3, 6, 16)
    assert seen.centers.shape == (3, 6, 3)
    features = backbone(seen)
    assert features.pooled.shape == (3, backbone.width) == (3, 32)
    assert features.cls_token.shape == (3, 16)
    assert features.tokens.shape == (3, 6, 16)
    torch.testing.assert_close(
        features.pooled, torch.cat([features.cls_token, features.tokens.amax(dim=1)], dim=1)
    )


def test_the_order_of_points_behind_the_first_does_not_matter() -> None:
    backbone, cloud = tiny(), points()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39)])
    ours, shuffled = (backbone(backbone.tokenize(x)) for x in (cloud, cloud[:, order]))
    torch.testing.assert_close(ours.pooled, shuffled.pooled)


def test_the_order_of_groups_does_not_matter_to_the_pooled_feature() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    order = torch.randperm(6)
    shuffled = PointTokens(seen.tokens[:, order], seen.centers[:, order])
    torch.testing.assert_close(backbone(seen).pooled, backbone(shuffled).pooled)


def test_clouds_of_a_batch_do_not_see_each_other() -> None:
    backbone, cloud = tiny(), points()
    together = backbone(backbone.tokenize(cloud)).pooled
    alone = torch.cat([backbone(backbone.tokenize(one[None])).pooled for one in cloud])
    torch.testing.assert_close(together, alone)


def test_a_hidden_group_is_known_by_its_place_only() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 2] = True
    other = seen.tokens.clone()
    other[:, 2] = 7.0
    elsewhere = seen.centers.clone()
    elsewhere[:, 2] += 0.5
    hidden = backbone(seen, mask)
    assert torch.equal(hidden.pooled, backbone(PointTokens(other, seen.centers), mask).pooled)
    assert not torch.allclose(hidden.pooled, backbone(seen).pooled, atol=1e-5)
    moved = backbone(PointTokens(seen.tokens, elsewhere), mask)
    assert not torch.allclose(hidden.pooled, moved.pooled, atol=1e-5)


def test_hiding_nothing_is_hiding_nothing() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    nothing = backbone(seen, torch.zeros(3, 6, dtype=torch.bool))
    assert torch.equal(nothing.pooled, backbone(seen).pooled)


def test_the_mask_of_one_cloud_does_not_touch_another() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0] = True
    changed = (backbone(seen, mask).pooled != backbone(seen).pooled).any(dim=1)
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("hidden", [True, False])
def test_the_mask_token_learns_where_something_is_hidden(hidden: bool) -> None:
    backbone = tiny()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 1] = hidden
    backbone(backbone.tokenize(points()), mask).pooled.square().sum().backward()
    assert (backbone.mask_token.grad.abs().max() > 0) == hidden


def test_the_tokens_outside_the_mask_get_a_gradient_and_hidden_ones_none() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    tokens = seen.tokens.detach().requires_grad_()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[:, 4] = True
    backbone(PointTokens(tokens, seen.centers), mask).pooled.square().sum().backward()
    assert (tokens.grad[:, 4] == 0).all()
    assert (tokens.grad[:, :4].abs().amax(dim=-1) > 0).all()


def test_branches_are_dropped_whole_and_made_up_for() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, drop_path=0.25).train()
    x = torch.randn(4000, 2, 16)
    kept = block.draw(x)
    assert kept is not None
    for factor in kept:
        assert factor.shape == (4000, 1, 1)
        assert {round(value, 5) for value in factor.unique().tolist()} == {0.0, round(4 / 3, 5)}
        assert factor.mean().item() == pytest.approx(1.0, abs=0.04)
    assert not torch.equal(*kept), "each branch has a chance of its own"
    with torch.no_grad():
        attended = block.attn(block.norm1(x))
        middle = x + attended * kept[0]
        expected = middle + block.mlp(block.norm2(middle)) * kept[1]
        torch.testing.assert_close(block(x, kept), expected)
        lost = (kept[0].flatten() == 0) & (kept[1].flatten() == 0)
        assert lost.any()
        assert torch.equal(block(x, kept)[lost], x[lost]), "an object's branches are dropped whole"
    assert block.eval().draw(x) is None


def test_evaluation_drops_nothing_and_repeats_itself() -> None:
    backbone = tiny()
    seen = backbone.tokenize(points())
    assert torch.equal(backbone(seen).pooled, backbone(seen).pooled)
    rates = [block.drop_path for block in pointbert_small().blocks.blocks]
    assert rates == pytest.approx([0.0, 0.1 / 3, 0.2 / 3, 0.1])


def published_names() -> dict[str, tuple[int, ...]]:
    """Tensors of Point-BERT as ULIP and CrossMoST save it, less the projection, which lies in
    our point tower."""

    def convolution(out: int, into: int) -> list[tuple[str, tuple[int, ...]]]:
        return [("weight", (out, into, 1)), ("bias", (out,))]

    def norm(width: int) -> list[tuple[str, tuple[int, ...]]]:
        vectors = ("weight", "bias", "running_mean", "running_var")
        return [*((name, (width,)) for name in vectors), ("num_batches_tracked", ())]

    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "encoder.first_conv.0": convolution(128, 3),
        "encoder.first_conv.1": norm(128),
        "encoder.first_conv.3": convolution(256, 128),
        "encoder.second_conv.0": convolution(512, 512),
        "encoder.second_conv.1": norm(512),
        "encoder.second_conv.3": convolution(256, 512),
        "reduce_dim": [("weight", (384, 256)), ("bias", (384,))],
        "pos_embed.0": [("weight", (128, 3)), ("bias", (128,))],
        "pos_embed.2": [("weight", (384, 128)), ("bias", (384,))],
        "norm": [("weight", (384,)), ("bias", (384,))],
        "lm_head": [("weight", (384, 384)), ("bias", (384,))],
    }
    for k in range(12):
        block = f"blocks.blocks.{k}"
        for name in ("norm1", "norm2"):
            parts[f"{block}.{name}"] = [("weight", (384,)), ("bias", (384,))]
        parts[f"{block}.attn.qkv"] = [("weight", (1152, 384))]
        parts[f"{block}.attn.proj"] = [("weight", (384, 384)), ("bias", (384,))]
        parts[f"{block}.mlp.fc1"] = [("weight", (1536, 384)), ("bias", (1536,))]
        parts[f"{block}.mlp.fc2"] = [("weight", (384, 1536)), ("bias", (384,))]
    names = {f"{part}.{name}": shape for part, pairs in parts.items() for name, shape in pairs}
    return names | dict.fromkeys(("cls_token", "mask_token", "cls_pos"), (1, 1, 384))


def test_the_full_size_takes_published_checkpoints_by_name() -> None:
    with torch.device("meta"):
        backbone, *others = pointbert(), pointbert_32(), pointbert_512()
    ours = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    expected = published_names()
    assert len(expected) == 163
    assert ours == expected
    assert sum(p.numel() for p in backbone.encoder.parameters()) == 428_800
    sizes = [(b.num_tokens, b.group_size) for b in (backbone, *others)]
    assert sizes == [(64, 32), (32, 64), (512, 32)]


def test_groups_can_start_at_a_random_point() -> None:
    backbone, cloud = tiny("random"), points()
    centers = backbone.tokenize(cloud, torch.Generator().manual_seed(3)).centers
    # One index a cloud, drawn from all of its points, as the published code draws it.
    start = torch.randint(0, 40, (3,), generator=torch.Generator().manual_seed(3))
    expected = gather(cloud, farthest_point_sample(cloud, 6, start=start))
    assert torch.equal(centers, expected)
    assert not torch.equal(centers, tiny().tokenize(cloud).centers)

    torch.manual_seed(3)
    assert torch.equal(backbone.tokenize(cloud).centers, expected), "without one, torch's own"
    assert not torch.equal(backbone.tokenize(cloud).centers, expected)


def test_from_the_first_point_nothing_is_drawn() -> None:
    backbone = tiny()
    state = torch.random.get_rng_state()
    assert torch.equal(backbone.tokenize(points()).centers[:, 0], points()[:, 0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_hidden_groups_are_told_from_the_final_tokens() -> None:
    backbone = tiny()
    features = backbone(backbone.tokenize(points()))
    torch.testing.assert_close(features.reconstruction, backbone.lm_head(features.tokens))
    assert backbone.frozen_modules() == [backbone.encoder]


def test_an_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'pointnxt'; the backbones are: pointbert, pointbert_32"
    ):
        build_point_backbone("pointnxt")
