"""A backbone of one's own: from "package.module:function" to a module that was tried out."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from typing import Any

import torch
from torch import nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones.base import PointBackbone

TRUSTED = "CROSSMOST_RAY_BACKBONES"
"""Environment variable that lists the backbones whose code may be imported."""

NUMBERS = ("width", "depth", "min_points")
METHODS = ("tokenize", "layer_of", "frozen_modules")


def build_custom_backbone(path: str) -> PointBackbone:
    """Imports what `path` names, calls it without arguments, and tries the result out.

    Args:
        path: "package.module:function"; a class will do as the function.

    Raises:
        ConfigError: If it is not trusted, can't be imported or called, or if what it returns is
            no `PointBackbone`: lacks an attribute, or gives outputs of other shapes than it says.
    """
    if path not in os.environ.get(TRUSTED, "").split(","):
        # A model folder may come from anywhere, and its config may name anything.
        raise ConfigError(
            f"the point backbone '{path}' is code outside this package; if you trust it, set the "
            f"environment variable {TRUSTED}={path} (several are parted by commas), on every node"
        )
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as missing:
        raise ConfigError(
            f"the point backbone '{path}' can't be imported ({missing}); expected "
            "'package.module:function', with the package installed or on PYTHONPATH"
        ) from missing
    build = getattr(module, name, None)
    if build is None:
        raise ConfigError(f"the module '{module_name}' has no '{name}', which '{path}' names")
    if not callable(build):
        raise ConfigError(
            f"the point backbone '{path}' is {type(build).__name__}, not callable; "
            "name a function without arguments that builds it"
        )
    try:
        inspect.signature(build).bind()
    except (TypeError, ValueError) as asks:
        raise ConfigError(
            f"the point backbone '{path}' can't be called without arguments ({asks}); "
            "name a function that needs none"
        ) from None
    backbone = build()
    problem = (
        _problem_of(backbone)
        if isinstance(backbone, nn.Module)
        else f"gives {type(backbone).__name__}, expected an nn.Module"
    )
    if problem is not None:
        raise ConfigError(f"the point backbone '{path}' {problem}; see docs/backbones.md")
    checked: PointBackbone = backbone
    return checked


def _problem_of(backbone: Any) -> str | None:
    """Says in what a backbone is not what it has to be, or None."""
    lacking = [name for name in (*NUMBERS, "token_width", *METHODS) if not hasattr(backbone, name)]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    for name in NUMBERS:
        value = getattr(backbone, name)
        if not isinstance(value, int) or value < 0:
            return f"has {name} {value!r}, expected a whole number of at least 0"
    if not isinstance(backbone.token_width, int | None):
        return f"has token_width {backbone.token_width!r}, expected a whole number or None"
    last = backbone.depth + 1
    for name, _ in backbone.named_parameters():
        layer = backbone.layer_of(name)
        if layer not in range(last + 1):
            return f"puts {name} into layer {layer!r}, expected 0 to {last} (depth + 1)"
    return _problem_of_outputs(backbone)


@torch.no_grad()
def _problem_of_outputs(backbone: Any) -> str | None:
    """Runs a copy on a tiny cloud, since BatchNorm would remember it."""
    trial = copy.deepcopy(backbone).eval()
    B, N, E = 2, max(backbone.min_points, 1), backbone.token_width
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    points = torch.arange(B * N * 3.0, device=device).sin().reshape(B, N, 3) / 2
    seen = trial.tokenize(points)
    G = seen.centers.shape[1]
    features = trial(seen, torch.zeros(B, G, dtype=torch.bool, device=device))
    outputs = {
        "tokenize(points).centers": (seen.centers, (B, G, 3)),
        "tokenize(points).tokens": (seen.tokens, (B, G, E)),
        "pooled": (features.pooled, (B, backbone.width)),
        "cls_token": (features.cls_token, (B, E)),
        "tokens": (features.tokens, (B, G, E)),
        "reconstruction": (features.reconstruction, (B, G, E)),
    }
    for name, (value, shape) in outputs.items():
        found = None if value is None else tuple(value.shape)
        expected = None if None in shape else shape
        if found != expected:
            return (
                f"gives {name} of shape {found} for points of shape {(B, N, 3)}, expected "
                f"{expected} (width {backbone.width}, token_width {E})"
            )
    return None
