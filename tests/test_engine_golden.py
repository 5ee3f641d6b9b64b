"""Label rules, terms and their sum against golden numbers of the reference's training step.

The fixture holds a teacher's and a student's outputs, and for each mode which objects were
selected with which labels, the total loss, and its gradient with respect to each output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossmost_ray.config import PseudoLabelConfig, PseudoLabelRule
from crossmost_ray.losses import alignment_loss, fairness_loss, self_training_loss
from crossmost_ray.pseudo_labels import pseudo_labels
from crossmost_ray.training.step import weighted_sum

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "engine_modes.npz")
MODES: dict[str, Any] = json.loads((FOLDER / "engine_modes.json").read_text())["modes"]

RULES: dict[str, PseudoLabelRule] = {
    "agreement": "agreement",
    "separate": "separate",
    "separate_trans_pcl_img": "points_to_image",
    "separate_trans_img_pcl": "image_to_points",
    "from_scratch": "image_to_points",
    "naive": "coin",
}
"""Every other mode takes joint labels by confidence."""


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def label_config(mode: str) -> PseudoLabelConfig:
    given = MODES[mode]["config"]
    return PseudoLabelConfig(
        rule=RULES.get(mode, "confidence"),
        threshold=given["conf_threshold_combined"],
        threshold_image=given["conf_threshold_image"],
        threshold_point=given["conf_threshold_pc"],
        threshold_agreement=given["agreement_pseudolabels_min_thresh"],
        # Our config refuses a factor that no point prediction could pass with.
        point_weight=max(given["conf_weight_pc"], given["conf_threshold_combined"]),
    )


def labels_of(mode: str, tie: Any = "image") -> Any:
    coins = golden("naive/picked_pc").bool() if mode == "naive" else torch.zeros(32).bool()
    return pseudo_labels(
        golden("teacher_image_logits"),
        golden("teacher_pc_logits"),
        label_config(mode),
        joint=True,
        point_drawn=coins,
        tie=tie,
    )


SELECTING = [mode for mode in MODES if MODES[mode]["error"] is None]
SELECTED = [
    (mode, tower, name)
    for mode in SELECTING
    for tower, name in (("image", "image"), ("point", "pc"))
    if f"{mode}/sel_{name}" in GOLDEN.files
]


@pytest.mark.parametrize(("mode", "tower", "name"), SELECTED)
def test_the_same_objects_are_selected_with_the_same_labels(
    mode: str, tower: str, name: str
) -> None:
    labels = labels_of(mode)[tower]
    rows = labels.selected.nonzero().squeeze(1)
    assert rows.tolist() == golden(f"{mode}/sel_{name}").tolist()
    assert labels.target[rows].tolist() == golden(f"{mode}/tgt_{name}").tolist()


@pytest.mark.parametrize("mode", SELECTING)
def test_the_total_and_its_gradients_agree(mode: str) -> None:
    names = ("il", "pl", "fi", "fp", "mi", "mp", "ai", "ap")
    student = {name: golden(f"student/{name}").requires_grad_() for name in names}
    config, masked = MODES[mode]["config"], MODES[mode]["args_mask"]
    labels = labels_of(mode)
    terms: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    for tower, short, logits, masked_term, distance in (
        ("image", "image", "il", "mi", "ai"),
        ("point", "pc", "pl", "mp", "ap"),
    ):
        if config["only_image" if tower == "point" else "only_pc"]:
            continue
        _, _, selected = labels[tower]
        terms[f"st_{tower}"] = self_training_loss(student[logits], labels[tower].target, selected)
        terms[f"fair_{tower}"] = fairness_loss(student[logits].softmax(-1).mean(0))
        weights |= {f"st_{tower}": 1.0, f"fair_{tower}": config[f"w_fair_{short}"]}
        if masked:
            terms[f"masked_{tower}"] = student[masked_term]
            terms[f"gl_{tower}"] = student[distance].mean()
            weights |= {
                f"masked_{tower}": config[f"w_mim_{short}"],
                f"gl_{tower}": config[f"w_align_{short}"],
            }
    both = not (config["only_image"] or config["only_pc"])
    if masked and both and config["image_pc_align"]:
        image = torch.nn.functional.normalize(student["fi"], dim=-1)
        point = torch.nn.functional.normalize(student["fp"], dim=-1)
        terms["alignment"] = 2 * alignment_loss(image, point, image, point, torch.tensor(1.0))
        weights["alignment"] = config["w_image_pc_align"]
    total = weighted_sum(terms, weights)
    assert total.item() + inert(mode) == pytest.approx(golden(f"{mode}/loss").item(), rel=1e-5)
    total.backward()
    for name in names:
        if f"{mode}/grad/{name}" in GOLDEN.files:
            found = student[name].grad
            assert found is not None, name
            torch.testing.assert_close(
                found, golden(f"{mode}/grad/{name}"), rtol=1e-4, atol=1e-7, msg=name
            )
        else:
            found = student[name].grad
            assert found is None or not found.any(), name


def inert(mode: str) -> float:
    """The reference's terms that carry no gradient: a constant in its total."""
    config, metrics = MODES[mode]["config"], MODES[mode]["metrics"]
    constant = 0.0
    if config["pseudolabel_agreement_loss"]:
        constant += config["w_pseudo_agree"] * metrics["loss_pseudolabel_agreement"]
    for tower in ("image", "pc"):
        if config[f"entropy_{tower}"]:
            constant += metrics[f"loss_entropy_{tower}"]
    return constant


def test_an_empty_selection_costs_nothing_where_the_reference_exits() -> None:
    assert MODES["empty_selection"]["error"] == "SystemExit(1)"
    labels = labels_of("empty_selection")["image"]
    assert not labels.selected.any()
    logits = golden("student/il").requires_grad_()
    loss = self_training_loss(logits, labels.target, labels.selected)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_tie_adds_two_classes_in_the_reference_and_not_here() -> None:
    teacher = torch.zeros(3, 40)
    teacher[torch.arange(3), torch.tensor([3, 1, 6])] = 60.0
    config = PseudoLabelConfig(point_weight=1.0, threshold=0.5)
    coins = torch.zeros(3).bool()

    def target(tie: Any) -> list[int]:
        labels = pseudo_labels(teacher, teacher, config, joint=True, point_drawn=coins, tie=tie)
        return list(labels["image"].target.tolist())

    assert target("sum") == [6, 2, 12]
    assert target("image") == target("point") == [3, 1, 6]
