"""One step: the weighted sum, what is logged, clipping, and the stop at a loss gone wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crossmost_ray.schema import RawBatch
from crossmost_ray.training.step import NonFiniteLossError, train_step, weighted_sum

BATCH = RawBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64), (), ("a",))


class TwoTerms:
    """A task of two weights: the first term is 3 a, the second is b squared."""

    def __init__(self, factor: float = 3.0) -> None:
        self.student: nn.Module = nn.ParameterDict(
            {"a": torch.tensor([2.0]), "b": torch.tensor([5.0])}
        )
        self.weights = {"line": 1.0, "square": 0.1, "unused": 7.0}
        self.factor = factor
        self.followed: list[int] = []

    def parameter_groups(self) -> list[dict[str, object]]:
        return [{"params": list(self.student.parameters())}]

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        parts = dict(self.student.named_parameters())
        return {
            "line": self.factor * parts["a"].sum(),
            "square": parts["b"].square().sum(),
        }

    def diagnostics(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(1.0, requires_grad=True)}

    def after_step(self, step: int) -> None:
        self.followed.append(step)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    @property
    def values(self) -> list[float]:
        return [p.item() for p in self.student.parameters()]


def step(task: TwoTerms, *, lr: float = 0.01, clip_norm: float = 100.0) -> dict[str, Tensor]:
    return train_step(
        task,
        torch.optim.SGD(task.student.parameters(), lr=lr),
        BATCH,
        step=11,
        generator=torch.Generator(),
        clip_norm=clip_norm,
    )


def test_terms_are_summed_with_their_weights() -> None:
    terms = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    assert weighted_sum(terms, {"a": 10.0, "b": 0.5, "c": 9.0}).item() == 21.5


def test_a_term_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="no weight is given for b, c"):
        weighted_sum(dict.fromkeys("cab", torch.tensor(1.0)), {"a": 1.0})


def test_a_step_moves_and_logs_what_it_optimised() -> None:
    task = TwoTerms()
    scalars = step(task)
    # d(3 a)/da = 3, d(0.1 b^2)/db = 0.2 b = 1
    assert task.values == pytest.approx([2 - 0.03, 5 - 0.01])
    assert {name: value.item() for name, value in scalars.items()} == pytest.approx(
        {"loss": 6 + 2.5, "loss/line": 6.0, "loss/square": 25.0, "seen": 1.0}
    )
    assert not any(value.requires_grad for value in scalars.values())
    assert task.followed == [11]


def test_long_gradients_are_shortened_together() -> None:
    task = TwoTerms(factor=30.0)
    step(task, lr=1.0, clip_norm=0.5)
    moved = torch.tensor([2.0, 5.0]) - torch.tensor(task.values)
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert (moved[0] / moved[1]).item() == pytest.approx(30.0, rel=1e-3)


def test_gradients_do_not_pile_up_over_steps() -> None:
    once, twice = TwoTerms(), TwoTerms()
    step(once, lr=0.0)
    step(once)
    step(twice)
    assert once.values == twice.values


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_gone_wrong_stops_before_anything_moves(factor: float) -> None:
    task = TwoTerms(factor)
    with pytest.raises(
        NonFiniteLossError, match=r"^step 11: the loss is not finite \(line on worker 0\); .*lr"
    ):
        step(task)
    assert task.values == [2.0, 5.0]
    assert task.followed == []
    assert all(parameter.grad is None for parameter in task.student.parameters())


def test_terms_that_cancel_are_still_found_out() -> None:
    # inf - inf is NaN, and so is a weight of 0 times inf.
    task = TwoTerms(float("inf"))
    task.weights["line"] = 0.0
    with pytest.raises(NonFiniteLossError, match="line"):
        step(task)


class MeanOfNames(TwoTerms):
    """A task whose term is a times the mean of the batch's object ids."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def losses(self, batch: RawBatch, generator: torch.Generator) -> dict[str, Tensor]:
        self.sizes.append(len(batch.object_id))
        assert [str(int(k)) for k in batch.object_id] == list(batch.names)
        mean = batch.object_id.float().mean()
        return {"line": mean * dict(self.student.named_parameters())["a"].sum()}


def numbered(size: int) -> RawBatch:
    return RawBatch(
        torch.zeros(size, 1),
        torch.zeros(size, 1),
        torch.arange(size),
        (),
        tuple(map(str, range(size))),
    )


@pytest.mark.parametrize(("parts", "sizes"), [(1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (7, [1] * 7)])
def test_a_batch_in_parts_is_one_step_of_the_whole_batch(parts: int, sizes: list[int]) -> None:
    task = MeanOfNames()
    scalars = train_step(
        task,
        torch.optim.SGD(task.student.parameters(), lr=0.01),
        numbered(7),
        step=4,
        generator=torch.Generator(),
        clip_norm=100.0,
        accumulate=parts,
    )
    assert task.sizes == sizes
    # The mean of 0 to 6 is 3, whatever the parts: the gradient, and what is logged.
    assert task.values == pytest.approx([2 - 0.03, 5])
    assert scalars["loss/line"].item() == pytest.approx(6)
    assert task.followed == [4]


def test_more_parts_than_objects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a batch of 3 can't be cut into 4 parts; lower optim"):
        train_step(
            task := MeanOfNames(),
            torch.optim.SGD(task.student.parameters(), lr=0.1),
            numbered(3),
            step=0,
            generator=torch.Generator(),
            clip_norm=1.0,
            accumulate=4,
        )
