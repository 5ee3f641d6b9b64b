"""The text tower: prompts in, class embeddings out. It stays with a model, so that an adapted
model can still be asked for new classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossmost_ray.config import check_classes
from crossmost_ray.models.clip import clip_config

Underscores = Literal["space", "raw"]


@functools.cache
def build_tokenizer(name: str) -> Callable[..., Tensor]:
    """Builds the tokenizer of the image-text model called `name`, once: it reads a vocabulary."""
    import open_clip

    options = clip_config(name)["text_cfg"].get("tokenizer_kwargs", {})
    tokenizer: Callable[..., Tensor] = open_clip.SimpleTokenizer(**options)
    return tokenizer


class TextTower(nn.Module):
    """The text half of an open_clip model.

    Args:
        clip: open_clip's CLIP, whose vision half is left out.
        name: Its name, which says which tokenizer belongs to it.
    """

    def __init__(self, clip: Any, name: str) -> None:
        super().__init__()
        # open_clip keeps the text half at the top level of the model. encode_text needs neither
        # the vision half nor the scale, which live in the other parts of our model.
        clip.visual = None
        clip.logit_scale = None
        self.clip = clip
        self.name = name

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turns texts into (len(texts), context) int64; a text too long ends with its end token."""
        tokens: Tensor = build_tokenizer(self.name)(
            list(texts), context_length=self.clip.context_length
        )
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeds (B, context) tokens as (B, D) unit vectors."""
        return F.normalize(self.clip.encode_text(tokens), dim=-1)

    @torch.no_grad()
    def embed_classes(
        self,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        underscores: Underscores = "space",
    ) -> Tensor:
        """Embeds class names, averaged over the templates.

        Args:
            classes: C names.
            templates: Prompts in which `{}` stands for the name.
            underscores: Those of the names are read as spaces, or go into the prompts as they are.

        Returns:
            (C, D) float32, unit length.

        Raises:
            ValueError: If the class list is empty or names a class twice.

        Source:
            CLIP (Radford et al., 2021), prompt ensembling: normalise, average, normalise.
        """
        check_classes(classes, "the class list")
        names = [name.replace("_", " ") for name in classes] if underscores == "space" else classes
        prompts = [template.replace("{}", name) for name in names for template in templates]
        device = self.clip.token_embedding.weight.device
        embeds = torch.cat([self(chunk.to(device)) for chunk in self.tokenize(prompts).split(256)])
        return F.normalize(embeds.reshape(len(classes), len(templates), -1).mean(dim=1), dim=-1)
