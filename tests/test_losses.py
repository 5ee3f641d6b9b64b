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
    agreement_loss,
    alignment_loss,
    chamfer_loss,
    contrastive_loss,
    entropy_loss,
    fairness_loss,
    global_local_loss,
    masked_modelling_loss,
    moving_fairness_loss,
    self_training_loss,
    token_id_loss,
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


# Chamfer distance


def naive_chamfer(reconstruction: Tensor, target: Tensor, mask: Tensor) -> float:
    found = []
    for b, g in mask.nonzero().tolist():
        ours, theirs = reconstruction[b, g].double().numpy(), target[b, g].double().numpy()
        there = [min(((p - q) ** 2).sum() for q in theirs) for p in ours]
        back = [min(((p - q) ** 2).sum() for p in ours) for q in theirs]
        found.append(np.mean(there) + np.mean(back))
    return float(np.mean(found))


@given(seed=seeds)
def test_chamfer_is_the_naive_one(seed: int) -> None:
    reconstruction, target = (torch.randn(2, 3, n, 3, generator=rng(seed + n)) for n in (4, 5))
    mask = torch.rand(2, 3, generator=rng(seed)) < 0.6
    mask[0, 0] = True
    loss = chamfer_loss(reconstruction, target, mask)
    assert loss.item() == pytest.approx(naive_chamfer(reconstruction, target, mask), rel=1e-5)


def test_chamfer_of_the_same_points_in_another_order_is_nothing() -> None:
    points = torch.randn(1, 2, 6, 3, generator=rng(0))
    moved = points[:, :, torch.randperm(6, generator=rng(1))].requires_grad_()
    loss = chamfer_loss(moved, points, torch.ones(1, 2).bool())
    loss.backward()
    assert loss.item() == 0.0
    assert moved.grad is not None
    assert moved.grad.isfinite().all(), "the slope at a perfect reconstruction"


# Token ids


def test_token_ids_count_where_hidden_only() -> None:
    logits = torch.randn(2, 3, 7, generator=rng(0), requires_grad=True)
    ids = torch.tensor([[1, 6, 0], [2, 2, 5]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    loss = token_id_loss(logits, ids, mask)
    torch.testing.assert_close(loss, F.cross_entropy(logits[mask], ids[mask]))
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[~mask].any()
    assert logits.grad[mask].any(dim=-1).all()


# Entropy and agreement


def test_entropy_of_what_is_known_and_unknown() -> None:
    unknown = torch.zeros(3, 8, requires_grad=True)
    known = torch.eye(8)[:3] * 1000
    assert entropy_loss(unknown).item() == pytest.approx(math.log(8), rel=1e-6)
    assert entropy_loss(known).item() == 0.0
    # Unlike the reference's term, it teaches: a step down makes a leaning prediction surer.
    logits = torch.tensor([[0.5, 0.0, 0.0]], requires_grad=True)
    entropy_loss(logits).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]


@given(seed=seeds)
def test_disagreement_is_between_nothing_and_log_two(seed: int) -> None:
    image, point = (5 * torch.randn(4, 6, generator=rng(seed + k)) for k in range(2))
    loss = agreement_loss(image, point)
    assert 0 <= loss.item() <= math.log(2) + 1e-6
    torch.testing.assert_close(loss, agreement_loss(point, image))
    assert agreement_loss(image, image).item() == pytest.approx(0.0, abs=1e-6)


def test_towers_that_exclude_each_other_disagree_fully() -> None:
    apart = agreement_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert apart.item() == pytest.approx(math.log(2), rel=1e-6)


# Many classes


def test_the_moving_average_of_fairness() -> None:
    previous, now = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.6, 0.3])
    loss = moving_fairness_loss(now.requires_grad_(), previous)
    expected = -np.log(np.array([0.3, 0.425, 0.275])).mean() / 0.5
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # Divided by the present's share, the gradient at a steady state is that of the plain term.
    (moving,) = torch.autograd.grad(moving_fairness_loss(now, now.detach()), now)
    (plain,) = torch.autograd.grad(fairness_loss(now), now)
    torch.testing.assert_close(moving, plain)


# Shares of a batch


def test_shares_weighted_by_the_common_count_add_up_to_the_whole() -> None:
    error = torch.randn(6, 5, 2, generator=rng(0))
    mask = torch.rand(6, 5, generator=rng(1)) < torch.linspace(0.1, 0.9, 6)[:, None]
    zero = torch.zeros_like(error)
    whole = masked_modelling_loss(error, zero, mask)
    count = mask.sum() / 2
    halves = [
        masked_modelling_loss(error[rows], zero[rows], mask[rows], count)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    alone = [
        masked_modelling_loss(error[rows], zero[rows], mask[rows])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    assert not torch.isclose(torch.stack(alone).mean(), whole, rtol=1e-2)


# Edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "classes"), [(1, 5), (4, 1), (1, 1)])
def test_every_term_is_finite_at_the_edges(dtype: torch.dtype, batch: int, classes: int) -> None:
    logits = (1000 * torch.randn(batch, classes, generator=rng(0))).to(dtype).requires_grad_()
    other = (-logits).detach()
    embed = unit(batch, 4).to(dtype).requires_grad_()
    patches = unit(batch, 3, 4, seed=1).to(dtype).requires_grad_()
    groups = torch.randn(batch, 3, 5, 3, generator=rng(2)).to(dtype).requires_grad_()
    target = torch.zeros(batch, dtype=torch.int64)
    scale = torch.tensor(100.0, dtype=dtype)
    for chosen in (False, True):
        rows = torch.full((batch,), chosen)
        mask = torch.full((batch, 3), chosen)
        terms = [
            self_training_loss(logits, target, rows),
            fairness_loss(logits.float().softmax(-1).mean(0)),
            masked_modelling_loss(patches, torch.zeros_like(patches), mask),
            global_local_loss(embed, patches, mask),
            chamfer_loss(groups, groups.detach() + 1, mask),
            token_id_loss(patches, torch.zeros(batch, 3, dtype=torch.int64), mask),
            entropy_loss(logits),
            agreement_loss(logits, other),
            alignment_loss(embed, embed, embed, embed, scale),
        ]
        total = torch.stack([term.float() for term in terms]).sum()
        gradients = torch.autograd.grad(total, [logits, embed, patches, groups])
        assert all(term.isfinite() for term in terms)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_finite_differences() -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng(sum(shape)), dtype=torch.float64).requires_grad_()

    mask = torch.tensor([[True, False, True], [False, True, True]])
    rows, target = torch.tensor([True, False]), torch.tensor([1, 0])
    ids = torch.tensor([[1, 0, 3], [2, 2, 1]])
    cases = [
        (lambda x: self_training_loss(x, target, rows), (draw(2, 3),)),
        (lambda x: fairness_loss(x.softmax(-1).mean(0)), (draw(2, 3),)),
        (lambda x, y: masked_modelling_loss(x, y, mask), (draw(2, 3, 4), draw(2, 3, 4).detach())),
        (lambda x, y: global_local_loss(x, y, mask), (draw(2, 4), draw(2, 3, 4))),
        (lambda x, y: chamfer_loss(x, y, mask), (draw(2, 3, 4, 3), draw(2, 3, 5, 3))),
        (lambda x: token_id_loss(x, ids, mask), (draw(2, 3, 4),)),
        (entropy_loss, (draw(2, 3),)),
        (agreement_loss, (draw(2, 3), draw(2, 4)[:, :3])),
        (
            lambda x, y: alignment_loss(x, y, x, y, torch.tensor(2.0, dtype=torch.float64)),
            (draw(3, 4), draw(3, 5)[:, :4]),
        ),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
