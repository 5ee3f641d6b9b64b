"""The teacher: its decay, its average, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from crossmost_ray.config import EmaConfig
from crossmost_ray.teacher import EmaTeacher, ema_decay

CONSTANT = EmaConfig(start=0.9, end=0.9)


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def shifted(module: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for value in module.state_dict().values():
            value.add_(amount if value.is_floating_point() else 1)


@pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.99), (200, 0.9949), (400, 0.9998), (401, 0.9998), (10**6, 0.9998)]
)
def test_the_decay_rises_for_400_steps(step: int, decay: float) -> None:
    assert ema_decay(step, EmaConfig()) == pytest.approx(decay, abs=1e-12)


def test_the_average_of_a_student_that_jumps_once_is_a_geometric_series() -> None:
    # t_n = d^n t_0 + (1 - d^n) s for a student that stays at s.
    module = student()
    teacher = EmaTeacher(module, CONSTANT)
    start = copy.deepcopy(module.state_dict())
    shifted(module, 1.0)
    for step in range(5):
        teacher.update(module, step)
    for name, value in teacher.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.9**5 * start[name] + (1 - 0.9**5) * module.state_dict()[name]
            torch.testing.assert_close(value, expected)


def test_the_average_is_that_of_torch() -> None:
    def average(ours: torch.Tensor, theirs: torch.Tensor, _count: object) -> torch.Tensor:
        return 0.9 * ours + 0.1 * theirs if ours.is_floating_point() else theirs

    module = student()
    teacher = EmaTeacher(module, CONSTANT)
    reference = AveragedModel(module, avg_fn=average, use_buffers=True)
    reference.update_parameters(module)  # AveragedModel's first call copies
    for step in range(3):
        module(torch.randn(8, 3)).sum()  # moves BatchNorm's statistics
        shifted(module, 0.1)
        teacher.update(module, step)
        reference.update_parameters(module)
    expected = reference.module.state_dict()
    for name, value in teacher.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_statistics_are_averaged_and_counters_are_copied() -> None:
    module = student()
    teacher = EmaTeacher(module, EmaConfig(start=0.75, end=0.75))
    module[1].running_mean.fill_(4.0)
    module[1].num_batches_tracked.fill_(1001)
    teacher.update(module, 0)
    assert teacher.module[1].running_mean.tolist() == [1.0] * 4
    assert teacher.module[1].num_batches_tracked.item() == 1001
    assert teacher.module[1].num_batches_tracked.dtype == torch.int64


def test_the_ramp_follows_the_step() -> None:
    module = student()
    teacher = EmaTeacher(module, EmaConfig(start=0.0, end=1.0, ramp_steps=4))
    start = copy.deepcopy(teacher.module.state_dict())
    shifted(module, 1.0)
    teacher.update(module, 4)  # a decay of 1: nothing moves
    assert torch.equal(teacher.module[0].weight, start["0.weight"])
    teacher.update(module, 1)  # a decay of 1/4
    torch.testing.assert_close(teacher.module[0].weight, start["0.weight"] + 0.75)


def test_the_teacher_needs_no_gradient_and_stays_in_evaluation_mode() -> None:
    module = student().train()
    teacher = EmaTeacher(module, CONSTANT)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not any(part.training for part in teacher.module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.training


def test_the_student_is_left_alone() -> None:
    module = student()
    teacher = EmaTeacher(module, CONSTANT)
    shifted(module, 1.0)
    before = copy.deepcopy(module.state_dict())
    teacher.update(module, 0)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    shared = {p.data_ptr() for p in module.parameters()} & {
        p.data_ptr() for p in teacher.module.parameters()
    }
    assert not shared
