"""The table of point backbones: from a name in a model's card to a module with fresh weights."""

from __future__ import annotations

from collections.abc import Callable

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones.pointbert import PointBert, pointbert, pointbert_small

POINT_BACKBONES: dict[str, Callable[[], PointBert]] = {
    "pointbert": pointbert,
    "pointbert_small": pointbert_small,
}


def build_point_backbone(name: str) -> PointBert:
    """Builds the backbone called `name`, with fresh weights.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in POINT_BACKBONES:
        known = ", ".join(sorted(POINT_BACKBONES))
        raise ConfigError(f"there is no point backbone '{name}'; the backbones are: {known}")
    return POINT_BACKBONES[name]()
