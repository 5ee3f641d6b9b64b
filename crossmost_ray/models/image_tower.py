"""The image tower: a vision transformer of open_clip or timm that can be masked, and that
reconstructs what was hidden."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.config import ConfigError


class TowerOutput(NamedTuple):
    """What a tower makes of a batch; without tokens `embed` alone, and None for the rest."""

    embed: Tensor
    """(B, D) float, unit length: the pooled feature in the shared space."""
    global_embed: Tensor | None = None
    """(B, K) float, unit length: the CLS token in the space of `local_embed`."""
    local_embed: Tensor | None = None
    """(B, L, K) float, unit length: patches or groups."""
    reconstruction: Tensor | None = None
    """(B, L, R) float: what was hidden, as far as the tower can tell."""
    target: Tensor | None = None
    """(B, L, R) float, detached: what the reconstruction is measured against."""


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

    def problems(self) -> list[str]:
        """Says what keeps it from being masked, if anything does."""
        ...

    def patches(self, images: Tensor) -> Tensor:
        """Embeds (B, 3, R, R) images as (B, P, W), without position."""
        ...

    def tokens(self, patches: Tensor) -> Tensor:
        """Reads (B, P, W) patches: (B, num_prefix + P, W) after the last block, before any norm."""
        ...

    def pool(self, tokens: Tensor) -> Tensor:
        """Makes (B, W) features of those tokens."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """Maps (..., W) features to (..., D), the shared space."""
        ...


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

    def tokens(self, patches: Tensor) -> Tensor:
        visual, dtype = self.visual, patches.dtype
        cls_token = visual.class_embedding.to(dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls_token, patches], dim=1) + visual.positional_embedding.to(dtype)
        tokens: Tensor = visual.transformer(visual.ln_pre(x))
        return tokens

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

    def tokens(self, patches: Tensor) -> Tensor:
        trunk = self.trunk
        if trunk.dynamic_img_size:
            patches = patches.unflatten(1, trunk.patch_embed.grid_size)
        placed = trunk._pos_embed(patches)
        # Eva hands on rotary positions, which every block turns its queries and keys by.
        x, rotary = placed if isinstance(placed, tuple) else (placed, None)
        x = trunk.norm_pre(x)
        for block in trunk.blocks:
            x = block(x) if rotary is None else block(x, rope=rotary)
        return x

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


class ImageTower(nn.Module):
    """A vision transformer with a mask token and a masked-modelling head.

    Args:
        visual: The vision half of an open_clip model.
        name: Of the model, for messages.

    Raises:
        ConfigError: If that half can't be masked.

    Source:
        CLIP (Radford et al., 2021); mask token, head and local projection as in MUST
        (Li et al., 2022).
    """

    def __init__(self, visual: Any, name: str) -> None:
        super().__init__()
        self.visual = visual
        # Not a module: it holds no parameters, and a checkpoint should not know of it.
        self.trunk = build_trunk(visual, name)
        self.image_size = self.trunk.image_size
        self.patch_size = self.trunk.patch_size
        self.grid = self.image_size // self.patch_size
        self.depth = self.trunk.depth
        width = self.trunk.width
        self.embed_dim = self.trunk.project(torch.zeros(1, width)).shape[1]
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.ln_patch = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, 3 * self.patch_size**2)

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Gives (B, num_prefix + P, W) tokens after the last block, before any norm."""
        x = self.trunk.patches(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return self.trunk.tokens(x)

    def _pooled(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.trunk.project(self.trunk.pool(tokens)), dim=-1)

    def embed(self, images: Tensor) -> Tensor:
        """Embeds (B, 3, R, R) normalised images as (B, D) unit vectors."""
        return self._pooled(self._tokens(images, None))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> TowerOutput:
        """Embeds images of which patches may be hidden.

        Args:
            images: (B, 3, R, R) float, normalised.
            mask: (B, P) bool, True where hidden; None hides nothing.
        """
        tokens = self._tokens(images, mask)
        embed = self._pooled(tokens)
        patches = self.ln_patch(tokens[:, self.trunk.num_prefix :])
        return TowerOutput(
            embed=embed,
            global_embed=embed,
            local_embed=F.normalize(self.trunk.project(patches), dim=-1),
            reconstruction=self.decoder(patches),
            target=self.patchify(images).detach(),
        )

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts (B, 3, R, R) images into (B, P, 3 * patch * patch), channels outermost."""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for embeddings, k + 1 for block k, then the heads."""
        if name.startswith(self.trunk.blocks):
            return int(name.removeprefix(self.trunk.blocks).split(".")[0]) + 1
        return 0 if name.startswith(("mask_token", *self.trunk.stem)) else self.depth + 1
