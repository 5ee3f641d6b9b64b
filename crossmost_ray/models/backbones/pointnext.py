"""PointNeXt: PointNet++ with shortcuts, places in units of the radius, and a height."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.layers import Pointwise, PointwiseNorm
from crossmost_ray.models.backbones.whole_cloud import Cloud, WholeCloudBackbone, start_cloud
from crossmost_ray.ops.points import ball_query, gather

STAGES = 4
WIDTH = 32
RADIUS = 0.15
"""Of the first stage's balls; each later stage's is half as large again."""
NUM_NEIGHBORS = 32


class Embedding(nn.Module):
    """The first layer, on each point alone."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Sequential(Pointwise(width_in, width_out, axes=1)))

    def forward(self, cloud: Cloud) -> Cloud:
        """Lifts the features of N points."""
        return cloud._replace(features=self.convs(cloud.features))


def _layer(width_in: int, width_out: int, axes: int) -> nn.Sequential:
    return nn.Sequential(
        Pointwise(width_in, width_out, axes=axes, bias=False), PointwiseNorm(width_out)
    )


class SetAbstraction(nn.Module):
    """Pools the balls around every other point, beside a shortcut from their centres.

    Args:
        width: Channels in; twice as many go out.
        radius: Of a ball, its surface excluded.
    """

    def __init__(self, width: int, radius: float) -> None:
        super().__init__()
        self.radius = radius
        self.skipconv = nn.Sequential(Pointwise(width, 2 * width, axes=1))
        self.convs = nn.Sequential(
            _layer(3 + width, width, axes=2).append(nn.ReLU()), _layer(width, 2 * width, axes=2)
        )

    def forward(self, cloud: Cloud) -> Cloud:
        """Maps N points to N // 2."""
        index, centers, order = cloud.centers(cloud.points.shape[1] // 2)
        near = ball_query(centers, cloud.points, self.radius, NUM_NEIGHBORS, inclusive=False)
        place = (gather(cloud.points, near) - centers[:, :, None]) / self.radius
        groups = self.convs(torch.cat([place, gather(cloud.features, near)], dim=-1))
        shortcut = self.skipconv(gather(cloud.features, index))
        return Cloud(centers, F.relu(groups.amax(dim=2) + shortcut), order)


class GlobalAbstraction(nn.Module):
    """Pools all that is left, with its place in the cloud."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _layer(3 + width, width, axes=2).append(nn.ReLU()),
            _layer(width, width, axes=2).append(nn.ReLU()),
        )

    def forward(self, cloud: Cloud) -> Tensor:
        """Maps N points to (B, width)."""
        return self.convs(torch.cat([cloud.points, cloud.features], dim=-1)).amax(dim=1)


class PointNextS(WholeCloudBackbone):
    """PointNeXt-S. Names of parameters are those of ULIP's checkpoints.

    Beside its place, each point has its height above the lowest point of its cloud, along y: the
    clouds must stand upright.

    Source:
        PointNeXt (Qian et al., 2022), size S; sizes as in ULIP (Xue et al., 2023).
    """

    width = 256
    depth = STAGES + 1
    min_points = 2**STAGES

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * 2**k for k in range(STAGES + 1)]
        stages: list[nn.Module] = [Embedding(4, WIDTH)]
        stages += [SetAbstraction(w, RADIUS * 1.5**k) for k, w in enumerate(widths[:-1])]
        stages += [GlobalAbstraction(widths[-1])]
        # The nesting is the checkpoints': encoder.encoder.<stage>.0 and prediction.head.<layer>.
        self.encoder = nn.ModuleDict(
            {"encoder": nn.Sequential(*(nn.Sequential(stage) for stage in stages))}
        )
        self.prediction = nn.ModuleDict(
            {
                "head": nn.Sequential(
                    _layer(widths[-1], 512, axes=0).append(nn.ReLU()),
                    nn.Dropout(0.5),
                    _layer(512, self.width, axes=0).append(nn.ReLU()),
                    nn.Dropout(0.5),
                )
            }
        )

    def pool(self, points: Tensor) -> Tensor:
        """Pools (B, N, 3) points of the unit sphere, y up, into (B, 256)."""
        y = points[..., 1:2]
        features = torch.cat([points, y - y.amin(dim=1, keepdim=True)], dim=-1)
        cloud = start_cloud(points, features, points.shape[1] // 2)
        return self.prediction["head"](self.encoder["encoder"](cloud))

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: a layer for each stage, then the head."""
        return int(name.split(".")[2]) if name.startswith("encoder.") else self.depth + 1


def pointnext_s() -> PointNextS:
    """Builds the full-size backbone: four stages that halve the points, then the whole."""
    return PointNextS()
