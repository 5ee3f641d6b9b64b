"""PointMLP: residual networks over nearest neighbours, seen from their centre's feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.layers import Pointwise, PointwiseNorm
from crossmost_ray.models.backbones.whole_cloud import Cloud, WholeCloudBackbone, start_cloud
from crossmost_ray.ops.points import gather, nearest_neighbors

STAGES = 4
BLOCKS = 2
WIDTH = 64
NUM_NEIGHBORS = 24
NUM_CENTERS = 512
"""Of the first stage, whatever N is; each later stage has half of those before it."""


def _layer(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        Pointwise(width_in, width_out, axes=1, bias=False), PointwiseNorm(width_out)
    )


class Lift(nn.Module):
    """A layer from one width to another."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.net = _layer(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width_in) to (..., width_out)."""
        return F.relu(self.net(x))


class Residual(nn.Module):
    """Two layers beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net1 = _layer(width, width)
        self.net2 = _layer(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to the same shape."""
        return F.relu(self.net2(F.relu(self.net1(x))) + x)


class Grouper(nn.Module):
    """Seen from its centre, each neighbour's feature, scaled to the spread of the whole cloud."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.affine_alpha = nn.Parameter(torch.ones(1, 1, 1, width))
        self.affine_beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, neighbors: Tensor, anchors: Tensor) -> Tensor:
        """Joins (B, S, K, C) neighbours and (B, S, C) centres to (B, S, K, 2 * C)."""
        anchors = anchors[:, :, None].expand_as(neighbors)
        offset = neighbors - anchors
        # Over groups, neighbours and channels, but never over the batch: what else is in it must
        # not change what an object looks like.
        sigma = offset.float().flatten(1).std(dim=1)[:, None, None, None]
        scaled = self.affine_alpha * (offset / (sigma + 1e-5)) + self.affine_beta
        return torch.cat([scaled, anchors], dim=-1)


class PreBlocks(nn.Module):
    """What is done to each neighbour before the maximum over them is taken."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.transfer = Lift(width_in, width_out)
        self.operation = nn.Sequential(*(Residual(width_out) for _ in range(BLOCKS)))

    def forward(self, groups: Tensor) -> Tensor:
        """Pools (B, S, K, width_in) into (B, S, width_out)."""
        return self.operation(self.transfer(groups)).amax(dim=2)


class PosBlocks(nn.Module):
    """What is done to each centre thereafter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.operation = nn.Sequential(*(Residual(width) for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, width) to the same shape."""
        return self.operation(x)


class PointMlp(WholeCloudBackbone):
    """PointMLP. Names of parameters are those of ULIP's checkpoints.

    Source:
        PointMLP (Ma et al., 2022), normalisation by anchor; sizes as in ULIP (Xue et al., 2023).
    """

    width = 256
    depth = STAGES
    min_points = NUM_CENTERS

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * 2**k for k in range(STAGES + 1)]
        self.embedding = Lift(3, WIDTH)
        self.local_grouper_list = nn.ModuleList(Grouper(width) for width in widths[:-1])
        self.pre_blocks_list = nn.ModuleList(PreBlocks(2 * w, 2 * w) for w in widths[:-1])
        self.pos_blocks_list = nn.ModuleList(PosBlocks(width) for width in widths[1:])
        # The numbering is the checkpoints': 2 and 3, 6 and 7 hold no parameters.
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1], 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Dropout(0.5),
        )

    def pool(self, points: Tensor) -> Tensor:
        """Pools (B, N, 3) points of the unit sphere into (B, 256)."""
        cloud = start_cloud(points, self.embedding(points), NUM_CENTERS)
        stages = zip(
            self.local_grouper_list, self.pre_blocks_list, self.pos_blocks_list, strict=True
        )
        for k, (group, pre, pos) in enumerate(stages):
            index, centers, order = cloud.centers(NUM_CENTERS // 2**k)
            near = nearest_neighbors(centers, cloud.points, NUM_NEIGHBORS)
            groups = group(gather(cloud.features, near), gather(cloud.features, index))
            cloud = Cloud(centers, pos(pre(groups)), order)
        return self.classifier(cloud.features.amax(dim=1))

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for the embedding, k + 1 for stage k, then heads."""
        part, *rest = name.split(".")
        if part.endswith("_list"):
            return int(rest[0]) + 1
        return 0 if part == "embedding" else self.depth + 1


def pointmlp() -> PointMlp:
    """Builds the full-size backbone: four stages of 512 to 64 centres, 13.2 million parameters."""
    return PointMlp()
