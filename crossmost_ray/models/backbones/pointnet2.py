"""PointNet++: balls around sampled centres, each pooled by a shared network, stage upon stage."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.layers import Pointwise, PointwiseNorm
from crossmost_ray.models.backbones.whole_cloud import Cloud, WholeCloudBackbone, start_cloud
from crossmost_ray.ops.points import ball_query, gather


class SharedMlp(nn.Module):
    """A network shared by all points of all groups, and the maximum over each group.

    Args:
        widths: Channels in, then those after each layer.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        layers = list(pairwise(widths))
        self.mlp_convs = nn.ModuleList(Pointwise(a, b, axes=2) for a, b in layers)
        self.mlp_bns = nn.ModuleList(PointwiseNorm(b) for _, b in layers)

    def pool(self, groups: Tensor) -> Tensor:
        """Pools (B, S, K, channels) into (B, S, widths[-1])."""
        for convolution, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            groups = F.relu(norm(convolution(groups)))
        return groups.amax(dim=2)


class SetAbstraction(SharedMlp):
    """Pools the balls around farthest points.

    Args:
        widths: Channels in (3 for the place, and those of the features), then those of the layers.
        num_centers: S.
        radius: Of a ball, its surface included.
        num_neighbors: K, points taken of a ball.
    """

    def __init__(self, *widths: int, num_centers: int, radius: float, num_neighbors: int) -> None:
        super().__init__(*widths)
        self.num_centers = num_centers
        self.radius = radius
        self.num_neighbors = num_neighbors

    def forward(self, cloud: Cloud) -> Cloud:
        """Maps N points to S."""
        _, centers, order = cloud.centers(self.num_centers)
        near = ball_query(centers, cloud.points, self.radius, self.num_neighbors, inclusive=True)
        place = gather(cloud.points, near) - centers[:, :, None]
        groups = torch.cat([place, gather(cloud.features, near)], dim=-1)
        return Cloud(centers, self.pool(groups), order)


class GlobalAbstraction(SharedMlp):
    """Pools all that is left, with its place in the cloud."""

    def forward(self, cloud: Cloud) -> Tensor:
        """Maps N points to (B, widths[-1])."""
        whole = torch.cat([cloud.points, cloud.features], dim=-1)
        return self.pool(whole[:, None])[:, 0]


class PointNet2Ssg(WholeCloudBackbone):
    """PointNet++ with one radius a stage. Names of parameters are those of ULIP's checkpoints.

    Source:
        PointNet++ (Qi et al., 2017), single-scale grouping; sizes as in ULIP (Xue et al., 2023).
    """

    width = 256
    depth = 2
    min_points = 512

    def __init__(self) -> None:
        super().__init__()
        self.sa1 = SetAbstraction(3, 64, 64, 128, num_centers=512, radius=0.2, num_neighbors=32)
        self.sa2 = SetAbstraction(
            3 + 128, 128, 128, 256, num_centers=128, radius=0.4, num_neighbors=64
        )
        self.sa3 = GlobalAbstraction(3 + 256, 256, 512, 1024)
        self.fc1 = nn.Linear(1024, 512)
        self.bn1 = nn.BatchNorm1d(512)
        self.fc2 = nn.Linear(512, 256)
        self.bn2 = nn.BatchNorm1d(256)
        self.dropout = nn.Dropout(0.4)

    def pool(self, points: Tensor) -> Tensor:
        """Pools (B, N, 3) points of the unit sphere into (B, 256)."""
        cloud = start_cloud(points, points[..., :0], self.sa1.num_centers)
        x = self.sa3(self.sa2(self.sa1(cloud)))
        x = self.dropout(F.relu(self.bn1(self.fc1(x))))
        return self.dropout(F.relu(self.bn2(self.fc2(x))))

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: a layer for each abstraction, then the head."""
        stages = ("sa1", "sa2", "sa3")
        stage = name.partition(".")[0]
        return stages.index(stage) if stage in stages else self.depth + 1


def pointnet2_ssg() -> PointNet2Ssg:
    """Builds the full-size backbone: 512 centres, 128 centres, the whole."""
    return PointNet2Ssg()
