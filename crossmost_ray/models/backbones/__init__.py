"""The table of point backbones: from a name in a model's card to a module with fresh weights."""

from __future__ import annotations

from collections.abc import Callable

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones.base import PointBackbone, PointFeatures, PointTokens
from crossmost_ray.models.backbones.custom import build_custom_backbone
from crossmost_ray.models.backbones.pointbert import (
    pointbert,
    pointbert_32,
    pointbert_512,
    pointbert_small,
)
from crossmost_ray.models.backbones.pointmlp import pointmlp
from crossmost_ray.models.backbones.pointnet2 import pointnet2_ssg
from crossmost_ray.models.backbones.pointnext import pointnext_s
from crossmost_ray.models.backbones.whole_cloud import WholeCloudBackbone

__all__ = [
    "POINT_BACKBONES",
    "PointBackbone",
    "PointFeatures",
    "PointTokens",
    "WholeCloudBackbone",
    "build_point_backbone",
]

POINT_BACKBONES: dict[str, Callable[[], PointBackbone]] = {
    "pointbert": pointbert,
    "pointbert_32": pointbert_32,
    "pointbert_512": pointbert_512,
    "pointbert_small": pointbert_small,
    "pointmlp": pointmlp,
    "pointnet2_ssg": pointnet2_ssg,
    "pointnext_s": pointnext_s,
}


def build_point_backbone(name: str) -> PointBackbone:
    """Builds the backbone called `name`, with fresh weights.

    Args:
        name: In the table, or "package.module:function" for one of one's own.

    Raises:
        ConfigError: If there is none of that name, or one's own is not what it has to be.
    """
    if ":" in name:
        return build_custom_backbone(name)
    if name not in POINT_BACKBONES:
        known = ", ".join(sorted(POINT_BACKBONES))
        raise ConfigError(
            f"there is no point backbone '{name}'; the backbones are: {known}; "
            "one of your own is named 'package.module:function'"
        )
    return POINT_BACKBONES[name]()
