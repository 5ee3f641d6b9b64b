"""Shapes in, boolean masks out: which patches and groups the student does not see."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_ranks(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draws a random order of the second axis, row by row.

    Returns:
        (rows, columns) int64: the place of each column in its row's order, on the
        generator's device.
    """
    noise = torch.rand(shape, generator=generator, device=generator.device)
    return noise.argsort(dim=1).argsort(dim=1)


def most_hidden(grid: int, cell: int, ratio: float) -> int:
    """Counts the patches that `block_mask` hides of an image at most: where cells don't divide the
    grid evenly, some of them are cut."""
    cells = math.ceil(grid / cell)
    return min(grid * grid, math.ceil(ratio * cells**2) * cell**2)


def block_mask(
    batch_size: int, *, grid: int, cell: int, ratio: float, generator: torch.Generator
) -> Tensor:
    """Hides square cells of an image's patches, ceil(ratio * cells) of them in every image.

    Args:
        batch_size: B.
        grid: Patches along a side of the image.
        cell: Patches along a side of a cell.
        ratio: Share of the cells to hide.
        generator: Source of randomness; the mask lies on its device.

    Returns:
        (B, grid * grid) bool, row by row, True where hidden.

    Source:
        SimMIM (Xie et al., 2022) and MUST (Li et al., 2022): at 14 patches, cells of 2 and a
        ratio of 0.3, 60 of 196 patches are hidden.
    """
    # A grid that cells don't divide evenly keeps a last row and column of cut cells.
    cells = math.ceil(grid / cell)
    hidden = random_ranks((batch_size, cells * cells), generator) < math.ceil(ratio * cells**2)
    blocks = hidden.reshape(batch_size, cells, cells)
    blocks = blocks.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    return blocks[:, :grid, :grid].flatten(1)


def neighborhood_mask(
    centers: Tensor, *, ratio_low: float, ratio_high: float, generator: torch.Generator
) -> Tensor:
    """Hides the groups nearest to a random group, a contiguous piece of every cloud.

    Args:
        centers: (B, G, 3) float, the groups' centres.
        ratio_low: Least share of groups to hide; the share is drawn per cloud.
        ratio_high: Largest share.
        generator: Source of randomness, on the device of `centers`.

    Returns:
        (B, G) bool, True where hidden: floor(share * G) in each row.

    Source:
        Point-BERT (Yu et al., 2022), block masking.
    """
    B, G, _ = centers.shape
    uniform = torch.rand(2, B, generator=generator, device=centers.device)
    seed = (uniform[0] * G).long().clamp(max=G - 1)
    ratio = ratio_low + (ratio_high - ratio_low) * uniform[1]
    origin = centers[torch.arange(B, device=centers.device), seed]
    order = (centers - origin[:, None]).norm(dim=-1).argsort(dim=1).argsort(dim=1)
    return order < (ratio * G).long()[:, None]
