"""The table of image-text models: from a name in a model's card to open_clip modules."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch

from crossmost_ray.config import ConfigError

TIMM = "timm:"

# The text tower of OpenAI's CLIP, in open_clip's terms.
CLIP_TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
}

CUSTOM_CLIP: dict[str, dict[str, Any]] = {
    # Small enough to train from nothing on two cores and to ship with the package. open_clip has
    # no configuration this small, so ours is given here in open_clip's own terms.
    "vit_small_64": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 4,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    },
    # The towers that ULIP's point towers were aligned with: SLIP's (Mu et al., 2022). Its images
    # are normalised by ImageNet's mean and deviation, which its model cards have to say.
    "slip_vit_b16": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": CLIP_TEXT,
        "quick_gelu": True,
    },
}


def clip_config(name: str) -> dict[str, Any]:
    """Gives open_clip's configuration of the image-text model called `name`.

    Args:
        name: In our table, or in `open_clip.list_models()`; or `timm:` and the name of a timm
            model, which becomes the image tower beside OpenAI's text tower of ViT-B/16. A `+` and
            the name of an image-text model behind it takes that model's text tower instead.

    Raises:
        ConfigError: If nothing knows the name, or the text tower can't be built without the net.
    """
    # Imported here: it takes seconds, and only those who build a tower should wait for it.
    import open_clip

    if name.startswith(TIMM):
        return _timm_config(name)
    if name in CUSTOM_CLIP:
        return copy.deepcopy(CUSTOM_CLIP[name])
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, [*CUSTOM_CLIP, *open_clip.list_models()], n=3)
        raise ConfigError(
            f"there is no image-text model '{name}'; the nearest are: "
            f"{', '.join(near) or 'none'}. Ours are {', '.join(CUSTOM_CLIP)}; "
            "open_clip.list_models() names the others, and timm:<name> takes an image tower of timm"
        )
    config: dict[str, Any] = copy.deepcopy(open_clip.get_model_config(name))
    text = config["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise ConfigError(
            f"the text half of '{name}' is fetched from the Hugging Face hub, and models are built "
            "without the net here; take one with CLIP's own tokenizer, such as "
            "ViT-B-16-quickgelu or ViT-L-14"
        )
    if "multimodal_cfg" in config:
        raise ConfigError(
            f"'{name}' is a captioner (CoCa), whose text tower is not CLIP's; "
            "take ViT-B-16-quickgelu or ViT-L-14"
        )
    # open_clip's other class for such a model computes the same and names the text half otherwise.
    config.pop("custom_text", None)
    config["vision_cfg"].pop("timm_model_pretrained", None)
    return config


def _timm_config(name: str) -> dict[str, Any]:
    """Puts an image tower of timm beside a text tower."""
    import timm

    image, plus, text = name.removeprefix(TIMM).partition("+")
    known = timm.list_models()
    if image not in known:
        near = difflib.get_close_matches(image, known, n=3)
        raise ConfigError(
            f"there is no timm model '{image}' ('{name}'); the nearest are: "
            f"{', '.join(near) or 'none'}. timm.list_models('vit*') names the transformers, "
            "without tags: those say which weights, and none are fetched here"
        )
    config = (
        clip_config(text) if plus else {"embed_dim": 512, "text_cfg": CLIP_TEXT, "quick_gelu": True}
    )
    # No name of a pooling: the model's own.
    vision = {"timm_model_name": image, "timm_pool": "", "timm_proj": "linear"}
    return config | {"vision_cfg": vision}


def build_clip(name: str) -> torch.nn.Module:
    """Builds the image-text model called `name`, with fresh weights and without the net.

    Raises:
        ConfigError: As `clip_config` does.
    """
    import open_clip

    # Not `open_clip.create_model`: it may look for weights, and warns of finding none.
    model: torch.nn.Module = open_clip.model.CLIP(**clip_config(name))
    return model
