"""Each label-free score against its closed form, and as a property."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.evaluation import selection
from crossmost_ray.evaluation.selection import (
    DEFAULT_WEIGHTS,
    agreement,
    combined,
    information,
    neighbourhood_density,
    opinion,
    persistence,
    scores,
    stability,
    student_agreement,
)

seeds = st.integers(0, 2**31 - 1)
objects = st.integers(3, 12)
classes = st.integers(2, 6)


def answers(N: int, C: int, seed: int, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(N, C, generator=generator)).softmax(dim=-1)


def sure(*named: int, C: int) -> Tensor:
    return F.one_hot(torch.tensor(named), C).float()


def everything(N: int, C: int, seed: int) -> dict[str, Tensor]:
    """All scores of N objects."""
    return scores(
        {"image": answers(N, C, seed), "point": answers(N, C, seed + 1)},
        steady=answers(N, 2, seed + 2)[:, 0],
        before_class=answers(N, C, seed + 3).argmax(dim=-1),
        student_class={"image": answers(N, C, seed + 4).argmax(dim=-1)},
    )


# Closed forms


def test_towers_that_share_three_of_four_classes_agree_to_three_quarters() -> None:
    image, point = sure(0, 1, 2, 0, C=3), sure(0, 1, 2, 1, C=3)
    assert agreement(image, point).item() == 0.75
    assert stability(image, point).item() == 0.75


@pytest.mark.parametrize("C", [2, 10, 40])
def test_information_is_one_where_sure_and_even_and_zero_where_all_answers_are_one(C: int) -> None:
    assert information(torch.eye(C)).item() == pytest.approx(1.0, abs=1e-6)
    # However sure: a collapsed model tells nothing of an object.
    assert information(torch.eye(C)[[0] * 7]).item() == pytest.approx(0.0, abs=1e-6)
    assert information(torch.full((7, C), 1 / C)).item() == pytest.approx(0.0, abs=1e-6)


def test_information_of_two_objects_by_hand() -> None:
    # The mean is (1/2, 1/2), of entropy log 2, and so all that is lost is each one's entropy.
    prob = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    each = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert information(prob).item() == pytest.approx(1 - each / math.log(2), rel=1e-6)


def test_one_class_holds_no_information() -> None:
    assert information(torch.ones(5, 1)).item() == 0.0


def test_density_of_two_clusters_by_hand() -> None:
    # Each of the 2 n sure objects has n - 1 others at similarity 1 and n at 0. At temperature t
    # the weights are e^(1/t) and 1, and the entropy is log Z - (n - 1) e^(1/t) / (t Z).
    n, t = 3, 0.5
    near = math.exp(1 / t)
    Z = (n - 1) * near + n
    expected = (math.log(Z) - (n - 1) * near / (t * Z)) / math.log(2 * n - 1)
    prob = sure(0, 0, 0, 1, 1, 1, C=4)
    assert neighbourhood_density(prob, temperature=t).item() == pytest.approx(expected, rel=1e-5)


def test_density_of_a_collapsed_model_is_one() -> None:
    assert neighbourhood_density(sure(*[2] * 9, C=4)).item() == pytest.approx(1.0, rel=1e-6)


def test_density_ignores_how_long_an_answer_is() -> None:
    # Features of unit length: (1, 1) / 2 and (1, 1) are one, and so are all of these.
    prob = torch.tensor([[0.5, 0.5], [0.1, 0.1], [2.0, 2.0], [0.3, 0.3]])
    assert neighbourhood_density(prob).item() == pytest.approx(1.0, rel=1e-6)


def test_dense_clusters_beat_scattered_answers() -> None:
    clusters = sure(*[0, 1] * 8, C=8)
    scattered = answers(16, 8, seed=0, sharpness=1.0)
    assert neighbourhood_density(clusters) > neighbourhood_density(scattered)


def test_density_of_many_objects_is_that_of_an_even_part() -> None:
    prob = answers(12, 3, seed=1)
    part = neighbourhood_density(prob, most=4)
    assert torch.equal(part, neighbourhood_density(prob[[0, 3, 6, 9]]))
    assert torch.equal(part, neighbourhood_density(prob, most=4))
    assert not torch.equal(part, neighbourhood_density(prob))


def test_persistence_counts_only_objects_that_had_a_class() -> None:
    before, now = torch.tensor([0, 1, -1, 2, -1]), torch.tensor([0, 2, 0, 2, 1])
    assert persistence(before, now).item() == pytest.approx(2 / 3)
    assert persistence(torch.tensor([-1, -1]), torch.tensor([0, -1])).item() == 0.0


def test_student_agreement_counts_only_objects_that_it_was_asked_about() -> None:
    said = torch.tensor([0, 1, -1, 0])
    assert student_agreement(sure(0, 2, 1, 0, C=3), said).item() == pytest.approx(2 / 3)


def test_the_opinion_is_the_mean_of_the_towers() -> None:
    both = opinion({"image": torch.tensor([[1.0, 0.0]]), "point": torch.tensor([[0.2, 0.8]])})
    torch.testing.assert_close(both, torch.tensor([[0.6, 0.4]]))


# Properties


@given(N=objects, C=classes, seed=seeds)
def test_every_score_is_a_scalar_from_zero_to_one(N: int, C: int, seed: int) -> None:
    for name, value in everything(N, C, seed).items():
        assert value.shape == ()
        assert -1e-5 <= value.item() <= 1 + 1e-5, name


@given(N=objects, C=classes, seed=seeds)
def test_the_order_of_objects_and_of_classes_does_not_matter(N: int, C: int, seed: int) -> None:
    image, point = answers(N, C, seed), answers(N, C, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.randperm(N, generator=generator), torch.randperm(C, generator=generator)
    plain = scores({"image": image, "point": point})
    turned = scores({"image": image[row][:, column], "point": point[row][:, column]})
    for name in plain:
        torch.testing.assert_close(turned[name], plain[name], atol=1e-5, rtol=1e-5)


@given(N=objects, C=classes, seed=seeds)
def test_a_model_that_agrees_with_itself_has_one(N: int, C: int, seed: int) -> None:
    prob = answers(N, C, seed)
    named = prob.argmax(dim=-1)
    assert agreement(prob, prob).item() == stability(prob, prob).item() == 1.0
    assert persistence(named, named).item() == student_agreement(prob, named).item() == 1.0


@given(N=objects, C=classes, seed=seeds)
def test_half_precision_changes_little(N: int, C: int, seed: int) -> None:
    # Summed in half precision, the entropies would be off by much more than the inputs are.
    prob = answers(N, C, seed)
    rounded = prob.half()
    for score in (information, neighbourhood_density):
        assert score(rounded).dtype == torch.float32
        assert torch.equal(score(rounded), score(rounded.float()))


# All of them together


def test_what_is_not_known_is_left_out() -> None:
    one = {"point": answers(5, 3, 0)}
    assert set(scores(one)) == {"information", "neighbourhood"}
    assert set(scores({"point": answers(2, 3, 0)})) == {"information"}
    both = one | {"image": answers(5, 3, 1)}
    assert set(scores(both)) == {"information", "neighbourhood", "agreement"}
    assert set(everything(5, 3, 0)) == {
        *("information", "neighbourhood", "agreement"),
        *("stability", "persistence", "student"),
    }


def test_each_score_reads_its_own_input() -> None:
    image, point = sure(0, 1, 2, C=3), sure(0, 1, 0, C=3)
    found = scores(
        {"image": image, "point": point},
        steady=torch.tensor([1.0, 0.5, 0.0]),
        before_class=torch.tensor([0, 0, 0]),
        student_class={"image": torch.tensor([0, 1, 2]), "point": torch.tensor([1, 1, 1])},
    )
    assert found["agreement"].item() == pytest.approx(2 / 3)
    assert found["stability"].item() == 0.5
    # The opinion on the third is a tie of 0 and 2, and a tie goes to the first.
    assert found["persistence"].item() == pytest.approx(2 / 3)
    # The image tower says all that its teacher says, the point tower one of three.
    assert found["student"].item() == pytest.approx((1 + 1 / 3) / 2)


def test_the_default_is_the_mean_of_its_weighted_scores() -> None:
    found = {name: torch.tensor(0.2 + 0.1 * place) for place, name in enumerate(DEFAULT_WEIGHTS)}
    total = sum(DEFAULT_WEIGHTS.values())
    expected = math.prod(found[k].item() ** (DEFAULT_WEIGHTS[k] / total) for k in found)
    found["noise"] = torch.tensor(100.0)
    assert combined(found).item() == pytest.approx(expected, rel=1e-6)


def test_weights_of_missing_scores_go_to_the_others() -> None:
    weights = {"a": 1.0, "b": 3.0, "c": 4.0}
    found = {"a": torch.tensor(0.4), "b": torch.tensor(0.8)}
    assert combined(found, weights).item() == pytest.approx(0.4**0.25 * 0.8**0.75)
    assert combined({"b": torch.tensor(0.8)}, weights).item() == pytest.approx(0.8)


def test_one_tower_alone_has_a_default_score() -> None:
    assert torch.isfinite(combined(scores({"point": answers(6, 3, 0)})))


def test_a_collapse_is_scored_below_what_went_before() -> None:
    before = {"image": answers(40, 5, 0), "point": answers(40, 5, 0)}
    collapsed = {tower: sure(*[3] * 40, C=5) for tower in before}
    assert combined(scores(collapsed)) < combined(scores(before))
    assert combined(scores(collapsed)).item() == pytest.approx(0, abs=1e-3)


# Bad calls


def test_answers_about_other_objects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(4, 2\), expected those of the same"):
        agreement(answers(3, 2, 0), answers(4, 2, 0))
    with pytest.raises(ValueError, match=r"\(3,\) and \(1,\)"):
        # It would be spread over all three.
        persistence(torch.tensor([0, 1, 1]), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        scores({"image": answers(3, 2, 0)}, steady=torch.ones(2))


def test_no_objects_no_towers_and_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 objects, expected at least 1"):
        information(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="there are 2 objects, expected at least 3"):
        neighbourhood_density(answers(2, 3, 0))
    with pytest.raises(ValueError, match="no tower"):
        scores({})
    with pytest.raises(ValueError, match=r"there are \['noise'\], expected at least one of"):
        combined({"noise": torch.tensor(1.0)})


# What it is built on


def test_nothing_but_torch_is_imported_so_that_training_may_use_it() -> None:
    tree = ast.parse(inspect.getsource(selection))
    names = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names <= {"__future__", "math", "collections.abc", "torch"}


def test_nothing_waits_for_the_device() -> None:
    # Tensors on "meta" have shapes and no values: what would fetch one, or choose rows by a mask,
    # fails on them.
    prob, named = torch.empty(8, 3, device="meta"), torch.empty(8, device="meta").long()
    found = scores(
        {"image": prob, "point": prob},
        steady=prob[:, 0],
        before_class=named,
        student_class={"image": named},
    )
    assert set(found) == set(everything(8, 3, 0))
    assert combined(found).is_meta
    assert stability(prob, prob).is_meta
