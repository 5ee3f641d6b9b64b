"""The point tower: a backbone, its projection into the shared space, and masked modelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones import PointTokens, build_point_backbone
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.image_tower import TowerOutput
from crossmost_ray.ops.masks import neighborhood_mask
from crossmost_ray.ops.precision import full_precision

TRAINING_HEADS = ("point_head.", "token_id_head.")
"""What the names of parameters begin with that serve training alone, and are not exported."""


class PointTower(nn.Module):
    """A point backbone and its two projections; one projection where it has no tokens.

    Args:
        backbone: Name in the table of point backbones, or "package.module:function".
        embed_dim: D, width of the shared space.
    """

    def __init__(self, backbone: str, embed_dim: int) -> None:
        super().__init__()
        self.backbone = build_point_backbone(backbone)
        self.depth = self.backbone.depth
        width, token_width = self.backbone.width, self.backbone.token_width
        self.projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        # Tokens have a width of their own, so they can't share the pooled feature's projection.
        self.local_projection = (
            None
            if token_width is None
            else nn.Parameter(torch.randn(token_width, embed_dim) * token_width**-0.5)
        )

        self.point_head: nn.Linear | None = None
        """Predicts the points of hidden groups; made by `predict_points` alone."""

        self.token_id_head: nn.Linear | None = None
        """Predicts the ids of hidden groups; made by `predict_token_ids` alone."""

    def predict_points(self) -> None:
        """Makes hidden points, in place of hidden tokens, what masked modelling predicts.

        Raises:
            ConfigError: If the backbone does not cut clouds into groups of a fixed size.
        """
        backbone = self._grouping_backbone("chamfer")
        self.point_head = self._training_head(backbone, 3 * backbone.group_size)

    def predict_token_ids(self, *, vocabulary: int, group_size: int) -> None:
        """Makes the ids of hidden groups, in place of their tokens, what masked modelling predicts.

        The output's target is then (B, G, 1 + M, 3): each group's centre, and its points relative
        to it. What their ids are, a tokenizer says; the tower does not know it.

        Args:
            vocabulary: How many ids there are.
            group_size: Points of the groups that the tokenizer names.

        Raises:
            ConfigError: If the backbone does not cut clouds into groups of that size.
        """
        backbone = self._grouping_backbone("token_ids")
        if backbone.group_size != group_size:
            raise ConfigError(
                f"the point tokenizer names groups of {group_size} points, but the point backbone "
                f"makes groups of {backbone.group_size}: take a model whose groups are of the same "
                "size, such as one of pointbert (32), or another point_tokenizer"
            )
        self.token_id_head = self._training_head(backbone, vocabulary)

    def _grouping_backbone(self, target: str) -> PointBert:
        if not isinstance(self.backbone, PointBert):
            raise ConfigError(
                f"compat.mpm_target {target} needs a PointBERT, whose groups have points; "
                f"the point backbone is {type(self.backbone).__name__}"
            )
        return self.backbone

    def _training_head(self, backbone: PointBert, width: int) -> nn.Linear:
        """Makes a head in place of the backbone's own, which then gets no gradient."""
        backbone.lm_head.requires_grad_(False)
        head = nn.Linear(backbone.cls_token.shape[-1], width)
        return head.to(self.projection.device)

    @property
    def has_tokens(self) -> bool:
        """Whether masked modelling and global-local alignment can be had from this tower."""
        return self.local_projection is not None

    def tokenize(self, points: Tensor) -> PointTokens:
        """Cuts (B, N, 3) points into the pieces that can be hidden, and encodes them.

        Raises:
            ConfigError: If the backbone needs more points.
        """
        return self.backbone.tokenize(points)

    def draw_mask(
        self, seen: PointTokens, ratio: tuple[float, float], generator: torch.Generator
    ) -> Tensor:
        """Draws (B, G) bool, True where hidden; `ratio` is the least and the largest share.

        Without tokens, G is the number of points.
        """
        return neighborhood_mask(
            seen.centers, ratio_low=ratio[0], ratio_high=ratio[1], generator=generator
        )

    def embed(self, points: Tensor) -> Tensor:
        """Embeds (B, N, 3) points of the unit sphere as (B, D) float32 unit vectors."""
        return self._projected(self.backbone(self.tokenize(points)).pooled)

    def _projected(self, pooled: Tensor) -> Tensor:
        """Maps (B, F) pooled features to (B, D) float32 unit vectors."""
        with full_precision(pooled.device):
            return F.normalize(pooled.float() @ self.projection, dim=-1)

    def forward(self, seen: PointTokens, mask: Tensor | None = None) -> TowerOutput:
        """Embeds tokenised clouds of which groups, or points, may be hidden.

        Args:
            seen: Output of `tokenize`.
            mask: (B, G) bool, True where hidden; None hides nothing.

        Returns:
            All fields of it, or `embed` alone where the backbone has no tokens.
        """
        features = self.backbone(seen, mask)
        embed = self._projected(features.pooled)
        if self.local_projection is None:
            return TowerOutput(embed)
        assert features.cls_token is not None
        assert features.tokens is not None
        assert seen.tokens is not None
        reconstruction, target = features.reconstruction, seen.tokens
        if self.point_head is not None:
            assert seen.groups is not None
            reconstruction = self.point_head(features.tokens).unflatten(-1, (-1, 3))
            target = seen.groups
        elif self.token_id_head is not None:
            assert seen.groups is not None
            reconstruction = self.token_id_head(features.tokens)
            target = torch.cat([seen.centers[:, :, None], seen.groups], dim=2)
        return TowerOutput(
            embed=embed,
            global_embed=F.normalize(features.cls_token @ self.local_projection, dim=-1),
            local_embed=F.normalize(features.tokens @ self.local_projection, dim=-1),
            reconstruction=reconstruction,
            # The tokens before anything was hidden: after it, the target at a hidden place would
            # be the mask token itself, which says nothing of the cloud.
            target=target.detach(),
            hidden=mask,
        )

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for the earliest, `depth` + 1 for the heads."""
        part, _, rest = name.partition(".")
        return self.backbone.layer_of(rest) if part == "backbone" else self.depth + 1
