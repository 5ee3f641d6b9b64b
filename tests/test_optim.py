"""Groups of parameters, layer-wise decay, and the schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crossmost_ray.config import OptimConfig
from crossmost_ray.models.classifier import CrossModalModel
from crossmost_ray.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)

# 0.65 ** (13 - k), layers 0 to 13 of a tower of twelve blocks.
SCALES_OF_TWELVE_BLOCKS = [
    *(0.003697, 0.005688, 0.008751, 0.013463, 0.020712, 0.031864, 0.049022),
    *(0.075419, 0.116029, 0.178506, 0.274625, 0.4225, 0.65, 1.0),
]


def test_layer_decay_of_twelve_blocks() -> None:
    module = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(14))
    groups = parameter_groups(
        module,
        layer_of=lambda name: (int(name.split(".")[0]), 13),
        weight_decay=0.05,
        layer_decay=0.65,
    )
    assert [group["lr_scale"] for group in groups] == pytest.approx(
        SCALES_OF_TWELVE_BLOCKS, abs=5e-7
    )


def test_layer_decay_of_the_image_tower(model: CrossModalModel) -> None:
    image = model.image
    groups = parameter_groups(
        image,
        layer_of=lambda name: (image.layer_of(name), image.depth + 1),
        weight_decay=0.05,
        layer_decay=0.65,
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    expected = {
        "mask_token": 0.65**5,
        "visual.class_embedding": 0.65**5,
        "visual.positional_embedding": 0.65**5,
        "visual.conv1.weight": 0.65**5,
        "visual.ln_pre.weight": 0.65**5,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.65**4,
        "visual.transformer.resblocks.3.mlp.c_proj.bias": 0.65,
        "visual.ln_post.bias": 1.0,
        "visual.proj": 1.0,
        "ln_patch.weight": 1.0,
        "decoder.weight": 1.0,
    }
    parameters = dict(image.named_parameters())
    for name, value in expected.items():
        assert scale[id(parameters[name])] == pytest.approx(value), name


def test_a_parameter_outside_the_towers_learns_at_the_full_rate() -> None:
    (group,) = parameter_groups(
        nn.Linear(2, 2, bias=False), layer_of=lambda name: None, weight_decay=0.1, layer_decay=0.5
    )
    assert group["lr_scale"] == 1.0


def test_vectors_and_scalars_are_not_decayed() -> None:
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(1.0))
    module.bias = nn.Parameter(torch.zeros(3))
    module.matrix = nn.Parameter(torch.zeros(3, 3))
    module.convolution = nn.Parameter(torch.zeros(3, 3, 1))
    groups = parameter_groups(
        module, layer_of=lambda name: None, weight_decay=0.05, layer_decay=1.0
    )
    decay = {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert decay == {0: 0.0, 1: 0.0, 2: 0.05, 3: 0.05}


def test_every_trainable_parameter_is_in_one_group(model: CrossModalModel) -> None:
    frozen = {id(p) for p in model.text.parameters()}
    for parameter in model.text.parameters():
        parameter.requires_grad_(False)
    try:
        groups = parameter_groups(
            model, layer_of=lambda name: (len(name) % 3, 2), weight_decay=0.1, layer_decay=0.5
        )
    finally:
        model.requires_grad_(True)
    placed = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in model.parameters()} - frozen


def rates(num_steps: int, warmup_steps: int, config: OptimConfig) -> list[float]:
    return [
        learning_rate(step, num_steps=num_steps, warmup_steps=warmup_steps, config=config)
        for step in range(num_steps + 1)
    ]


@given(
    num_steps=st.integers(1, 200),
    share=st.floats(0, 1),
    lr=st.floats(1e-6, 1.0),
    floor=st.floats(0, 1),
)
def test_the_rate_rises_then_falls_between_its_bounds(
    num_steps: int, share: float, lr: float, floor: float
) -> None:
    config = OptimConfig(lr=lr, min_lr=floor * lr)
    warmup = round(share * num_steps)
    values = rates(num_steps, warmup, config)
    tolerance = 1e-9 * lr
    assert all(0 < value <= lr + tolerance for value in values[:warmup])
    assert all(config.min_lr - tolerance <= value for value in values[warmup:])
    assert all(b > a for a, b in itertools.pairwise(values[:warmup]))
    assert all(b <= a + tolerance for a, b in itertools.pairwise(values[warmup:]))


def test_the_warm_up_is_a_line() -> None:
    values = rates(100, 10, OptimConfig(lr=4e-5, min_lr=2e-6))
    assert values[:10] == pytest.approx([4e-5 * k / 10 for k in range(1, 11)])


def test_the_cosine_begins_where_the_line_ends() -> None:
    values = rates(110, 10, OptimConfig(lr=4e-5, min_lr=2e-6))
    assert values[9] == values[10] == pytest.approx(4e-5)
    # Half way through the cosine lies the mean; a quarter of the way, cos(pi / 4).
    assert values[60] == pytest.approx((4e-5 + 2e-6) / 2)
    assert values[35] == pytest.approx(2e-6 + (4e-5 - 2e-6) * (1 + math.sqrt(0.5)) / 2)
    assert values[110] == pytest.approx(2e-6)


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert rates(10, 0, OptimConfig(lr=1e-3))[0] == 1e-3


def test_every_group_gets_its_share() -> None:
    fast, slow = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = build_optimizer(
        [
            {"params": [fast], "lr_scale": 1.0, "weight_decay": 0.0},
            {"params": [slow], "lr_scale": 0.25, "weight_decay": 0.0},
        ],
        OptimConfig(lr=0.5),
    )
    set_learning_rate(optimizer, 0.1)
    (fast.sum() + slow.sum()).backward()
    optimizer.step()
    # Adam's first step is as long as the rate, whatever the gradient.
    torch.testing.assert_close(1 - fast, torch.full((2, 2), 0.1))
    torch.testing.assert_close(1 - slow, torch.full((2, 2), 0.025))
