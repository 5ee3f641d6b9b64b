"""Each term of the objectives against its closed form, and as a property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.losses import (
    alignment_loss,
    contrastive_loss,
    fairness_loss,
    global_local_loss,
    masked_modelling_loss,
    self_training_loss,
)

seeds = st.integers(0, 2**31 - 1)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng(seed)), dim=-1)


# Self-training


def test_nothing_selected_costs_nothing_and_moves_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = self_training_loss(logits, torch.zeros(4, dtype=torch.int64), torch.zeros(4).bool())
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(4, 3))


@given(seed=seeds, chosen=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_self_training_is_the_mean_over_the_selected_rows(seed: int, chosen: list[bool]) -> None:
    logits = torch.randn(6, 5, generator=rng(seed), requires_grad=True)
    target = torch.randint(0, 5, (6,), generator=rng(seed + 1))
    selected = torch.tensor(chosen)
    loss = self_training_loss(logits, target, selected)
    torch.testing.assert_close(loss, F.cross_entropy(logits[selected], target[selected]))
    loss.backward()
    assert (logits.grad[~selected] == 0).all()
    assert (logits.grad[selected] != 0).all()


# Fairness


@pytest.mark.parametrize("num_classes", [2, 10, 40])
def test_fairness_of_uniform_predictions_is_log_num_classes(num_classes: int) -> None:
    uniform = torch.full((num_classes,), 1 / num_classes)
    assert fairness_loss(uniform).item() == pytest.approx(math.log(num_classes), rel=1e-6)


@given(seed=seeds, num_classes=st.integers(2, 12))
def test_fairness_is_the_divergence_from_uniform_plus_log_num_classes(
    seed: int, num_classes: int
) -> None:
    mean_prob = torch.randn(num_classes, generator=rng(seed)).double().softmax(0)
    uniform = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    divergence = (uniform * (uniform / mean_prob).log()).sum()
    loss = fairness_loss(mean_prob)
    torch.testing.assert_close(loss, divergence + math.log(num_classes))
    assert loss >= math.log(num_classes) - 1e-12


def test_fairness_of_a_class_never_used_is_finite_and_pulls_it_up() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = fairness_loss(logits.softmax(-1).mean(0))
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 40
    assert logits.grad.isfinite().all()


# Masked modelling


def test_masked_modelling_by_hand() -> None:
    target = torch.zeros(1, 3, 2)
    reconstruction = torch.tensor([[[1.0, -3.0], [5.0, 5.0], [0.0, 1.0]]])
    mask = torch.tensor([[True, False, True]])
    # Of the hidden places the mean over channels is 2 and 1/2; their mean is 1.25.
    loss = masked_modelling_loss(reconstruction, target, mask)
    assert loss.item() == pytest.approx(1.25)


@given(seed=seeds)
def test_what_is_not_hidden_does_not_count(seed: int) -> None:
    reconstruction = torch.randn(2, 6, 4, generator=rng(seed), requires_grad=True)
    target = torch.randn(2, 6, 4, generator=rng(seed + 1))
    mask = torch.rand(2, 6, generator=rng(seed + 2)) < 0.5
    mask[0, 0] = True
    loss = masked_modelling_loss(reconstruction, target, mask)
    expected = np.abs(reconstruction.detach().numpy() - target.numpy())[mask.numpy()].mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert (reconstruction.grad[~mask] == 0).all()
    assert (reconstruction.grad[mask] != 0).all()


def test_with_nothing_hidden_the_terms_are_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    guess = torch.randn(2, 3, 4, requires_grad=True)
    for loss in (
        masked_modelling_loss(guess, torch.zeros(2, 3, 4), nothing),
        global_local_loss(unit(2, 4), F.normalize(guess, dim=-1), nothing),
    ):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, guess)
        assert torch.equal(gradient, torch.zeros_like(gradient))


# Global and local


@given(seed=seeds)
def test_global_local_is_two_minus_two_cosines(seed: int) -> None:
    whole, parts = unit(3, 8, seed=seed), unit(3, 5, 8, seed=seed + 1)
    mask = torch.rand(3, 5, generator=rng(seed)) < 0.6
    mask[:, 0] = True
    cosine = (parts * whole[:, None]).sum(-1)[mask]
    loss = global_local_loss(whole, parts, mask)
    torch.testing.assert_close(loss, (2 - 2 * cosine).mean())
    assert 0 <= loss <= 4


def test_global_local_has_its_bounds_at_equal_and_opposite_parts() -> None:
    whole, mask = unit(2, 4), torch.ones(2, 3, dtype=torch.bool)
    parts = whole[:, None].expand(2, 3, 4)
    assert global_local_loss(whole, parts, mask).item() == 0.0
    assert global_local_loss(whole, -parts, mask).item() == pytest.approx(4.0, rel=1e-6)


def test_global_local_moves_both_sides() -> None:
    whole, parts = unit(2, 4).requires_grad_(), unit(2, 3, 4, seed=1).requires_grad_()
    global_local_loss(whole, parts, torch.ones(2, 3, dtype=torch.bool)).backward()
    assert whole.grad.abs().sum() > 0
    assert parts.grad.abs().sum() > 0


# Contrast


def test_contrastive_of_orthonormal_pairs() -> None:
    # With B orthonormal pairs a row of the logits is (s, 0, ..., 0) up to its order,
    # so the loss is log(e^s + B - 1) - s.
    batch_size, scale = 4, 3.0
    embed = torch.eye(batch_size)
    expected = math.log(math.exp(scale) + batch_size - 1) - scale
    loss = contrastive_loss(embed, embed, torch.tensor(scale))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_without_a_temperature_has_a_floor() -> None:
    # The best that raw cosines can do with 128 pairs is 1 for the own key and -1 for all others:
    # log(1 + 127 e^-2) = 2.9007. Two such keys exist in one dimension.
    queries, keys = torch.ones(1, 1), torch.full((128, 1), -1.0)
    keys[5] = 1.0
    loss = contrastive_loss(queries, keys, torch.tensor(1.0), first=5)
    assert loss.item() == pytest.approx(2.9007, abs=5e-5)


def naive_contrast(
    queries: Tensor, keys: Tensor, scale: float, first: int, names: list[int] | None
) -> float:
    total = 0.0
    for row, query in enumerate(queries.double().numpy()):
        own = first + row
        others = [
            key
            for place, key in enumerate(keys.double().numpy())
            if place == own or names is None or names[place] != names[own]
        ]
        exponents = [scale * float(query @ key) for key in others]
        own_exponent = scale * float(query @ keys[own].double().numpy())
        total += math.log(sum(math.exp(x) for x in exponents)) - own_exponent
    return total / len(queries)


@given(seed=seeds, worker=st.integers(0, 2), grouped=st.booleans())
def test_contrast_equals_the_naive_one(seed: int, worker: int, grouped: bool) -> None:
    B, W = 3, 3
    keys, queries = unit(B * W, 4, seed=seed), unit(B, 4, seed=seed + 1)
    names = torch.randint(0, 4, (B * W,), generator=rng(seed))
    first = worker * B
    loss = contrastive_loss(
        queries,
        keys,
        torch.tensor(5.0),
        first=first,
        groups=(names[first : first + B], names) if grouped else None,
    )
    expected = naive_contrast(queries, keys, 5.0, first, names.tolist() if grouped else None)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_second_view_of_an_object_is_no_negative() -> None:
    points = unit(3, 4)
    names = torch.tensor([7, 8, 7])
    own = contrastive_loss(
        points[[0, 1]], points[[0, 1]], torch.tensor(9.0), groups=(names[:2], names[:2])
    )
    # Row 2 shows the same object as row 0: for row 0, it changes nothing.
    queries, keys = points[[0]], points[[0, 1, 0]]
    with_copy = contrastive_loss(queries, keys, torch.tensor(9.0), groups=(names[:1], names))
    alone = contrastive_loss(queries, keys[:2], torch.tensor(9.0))
    torch.testing.assert_close(with_copy, alone)
    assert own.isfinite()


@given(seed=seeds)
def test_alignment_is_symmetric_and_knows_no_order(seed: int) -> None:
    image, point, scale = unit(5, 4, seed=seed), unit(5, 4, seed=seed + 1), torch.tensor(4.0)
    loss = alignment_loss(image, point, image, point, scale)
    torch.testing.assert_close(loss, alignment_loss(point, image, point, image, scale))
    order = torch.randperm(5, generator=rng(seed))
    shuffled = alignment_loss(image[order], point[order], image[order], point[order], scale)
    torch.testing.assert_close(loss, shuffled)


def test_alignment_of_embeddings_that_tell_nothing_is_log_of_their_number() -> None:
    same = unit(1, 8).expand(6, 8)
    loss = alignment_loss(same, same, same, same, torch.tensor(14.0))
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)


def test_alignment_moves_both_towers_and_the_scale() -> None:
    image, point = unit(4, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    groups = (torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 2]))
    alignment_loss(image, point, image, point, scale, groups=groups).backward()
    for leaf in (image, point, scale):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def test_alignment_halves_the_two_directions() -> None:
    # Images find their points perfectly in one direction only.
    image = torch.eye(3)
    point = torch.eye(3)[[0, 1, 1]]
    there = contrastive_loss(image, point, torch.tensor(2.0))
    back = contrastive_loss(point, image, torch.tensor(2.0))
    both = alignment_loss(image, point, image, point, torch.tensor(2.0))
    assert there.item() != pytest.approx(back.item())
    assert both.item() == pytest.approx((there.item() + back.item()) / 2)
