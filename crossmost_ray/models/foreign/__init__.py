"""Published checkpoints of other projects: which of them a file is, its tensors' names say."""

from __future__ import annotations

from crossmost_ray.models.foreign.crossmost import ADAPTED, FIRST_STAGE
from crossmost_ray.models.foreign.layout import Layout, Tensors, refusal
from crossmost_ray.models.foreign.open_clip_weights import OPEN_CLIP
from crossmost_ray.models.foreign.openai_clip import OPENAI_CLIP
from crossmost_ray.models.foreign.pointbert import DVAE, POINT_BERT
from crossmost_ray.models.foreign.ulip import ULIP

__all__ = ["LAYOUTS", "recognise"]

LAYOUTS: tuple[Layout, ...] = (
    ADAPTED,
    FIRST_STAGE,
    ULIP,
    OPENAI_CLIP,
    OPEN_CLIP,
    DVAE,
    POINT_BERT,
)
"""In the order they are tried: what only some have comes before what all have."""


def recognise(tensors: Tensors, source: str) -> Layout:
    """Tells the layout of a file by the names of its tensors; its own name says nothing.

    Raises:
        ConfigError: If it is none that is known; it names the first tensors.
    """
    for layout in LAYOUTS:
        if layout.matches(tensors):
            return layout
    raise refusal(
        f"{source} holds {len(tensors)} tensors of no known layout",
        list(tensors),
        f"what can be converted is: {'; '.join(layout.name for layout in LAYOUTS)}",
    )
