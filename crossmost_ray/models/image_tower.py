"""The image tower: an open_clip ViT that can be masked and that reconstructs what was hidden."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TowerOutput(NamedTuple):
    """What a tower makes of a batch."""

    embed: Tensor
    """(B, D) float, unit length: the pooled feature in the shared space."""
    global_embed: Tensor
    """(B, K) float, unit length: the CLS token in the space of `local_embed`."""
    local_embed: Tensor
    """(B, L, K) float, unit length: patches or groups."""
    reconstruction: Tensor
    """(B, L, R) float: what was hidden, as far as the tower can tell."""
    target: Tensor
    """(B, L, R) float, detached: what the reconstruction is measured against."""


class ImageTower(nn.Module):
    """A CLIP vision transformer with a mask token and a masked-modelling head.

    Args:
        visual: open_clip's VisionTransformer with a learned position and a CLS token.

    Source:
        CLIP (Radford et al., 2021); mask token, head and local projection as in MUST
        (Li et al., 2022).
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.image_size = int(visual.image_size[0])
        self.patch_size = int(visual.patch_size[0])
        self.grid = self.image_size // self.patch_size
        width = visual.conv1.out_channels
        self.depth = len(visual.transformer.resblocks)
        self.embed_dim = int(visual.proj.shape[1])
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.ln_patch = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, 3 * self.patch_size**2)

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Gives (B, 1 + P, W) tokens after the last block, before any norm."""
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        cls_token = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls_token, x], dim=1) + visual.positional_embedding.to(x.dtype)
        hidden: Tensor = visual.transformer(visual.ln_pre(x))
        return hidden

    def embed(self, images: Tensor) -> Tensor:
        """Embeds (B, 3, R, R) normalised images as (B, D) unit vectors."""
        tokens = self._tokens(images, None)
        return F.normalize(self.visual.ln_post(tokens[:, 0]) @ self.visual.proj, dim=-1)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> TowerOutput:
        """Embeds images of which patches may be hidden.

        Args:
            images: (B, 3, R, R) float, normalised.
            mask: (B, P) bool, True where hidden; None hides nothing.
        """
        tokens = self._tokens(images, mask)
        embed = F.normalize(self.visual.ln_post(tokens[:, 0]) @ self.visual.proj, dim=-1)
        patches = self.ln_patch(tokens[:, 1:])
        return TowerOutput(
            embed=embed,
            global_embed=embed,
            local_embed=F.normalize(patches @ self.visual.proj, dim=-1),
            reconstruction=self.decoder(patches),
            target=self.patchify(images).detach(),
        )

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts (B, 3, R, R) images into (B, P, 3 * patch * patch), channels outermost."""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for embeddings, k + 1 for block k, then the heads."""
        if name.startswith("visual.transformer.resblocks."):
            return int(name.split(".")[3]) + 1
        first = ("visual.conv1", "visual.class_emb", "visual.positional_emb", "visual.ln_pre")
        if name == "mask_token" or name.startswith(first):
            return 0
        return self.depth + 1
