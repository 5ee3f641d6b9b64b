"""A training step in the style of the published research code, written for comparison: eager, in
float32, with a Python loop wherever that code has one, over the same weights as the project's step.

What is kept of that style: attention of the point tower by two products and a softmax, attention
weights asked of the last image block, layouts that are transposed back and forth, convolutions of
width 1 over repeated features, sampling by a loop over picks, masks by a loop over samples, AdamW
as it comes, a teacher moved tensor by tensor through two state dicts, and every scalar fetched in
every step. The formulas are those of docs/method.md, so that both steps compute the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from point_ops import expanded_distances, loop_sample
from torch import Tensor, nn

from crossmost_ray.config import OptimConfig
from crossmost_ray.models.backbones.pointbert import Block, GroupEncoder, PointBert
from crossmost_ray.models.classifier import CrossModalClassifier
from crossmost_ray.schema import PairBatch
from crossmost_ray.teacher import ema_decay
from crossmost_ray.training.adapt import AdaptTask


def image_tokens(visual: Any, images: Tensor, mask: Tensor | None, token: Tensor) -> Tensor:
    """Reads images through open_clip's blocks, (L, B, W) inside, as (B, 1 + P, W) tokens."""
    x = visual.conv1(images)
    x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
    if mask is not None:
        hidden = mask[..., None].to(x.dtype)
        x = x * (1 - hidden) + token.expand(x.shape[0], x.shape[1], -1) * hidden
    cls_token = visual.class_embedding + torch.zeros(x.shape[0], 1, x.shape[-1], device=x.device)
    x = torch.cat([cls_token, x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x).permute(1, 0, 2)
    blocks = visual.transformer.resblocks
    for place, block in enumerate(blocks):
        attn, normed = block.attn, block.ln_1(x)
        mixed, _ = F.multi_head_attention_forward(
            normed,
            normed,
            normed,
            attn.embed_dim,
            attn.num_heads,
            attn.in_proj_weight,
            attn.in_proj_bias,
            None,
            None,
            False,
            0.0,
            attn.out_proj.weight,
            attn.out_proj.bias,
            training=attn.training,
            need_weights=place == len(blocks) - 1,
        )
        x = x + mixed
        inner = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
    return x.permute(1, 0, 2)


def encoded_groups(encoder: GroupEncoder, groups: Tensor) -> Tensor:
    """Encodes (B, G, M, 3) groups by convolutions of width 1 over channels-first copies."""
    B, G, M, _ = groups.shape
    feature = encoder.first_conv(groups.reshape(B * G, M, 3).transpose(2, 1))
    overall = torch.max(feature, dim=2, keepdim=True)[0]
    feature = torch.cat([overall.expand(-1, -1, M), feature], dim=1)
    feature = encoder.second_conv(feature)
    return torch.max(feature, dim=2, keepdim=False)[0].reshape(B, G, -1)


def dropped(block: Block, branch: Tensor) -> Tensor:
    """Drops the branch of some objects."""
    if not block.training or block.drop_path == 0.0:
        return branch
    keep = 1 - block.drop_path
    return branch.div(keep) * branch.new_empty(len(branch), 1, 1).bernoulli_(keep)


def block_output(block: Block, x: Tensor) -> Tensor:
    """Maps (B, L, W) tokens through one block, attention by two products and a softmax."""
    B, L, width = x.shape
    heads, normed = block.attn.heads, block.norm1(x)
    qkv = block.attn.qkv(normed).reshape(B, L, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (qkv[0] @ qkv[1].transpose(-2, -1)) * (width // heads) ** -0.5
    mixed = (weights.softmax(dim=-1) @ qkv[2]).transpose(1, 2).reshape(B, L, width)
    x = x + dropped(block, block.attn.proj(mixed))
    return x + dropped(block, block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))


def group_mask(centers: Tensor, low: float, high: float, rng: torch.Generator) -> Tensor:
    """Hides neighbouring groups, sample by sample."""
    B, G, _ = centers.shape
    uniform = torch.rand(2, B, generator=rng, device=centers.device)
    rows = []
    for sample in range(B):
        seed = min(int(uniform[0, sample] * G), G - 1)
        count = int((low + (high - low) * uniform[1, sample]) * G)
        distance = torch.norm(centers[sample] - centers[sample, seed], dim=-1)
        row = torch.zeros(G, dtype=torch.bool)
        row[torch.argsort(distance).cpu()[:count]] = True
        rows.append(row)
    return torch.stack(rows).to(centers.device)


class PointPass:
    """The point tower's pass over a batch of clouds."""

    def __init__(self, backbone: PointBert, points: Tensor) -> None:
        self.backbone = backbone
        picked = loop_sample(points, backbone.num_tokens)
        rows = torch.arange(len(points), device=points.device)[:, None]
        self.centers = points[rows, picked]
        near = expanded_distances(self.centers, points).topk(
            backbone.group_size, dim=-1, largest=False, sorted=False
        )
        groups = points[rows[..., None], near.indices] - self.centers[:, :, None]
        self.tokens = backbone.reduce_dim(encoded_groups(backbone.encoder, groups))

    def features(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gives the (B, W) CLS token and (B, G, W) tokens after the last norm."""
        backbone, tokens = self.backbone, self.tokens
        if mask is not None:
            hidden = mask[..., None].to(tokens.dtype)
            shown = backbone.mask_token.expand(*tokens.shape[:2], -1)
            tokens = tokens * (1 - hidden) + shown * hidden
        B = len(tokens)
        x = torch.cat([backbone.cls_token.expand(B, -1, -1), tokens], dim=1)
        place = backbone.pos_embed(self.centers)
        place = torch.cat([backbone.cls_pos.expand(B, -1, -1), place], dim=1)
        for block in backbone.blocks.blocks:
            assert isinstance(block, Block)
            x = block_output(block, x + place)
        x = backbone.norm(x)
        return x[:, 0], x[:, 1:]


def unit(x: Tensor) -> Tensor:
    """Brings rows to unit length."""
    return x / x.norm(dim=-1, keepdim=True)


class PublishedStyleStep:
    """One training step of the cross-modal objective in that style.

    Args:
        task: Its student, teacher and config are used, and nothing else of it.
    """

    def __init__(self, task: AdaptTask) -> None:
        self.task = task
        self.student: CrossModalClassifier = task.bare_student
        self.teacher: CrossModalClassifier = task.teacher.module

    def build_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        """Builds AdamW as it comes: its default implementation for the device."""
        groups = self.task.parameter_groups()
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))

    def logits(self, model: CrossModalClassifier, embed: Tensor) -> Tensor:
        """Scores embeddings against the classes."""
        return model.logit_scale.exp() * embed @ unit(model.class_embed).t()

    @torch.no_grad()
    def labels(self, pairs: PairBatch) -> tuple[Tensor, Tensor]:
        """Asks the teacher for joint labels, and which of them count."""
        teacher, config = self.teacher, self.task.config.pseudo_labels
        visual: Any = teacher.image.visual
        tokens = image_tokens(visual, pairs.image_weak[:, 0], None, teacher.image.mask_token)
        image = unit(visual.ln_post(tokens[:, 0]) @ visual.proj)
        backbone = teacher.point.backbone
        assert isinstance(backbone, PointBert)
        cls_token, rest = PointPass(backbone, pairs.points_weak[:, 0]).features(None)
        point = unit(torch.cat([cls_token, rest.max(1)[0]], dim=-1) @ teacher.point.projection)
        image_conf, image_class = self.logits(teacher, image).softmax(dim=-1).max(dim=-1)
        point_conf, point_class = self.logits(teacher, point).softmax(dim=-1).max(dim=-1)
        point_conf = point_conf * config.point_weight
        target = torch.where(point_conf > image_conf, point_class, image_class)
        return target, torch.max(point_conf, image_conf) > config.threshold

    def losses(self, pairs: PairBatch, rng: torch.Generator) -> dict[str, Tensor]:
        """Computes the terms of mode crossmost."""
        target, selected = self.labels(pairs)
        # The project's step tosses a coin for each object here, whether its rule asks or not.
        torch.rand(len(target), generator=rng, device=rng.device)
        student = self.student
        student.train()
        backbone = student.point.backbone
        assert isinstance(backbone, PointBert)
        backbone.encoder.eval()
        mask = self.task.config.mask

        cloud = PointPass(backbone, pairs.points_strong)
        point_mask = group_mask(cloud.centers, mask.point_ratio_low, mask.point_ratio_high, rng)
        visual: Any = student.image.visual
        images, image_mask = pairs.image_strong, pairs.image_mask
        tokens = image_tokens(visual, images, image_mask, student.image.mask_token)
        image_embed = unit(visual.ln_post(tokens[:, 0]) @ visual.proj)
        patches = student.image.ln_patch(tokens[:, 1:])
        cls_token, groups = cloud.features(point_mask)
        pooled = torch.cat([cls_token, groups.max(1)[0]], dim=-1)
        point_embed = unit(pooled @ student.point.projection)
        local = student.point.local_projection
        assert local is not None

        drawn = student.image.decoder(patches)
        pixels = student.image.patchify(images)
        terms = {
            "masked_image": (drawn - pixels).abs()[image_mask].mean(),
            "masked_point": (backbone.lm_head(groups) - cloud.tokens.detach())
            .abs()[point_mask]
            .mean(),
            "global_local_image": self.apart(image_embed, unit(patches @ visual.proj), image_mask),
            "global_local_point": self.apart(
                unit(cls_token @ local), unit(groups @ local), point_mask
            ),
        }
        for tower, embed in (("image", image_embed), ("point", point_embed)):
            logits = self.logits(student, embed)
            chosen = logits[selected]
            terms[f"self_training_{tower}"] = (
                F.cross_entropy(chosen, target[selected]) if len(chosen) else 0 * logits.sum()
            )
            terms[f"fairness_{tower}"] = -logits.softmax(dim=-1).mean(dim=0).log().mean()
        scores = student.logit_scale.exp() * image_embed @ point_embed.t()
        own = torch.arange(len(scores), device=scores.device)
        terms["alignment"] = F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)
        return terms

    @staticmethod
    def apart(whole: Tensor, parts: Tensor, mask: Tensor) -> Tensor:
        """Averages the squared distance of hidden parts to the whole."""
        return ((parts - whole[:, None]) ** 2).sum(dim=-1)[mask].mean()

    def __call__(
        self, optimizer: torch.optim.Optimizer, pairs: PairBatch, step: int, rng: torch.Generator
    ) -> dict[str, float]:
        """Forward, backward, update, teacher; every term is fetched."""
        terms = self.losses(pairs, rng)
        total = torch.stack([self.task.weights[name] * term for name, term in terms.items()]).sum()
        if not torch.isfinite(total):
            raise RuntimeError(f"step {step}: the loss is not finite")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        self.follow(step)
        return {"loss": total.item(), **{name: term.item() for name, term in terms.items()}}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Moves the teacher, tensor by tensor."""
        decay = ema_decay(step, self.task.config.ema)
        theirs = self.student.state_dict()
        for name, value in self.teacher.state_dict().items():
            moved = decay * value + (1 - decay) * theirs[name]
            value.copy_(moved)


def without_chance(model: nn.Module) -> None:
    """Switches stochastic depth off, so that two steps can be compared."""
    for module in model.modules():
        if isinstance(module, Block):
            module.drop_path = 0.0
