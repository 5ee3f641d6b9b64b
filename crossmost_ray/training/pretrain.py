"""The tri-modal contrastive objective: points, images and captions into one space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossmost_ray.config import MaskConfig, PretrainConfig
from crossmost_ray.data.augment import (
    normalize_images_,
    sample_points,
    strong_images,
    strong_points,
)
from crossmost_ray.data.decode import hash_id
from crossmost_ray.losses import alignment_loss, global_local_loss, masked_modelling_loss
from crossmost_ray.models.classifier import CrossModalModel, clamp_logit_scale
from crossmost_ray.models.image_tower import TowerOutput
from crossmost_ray.ops.distributed import gather_from_workers, worker_rank
from crossmost_ray.ops.masks import block_mask, most_hidden
from crossmost_ray.ops.precision import mixed_precision
from crossmost_ray.optim import parameter_groups
from crossmost_ray.schema import RawBatch
from crossmost_ray.training.task import EpochEnd

PAIRS = (("point", "text"), ("point", "image"), ("image", "text"))


def _pick(choices: Sequence[str], draw: float) -> str:
    """Turns a number from [0, 1) into one of the choices."""
    return choices[int(draw * len(choices))]


class TriModalStudent(nn.Module):
    """The forward pass of pre-training, as one module so that DDP sees all of it."""

    def __init__(self, model: CrossModalModel, mask: MaskConfig, frozen: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.mask = mask
        self.precision = torch.float32
        """What the towers compute their matrix products in; all that follows is float32."""
        self.frozen = frozenset(frozen)

    def forward(
        self,
        images: Tensor,
        points: Tensor,
        tokens: Tensor,
        image_mask: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Embeds (B, 3, R, R) images, (B, N, 3) points and (B, context) tokens."""
        model, mask = self.model, self.mask
        with mixed_precision(images.device, self.precision):
            cut = model.point.tokenize(points)
            ratio = (mask.point_ratio_low, mask.point_ratio_high)
            point = model.point(cut, model.point.draw_mask(cut, ratio, generator))
            image = (
                TowerOutput(model.image.embed(images))
                if "image" in self.frozen
                else model.image(
                    images,
                    image_mask,
                    most_hidden(model.image.grid, mask.image_cell, mask.image_ratio),
                )
            )
            text = model.text(tokens)
        terms = {
            "image": image.embed,
            "point": point.embed,
            "text": text.float(),
            "scale": model.logit_scale.exp(),
        }
        for name, seen in (("image", image), ("point", point)):
            if seen.reconstruction is not None:
                assert seen.target is not None
                assert seen.hidden is not None
                assert seen.global_embed is not None
                assert seen.local_embed is not None
                terms[f"masked_{name}"] = masked_modelling_loss(
                    seen.reconstruction, seen.target, seen.hidden
                )
                terms[f"global_local_{name}"] = global_local_loss(
                    seen.global_embed, seen.local_embed, seen.hidden
                )
        return terms


class PretrainTask:
    """Trains all three towers on captioned objects.

    Args:
        model: With fresh weights.
        config: The run.
        wrap: Prepares the student for several workers.
        precision: What the towers compute their matrix products in.

    Source:
        ULIP (Xue et al., 2023); with an image-text term, since the image and text towers start
        from nothing here.
    """

    def __init__(
        self,
        model: CrossModalModel,
        config: PretrainConfig,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.model = model
        self._frozen: list[nn.Module] = [getattr(model, tower) for tower in config.freeze]
        for module in self._frozen:
            module.requires_grad_(False)
        model.logit_scale.requires_grad_(not config.freeze_scale)
        student = TriModalStudent(model, config.mask, config.freeze)
        student.precision = precision
        self.student = wrap(student)
        self.pairs = [pair for pair in PAIRS if not set(pair) <= set(config.freeze)]
        self.weights: dict[str, float] = dataclasses.asdict(config.weights)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Sorts the parameters; all layers learn alike, since all start from nothing."""
        return parameter_groups(
            self.model,
            layer_of=lambda name: None,
            weight_decay=self.config.optim.weight_decay,
            layer_decay=1.0,
        )

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of the objective on one batch, unweighted."""
        config, model, spec = self.config, self.model, self.model.spec
        B, device = len(batch.images), batch.images.device
        images = strong_images(
            batch.images[:, 0], model.image.image_size, config.image_augment, generator
        )
        points = sample_points(batch.points, config.data.num_points, generator)
        draws = torch.rand(B, 2, generator=generator, device=device).tolist()
        prompts = [
            _pick(config.data.templates, first).replace("{}", _pick(captions, second))
            for (first, second), captions in zip(draws, batch.captions, strict=True)
        ]
        self.student.train()
        for module in self._frozen:
            module.eval()
        out = self.student(
            normalize_images_(images, spec.image_mean, spec.image_std),
            strong_points(points, config.point_augment, generator, spec.up_axis),
            model.text.tokenize(prompts).to(device),
            block_mask(
                B,
                grid=model.image.grid,
                cell=config.mask.image_cell,
                ratio=config.mask.image_ratio,
                generator=generator,
            ),
            generator,
        )
        # Objects that share their most general caption are no negatives of each other's text.
        kinds = [hash_id(captions[-1].lower()) for captions in batch.captions]
        same_text = torch.tensor(kinds, device=device)
        everyone = {name: gather_from_workers(out[name]) for name in ("image", "point", "text")}
        groups = {
            "text": (same_text, gather_from_workers(same_text)),
            "image": (batch.object_id, gather_from_workers(batch.object_id)),
        }
        terms = {name: out[name] for name in self.weights if name in out}
        for left, right in self.pairs:
            terms[f"{left}_{right}"] = alignment_loss(
                out[left],
                out[right],
                everyone[left],
                everyone[right],
                out["scale"],
                first=worker_rank() * B,
                groups=groups[right],
            )
        return terms

    def diagnostics(self) -> dict[str, Tensor]:
        """The learned factor on cosines."""
        return {"logit_scale": self.model.logit_scale.exp()}

    def after_step(self, step: int) -> None:
        """Keeps the scale in bounds."""
        clamp_logit_scale(self.model.logit_scale)

    def finish_epoch(self) -> EpochEnd:
        """Has nothing to look back on: captions are the only teacher."""
        return EpochEnd()

    def state_dict(self) -> dict[str, Any]:
        """The model."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the model back."""
        self.model.load_state_dict(state["model"])
