"""The self-training objective: a teacher's joint pseudo-labels, a masked student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossmost_ray.config import TOWERS, AdaptConfig, Tower
from crossmost_ray.data.augment import (
    normalize_images,
    sample_points,
    strong_images,
    strong_points,
    to_float,
    weak_images,
    weak_points,
)
from crossmost_ray.losses import (
    alignment_loss,
    fairness_loss,
    global_local_loss,
    masked_modelling_loss,
    self_training_loss,
)
from crossmost_ray.models.classifier import CrossModalClassifier, ModelSpec, clamp_logit_scale
from crossmost_ray.ops.distributed import gather_from_workers, mean_over_workers, worker_rank
from crossmost_ray.ops.masks import block_mask
from crossmost_ray.optim import parameter_groups
from crossmost_ray.pseudo_labels import joint_pseudo_labels, separate_pseudo_labels
from crossmost_ray.schema import PairBatch, PseudoLabels, RawBatch
from crossmost_ray.teacher import EmaTeacher

TOWERS_OF_MODE: dict[str, tuple[Tower, ...]] = {
    "crossmost": TOWERS,
    "baseline": TOWERS,
    "image_only": ("image",),
    "points_only": ("point",),
}


class AdaptTask:
    """Adapts a zero-shot classifier to unlabelled pairs.

    Args:
        classifier: The zero-shot classifier; it becomes the student.
        spec: Says how the towers want their inputs.
        config: The run.
        wrap: Prepares the student for several workers; the teacher needs none, being the same
            function of the student on each.

    Source:
        CrossMoST (Dharmasiri et al., 2024).
    """

    def __init__(
        self,
        classifier: CrossModalClassifier,
        spec: ModelSpec,
        config: AdaptConfig,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config = config
        self.spec = spec
        self.towers = TOWERS_OF_MODE[config.mode]
        # The small PointNet is the tokenizer that masked modelling predicts: if it moved, its
        # target would move with it.
        frozen = [classifier.point.backbone.encoder]
        frozen += [getattr(classifier, tower) for tower in TOWERS if tower not in self.towers]
        for module in frozen:
            module.requires_grad_(False)
        self._frozen = frozen
        self.bare_student = classifier
        self.teacher = EmaTeacher(classifier, config.ema)
        self.student = wrap(classifier)
        self.weights: dict[str, float] = dataclasses.asdict(config.weights)
        self._diagnostics: dict[str, Tensor] = {}

    def parameter_groups(self) -> list[dict[str, object]]:
        """Sorts the trainable parameters, tower by tower, with layer-wise decay."""

        def layer_of(name: str) -> tuple[int, int] | None:
            tower, _, rest = name.partition(".")
            if tower == "image":
                image = self.bare_student.image
                return image.layer_of(rest), image.depth + 1
            if tower == "point":
                point = self.bare_student.point
                return point.layer_of(rest), point.depth + 1
            return None

        return parameter_groups(
            self.bare_student,
            layer_of=layer_of,
            weight_decay=self.config.optim.weight_decay,
            layer_decay=self.config.optim.layer_decay,
            scale_of=lambda name: (
                self.config.optim.point_lr_scale if name.startswith("point.") else 1.0
            ),
        )

    def augment(self, batch: RawBatch, generator: torch.Generator) -> PairBatch:
        """Makes the weak pairs of the teacher and the strong, masked pairs of the student."""
        config, spec, image = self.config, self.spec, self.bare_student.image
        B, T, size = len(batch.images), batch.images.shape[1], image.image_size
        views = to_float(batch.images)
        weak = weak_images(views.flatten(0, 1), size, config.image_augment, generator)
        strong = strong_images(views[:, 0], size, config.image_augment, generator)
        repeated = batch.points.repeat_interleave(T, dim=0)
        sampled = sample_points(repeated, config.data.num_points, generator)
        points_weak = weak_points(sampled, config.point_augment, generator)
        sampled = sample_points(batch.points, config.data.num_points, generator)
        return PairBatch(
            image_weak=normalize_images(weak, spec.image_mean, spec.image_std).unflatten(0, (B, T)),
            image_strong=normalize_images(strong, spec.image_mean, spec.image_std),
            points_weak=points_weak.unflatten(0, (B, T)),
            points_strong=strong_points(sampled, config.point_augment, generator, spec.up_axis),
            image_mask=block_mask(
                B,
                grid=image.grid,
                cell=config.mask.image_cell,
                ratio=config.mask.image_ratio,
                generator=generator,
            ),
            object_id=batch.object_id,
        )

    @torch.no_grad()
    def pseudo_labels(self, pairs: PairBatch) -> dict[Tower, PseudoLabels]:
        """Asks the teacher about the weak pairs; its logits are averaged over T views."""
        B, T = pairs.image_weak.shape[:2]
        seen = self.teacher.module.predict(
            pairs.image_weak.flatten(0, 1), pairs.points_weak.flatten(0, 1)
        )
        image_logits = seen.image_logits.float().unflatten(0, (B, T)).mean(dim=1)
        point_logits = seen.point_logits.float().unflatten(0, (B, T)).mean(dim=1)
        config = self.config.pseudo_labels
        if self.config.mode == "crossmost":
            joint = joint_pseudo_labels(image_logits, point_logits, config)
            labels: dict[Tower, PseudoLabels] = {"image": joint, "point": joint}
        else:
            labels = {
                "image": separate_pseudo_labels(image_logits, config.threshold_image),
                "point": separate_pseudo_labels(point_logits, config.threshold_point),
            }
        agreement = image_logits.argmax(dim=-1) == point_logits.argmax(dim=-1)
        self._diagnostics = {"teacher/agreement": agreement.float().mean()}
        for tower in self.towers:
            share = labels[tower].selected.float().mean()
            self._diagnostics[f"pseudo/selected_{tower}"] = share
        return labels

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of the objective on one batch, unweighted."""
        pairs = self.augment(batch, generator)
        labels = self.pseudo_labels(pairs)
        mask = self.config.mask
        self.student.train()
        for module in self._frozen:
            # In training mode its BatchNorm would follow the strong clouds.
            module.eval()
        out = self.student(
            pairs.image_strong,
            pairs.points_strong,
            pairs.image_mask,
            point_ratio=(mask.point_ratio_low, mask.point_ratio_high),
            generator=generator,
        )

        terms: dict[str, Tensor] = {}
        for tower in self.towers:
            seen, hidden, logits = (
                (out.image, pairs.image_mask, out.prediction.image_logits)
                if tower == "image"
                else (out.point, out.point_mask, out.prediction.point_logits)
            )
            target, _, selected = labels[tower]
            mean_prob = mean_over_workers(logits.float().softmax(dim=-1).mean(dim=0))
            terms[f"self_training_{tower}"] = self_training_loss(logits.float(), target, selected)
            terms[f"fairness_{tower}"] = fairness_loss(mean_prob)
            terms[f"masked_{tower}"] = masked_modelling_loss(
                seen.reconstruction, seen.target, hidden
            )
            terms[f"global_local_{tower}"] = global_local_loss(
                seen.global_embed, seen.local_embed, hidden
            )
        if self.config.mode == "crossmost":
            B = len(pairs.object_id)
            terms["alignment"] = alignment_loss(
                out.prediction.image_embed,
                out.prediction.point_embed,
                gather_from_workers(out.prediction.image_embed),
                gather_from_workers(out.prediction.point_embed),
                out.logit_scale,
                first=worker_rank() * B,
                groups=(pairs.object_id, gather_from_workers(pairs.object_id)),
            )
        return terms

    def diagnostics(self) -> dict[str, Tensor]:
        """Share of selected objects and agreement of the towers, as the teacher saw them."""
        return self._diagnostics

    def after_step(self, step: int) -> None:
        """Moves the teacher, and keeps the scale in bounds."""
        clamp_logit_scale(self.bare_student.logit_scale)
        self.teacher.update(self.bare_student, step)

    def state_dict(self) -> dict[str, Any]:
        """Student and teacher."""
        return {
            "student": self.bare_student.state_dict(),
            "teacher": self.teacher.module.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes both back; the teacher, too: without it a resumed run would start over."""
        self.bare_student.load_state_dict(state["student"])
        self.teacher.module.load_state_dict(state["teacher"])
