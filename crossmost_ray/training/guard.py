"""An epoch's health and score in, what is to be done about it out: go on, lower thresholds, go back
to a healthy teacher, or stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossmost_ray.config import GuardConfig
from crossmost_ray.training.health import Finding, Health, diagnose, lowered

MOST_ROLLBACKS = 2
"""Times that a run goes back: one that collapses again and again needs another config."""

BETTER = 1e-4
"""By how much a score has to rise to count as better."""


@dataclass(frozen=True)
class Verdict:
    """What follows from an epoch."""

    events: tuple[dict[str, Any], ...] = ()
    """Lines for the run's log: what was found, and what is done."""
    stop: str | None = None
    """Why the run is over, if it is."""
    rollback: bool = False
    """Whether the run is to go back to its last healthy teacher."""
    healthy: bool = True
    """Whether the teacher is one to go back to."""


class Guard:
    """Follows a run's health over the epochs.

    Every worker holds one and is told the same, so that all decide alike.

    Args:
        config: What is to be done.
        classes: C names.
    """

    def __init__(self, config: GuardConfig, classes: Sequence[str]) -> None:
        self.config = config
        self.classes = tuple(classes)
        self.history: list[Health] = []
        self.ease = torch.ones(len(self.classes))
        """(C,) factors on the thresholds."""
        self.rollbacks = 0
        self.best: float | None = None
        self.since_best = 0

    @property
    def ever_confident(self) -> Tensor | None:
        """(C,) bool, the classes that had a selected label; None in the first epoch."""
        return self.history[-1].ever_confident if self.history else None

    def judge(self, health: Health, score: float) -> Verdict:
        """Takes an epoch in, and says what follows.

        Args:
            health: Of the epoch.
            score: The label-free score of its teacher.
        """
        config = self.config
        self.history.append(health)
        found = {
            finding.kind: finding
            for finding in diagnose(self.history, self.classes, patience=config.starved_epochs)
        }
        # What is needed later: the first, to compare with, and the last few.
        self.history = [self.history[0], *self.history[1:][-config.starved_epochs :]]
        events, stop, rollback = [], None, False
        if (finding := found.get("collapse")) is not None:
            action = self._against_collapse()
            stop = f"collapse: {finding.says}" if action == "stop" else None
            rollback = action == "rollback"
            events.append(_event(finding, action))
            if rollback:
                self.rollbacks += 1
                # The collapsed epoch is taken back: the next one is judged as its successor.
                self.history = self.history[:1]
        elif (finding := found.get("starvation")) is not None:
            lowers = config.starvation == "lower"
            if lowers:
                self.ease = lowered(
                    self.ease, finding.classes, factor=config.lower_by, floor=config.lowest
                )
            events.append(_event(finding, "lower" if lowers else "none"))
        if self.best is None or score > self.best + BETTER:
            self.best, self.since_best = score, 0
        else:
            self.since_best += 1
        if stop is None and config.patience is not None and self.since_best >= config.patience:
            stop = f"no better label-free score than {self.best:.4f} in {self.since_best} epoch(s)"
            events.append({"event": "stopped early", "says": stop})
        return Verdict(tuple(events), stop, rollback, healthy="collapse" not in found)

    def _against_collapse(self) -> str:
        if self.config.collapse == "report":
            return "none"
        if self.config.collapse == "rollback" and self.rollbacks < MOST_ROLLBACKS:
            return "rollback"
        return "stop"

    def state_dict(self) -> dict[str, Any]:
        """Gives what resuming needs, as tensors and plain values."""
        return {
            "history": [dataclasses.asdict(health) for health in self.history],
            "ease": self.ease,
            "rollbacks": self.rollbacks,
            "best": self.best,
            "since_best": self.since_best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.history = [Health(**health) for health in state["history"]]
        self.ease = state["ease"]
        self.rollbacks = state["rollbacks"]
        self.best, self.since_best = state["best"], state["since_best"]


def _event(finding: Finding, action: str) -> dict[str, Any]:
    return {"event": "health", "kind": finding.kind, "action": action, "says": finding.says}
