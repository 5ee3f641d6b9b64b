"""An epoch's unlabelled answers in, the state of a run's health out, and what is wrong with it:
collapse, where a few classes swallow the others, and starvation, where a class is never learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

COLLAPSED = 0.5
"""Share of the classes in use at first, not counting one, that must be left.

Not counting one: an effective number of classes is never below 1, so that of two classes half
would never be undercut. Of two, this is reached when one has 86 % of the objects."""

SWALLOWED = 0.5
"""Share of the labels above which one class has swallowed others, if it also has doubled: data may
well consist of chairs for the greater part, and then do so from the first epoch on."""

PATIENCE = 3
"""Epochs without a confident label after which a class starves."""

STARVED_SHARE = 0.1
"""Least share of the labels, in even shares of 1 / C, for a class to be missed when none of them
is confident. Classes that are in the list, but hardly in the data, are to be left alone."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """What an epoch's answers say about a run. Plain values: `Health(**dataclasses.asdict(health))`
    gives it back."""

    confident: float
    """Share of the labels that were selected, from 0 to 1."""
    classes_used: float
    """Effective number of classes of the mean answer of all towers, from 1 to C."""
    tower_used: dict[str, float]
    """The same of each tower of the teacher."""
    tower_named: dict[str, tuple[float, ...]]
    """(C,) share of each class among each tower's best classes. Answers that grow sure take
    `tower_used` down even if no object changes its class; these shares stay."""
    balance: tuple[float, ...]
    """(C,) share of each class among the labels, selected or not; their sum is 1 (compat.tie "sum"
    may leave a little of it to no class)."""
    confident_share: tuple[float, ...]
    """(C,) share of the labels that are of this class and selected; their sum is `confident`."""
    flips: float | None
    """Share of the labels that changed since the epoch before; None in the first."""
    agreement: float | None
    """Share of the objects that both towers put into one class; None for one tower."""
    never_confident: tuple[int, ...]
    """Classes without a selected label in this epoch and all before it."""

    @property
    def ever_confident(self) -> Tensor:
        """(C,) bool, the classes that had a selected label, for the next epoch's `assess`."""
        known = torch.ones(len(self.balance), dtype=torch.bool)
        known[list(self.never_confident)] = False
        return known

    def metrics(self) -> dict[str, float]:
        """Gives the scalars that are logged each epoch, by name."""
        found = {
            "health/confident": self.confident,
            "health/classes_used": self.classes_used,
            "health/largest_class": max(self.balance),
            "health/never_confident": float(len(self.never_confident)),
        }
        return found if self.flips is None else found | {"health/flips": self.flips}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run."""

    kind: Literal["collapse", "starvation"]
    classes: tuple[int, ...]
    """Those that swallow others, or those that starve."""
    says: str
    """One sentence with the numbers."""


def effective_classes(share: Tensor) -> Tensor:
    """Gives the number of equally frequent classes that would be as mixed: exp of the entropy.

    Args:
        share: (C,), not negative, its sum 1.

    Returns:
        Scalar from 1 to C.

    Source:
        Hill (1973), diversity of order 1.
    """
    return torch.special.entr(share).sum().exp()


def assess(
    prob: Mapping[str, Tensor],
    label: Mapping[str, Tensor],
    selected: Mapping[str, Tensor],
    *,
    before: Mapping[str, Tensor] | None = None,
    ever_confident: Tensor | None = None,
) -> Health:
    """Sums an epoch's answers up.

    Args:
        prob: By tower, "image" or "point": (N, C), the teacher's answers, averaged over weak views.
        label: By tower of the student: (N,) int64, the pseudo-labels it learned from. Where the
            rule is joint, both towers' are the same; giving one of them gives the same result. One
            beyond C - 1, a mistake that `compat.tie` repeats on request, is of no class.
        selected: By tower of the student: (N,) bool, which of them counted.
        before: `label` of the epoch before, -1 where an object had none; None in the first.
        ever_confident: (C,) bool, the classes that had a selected label in any epoch before; None
            in the first.

    Raises:
        ValueError: If there are no objects, or shapes or towers don't fit together.
    """
    answers = {tower: one.float() for tower, one in prob.items()}
    if not all(by_tower and all(map(len, by_tower.values())) for by_tower in (prob, label)):
        raise ValueError("there are no answers or no labels, expected those of at least one object")
    every_label, every_selected = _joined(label), _joined(selected)
    if every_label.shape != every_selected.shape:
        raise ValueError(
            f"there are {len(every_label)} labels, and {len(every_selected)} marks of what was "
            "selected; expected a mark for each label"
        )
    mean = {tower: one.mean(dim=0) for tower, one in answers.items()}
    C = len(next(iter(mean.values())))
    count = torch.bincount(every_label, minlength=C)[:C]
    chosen = torch.bincount(every_label, weights=every_selected.double(), minlength=C)[:C]
    ever = chosen > 0
    if ever_confident is not None:
        ever = ever | ever_confident.to(ever.device)
    return Health(
        confident=float(every_selected.double().mean()),
        classes_used=float(effective_classes(torch.stack(list(mean.values())).mean(dim=0))),
        tower_used={tower: float(effective_classes(one)) for tower, one in mean.items()},
        tower_named={
            tower: tuple(_histogram(one.argmax(dim=-1), C).tolist())
            for tower, one in answers.items()
        },
        balance=tuple((count / len(every_label)).tolist()),
        confident_share=tuple((chosen / len(every_label)).tolist()),
        flips=None if before is None else _flips(_joined(before), every_label),
        agreement=_agreement(answers),
        never_confident=tuple((~ever).nonzero()[:, 0].tolist()),
    )


def diagnose(
    history: Sequence[Health], names: Sequence[str], *, patience: int = PATIENCE
) -> list[Finding]:
    """Tells what is wrong after the last epoch of a history.

    Collapse is judged by the first epoch, for nothing else tells without a label which classes the
    data holds: a run that was collapsed when it began is not found out. It is found where

    - a tower's mean answer and its best classes both use less than half of the classes that they
      used at first, not counting one class; or
    - one class has more than half of the labels, and more than twice its first share.

    A class starves if it has had a fair number of labels over the last epochs, and none of them was
    confident. One that no object is given to is not counted: it may not be in the data, and no
    threshold would help it.

    Args:
        history: Oldest first; the first is the one to compare with, such as that of the zero-shot
            model.
        names: C names of classes.
        patience: Epochs without a confident label after which a class starves.

    Returns:
        At most one finding of each kind. It comes again each epoch for as long as it is so.

    Raises:
        ValueError: If the history is empty, names don't fit it, or patience is below 1.
    """
    if not history or patience < 1:
        raise ValueError(
            f"there are {len(history)} epochs, and patience is {patience}; expected at least 1 each"
        )
    if len(names) != len(history[-1].balance):
        raise ValueError(
            f"there are {len(names)} names of {len(history[-1].balance)} classes, expected one each"
        )
    found = [_collapse(history[0], history[-1], names)]
    if len(history) >= patience:
        found.append(_starvation(history[-patience:], names))
    return [finding for finding in found if finding is not None]


def lowered(threshold: Tensor, starved: Sequence[int], *, factor: float, floor: float) -> Tensor:
    """Lowers the thresholds of classes that starve.

    Args:
        threshold: (C,) least confidence of a label of each class.
        starved: Which classes.
        factor: By which theirs are multiplied; from above 0 to 1.
        floor: Below this, none is lowered; one that is below it already stays.

    Returns:
        (C,), nowhere above what it was.

    Raises:
        ValueError: If the factor is out of bounds.

    Source:
        Zhang et al. (2021), FlexMatch: classes that are learned slowly get lower thresholds. There
        it is done at every step; here only on a finding.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor}, expected a number above 0 and up to 1")
    fresh = threshold.clone()
    chosen = torch.tensor(list(starved), dtype=torch.int64, device=threshold.device)
    old = threshold[chosen]
    fresh[chosen] = torch.minimum(old, (old * factor).clamp(min=floor))
    return fresh


def _collapse(first: Health, now: Health, names: Sequence[str]) -> Finding | None:
    reasons, swallowing = [], []
    for tower in sorted(now.tower_used.keys() & first.tower_used.keys()):
        uses, used = now.tower_used[tower], first.tower_used[tower]
        if _has_shrunk(used, uses) and _has_shrunk(
            _effective(first.tower_named[tower]), _effective(now.tower_named[tower])
        ):
            largest = _largest(now.tower_named[tower])
            share = 100 * now.tower_named[tower][largest]
            swallowing.append(largest)
            reasons.append(
                f"the {tower} tower uses {uses:.1f} classes, {used:.1f} at first, and calls "
                f"{share:.0f} % of the objects '{names[largest]}'"
            )
    largest = _largest(now.balance)
    share, share_at_first = now.balance[largest], first.balance[largest]
    if share > max(SWALLOWED, 2 * share_at_first):
        swallowing.append(largest)
        reasons.append(
            f"'{names[largest]}' is the label of {100 * share:.0f} % of the objects, "
            f"of {100 * share_at_first:.0f} % at first"
        )
    if not reasons:
        return None
    return Finding("collapse", tuple(sorted(set(swallowing))), "; ".join(reasons))


def _has_shrunk(first: float, now: float) -> bool:
    return now - 1 < COLLAPSED * (first - 1)


def _effective(share: Sequence[float]) -> float:
    return float(effective_classes(torch.tensor(share)))


def _largest(share: Sequence[float]) -> int:
    return max(range(len(share)), key=share.__getitem__)


def _starvation(recent: Sequence[Health], names: Sequence[str]) -> Finding | None:
    C = len(names)
    starved = tuple(
        place
        for place in range(C)
        if not any(epoch.confident_share[place] for epoch in recent)
        and recent[-1].balance[place] > 0
        and sum(epoch.balance[place] for epoch in recent) / len(recent) >= STARVED_SHARE / C
    )
    if not starved:
        return None
    listed = ", ".join(
        f"'{names[place]}' ({100 * recent[-1].balance[place]:.1f} % of the labels)"
        for place in starved
    )
    says = (
        f"{len(starved)} of {C} classes had no confident label for {len(recent)} epoch(s): {listed}"
    )
    return Finding("starvation", starved, says)


def _joined(by_tower: Mapping[str, Tensor]) -> Tensor:
    # By name: what is compared with another mapping must come in one order.
    return torch.cat([by_tower[tower] for tower in sorted(by_tower)])


def _histogram(named: Tensor, C: int) -> Tensor:
    return torch.bincount(named, minlength=C) / len(named)


def _flips(before: Tensor, now: Tensor) -> float:
    if before.shape != now.shape:
        raise ValueError(
            f"there are {len(now)} labels, and {len(before)} of the epoch before; "
            "expected those of the same objects"
        )
    known = before >= 0
    return float(((before != now) & known).sum() / known.sum().clamp(min=1))


def _agreement(answers: Mapping[str, Tensor]) -> float | None:
    if len(answers) < 2:
        return None
    named = [one.argmax(dim=-1) for one in answers.values()]
    return float((named[0] == named[1]).double().mean())
