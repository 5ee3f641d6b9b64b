"""The table of image-text models: from a name in a model's card to open_clip modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from crossmost_ray.config import ConfigError

# Small enough to train from nothing on two cores and to ship with the package. open_clip has no
# configuration this small, so ours is given here in open_clip's own terms.
CUSTOM_CLIP: dict[str, dict[str, Any]] = {
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
}


def build_clip(name: str) -> nn.Module:
    """Builds the open_clip model called `name`, with fresh weights.

    Raises:
        ConfigError: If neither this table nor open_clip knows the name.
    """
    # Imported here: it takes seconds, and only those who build a tower should wait for it.
    import open_clip

    if name in CUSTOM_CLIP:
        model: nn.Module = open_clip.model.CLIP(**CUSTOM_CLIP[name])
        return model
    if name in open_clip.list_models():
        built: nn.Module = open_clip.create_model(name)
        return built
    known = ", ".join([*CUSTOM_CLIP, *open_clip.list_models()[:5]])
    raise ConfigError(
        f"there is no image-text model '{name}'; ours and open_clip's are: {known}, ... "
        "(open_clip.list_models() names all)"
    )


def clip_image_size(name: str) -> int:
    """Gives the side of the images that the model called `name` takes, without building it.

    Raises:
        ConfigError: If neither this table nor open_clip knows the name.
    """
    import open_clip

    config = CUSTOM_CLIP.get(name) or open_clip.get_model_config(name)
    if config is None:
        raise ConfigError(f"there is no image-text model '{name}'; see open_clip.list_models()")
    size = config["vision_cfg"]["image_size"]
    return int(size if isinstance(size, int) else size[0])
