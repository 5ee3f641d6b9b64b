"""What a published layout is: its marks, and rules for where its tensors go in our model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from crossmost_ray.config import ConfigError
from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.models.pretrained import MAX_NAMED_TENSORS, ModelFolder

Tensors = Mapping[str, Tensor]
Option = Literal["clip", "backbone", "start", "weights", "classes"]

# Parts of our model that no CLIP has: masked modelling's.
IMAGE_HEADS = ("image.mask_token", "image.ln_patch.", "image.decoder.")
POINT_HEADS = (
    "point.local_projection",
    "point.backbone.mask_token",
    "point.backbone.lm_head.",
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for beside the file."""

    clip: str | None = None
    backbone: str | None = None
    start: ModelFolder | None = None
    classes: Sequence[str] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


class Rule(NamedTuple):
    """Where a tensor goes, or all of those whose names begin alike."""

    theirs: str
    """A name; a beginning, if it ends with a dot; an end, if it begins with `*.`."""
    ours: str | None
    """A name or a beginning, likewise; None for what is not taken."""
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reason: str = ""
    """Why it is not taken."""

    def match(self, name: str) -> bool:
        """Tells whether this rule is for the tensor `name` of a file."""
        if self.theirs.startswith("*."):
            return f".{name}".endswith(self.theirs[1:])
        return name.startswith(self.theirs) if self.theirs.endswith(".") else name == self.theirs

    def place(self, name: str) -> str:
        """Gives the name in our model."""
        assert self.ours is not None
        return self.ours + name.removeprefix(self.theirs)

    def origin(self, name: str) -> str | None:
        """Gives the name in their file of our tensor `name`, if it comes by this rule."""
        whole = self.ours is not None and self.ours.endswith(".")
        if self.ours is None or not (name.startswith(self.ours) if whole else name == self.ours):
            return None
        return self.theirs + name.removeprefix(self.ours)


def left(reason: str, *names: str) -> tuple[Rule, ...]:
    """Makes rules for tensors that are not taken."""
    return tuple(Rule(name, None, reason=reason) for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One kind of file."""

    name: str
    matches: Callable[[Collection[str]], bool]
    """Whether a file with tensors of these names is one."""
    rules: tuple[Rule, ...]
    """The first that matches counts; a tensor that none matches is an error."""
    spec: Callable[[Tensors, Request], ModelSpec]
    """The model that the tensors belong to."""
    may_lack: tuple[str, ...]
    """Parts of our model that such a file need not hold, each as a whole: names, or beginnings."""
    takes: frozenset[Option]
    needs: frozenset[Option] = frozenset()
    next_step: str
    """What to do with the model folder: a command line with `{folder}`, and `{backbone}`."""


class Fit(NamedTuple):
    """How the tensors of a file fill a model."""

    mapped: dict[str, tuple[str, Tensor]]
    """Name in the file, and the tensor in our shape, by our name."""
    ignored: dict[str, str]
    """Why a tensor of the file is not taken, by its name there."""
    absent: tuple[str, ...]
    """Our tensors that the file does not hold."""


def fit(layout: Layout, tensors: Tensors, expected: Tensors, source: str) -> Fit:
    """Finds the place of every tensor of a file; looks at names, shapes and dtypes, not at values.

    Args:
        layout: Of the file.
        tensors: Of the file.
        expected: Of our model, by name.
        source: The file, for the message.

    Raises:
        ConfigError: Naming the first tensors that are missing, unknown or of another shape.
    """
    mapped: dict[str, tuple[str, Tensor]] = {}
    ignored: dict[str, str] = {}
    problems: list[str] = []
    for theirs, tensor in tensors.items():
        rule = next((rule for rule in layout.rules if rule.match(theirs)), None)
        if rule is None:
            problems.append(f"{theirs} is unknown")
        elif rule.ours is None:
            ignored[theirs] = rule.reason
        elif (ours := rule.place(theirs)) not in expected:
            problems.append(f"{theirs} has no place in the model, which has no {ours}")
        elif ours in mapped:
            problems.append(f"{theirs} and {mapped[ours][0]} have one place, {ours}")
        else:
            mapped[ours] = (theirs, rule.change(tensor))
    absent = tuple(name for name in expected if name not in mapped)
    problems += [
        f"{_origin(layout, name)} is missing"
        for name in absent
        if not any(_lacks(part, name, mapped) for part in layout.may_lack)
    ]
    for ours, (theirs, tensor) in mapped.items():
        problems += _misfit(theirs, tensor, expected[ours])
    if problems:
        raise refusal(
            f"{source} was taken for {layout.name}, but does not fit its model",
            problems,
            "fetch the file anew"
            + (", or name other variants (--clip, --backbone, --start)" if layout.takes else ""),
        )
    return Fit(mapped, ignored, absent)


def _lacks(part: str, name: str, mapped: Collection[str]) -> bool:
    """Tells whether `name` belongs to a part that may be lacking, and lacks as a whole."""
    if not part.endswith("."):
        return name == part
    return name.startswith(part) and not any(held.startswith(part) for held in mapped)


def _origin(layout: Layout, name: str) -> str:
    origins = (rule.origin(name) for rule in layout.rules)
    return next((origin for origin in origins if origin is not None), name)


def _misfit(theirs: str, found: Tensor, expected: Tensor) -> list[str]:
    if found.layout != torch.strided or found.is_quantized:
        return [f"{theirs} is sparse or quantised"]
    if found.is_floating_point() != expected.is_floating_point() or found.is_complex():
        return [f"{theirs} holds {found.dtype}, expected {expected.dtype}"]
    if found.shape != expected.shape:
        return [f"{theirs} gives shape {tuple(found.shape)}, expected {tuple(expected.shape)}"]
    return []


def refusal(what: str, problems: Sequence[str], cure: str) -> ConfigError:
    """Makes the error that names the first of many tensors."""
    named = "\n".join(f"  {problem}" for problem in problems[:MAX_NAMED_TENSORS])
    more = len(problems) - MAX_NAMED_TENSORS
    return ConfigError(
        f"{what}:\n{named}" + (f"\n  ... and {more} more" if more > 0 else "") + f"\n{cure}"
    )
