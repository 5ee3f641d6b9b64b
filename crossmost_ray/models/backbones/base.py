"""What a point tower asks of its backbone, and the tensors that pass between the two."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from crossmost_ray.config import ConfigError


class PointTokens(NamedTuple):
    """A cloud cut into the pieces that can be hidden."""

    tokens: Tensor | None
    """(B, G, E) float, one embedding per group; None for a backbone that has no tokens."""
    centers: Tensor
    """(B, G, 3) float, the groups' centres; for a backbone without tokens its (B, N, 3) points."""
    groups: Tensor | None = None
    """(B, G, M, 3) float, the groups' points relative to their centres, where groups have any."""


class PointFeatures(NamedTuple):
    """What a backbone makes of a cloud. All but `pooled` is None without tokens."""

    pooled: Tensor
    """(B, F) float."""
    cls_token: Tensor | None = None
    """(B, E) float, after the last norm."""
    tokens: Tensor | None = None
    """(B, G, E) float, after the last norm."""
    reconstruction: Tensor | None = None
    """(B, G, E) float: the tokens before anything was hidden, as far as the backbone can tell."""


class PointBackbone(Protocol):
    """What a point tower asks of its backbone, which is also an `nn.Module`."""

    width: int
    """F, of the pooled feature."""
    token_width: int | None
    """E, of a token. None for a backbone without tokens: it can't be mask-modelled."""
    depth: int
    """Layers between the earliest one, which is layer 0, and the heads."""
    min_points: int
    """Least number of points of a cloud that it can read."""

    def tokenize(self, points: Tensor) -> PointTokens:
        """Cuts (B, N, 3) points of the unit sphere into pieces that can be hidden."""
        ...

    def __call__(self, seen: PointTokens, mask: Tensor | None = None) -> PointFeatures:
        """Reads a tokenised cloud.

        Args:
            seen: Output of `tokenize`.
            mask: (B, G) bool, True where a piece is hidden; None hides nothing.
        """
        ...

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter of the backbone lies: 0 to `depth`, `depth` + 1 for heads."""
        ...

    def frozen_modules(self) -> list[nn.Module]:
        """Lists what must not be trained under masked modelling, because it makes the target."""
        ...


def check_num_points(points: Tensor, backbone: PointBackbone) -> None:
    """Refuses clouds that are too small for a backbone.

    Raises:
        ConfigError: If (B, N, 3) points have an N below the backbone's `min_points`.
    """
    if points.shape[1] < backbone.min_points:
        raise ConfigError(
            f"the clouds have {points.shape[1]} points, but {type(backbone).__name__} needs at "
            f"least {backbone.min_points}: raise data.num_points, or take another point backbone"
        )
