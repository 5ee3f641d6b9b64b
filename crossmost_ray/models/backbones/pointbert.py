"""PointBERT: a cloud is cut into groups, each becomes a token, a transformer reads the tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.base import PointFeatures, PointTokens, check_num_points
from crossmost_ray.models.blocks import BlockRunner, attend, call
from crossmost_ray.ops.points import group_points

FpsStart = Literal["first", "random"]


def _linear(convolution: nn.Module, x: Tensor) -> Tensor:
    """Applies a Conv1d of width 1 to (rows, channels)."""
    assert isinstance(convolution, nn.Conv1d)
    return F.linear(x, convolution.weight.squeeze(-1), convolution.bias)


class GroupEncoder(nn.Module):
    """A small PointNet that turns one group of points into one vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, width // 2, 1),
            nn.BatchNorm1d(width // 2),
            nn.ReLU(),
            nn.Conv1d(width // 2, width, 1),
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * width, 2 * width, 1),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Conv1d(2 * width, width, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Encodes (B, G, M, 3) relative points as (B, G, width)."""
        B, G, M, _ = groups.shape
        # A convolution of width 1 is a linear layer. As one matrix product over all points it is
        # three times faster on a CPU, and the part that looks at the group's maximum is computed
        # once for a group, not once for each of its points.
        first, norm, second = (self.first_conv[place] for place in (0, 1, 3))
        local = _linear(first, groups.reshape(B * G * M, 3))
        local = _linear(second, F.relu(norm(local))).reshape(B * G, M, -1)
        overall = local.amax(dim=1)

        first, norm, second = (self.second_conv[place] for place in (0, 1, 3))
        assert isinstance(first, nn.Conv1d)
        width = overall.shape[1]
        weight = first.weight.squeeze(-1)
        mixed = F.linear(local, weight[:, width:]) + F.linear(
            overall, weight[:, :width], first.bias
        ).unsqueeze(1)
        encoded = _linear(second, F.relu(norm(mixed.flatten(0, 1))))
        return encoded.reshape(B, G, M, -1).amax(dim=2)


class Attention(nn.Module):
    """Multi-head self-attention without a bias on queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes (B, L, width) tokens."""
        return self.proj(attend(*self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are dropped at random while training."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path = drop_path

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Draws which objects' branches are dropped, of (B, L, width) tokens: for each of the two
        branches (B, 1, 1) float, 0 or what makes up for those that are; None where none can be."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        first, second = (x.new_empty(len(x), 1, 1).bernoulli_(keep) for _ in range(2))
        return first.div_(keep), second.div_(keep)

    def forward(self, x: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Maps (B, L, width) tokens to the same shape; `kept` is what `draw` gave."""
        # Drawn outside: what is compiled then serves all blocks, whatever their chance.
        attended = self.attn(self.norm1(x))
        x = x + (attended if kept is None else attended * kept[0])
        read = self.mlp(self.norm2(x))
        return x + (read if kept is None else read * kept[1])


class Trunk(nn.Module):
    """The blocks; the positions are added before each of them."""

    def __init__(self, width: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        rates = [drop_path * k / max(depth - 1, 1) for k in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.run = BlockRunner()

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Maps (B, L, width) tokens with (B, L, width) positions to the same shape."""
        for block in self.blocks:
            assert isinstance(block, Block)
            x = x + position
            x = self.run(call, block, x, block.draw(x))
        return x


class PointBert(nn.Module):
    """Point-BERT's masked transformer over groups of points.

    Names of parameters are those of Point-BERT, ULIP and CrossMoST, so that their checkpoints
    load by name.

    Args:
        num_groups: G, tokens of a cloud.
        group_size: Points of a group.
        width: Of a token inside the transformer.
        depth: Blocks.
        heads: Attention heads.
        group_width: Width of the small PointNet's output.
        drop_path: Chance of dropping the last block's branches while training.
        fps_start: Which point the groups' centres are sampled from. From the first, evaluation is
            deterministic; CrossMoST starts at a random one, even there.

    Source:
        Point-BERT (Yu et al., 2022); the CLS token's output beside the maximum over the tokens
        as in ULIP (Xue et al., 2023).
    """

    def __init__(
        self,
        *,
        num_groups: int,
        group_size: int,
        width: int,
        depth: int,
        heads: int,
        group_width: int,
        drop_path: float = 0.1,
        fps_start: FpsStart = "first",
    ) -> None:
        super().__init__()
        self.num_tokens = num_groups
        self.group_size = group_size
        self.width = 2 * width
        self.token_width: int | None = width
        self.depth = depth
        self.min_points = max(num_groups, group_size)
        self.fps_start: FpsStart = fps_start
        self.encoder = GroupEncoder(group_width)
        self.reduce_dim = nn.Linear(group_width, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = Trunk(width, depth, heads, drop_path)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, width)
        self.apply(_init_weights)
        for token in (self.cls_token, self.cls_pos, self.mask_token):
            nn.init.trunc_normal_(token, std=0.02)

    def tokenize(self, points: Tensor, generator: torch.Generator | None = None) -> PointTokens:
        """Cuts (B, N, 3) points into groups and encodes each.

        Args:
            points: (B, N, 3) float.
            generator: Draws the points to start from, where `fps_start` is "random"; torch's own
                if there is none.

        Raises:
            ConfigError: If N is below the number of groups or the size of one.
        """
        check_num_points(points, self)
        start = None
        if self.fps_start == "random":
            B, N, _ = points.shape
            device = points.device if generator is None else generator.device
            drawn = torch.randint(N, (B,), generator=generator, device=device)
            start = drawn.to(points.device)
        groups, centers = group_points(points, self.num_tokens, self.group_size, start=start)
        return PointTokens(self.reduce_dim(self.encoder(groups)), centers, groups)

    def forward(self, seen: PointTokens, mask: Tensor | None = None) -> PointFeatures:
        """Reads a tokenised cloud.

        Args:
            seen: Output of `tokenize`.
            mask: (B, G) bool, True where the mask token stands in for a group; None for none.
        """
        tokens = seen.tokens
        assert tokens is not None
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        B = len(tokens)
        x = torch.cat([self.cls_token.expand(B, -1, -1).to(tokens.dtype), tokens], dim=1)
        position = self.pos_embed(seen.centers)
        position = torch.cat([self.cls_pos.expand(B, -1, -1).to(position.dtype), position], dim=1)
        x = self.norm(self.blocks(x, position))
        cls_token, tokens = x[:, 0], x[:, 1:]
        pooled = torch.cat([cls_token, tokens.amax(dim=1)], dim=-1)
        return PointFeatures(pooled, cls_token, tokens, self.lm_head(tokens))

    def layer_of(self, name: str) -> int:
        """Tells how deep a parameter lies: 0 for embeddings, k + 1 for block k, then the heads."""
        if name.startswith("blocks.blocks."):
            return int(name.split(".")[2]) + 1
        return self.depth + 1 if name.startswith(("norm.", "lm_head.")) else 0

    def frozen_modules(self) -> list[nn.Module]:
        """Names the small PointNet: if the tokenizer moved, the target would move with it."""
        return [self.encoder]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _full_size(num_groups: int, group_size: int, fps_start: FpsStart) -> PointBert:
    return PointBert(
        num_groups=num_groups,
        group_size=group_size,
        width=384,
        depth=12,
        heads=6,
        group_width=256,
        fps_start=fps_start,
    )


def pointbert(*, fps_start: FpsStart = "first") -> PointBert:
    """Builds the full-size backbone: 64 groups of 32 points, width 384, 12 blocks."""
    return _full_size(64, 32, fps_start)


def pointbert_512(*, fps_start: FpsStart = "first") -> PointBert:
    """Builds the full-size backbone as in ULIP's checkpoint: 512 groups of 32 points."""
    return _full_size(512, 32, fps_start)


def pointbert_32(*, fps_start: FpsStart = "first") -> PointBert:
    """Builds the full-size backbone as CrossMoST pre-trains it: 32 groups of 64 points."""
    return _full_size(32, 64, fps_start)


def pointbert_small() -> PointBert:
    """Builds the backbone of the embedded model: 32 groups of 16 points, width 128, 4 blocks."""
    return PointBert(num_groups=32, group_size=16, width=128, depth=4, heads=4, group_width=64)
