"""The image tower's own blocks against open_clip's, and blocks that are compiled or run twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from crossmost_ray.models.blocks import BlockRunner
from crossmost_ray.models.classifier import CrossModalClassifier, CrossModalModel, set_runner
from crossmost_ray.models.image_tower import ImageTower
from crossmost_ray.models.trunks import clip_block, quick_mlp
from crossmost_ray.ops.masks import block_mask, most_hidden
from tests.synthetic import fresh_model


def block_of(*, quick: bool, scaled: bool = False) -> ResidualAttentionBlock:
    torch.manual_seed(3)
    block = ResidualAttentionBlock(
        16, 4, act_layer=QuickGELU if quick else nn.GELU, ls_init_value=0.3 if scaled else None
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return block


def gradients(block: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What a run gives, and the gradients of its input and of the block's parameters."""
    x = x.clone().requires_grad_()
    out = run(x)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *block.parameters()])]


@pytest.mark.parametrize(("quick", "scaled"), [(True, False), (False, False), (True, True)])
def test_a_block_of_ours_is_open_clips(quick: bool, scaled: bool) -> None:
    block, x = block_of(quick=quick, scaled=scaled), torch.randn(3, 7, 16)
    theirs = gradients(block, x, block)
    ours = gradients(block, x, lambda x: clip_block(block, x, quick, None))
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_asked_for_are_those_of_the_whole_block() -> None:
    block, x = block_of(quick=True), torch.randn(3, 7, 16)
    asked = torch.tensor([[0, 4], [6, 6], [2, 1]])

    def whole(x: Tensor) -> Tensor:
        every = clip_block(block, x, True, None)
        return torch.stack([row[places] for row, places in zip(every, asked, strict=True)])

    some = gradients(block, x, lambda x: clip_block(block, x, True, asked))
    for ours, theirs in zip(some, gradients(block, x, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.floats(-30, 30), st.floats(0.1, 10), st.lists(st.integers(1, 4), max_size=2))
def test_the_quick_mlp_is_its_formula(middle: float, width: float, shape: list[int]) -> None:
    torch.manual_seed(0)
    inner, outer = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
    x = middle + width * torch.randn(*shape, 2, 3, dtype=torch.float64)

    def formula(x: Tensor) -> Tensor:
        opened = inner(x)
        return outer(opened * torch.sigmoid(1.702 * opened))

    both = nn.ModuleList([inner, outer])
    expected = gradients(both, x, formula)
    for found, wanted in zip(
        gradients(both, x, lambda x: quick_mlp(x, inner, outer)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@given(grid=st.integers(1, 15), cell=st.integers(1, 5), ratio=st.floats(0, 1))
def test_no_image_hides_more_patches_than_are_counted_on(
    grid: int, cell: int, ratio: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    mask = block_mask(8, grid=grid, cell=cell, ratio=ratio, generator=rng)
    hidden = int(mask.sum(dim=1).max())
    assert hidden <= most_hidden(grid, cell, ratio) <= grid * grid
    if grid % cell == 0:
        assert hidden == most_hidden(grid, cell, ratio)


def terms(tower: ImageTower, mask: Tensor, most: int | None) -> list[Tensor]:
    """The three uses of a tower's output, each a sum over what was hidden, and their gradients."""
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    out = tower(images, mask, most)
    chosen = out.hidden[..., None].float()
    found = [
        out.embed.square()[:, 0].sum(),
        ((out.reconstruction - out.target).abs() * chosen).sum() / 100,
        ((out.local_embed - out.global_embed[:, None]).square() * chosen).sum(),
    ]
    used = {name: p for name, p in tower.named_parameters() if p.requires_grad}
    return [*found, *torch.autograd.grad(sum(found), list(used.values()))]


def test_what_no_term_asks_for_is_not_needed_for_any(model: CrossModalModel) -> None:
    tower = copy.deepcopy(model.image)
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) < 0.3
    most = int(mask.sum(dim=1).max()) + 2  # some rows are filled up with patches that are seen
    whole, few = terms(tower, mask, None), terms(tower, mask, most)
    assert mask.sum(dim=1).unique().numel() > 1
    for ours, theirs in zip(few, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def pass_of(run: BlockRunner) -> dict[str, Any]:
    """One masked pass of a small model in training, stochastic depth included."""
    model = fresh_model()
    classifier = CrossModalClassifier(model, torch.eye(128)[:5]).train()
    set_runner(classifier, run)
    rng = torch.Generator().manual_seed(4)
    images, points = torch.randn(2, 3, 64, 64, generator=rng), torch.randn(2, 64, 3, generator=rng)
    torch.manual_seed(7)
    out = classifier(
        images,
        points,
        block_mask(2, grid=8, cell=2, ratio=0.3, generator=rng),
        most_hidden=most_hidden(8, 2, 0.3),
        point_ratio=(0.2, 0.4),
        generator=rng,
    )
    loss = out.prediction.image_logits.sum() + out.prediction.point_logits[:, 0].sum()
    loss += out.image.reconstruction.square().mean() + out.point.reconstruction.square().mean()
    loss.backward()
    found = {name: p.grad for name, p in classifier.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def test_blocks_that_are_computed_again_change_nothing() -> None:
    plain, again = pass_of(BlockRunner()), pass_of(BlockRunner(recompute=True))
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@pytest.mark.slow
def test_compiled_blocks_agree() -> None:
    plain, compiled = pass_of(BlockRunner()), pass_of(BlockRunner(compiled=True, recompute=True))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_mixed_precision_stays_inside_the_towers(model: CrossModalModel) -> None:
    classifier = CrossModalClassifier(copy.deepcopy(model), torch.eye(128)[:5]).eval()
    images, points = torch.randn(2, 3, 64, 64), torch.randn(2, 64, 3)
    seen: list[torch.dtype] = []
    classifier.image.trunk.run = Watching(seen)
    with torch.no_grad():
        exact = classifier.predict(images, points)
        classifier.precision = torch.bfloat16
        rough = classifier.predict(images, points)
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert not torch.is_autocast_enabled("cpu")
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
    cosine = (rough.image_embed * exact.image_embed).sum(dim=-1)
    assert (cosine > 0.999).all()
    # The scores are those of the embeddings, to float32's last digits: nothing was rounded after.
    torch.testing.assert_close(rough.image_logits, classifier.logits(rough.image_embed))


class Watching(BlockRunner):
    """Notes what a block's products are computed in."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__()
        object.__setattr__(self, "seen", seen)

    def __call__(self, forward: Any, block: nn.Module, x: Tensor, *more: Any) -> Tensor:
        self.seen.append((x @ x.transpose(1, 2)).dtype)  # type: ignore[attr-defined]
        return super().__call__(forward, block, x, *more)
