"""The image tower: a vision transformer of open_clip or timm that can be masked, and that
reconstructs what was hidden."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.trunks import build_trunk
from crossmost_ray.ops.points import gather
from crossmost_ray.ops.precision import full_precision


class TowerOutput(NamedTuple):
    """What a tower makes of a batch; without tokens `embed` alone, and None for the rest."""

    embed: Tensor
    """(B, D) float32, unit length: the pooled feature in the shared space."""
    global_embed: Tensor | None = None
    """(B, K) float, unit length: the CLS token in the space of `local_embed`."""
    local_embed: Tensor | None = None
    """(B, L, K) float, unit length: patches or groups; of an image perhaps not all of them."""
    reconstruction: Tensor | None = None
    """(B, L, R) float: what was hidden, as far as the tower can tell."""
    target: Tensor | None = None
    """(B, L, R) float, detached: what the reconstruction is measured against."""
    hidden: Tensor | None = None
    """(B, L) bool: which of these patches or groups were hidden; None where nothing was."""


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

    def _projected(self, features: Tensor) -> Tensor:
        """Maps (B, W) pooled features to (B, D) float32 unit vectors."""
        with full_precision(features.device):
            return F.normalize(self.trunk.project(features.float()), dim=-1)

    def embed(self, images: Tensor) -> Tensor:
        """Embeds (B, 3, R, R) normalised images as (B, D) float32 unit vectors."""
        asked = None
        if self.trunk.pools_cls:
            asked = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
        tokens = self.trunk.tokens(self.trunk.patches(images), asked)
        return self._projected(self.trunk.pool(tokens))

    def forward(
        self, images: Tensor, mask: Tensor | None = None, most_hidden: int | None = None
    ) -> TowerOutput:
        """Embeds images of which patches may be hidden.

        Args:
            images: (B, 3, R, R) float, normalised.
            mask: (B, P) bool, True where hidden; None hides nothing.
            most_hidden: How many patches of an image are hidden at most, where nobody asks what
                becomes of the others: the output then holds so many, all hidden ones among them.
                It says nothing else: what is computed is the same. None gives all P.
        """
        x = self.trunk.patches(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        target, asked, prefix = self.patchify(images).detach(), None, self.trunk.num_prefix
        if mask is not None and most_hidden is not None and self.trunk.pools_cls:
            # A fixed number of them, hidden ones first: how many there are, only the device knows.
            places = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most_hidden]
            mask, target = mask.gather(1, places), gather(target, places)
            asked, prefix = F.pad(places + prefix, (1, 0)), 1
        tokens = self.trunk.tokens(x, asked)
        embed = self._projected(self.trunk.pool(tokens))
        patches = self.ln_patch(tokens[:, prefix:])
        return TowerOutput(
            embed=embed,
            global_embed=embed,
            local_embed=F.normalize(self.trunk.project(patches), dim=-1),
            reconstruction=self.decoder(patches),
            target=target,
            hidden=mask,
        )

    def patchify(self, images: Tensor) -> Tensor:
        """Cuts (B, 3, R, R) images into (B, P, 3 * patch * patch), channels outermost."""
        return F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for embeddings, k + 1 for block k, then the heads."""
        if name.startswith(self.trunk.blocks):
            return int(name.removeprefix(self.trunk.blocks).split(".")[0]) + 1
        return 0 if name.startswith(("mask_token", *self.trunk.stem)) else self.depth + 1
