"""Pseudo-labels: who wins, what counts, and what ties do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossmost_ray.config import PseudoLabelConfig
from crossmost_ray.pseudo_labels import joint_pseudo_labels, separate_pseudo_labels

logits = st.lists(
    st.lists(st.floats(-40, 40, width=32), min_size=5, max_size=5), min_size=4, max_size=4
).map(torch.tensor)
threshold = st.floats(0.0, 0.9)


def of_confidence(confidence: float, best: int, num_classes: int = 5) -> Tensor:
    """(1, C) logits whose softmax is `confidence` at `best` and equal elsewhere."""
    rest = (1 - confidence) / (num_classes - 1)
    row = [math.log(rest)] * num_classes
    row[best] = math.log(confidence)
    return torch.tensor([row])


@pytest.mark.parametrize(
    ("image", "point", "target"),
    [(0.95, 0.90, 1), (0.80, 0.99, 3), (0.90, 0.99, 1), (0.85, 0.96, 3)],
)
def test_the_surer_tower_decides_once_the_points_are_discounted(
    image: float, point: float, target: int
) -> None:
    labels = joint_pseudo_labels(
        of_confidence(image, 1), of_confidence(point, 3), PseudoLabelConfig()
    )
    assert labels.target.tolist() == [target]
    assert labels.confidence.item() == pytest.approx(max(image, 0.9 * point), abs=1e-5)


@pytest.mark.parametrize("num_classes", [5, 40])
def test_a_tie_goes_to_the_image_tower(num_classes: int) -> None:
    # Logits that differ by 100 saturate the softmax: both confidences are exactly 1. Adding the
    # two classes up, as masked sums do, would give class 7 of 5, or the wrong one of 40.
    image, point = torch.zeros(1, num_classes), torch.zeros(1, num_classes)
    image[0, 3], point[0, 4] = 100.0, 100.0
    labels = joint_pseudo_labels(image, point, PseudoLabelConfig(point_weight=1.0))
    assert labels.target.tolist() == [3]
    assert labels.confidence.tolist() == [1.0]
    assert labels.selected.tolist() == [True]


def test_the_threshold_is_strict() -> None:
    image = torch.tensor([[0.0, 0.0], [1e-3, 0.0]])  # confidences of exactly 1/2, and just above
    config = PseudoLabelConfig(threshold=0.5, point_weight=0.5)
    assert joint_pseudo_labels(image, torch.zeros(2, 2), config).selected.tolist() == [False, True]
    assert separate_pseudo_labels(image, 0.5).selected.tolist() == [False, True]


@pytest.mark.parametrize(("point", "selected"), [(0.9330, False), (0.9336, True)])
def test_points_alone_need_a_confidence_above_the_threshold_over_their_weight(
    point: float, selected: bool
) -> None:
    # 0.84 / 0.9 = 0.93333
    labels = joint_pseudo_labels(
        of_confidence(0.4, 1), of_confidence(point, 3), PseudoLabelConfig()
    )
    assert labels.selected.tolist() == [selected]
    assert labels.target.tolist() == [3]


@given(image=logits, point=logits, a=threshold, b=threshold)
def test_a_higher_threshold_selects_a_subset(
    image: Tensor, point: Tensor, a: float, b: float
) -> None:
    low, high = (PseudoLabelConfig(threshold=t) for t in sorted((a, b)))
    loose, strict = (joint_pseudo_labels(image, point, config) for config in (low, high))
    assert not (strict.selected & ~loose.selected).any()
    assert torch.equal(loose.target, strict.target)


@given(image=logits, point=logits)
def test_every_target_is_the_class_of_one_of_the_towers(image: Tensor, point: Tensor) -> None:
    target = joint_pseudo_labels(image, point, PseudoLabelConfig(point_weight=1.0)).target
    # Of the softmax, not of the logits: it rounds logits that differ by 1e-11 to a tie, and the
    # two argmaxes then disagree.
    image_class, point_class = (x.softmax(-1).argmax(-1) for x in (image, point))
    assert ((target == image_class) | (target == point_class)).all()


@given(image=logits, point=logits)
def test_equal_towers_change_places_without_effect_but_for_ties(
    image: Tensor, point: Tensor
) -> None:
    config = PseudoLabelConfig(point_weight=1.0)
    one, other = (
        joint_pseudo_labels(image, point, config),
        joint_pseudo_labels(point, image, config),
    )
    assert torch.equal(one.confidence, other.confidence)
    assert torch.equal(one.selected, other.selected)
    tied = image.softmax(-1).amax(-1) == point.softmax(-1).amax(-1)
    assert torch.equal(one.target[~tied], other.target[~tied])


@given(own=logits, level=st.floats(0, 1))
def test_separate_labels_are_a_towers_own(own: Tensor, level: float) -> None:
    labels = separate_pseudo_labels(own, level)
    probability = own.softmax(-1)
    assert torch.equal(probability.gather(1, labels.target[:, None])[:, 0], labels.confidence)
    assert (probability <= labels.confidence[:, None]).all()
    assert labels.selected.tolist() == [c > level for c in labels.confidence.tolist()]


def test_no_gradient_passes_through_labels() -> None:
    image = torch.zeros(2, 3, requires_grad=True)
    for labels in (
        joint_pseudo_labels(image, image, PseudoLabelConfig()),
        separate_pseudo_labels(image, 0.1),
    ):
        assert not labels.confidence.requires_grad
        assert labels.target.dtype == torch.int64
        assert labels.selected.dtype == torch.bool
