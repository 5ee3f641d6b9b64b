"""What Tune asks: which trial comes next, and which one may stop. Neither reads a label."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher

from crossmost_ray.config import ConfigError
from crossmost_ray.tuning.config import Axis, SweepConfig
from crossmost_ray.tuning.ledger import OPEN, Entry
from crossmost_ray.tuning.space import trial_name
from crossmost_ray.tuning.trial import EPOCHS, OF_EPOCHS

REDUCTION = 2
"""Of the trials that reach one of ASHA's rungs, one in so many goes on."""


class Queue(Searcher):
    """Hands Tune the trials that have something left to do, one after the other."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        super().__init__()
        self.waiting: deque[dict[str, Any]] = deque(
            {"trial": entry.trial, "settings": entry.settings}
            for entry in entries
            if entry.status in OPEN
        )

    @property
    def num_trials(self) -> int:
        """Trials that it will hand out."""
        return len(self.waiting)

    def suggest(self, trial_id: str) -> Any:
        """Gives what a trial is called and sets."""
        return self.waiting.popleft() if self.waiting else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Does nothing: what comes next was settled beforehand."""

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the sweep's ledger knows all that going on needs."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, for the same reason."""


class OptunaQueue(Queue):
    """Proposes trials from the scores of those before them, by Optuna's default sampler.

    Source:
        Bergstra et al., 2011: tree-structured Parzen estimator.
    """

    def __init__(self, sweep: SweepConfig, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "search optuna needs the package optuna, which is not installed: "
                "`pip install optuna`, or set search: random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.metric_name = sweep.metric
        self.axes = {key: _distribution(axis) for key, axis in sweep.space.items()}
        self.study = optuna.create_study(
            direction="maximize",
            # Gone on with, a sweep would be proposed its first trials again by the same seed.
            sampler=optuna.samplers.TPESampler(seed=sweep.seed + len(entries)),
        )
        for entry in entries:
            if entry.status in ("done", "stopped") and entry.score is not None:
                self.study.add_trial(
                    optuna.trial.create_trial(
                        params=entry.settings, distributions=self.axes, value=entry.score
                    )
                )
        for assigned in self.waiting:
            self.study.enqueue_trial(assigned["settings"])
        assert sweep.num_trials is not None, "the config has seen to it"
        self.names = deque(assigned["trial"] for assigned in self.waiting)
        self.names.extend(trial_name(place) for place in range(len(entries), sweep.num_trials))
        self.asked: dict[str, Any] = {}

    @property
    def num_trials(self) -> int:
        """Trials that it will hand out."""
        return len(self.names)

    def suggest(self, trial_id: str) -> Any:
        """Gives what a trial is called and sets."""
        if not self.names:
            return Searcher.FINISHED
        asked = self.study.ask(self.axes)
        self.asked[trial_id] = asked
        return {"trial": self.names.popleft(), "settings": dict(asked.params)}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells Optuna how a trial came out; one without a score has failed to it."""
        from optuna.trial import TrialState

        score = (result or {}).get(self.metric_name)
        if error or score is None or not math.isfinite(score):
            self.study.tell(self.asked[trial_id], state=TrialState.FAIL)
        else:
            self.study.tell(self.asked[trial_id], score)


def _distribution(axis: Axis) -> Any:
    """Gives an axis as Optuna names it."""
    from optuna import distributions

    if axis.choice is not None:
        return distributions.CategoricalDistribution(axis.choice)
    if axis.randint is not None:
        return distributions.IntDistribution(*axis.randint)
    assert axis.ends is not None, "the config has refused grids"
    return distributions.FloatDistribution(*axis.ends, log=axis.loguniform is not None)


class _Patient:
    """A scheduler that stops, but never pauses, and leaves alone a trial that has nothing left.

    After its last epoch a trial writes its model; and one that is paused starts anew all that
    training needs.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Says whether a trial goes on after an epoch."""
        action: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        over = result.get(EPOCHS, 0) >= result.get(OF_EPOCHS, math.inf)
        stops = action == TrialScheduler.STOP and not over
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Takes note of a trial's end; of one without a score there is nothing to compare."""
        if self._metric in result:  # type: ignore[attr-defined]
            super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]


class Asha(_Patient, ASHAScheduler):
    """Asynchronous successive halving, over epochs.

    Source:
        Li et al., 2018: A system for massively parallel hyperparameter tuning.
    """


class Median(_Patient, MedianStoppingRule):
    """The median stopping rule, over epochs.

    Source:
        Golovin et al., 2017: Google Vizier.
    """


@dataclasses.dataclass(frozen=True)
class _Former:
    """A trial that ended before Tune was started, as far as a scheduler looks at it."""

    trial_id: str


def build_scheduler(
    sweep: SweepConfig, *, epochs: int, former: Mapping[str, Sequence[Mapping[str, Any]]]
) -> TrialScheduler:
    """Builds what stops trials.

    Args:
        sweep: Names it.
        epochs: Of the longest trial.
        former: Rows of the trials that ended before the sweep was taken up again, by trial: new
            ones are compared with them, too.
    """
    if sweep.scheduler == "none":
        return FIFOScheduler()
    ways: dict[str, Any] = {"time_attr": EPOCHS, "metric": sweep.metric, "mode": "max"}
    # Any: it is told of former trials in fewer words than Tune has for its own.
    scheduler: Any
    if sweep.scheduler == "asha":
        scheduler = Asha(
            max_t=epochs, grace_period=sweep.grace_epochs, reduction_factor=REDUCTION, **ways
        )
    else:
        scheduler = Median(grace_period=sweep.grace_epochs, **ways)
    for trial, rows in former.items():
        for done, row in enumerate(rows, start=1):
            told = _Former(trial)
            scheduler.on_trial_add(None, told)
            scheduler.on_trial_complete(None, told, {**row, EPOCHS: done})
    stopper: TrialScheduler = scheduler
    return stopper
