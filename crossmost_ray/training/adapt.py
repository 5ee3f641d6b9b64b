"""The self-training objective: a teacher's joint pseudo-labels, a masked student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossmost_ray.config import TOWERS, AdaptConfig, Tower
from crossmost_ray.data.augment import (
    fill_up_points,
    normalize_images_,
    sample_points,
    strong_images,
    strong_points,
    weak_images,
    weak_points,
)
from crossmost_ray.evaluation import selection
from crossmost_ray.losses import (
    MANY_CLASSES,
    agreement_loss,
    alignment_loss,
    chamfer_loss,
    entropy_loss,
    fairness_loss,
    global_local_loss,
    masked_modelling_loss,
    moving_fairness_loss,
    self_training_loss,
    token_id_loss,
)
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.classifier import (
    CrossModalClassifier,
    MaskedOutput,
    ModelSpec,
    clamp_logit_scale,
)
from crossmost_ray.models.image_tower import TowerOutput
from crossmost_ray.models.point_tokenizer import PointTokenizer
from crossmost_ray.models.point_tower import PointTower
from crossmost_ray.ops.distributed import (
    from_first_worker,
    gather_from_workers,
    mean_over_workers,
    worker_rank,
)
from crossmost_ray.ops.masks import block_mask, most_hidden
from crossmost_ray.optim import parameter_groups
from crossmost_ray.pseudo_labels import pseudo_labels
from crossmost_ray.schema import PairBatch, PseudoLabels, RawBatch
from crossmost_ray.teacher import EmaTeacher
from crossmost_ray.training.guard import Guard, Verdict
from crossmost_ray.training.health import assess
from crossmost_ray.training.task import EpochEnd
from crossmost_ray.training.votes import Memory, VoteBox, Votes, votes_table

REFERENCE_POINTS = 8192
"""Points that the reference fills strong clouds up to."""

SCORE = "selection/score"
"""Metric that says without a label which checkpoints are worth keeping; higher is better."""

TOWERS_OF_MODE: dict[str, tuple[Tower, ...]] = {
    "crossmost": TOWERS,
    "baseline": TOWERS,
    "image_only": ("image",),
    "points_only": ("point",),
}


def set_masked_target(
    point: PointTower, config: AdaptConfig, tokenizer: PointTokenizer | None
) -> None:
    """Gives a point tower the head for what masked point modelling is to predict.

    Args:
        point: Changed, unless it is to predict its own tokens.
        config: The run.
        tokenizer: Says what the ids are; there has to be one for compat.mpm_target token_ids.

    Raises:
        ConfigError: If the tower's backbone has no such groups.
    """
    if config.compat.mpm_target == "chamfer":
        point.predict_points()
    elif config.compat.mpm_target == "token_ids":
        assert tokenizer is not None
        point.predict_token_ids(
            vocabulary=tokenizer.spec.vocabulary, group_size=tokenizer.spec.group_size
        )


class AdaptTask:
    """Adapts a zero-shot classifier to unlabelled pairs.

    Args:
        classifier: The zero-shot classifier; it becomes the student.
        spec: Says how the towers want their inputs.
        config: The run.
        wrap: Prepares the student for several workers; the teacher needs none, being the same
            function of the student on each.
        tokenizer: Names groups of points where their ids are what is predicted. It is no part of
            the state: it never changes.
        classes: C names, for what is said of the run's health; None numbers them.

    Source:
        CrossMoST (Dharmasiri et al., 2024).
    """

    def __init__(
        self,
        classifier: CrossModalClassifier,
        spec: ModelSpec,
        config: AdaptConfig,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        tokenizer: PointTokenizer | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.compat = config.compat
        self.spec = spec
        self.towers = TOWERS_OF_MODE[config.mode]
        self.tokenizer = tokenizer
        set_masked_target(classifier.point, config, tokenizer)
        # The small PointNet is the tokenizer that masked modelling predicts: if it moved, its
        # target would move with it.
        frozen = classifier.point.backbone.frozen_modules()
        frozen += [getattr(classifier, tower) for tower in TOWERS if tower not in self.towers]
        for module in frozen:
            module.requires_grad_(False)
        self._frozen = frozen
        self.bare_student = classifier
        self.teacher = EmaTeacher(classifier, config.ema)
        self.student = wrap(classifier)
        self.weights: dict[str, float] = dataclasses.asdict(config.weights)
        self._diagnostics: dict[str, Tensor] = {}
        self._mean_prob: dict[str, Tensor] = {}
        C = len(classifier.class_embed)
        self.guard = Guard(config.guard, classes or [f"class {place}" for place in range(C)])
        self._box = VoteBox()
        self._said: tuple[dict[str, Tensor], Tensor | None] = ({}, None)
        self._before: Memory | None = None
        self._healthy = self._copy_of_teacher()

    def parameter_groups(self) -> list[dict[str, object]]:
        """Sorts the trainable parameters, tower by tower, with layer-wise decay of the rate."""

        def layer_of(name: str) -> tuple[int, int] | None:
            tower, _, rest = name.partition(".")
            if tower == "image":
                image = self.bare_student.image
                return image.layer_of(rest), image.depth + 1
            return None

        def scale_of(name: str) -> float:
            tower, _, rest = name.partition(".")
            if tower != "point":
                return 1.0
            scale, decay = self.config.optim.point_lr_scale, self.compat.point_layer_decay
            if decay == "none":
                return scale
            point = self.bare_student.point
            return scale * float(decay) ** (point.depth + 1 - point.layer_of(rest))

        def decays(name: str, parameter: nn.Parameter) -> bool:
            if self.compat.decay_on == "matrices":
                return parameter.ndim > 1
            # The reference holds the image's mask token as (1, 1, W), and skips vectors only.
            return parameter.ndim != 1 or name == "image.mask_token"

        return parameter_groups(
            self.bare_student,
            layer_of=layer_of,
            weight_decay=self.config.optim.weight_decay,
            layer_decay=self.config.optim.layer_decay,
            scale_of=scale_of,
            decays=decays,
        )

    def augment(self, batch: RawBatch, generator: torch.Generator) -> PairBatch:
        """Makes the weak pairs of the teacher and the strong, masked pairs of the student."""
        config, spec, image = self.config, self.spec, self.bare_student.image
        B, T, size = len(batch.images), batch.images.shape[1], image.image_size
        weak = weak_images(batch.images.flatten(0, 1), size, config.image_augment, generator)
        strong_views = strong_images(batch.images[:, 0], size, config.image_augment, generator)
        sampled = sample_points(batch.points, config.data.num_points, generator, repeats=T)
        points_weak = weak_points(sampled, config.point_augment, generator)
        sampled = sample_points(batch.points, config.data.num_points, generator)
        strong = strong_points(sampled, config.point_augment, generator, spec.up_axis)
        if self.compat.strong_upsample == "always":
            strong = fill_up_points(strong, REFERENCE_POINTS, generator)
        return PairBatch(
            image_weak=normalize_images_(weak, spec.image_mean, spec.image_std).unflatten(
                0, (B, T)
            ),
            image_strong=normalize_images_(strong_views, spec.image_mean, spec.image_std),
            points_weak=points_weak.unflatten(0, (B, T)),
            points_strong=strong,
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
    def pseudo_labels(
        self, pairs: PairBatch, generator: torch.Generator
    ) -> dict[Tower, PseudoLabels]:
        """Asks the teacher about the weak pairs; its logits are averaged over T views."""
        B, T = pairs.image_weak.shape[:2]
        seen = self.teacher.module.predict(
            pairs.image_weak.flatten(0, 1), pairs.points_weak.flatten(0, 1)
        )
        image_logits = seen.image_logits.unflatten(0, (B, T)).mean(dim=1)
        point_logits = seen.point_logits.unflatten(0, (B, T)).mean(dim=1)
        coins = torch.rand(B, generator=generator, device=image_logits.device) < 0.5
        labels = self._labels(image_logits, point_logits, coins)
        agreement = image_logits.argmax(dim=-1) == point_logits.argmax(dim=-1)
        self._diagnostics = {"teacher/agreement": agreement.float().mean()}
        for tower in self.towers:
            share = labels[tower].selected.float().mean()
            self._diagnostics[f"pseudo/selected_{tower}"] = share
        stable = None
        if T > 1:
            by_view = {
                "image": seen.image_logits.softmax(dim=-1).unflatten(0, (B, T)),
                "point": seen.point_logits.softmax(dim=-1).unflatten(0, (B, T)),
            }
            named = selection.opinion({name: by_view[name] for name in self.towers}).argmax(dim=-1)
            stable = named[:, 0] == named[:, 1]
        self._said = ({"image": image_logits, "point": point_logits}, stable)
        return labels

    def _labels(
        self, image_logits: Tensor, point_logits: Tensor, coins: Tensor
    ) -> dict[Tower, PseudoLabels]:
        """Applies the rule of the run to what the teacher says."""
        return pseudo_labels(
            image_logits,
            point_logits,
            self.config.pseudo_labels,
            joint=self.config.mode == "crossmost",
            point_drawn=coins,
            tie=self.compat.tie,
            ease=self.guard.ease.to(image_logits.device),
        )

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of the objective on one batch, unweighted."""
        pairs = self.augment(batch, generator)
        labels = self.pseudo_labels(pairs, generator)
        mask = self.config.mask
        self.student.train()
        if self.compat.frozen_encoder_bn == "eval":
            for module in self._frozen:
                # In training mode its BatchNorm would follow the strong clouds.
                module.eval()
        out = self.student(
            pairs.image_strong,
            pairs.points_strong,
            pairs.image_mask,
            most_hidden=most_hidden(
                self.bare_student.image.grid, mask.image_cell, mask.image_ratio
            ),
            point_ratio=(mask.point_ratio_low, mask.point_ratio_high),
            generator=generator,
        )

        said, stable = self._said
        answers = {
            "student_image": out.prediction.image_logits,
            "student_point": out.prediction.point_logits,
        }
        self._box.add(batch.object_id, batch.names, said | answers, stable)

        terms: dict[str, Tensor] = {}
        for tower in self.towers:
            terms |= self._tower_terms(tower, out, labels[tower])
        if self.config.mode == "crossmost":
            terms["alignment"] = self._alignment(out, pairs)
        if self.weights["agreement"] > 0 and len(self.towers) == 2:
            terms["agreement"] = agreement_loss(
                out.prediction.image_logits, out.prediction.point_logits
            )
        return terms

    def _tower_terms(
        self, tower: Tower, out: MaskedOutput, labels: PseudoLabels
    ) -> dict[str, Tensor]:
        """Self-training, fairness and the masked terms of one tower."""
        seen, logits = (
            (out.image, out.prediction.image_logits)
            if tower == "image"
            else (out.point, out.prediction.point_logits)
        )
        chosen = mean_over_workers(labels.selected.sum().float())
        terms = {
            f"self_training_{tower}": self_training_loss(
                logits, labels.target, labels.selected, chosen
            ),
            f"fairness_{tower}": self._fairness(tower, logits),
        }
        if seen.reconstruction is not None:
            assert seen.hidden is not None
            assert seen.global_embed is not None
            assert seen.local_embed is not None
            hidden = seen.hidden
            places = mean_over_workers(hidden.sum().float())
            terms[f"masked_{tower}"] = self._masked_term(tower, seen, hidden, places)
            terms[f"global_local_{tower}"] = global_local_loss(
                seen.global_embed, seen.local_embed, hidden, places
            )
        if self.weights[f"entropy_{tower}"] > 0:
            terms[f"entropy_{tower}"] = entropy_loss(logits)
        return terms

    def _fairness(self, tower: Tower, logits: Tensor) -> Tensor:
        mean_prob = mean_over_workers(logits.softmax(dim=-1).mean(dim=0))
        if len(mean_prob) < MANY_CLASSES:
            return fairness_loss(mean_prob)
        previous = self._mean_prob.get(tower, mean_prob.detach())
        self._mean_prob[tower] = ((previous + mean_prob) / 2).detach()
        return moving_fairness_loss(mean_prob, previous)

    def _masked_term(
        self, tower: Tower, seen: TowerOutput, hidden: Tensor, places: Tensor
    ) -> Tensor:
        """Measures what a tower made of its hidden places against what was there."""
        assert seen.reconstruction is not None
        assert seen.target is not None
        if tower == "point" and self.compat.mpm_target == "chamfer":
            return chamfer_loss(seen.reconstruction, seen.target, hidden, places)
        if tower == "point" and self.compat.mpm_target == "token_ids":
            assert self.tokenizer is not None
            centers, groups = seen.target[:, :, 0], seen.target[:, :, 1:]
            token_ids = self.tokenizer.token_ids(groups, centers)
            return token_id_loss(seen.reconstruction, token_ids, hidden, places)
        return self._masked_scale(tower, seen) * masked_modelling_loss(
            seen.reconstruction, self._masked_target(tower, seen), hidden, places
        )

    def _masked_scale(self, tower: Tower, seen: TowerOutput) -> float:
        """Gives the factor by which the reference's normalisation differs from a mean."""
        assert seen.target is not None
        B, _, R = seen.target.shape
        if tower == "image" and self.compat.mim_norm == "tokens197":
            return 3 / (self.bare_student.image.grid**2 + 1)
        if tower == "point" and self.compat.mpm_norm == "upstream":
            return R / B
        return 1.0

    def _masked_target(self, tower: Tower, seen: TowerOutput) -> Tensor:
        assert seen.target is not None
        if tower == "point" and self.compat.mpm_target == "mask_token":
            backbone = self.bare_student.point.backbone
            assert isinstance(backbone, PointBert)
            return backbone.mask_token.expand_as(seen.target)
        return seen.target

    def _alignment(self, out: MaskedOutput, pairs: PairBatch) -> Tensor:
        """Contrasts the towers' embeddings, both directions added."""
        image, point = out.prediction.image_embed, out.prediction.point_embed
        learned = self.compat.align_temperature == "learned"
        scale = out.logit_scale if learned else torch.ones_like(out.logit_scale)
        if self.compat.align_negatives == "local":
            return 2 * alignment_loss(image, point, image, point, scale)
        return 2 * alignment_loss(
            image,
            point,
            gather_from_workers(image),
            gather_from_workers(point),
            scale,
            first=worker_rank() * len(image),
            groups=(pairs.object_id, gather_from_workers(pairs.object_id)),
        )

    def diagnostics(self) -> dict[str, Tensor]:
        """Share of selected objects and agreement of the towers, as the teacher saw them."""
        return self._diagnostics

    def after_step(self, step: int) -> None:
        """Moves the teacher, and keeps the scale in bounds."""
        if self.compat.clamp_logit_scale:
            clamp_logit_scale(self.bare_student.logit_scale)
        self.teacher.update(self.bare_student, step)

    def finish_epoch(self) -> EpochEnd:
        """Scores the epoch's votes, judges the run's health, and acts where the guard is to."""
        votes = self._box.empty()
        # The first worker has all votes; the others hear what follows from them.
        end, verdict = (EpochEnd(), None) if votes is None else self._judge(votes)
        told, verdict, guard = from_first_worker(
            (dataclasses.replace(end, votes=None), verdict, self.guard.state_dict())
        )
        if worker_rank() > 0:
            end = told
            self.guard.load_state_dict(guard)
        if verdict is not None and verdict.rollback:
            self._go_back()
        elif verdict is not None and verdict.healthy:
            self._healthy = self._copy_of_teacher()
        return end

    def _judge(self, votes: Votes) -> tuple[EpochEnd, Verdict]:
        """Says what an epoch came to, and what follows from it."""
        coins = torch.rand(len(votes.names), generator=torch.Generator().manual_seed(0)) < 0.5
        # Of a probability's logarithm, the softmax is the probability.
        logits = {tower: votes.prob[tower].clamp(min=1e-12).log() for tower in TOWERS}
        told = self._labels(logits["image"], logits["point"], coins)
        labels = {tower: told[tower] for tower in self.towers}
        C = votes.prob["image"].shape[-1]
        # The reference's sum of two class indices may be no class.
        targets: dict[str, Tensor] = {
            tower: labels[tower].target.clamp(max=C - 1) for tower in self.towers
        }
        teacher: dict[str, Tensor] = {tower: votes.prob[tower] for tower in self.towers}
        opinion = selection.opinion(teacher).argmax(dim=-1)
        known = None if self._before is None else self._before.of(votes.names)
        found = selection.scores(
            teacher,
            steady=votes.stability,
            before_class=None if known is None else known.opinion,
            student_class={
                tower: votes.prob[f"student_{tower}"].argmax(dim=-1) for tower in self.towers
            },
        )
        score = float(selection.combined(found))
        health = assess(
            teacher,
            targets,
            {tower: labels[tower].selected for tower in self.towers},
            before=None if known is None else known.targets,
            ever_confident=self.guard.ever_confident,
        )
        self._before = Memory(votes.names, opinion, targets)
        verdict = self.guard.judge(health, score)
        metrics = {f"selection/{name}": float(value) for name, value in found.items()}
        end = EpochEnd(
            metrics=metrics | {SCORE: score} | health.metrics(),
            votes=votes_table(votes, labels),
            events=verdict.events,
            stop=verdict.stop,
            rolled_back=verdict.rollback,
        )
        return end, verdict

    def _copy_of_teacher(self) -> dict[str, Tensor] | None:
        """Keeps the teacher's weights, where the guard may want to go back to them."""
        if self.config.guard.collapse != "rollback":
            return None
        return {name: value.clone() for name, value in self.teacher.module.state_dict().items()}

    def _go_back(self) -> None:
        """Takes the last healthy teacher for teacher and student."""
        assert self._healthy is not None
        self.teacher.module.load_state_dict(self._healthy)
        self.bare_student.load_state_dict(self._healthy)
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """Student, teacher, and what is remembered of the votes and the epochs before; the latter
        whole on the first worker only."""
        return {
            "student": self.bare_student.state_dict(),
            "teacher": self.teacher.module.state_dict(),
            "healthy": self._healthy,
            "mean_prob": self._mean_prob,
            "votes": self._box.state_dict(),
            "before": None if self._before is None else self._before.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all of it back; the teacher, too: without it a resumed run would start over."""
        self.bare_student.load_state_dict(state["student"])
        if self.compat.ema_restore:
            self.teacher.module.load_state_dict(state["teacher"])
        self._mean_prob = dict(state["mean_prob"])
        self._healthy = state["healthy"]
        self._box.load_state_dict(state["votes"])
        self._before = None if state["before"] is None else Memory.load(state["before"])
        self.guard.load_state_dict(state["guard"])
