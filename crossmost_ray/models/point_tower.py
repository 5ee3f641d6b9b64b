"""The point tower: a backbone, its projection into the shared space, and masked modelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones import build_point_backbone
from crossmost_ray.models.backbones.pointbert import PointTokens
from crossmost_ray.models.image_tower import TowerOutput
from crossmost_ray.ops.masks import neighborhood_mask


class PointTower(nn.Module):
    """A point backbone and its two projections.

    Args:
        backbone: Name in the table of point backbones.
        embed_dim: D, width of the shared space.
    """

    def __init__(self, backbone: str, embed_dim: int) -> None:
        super().__init__()
        self.backbone = build_point_backbone(backbone)
        self.depth = self.backbone.depth
        width, token_width = self.backbone.width, self.backbone.token_width
        self.projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        # Tokens are half as wide as the pooled feature, so they can't share its projection.
        self.local_projection = nn.Parameter(
            torch.randn(token_width, embed_dim) * token_width**-0.5
        )

    def tokenize(self, points: Tensor) -> PointTokens:
        """Cuts (B, N, 3) points into groups and encodes each."""
        return self.backbone.tokenize(points)

    def draw_mask(
        self, seen: PointTokens, ratio: tuple[float, float], generator: torch.Generator
    ) -> Tensor:
        """Draws (B, G) bool, True where hidden; `ratio` is the least and the largest share."""
        return neighborhood_mask(
            seen.centers, ratio_low=ratio[0], ratio_high=ratio[1], generator=generator
        )

    def embed(self, points: Tensor) -> Tensor:
        """Embeds (B, N, 3) points of the unit sphere as (B, D) unit vectors."""
        features = self.backbone(self.tokenize(points))
        return F.normalize(features.pooled @ self.projection, dim=-1)

    def forward(self, seen: PointTokens, mask: Tensor | None = None) -> TowerOutput:
        """Embeds tokenised clouds of which groups may be hidden.

        Args:
            seen: Output of `tokenize`.
            mask: (B, G) bool, True where hidden; None hides nothing.
        """
        features = self.backbone(seen, mask)
        return TowerOutput(
            embed=F.normalize(features.pooled @ self.projection, dim=-1),
            global_embed=F.normalize(features.cls_token @ self.local_projection, dim=-1),
            local_embed=F.normalize(features.tokens @ self.local_projection, dim=-1),
            reconstruction=self.backbone.lm_head(features.tokens),
            # The tokens before anything was hidden: after it, the target at a hidden place would
            # be the mask token itself, which says nothing of the cloud.
            target=seen.tokens.detach(),
        )

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for embeddings, k + 1 for block k, then the heads."""
        if name.startswith("backbone.blocks.blocks."):
            return int(name.split(".")[3]) + 1
        heads = ("projection", "local_projection", "backbone.norm", "backbone.lm_head")
        return self.depth + 1 if name.startswith(heads) else 0
