"""Groups of points in, ids of a vocabulary out: the half of a discrete autoencoder that names what
it sees. It is only ever asked: it comes from a folder, and is never trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.models.backbones.pointbert import GroupEncoder
from crossmost_ray.models.pretrained import (
    FORMAT,
    check_tensors,
    read_folder,
    with_tuples,
    write_folder,
)
from crossmost_ray.ops.points import nearest_neighbors

NUM_NEIGHBORS = 4
"""Centres that a centre is compared with, itself among them."""
NORM_GROUPS = 4
SLOPE = 0.2
"""Of the leaky ReLUs below zero."""

MAX_SIZE = 2**16
"""Of a tokenizer's sizes: a config can't ask for more memory than there is."""


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Sizes of a tokenizer; by default those of Point-BERT's discrete autoencoder."""

    group_size: int = 32
    """Points of the groups that it was trained on. Others could be computed, but not understood."""
    group_width: int = 256
    """Width of a group's vector."""
    input_width: int = 128
    edge_widths: tuple[int, ...] = (256, 512, 512, 1024)
    vocabulary: int = 8192
    """K, how many ids there are."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for size in value if isinstance(value, tuple) else (value,):
                if type(size) is not int or not 1 <= size <= MAX_SIZE:
                    raise ValueError(f"{field.name} is {value!r}, expected 1 to {MAX_SIZE}")
        if any(width % NORM_GROUPS for width in (*self.edge_widths, self.vocabulary)):
            raise ValueError(f"edge_widths and vocabulary must be multiples of {NORM_GROUPS}")


class EdgeConvolution(nn.Module):
    """Reads each centre beside its neighbours, and keeps the strongest answer.

    Args:
        width: C, channels that come in.
        out_width: Channels that go out.

    Source:
        DGCNN (Wang et al., 2019), its edge convolution, with the norm of Point-BERT.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, out_width, bias=False)
        """Of the difference of a neighbour to the centre, then the centre itself."""
        self.norm = nn.GroupNorm(NORM_GROUPS, out_width)

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        """Maps (B, C, G) by (B, G, k) int64 neighbours to (B, out_width, G)."""
        # W [neighbour - own, own] = W1 neighbour + (W2 - W1) own: each centre is multiplied once by
        # either part, not once for every neighbour.
        difference, own = self.linear.weight.chunk(2, dim=1)
        edges = torch.take_along_dim(difference @ x, neighbors.flatten(1)[:, None], dim=2)
        edges = edges.unflatten(2, neighbors.shape[1:]) + ((own - difference) @ x)[..., None]
        return F.leaky_relu(self.norm(edges), SLOPE).amax(dim=-1)


class PointTokenizer(nn.Module):
    """Names each group of a cloud by an id, from its points and from the groups around it.

    Always frozen, and in evaluation mode unless somebody changes that.

    Source:
        Point-BERT (Yu et al., 2022): the encoder of its discrete autoencoder. Which of its
        neighbours a group is compared with depends on the centres alone.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = GroupEncoder(spec.group_width)
        self.input = nn.Linear(spec.group_width, spec.input_width)
        widths = (spec.input_width, *spec.edge_widths)
        self.edges = nn.ModuleList(
            EdgeConvolution(width, out_width) for width, out_width in pairwise(widths)
        )
        self.output = nn.Linear(sum(spec.edge_widths), spec.vocabulary, bias=False)
        self.output_norm = nn.GroupNorm(NORM_GROUPS, spec.vocabulary)
        self.eval().requires_grad_(False)

    def forward(self, groups: Tensor, centers: Tensor) -> Tensor:
        """Scores groups against the vocabulary.

        Args:
            groups: (B, G, M, 3) float, points relative to their group's centre.
            centers: (B, G, 3) float, in the same unit.

        Returns:
            (B, G, K) float.

        Raises:
            ValueError: If G is below the number of neighbours.
        """
        if centers.shape[1] < NUM_NEIGHBORS:
            raise ValueError(
                f"a cloud of {centers.shape[1]} groups can't be named: a group is compared with "
                f"its {NUM_NEIGHBORS} nearest, itself among them"
            )
        neighbors = nearest_neighbors(centers, centers, NUM_NEIGHBORS)
        x = self.input(self.encoder(groups)).transpose(1, 2)
        seen = []
        for edge in self.edges:
            x = edge(x, neighbors)
            seen.append(x)
        scores = self.output_norm(self.output.weight @ torch.cat(seen, dim=1))
        return F.leaky_relu(scores, SLOPE).transpose(1, 2)

    @torch.no_grad()
    def token_ids(self, groups: Tensor, centers: Tensor) -> Tensor:
        """Names groups: (B, G) int64, each the best of K. The arguments are those of `forward`."""
        # In full precision even inside mixed precision: among thousands of ids the best two are
        # often closer than bfloat16 can tell.
        with torch.autocast(groups.device.type, enabled=False):
            return self(groups.float(), centers.float()).argmax(dim=-1)


def save_tokenizer(
    folder: Path, tokenizer: PointTokenizer, *, card: str, origin: Mapping[str, Any] | None = None
) -> None:
    """Writes a tokenizer's folder, whole or not at all.

    Args:
        folder: Replaced if it exists.
        tokenizer: What to write.
        card: Markdown.
        origin: Where it comes from, for the record.
    """
    config = {
        "format": FORMAT,
        "tokenizer": dataclasses.asdict(tokenizer.spec),
        "origin": dict(origin or {}),
    }
    tensors = {name: x.contiguous().cpu() for name, x in tokenizer.state_dict().items()}
    write_folder(folder, tensors, config, card)


def load_tokenizer(path: str | Path) -> PointTokenizer:
    """Loads a tokenizer's folder, on the CPU.

    Raises:
        ConfigError: If the folder or a file of it is missing or damaged, or if its tensors are
            not those of the tokenizer that it claims to be; the first differing ones are named.
    """
    hint = (
        "convert Point-BERT's with `python jobs/convert.py dVAE.pth --as-tokenizer --output "
        f"{path}`, or mend `point_tokenizer`"
    )
    spec, tensors, weights = read_folder(
        path, "tokenizer", hint, lambda config: TokenizerSpec(**with_tuples(config["tokenizer"]))
    )
    # Without memory until its tensors are known to be there.
    with torch.device("meta"):
        tokenizer = PointTokenizer(spec)
    check_tensors(tensors, tokenizer.state_dict(), weights)
    tokenizer = tokenizer.to_empty(device="cpu")
    tokenizer.load_state_dict(tensors)
    return tokenizer
