"""Vision transformers of open_clip and timm under one face, that of the image tower's trunk."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.blocks import BlockRunner, attend, call
from crossmost_ray.ops.points import gather


class Trunk(Protocol):
    """What the tower asks of a vision transformer. W is its width."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_prefix: int
    """Tokens before the patches, the first of them the CLS token."""
    blocks: str
    """What the names of the blocks' parameters begin with, up to the number of the block."""
    stem: tuple[str, ...]
    """What the names of the parameters before the blocks begin with."""
    run: BlockRunner
    """How its blocks are run."""

    def problems(self) -> list[str]:
        """Says what keeps it from being masked, if anything does."""
        ...

    def patches(self, images: Tensor) -> Tensor:
        """Embeds (B, 3, R, R) images as (B, P, W), without position."""
        ...

    pools_cls: bool
    """Whether pooling looks at the CLS token alone."""

    def tokens(self, patches: Tensor, asked: Tensor | None = None) -> Tensor:
        """Reads (B, P, W) patches.

        Args:
            patches: (B, P, W).
            asked: (B, Q) int64, the tokens that are asked for; None for all, in their order.

        Returns:
            (B, Q, W) after the last block, before any norm; Q is num_prefix + P where all are
            asked for.
        """
        ...

    def pool(self, tokens: Tensor) -> Tensor:
        """Makes (B, W) features of all tokens, or, where `pools_cls`, of any that begin with the
        CLS token."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """Maps (..., W) features to (..., D), the shared space."""
        ...


QUICK = 1.702
"""The factor inside QuickGELU, x sigmoid(1.702 x)."""


class _QuickMlp(torch.autograd.Function):
    """Two linear layers around QuickGELU, as silu(s) / 1.702 of s = 1.702 x.

    Products scale what they write for nothing: neither factor costs a pass over memory, nor does
    either on the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        scaled = torch.addmm(b1, x, w1.t(), beta=QUICK, alpha=QUICK)
        opened = F.silu(scaled)
        ctx.save_for_backward(x, w1, w2, scaled, opened)
        return torch.addmm(b2, opened, w2.t(), alpha=1 / QUICK)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, w1, w2, scaled, opened = ctx.saved_tensors
        of_w2 = _product(gradient.t(), opened, 1 / QUICK)
        of_scaled = torch.ops.aten.silu_backward(_product(gradient, w2, 1 / QUICK), scaled)
        of_w1 = _product(of_scaled.t(), x, QUICK)
        of_b1 = of_scaled.sum(dim=0).mul_(QUICK)
        return _product(of_scaled, w1, QUICK), of_w1, of_b1, of_w2, gradient.sum(dim=0)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Multiplies matrices and a number."""
    return torch.addmm(b.new_empty(()), a, b, beta=0, alpha=factor)


def quick_mlp(x: Tensor, inner: nn.Linear, outer: nn.Linear) -> Tensor:
    """Computes outer(QuickGELU(inner(x))), in fewer passes over memory than its formula takes, and
    keeps two wide tensors for the gradient in place of four.

    Args:
        x: (..., W).
        inner: W to any width.
        outer: That width to V.

    Returns:
        (..., V), in the type that autocast asks for, if it is on.

    Source:
        CLIP (Radford et al., 2021), its MLP.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    given = (x.flatten(0, -2), inner.weight, inner.bias, outer.weight, outer.bias)
    out: Tensor = _QuickMlp.apply(*(tensor.to(dtype) for tensor in given))
    return out.unflatten(0, x.shape[:-1])


def clip_block(block: nn.Module, x: Tensor, quick: bool, asked: Tensor | None) -> Tensor:
    """Runs one of open_clip's plain blocks, of its parameters.

    Its own forward pass lays tokens out as (L, B, W) inside, which copies them back and forth, and
    in bfloat16 on a CPU repeats the weights for each token: that took more than half of a step.

    Args:
        block: A ResidualAttentionBlock that attends to its own input.
        x: (B, L, W) tokens.
        quick: Whether its activation is QuickGELU.
        asked: (B, Q) int64, the tokens that are asked for: the others are looked at, and not
            computed. None asks for all, in their order.

    Returns:
        (B, Q, W).
    """
    attn, mlp = block.attn, block.mlp
    assert isinstance(attn, nn.MultiheadAttention)
    assert isinstance(mlp, nn.Sequential)
    heads, W = attn.num_heads, attn.embed_dim
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    normed = block.ln_1(x)  # type: ignore[operator]
    if asked is None:
        packed = F.linear(normed, weight, bias).unflatten(-1, (3, heads, -1))
        query, key, value = packed.unbind(2)
    else:
        x = gather(x, asked)
        few = gather(normed, asked)
        query = F.linear(few, weight[:W], bias[:W]).unflatten(-1, (heads, -1))
        key, value = F.linear(normed, weight[W:], bias[W:]).unflatten(-1, (2, heads, -1)).unbind(2)
    x = x + block.ls_1(attn.out_proj(attend(query, key, value)))  # type: ignore[operator]
    inner: Any
    outer: Any
    inner, activation, outer = mlp
    normed = block.ln_2(x)  # type: ignore[operator]
    opened = quick_mlp(normed, inner, outer) if quick else outer(activation(inner(normed)))
    return x + block.ls_2(opened)  # type: ignore[operator]


class OpenClipTrunk:
    """open_clip's own VisionTransformer, pooled by its CLS token or by its patches' mean."""

    num_prefix = 1
    blocks = "visual.transformer.resblocks."
    stem: tuple[str, ...] = (
        "visual.conv1",
        "visual.class_emb",
        "visual.positional_emb",
        "visual.ln_pre",
    )

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.image_size = int(visual.image_size[0])
        self.patch_size = int(visual.patch_size[0])
        self.width = int(visual.conv1.out_channels)
        self.depth = len(visual.transformer.resblocks)
        self.run = BlockRunner()
        self.pools_cls = visual.pool_type == "tok"
        # Options of later models make blocks of another class.
        from open_clip.transformer import QuickGELU, ResidualAttentionBlock

        blocks = visual.transformer.resblocks
        self._plain = all(type(block) is ResidualAttentionBlock for block in blocks)
        self._quick = self._plain and isinstance(blocks[0].mlp.gelu, QuickGELU)

    def problems(self) -> list[str]:
        visual = self.visual
        found = {
            "its images are not square": len({*visual.image_size}) > 1,
            "it pools by attention": visual.attn_pool is not None,
            "it does not pool its tokens": visual.pool_type not in ("tok", "avg"),
            "it drops patches while training": not isinstance(visual.patch_dropout, nn.Identity),
        }
        return [problem for problem, there in found.items() if there]

    def patches(self, images: Tensor) -> Tensor:
        patches: Tensor = self.visual.conv1(images).flatten(2).transpose(1, 2)
        return patches

    def tokens(self, patches: Tensor, asked: Tensor | None = None) -> Tensor:
        visual, dtype = self.visual, patches.dtype
        cls_token = visual.class_embedding.to(dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls_token, patches], dim=1) + visual.positional_embedding.to(dtype)
        x = visual.ln_pre(x)
        *blocks, last = visual.transformer.resblocks
        if not self._plain:
            for block in (*blocks, last):
                x = self.run(call, block, x)
            return x if asked is None else gather(x, asked)
        for block in blocks:
            x = self.run(clip_block, block, x, self._quick, None)
        return self.run(clip_block, last, x, self._quick, asked)

    def pool(self, tokens: Tensor) -> Tensor:
        visual = self.visual
        if visual.pool_type == "tok":
            features: Tensor = visual.ln_post(tokens[:, 0])
        elif visual.final_ln_after_pool:
            features = visual.ln_post(tokens[:, 1:].mean(dim=1))
        else:
            features = visual.ln_post(tokens[:, 1:]).mean(dim=1)
        return features

    def project(self, features: Tensor) -> Tensor:
        projected: Tensor = features @ self.visual.proj
        return projected


class TimmTrunk:
    """timm's VisionTransformer or Eva inside open_clip's TimmModel, pooled as timm pools it."""

    blocks = "visual.trunk.blocks."
    stem: tuple[str, ...] = tuple(
        f"visual.trunk.{name}"
        for name in ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "rope")
    )

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.trunk = visual.trunk
        self.image_size = int(self.trunk.patch_embed.img_size[0])
        self.patch_size = int(self.trunk.patch_embed.patch_size[0])
        self.width = int(self.trunk.embed_dim)
        self.depth = len(self.trunk.blocks)
        self.num_prefix = int(self.trunk.num_prefix_tokens)
        self.pools_cls = self.trunk.global_pool == "token" and self.trunk.attn_pool is None
        self.run = BlockRunner()

    def problems(self) -> list[str]:
        from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
        from timm.layers.patch_embed import PatchEmbed

        trunk = self.trunk
        rope = getattr(trunk, "rope", None)
        found = {
            "its images are not square": len({*trunk.patch_embed.img_size}) > 1,
            "it has no CLS token": trunk.cls_token is None,
            "it knows no position": trunk.pos_embed is None and rope is None,
            "its positions differ from block to block": getattr(trunk, "rope_mixed", False),
            # A stem of several convolutions would tell neighbours what is hidden.
            "its patches come out of a convolutional stem": type(trunk.patch_embed)
            is not PatchEmbed,
            "it pools by attention": trunk.attn_pool is not None,
            "it drops patches while training": isinstance(
                trunk.patch_drop, PatchDropout | PatchDropoutWithIndices
            ),
        }
        return [problem for problem, there in found.items() if there]

    def patches(self, images: Tensor) -> Tensor:
        patches: Tensor = self.trunk.patch_embed(images)
        # Models that take several sizes keep the grid until positions are added.
        return patches.flatten(1, 2) if self.trunk.dynamic_img_size else patches

    def tokens(self, patches: Tensor, asked: Tensor | None = None) -> Tensor:
        trunk = self.trunk
        if trunk.dynamic_img_size:
            patches = patches.unflatten(1, trunk.patch_embed.grid_size)
        placed = trunk._pos_embed(patches)
        # Eva hands on rotary positions, which every block turns its queries and keys by.
        x, rotary = placed if isinstance(placed, tuple) else (placed, None)
        x = trunk.norm_pre(x)
        for block in trunk.blocks:
            x = self.run(call, block, x) if rotary is None else self.run(call, block, x, rotary)
        return x if asked is None else gather(x, asked)

    def pool(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.trunk.forward_head(self.trunk.norm(tokens), pre_logits=True)
        return features

    def project(self, features: Tensor) -> Tensor:
        # One of the two heads is the identity: which one, the model's configuration says.
        projected: Tensor = self.visual.head(self.trunk.head(features))
        return projected


def build_trunk(visual: Any, name: str) -> Trunk:
    """Gives the vision half of an open_clip model the one face that the tower knows.

    Args:
        visual: Of the open_clip model; it stays as it is.
        name: Of the model, for the message.

    Raises:
        ConfigError: If it is no vision transformer, or none that can be masked.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models import eva, vision_transformer

    def refusal(problems: list[str]) -> ConfigError:
        return ConfigError(
            f"the image tower of '{name}' can't be masked: {', '.join(problems)}; take one such as "
            "ViT-B-16-quickgelu, ViT-L-14, EVA02-B-16 or timm:vit_base_patch16_224"
        )

    inner = visual.trunk if isinstance(visual, TimmModel) else visual
    # Not isinstance: a class derived from one of these computes something else.
    if type(inner) is VisionTransformer:
        trunk: Trunk = OpenClipTrunk(visual)
    elif type(inner) in (vision_transformer.VisionTransformer, eva.Eva):
        trunk = TimmTrunk(visual)
    else:
        raise refusal([f"it is a {type(inner).__name__}, no plain vision transformer"])
    if problems := trunk.problems():
        raise refusal(problems)
    return trunk
