"""The ear of a sweep's driver: what Tune tells of its trials goes into the ledger and, a line each,
to the terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ray.tune import Callback

from crossmost_ray.evaluation.summary import TEACHER
from crossmost_ray.training.adapt import SCORE
from crossmost_ray.training.status import write_status
from crossmost_ray.training.watch import say
from crossmost_ray.tuning.disk import free, is_complete
from crossmost_ray.tuning.ledger import Entry, Ledger
from crossmost_ray.tuning.space import settings_text
from crossmost_ray.tuning.trial import (
    EPOCHS,
    OF_EPOCHS,
    SECONDS,
    STOP_LIMIT_S,
    STOP_NAME,
    TRIALS_FOLDER,
    stop_trial,
)

CLASS_OF_ERROR = re.compile(r"^[\w.]*[A-Z]\w*(\(\w+\))?: ")
"""What a traceback's last line begins with, such as `crossmost_ray.config.ConfigError: `."""


class Watch(Callback):
    """Keeps the ledger while trials run, and frees the disk of what they leave."""

    def __init__(self, ledger: Ledger, metric: str, *, keeps_best: bool) -> None:
        """Listens for a sweep.

        Args:
            ledger: Of the sweep.
            metric: By which trials are ranked.
            keeps_best: Whether a trial's result is its best epoch, and not its last: then its score
                is that epoch's, too.
        """
        self.ledger = ledger
        self.metric = metric
        self.keeps_best = keeps_best
        self._best: dict[str, dict[str, Any]] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial runs."""
        name, settings = trial.config["trial"], trial.config["settings"]
        self.ledger.begin(name, settings)
        say(f"{name}  started: {settings_text(settings)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Notes a finished epoch."""
        name = trial.config["trial"]
        best = self._best.get(name)
        if best is None or not self.keeps_best or result.get(SCORE, 0.0) > best.get(SCORE, 0.0):
            self._best[name] = result
        entry = self.ledger.advance(
            name,
            epochs=result[EPOCHS],
            score=self._best[name].get(self.metric),
            seconds=result[SECONDS],
        )
        say(f"{entry.trial}  epoch {entry.epochs}/{result[OF_EPOCHS]}  {_score_text(entry)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes that a trial has finished, or was stopped."""
        name = trial.config["trial"]
        run = self.ledger.folder.child(TRIALS_FOLDER).child(name)
        if is_complete(run):
            entry = self.ledger.end(name, "done")
        else:
            if not stop_trial(run):
                say(f"{name}  does not end within {STOP_LIMIT_S:.0f} s; its CPUs may stay taken")
            entry = self.ledger.end(name, "stopped")
            settle(self.ledger)
        say(f"{name}  {entry.status} after {entry.epochs} epoch(s)  {_score_text(entry)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Notes why a trial has failed."""
        told = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        entry = self.ledger.end(trial.config["trial"], "failed", last_line(told))
        run = self.ledger.folder.child(TRIALS_FOLDER).child(entry.trial)
        if run.is_folder():
            write_status(run, "failed", "training", entry.error)
        say(f"{entry.trial}  failed: {entry.error}")


def last_line(traceback: str) -> str:
    """Gives what a traceback says went wrong: of its last error the first sentence, without the
    error's class. What stands below that is advice, such as Ray's where memory has run out."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    errors = [line for line in lines if CLASS_OF_ERROR.match(line)]
    said = CLASS_OF_ERROR.sub("", [*lines, *errors][-1]) if lines else "it said nothing"
    return said.partition(". ")[0]


def settle(ledger: Ledger) -> None:
    """Frees the disk of what stopped trials have written, and notes in their folders that they
    were stopped. One that did not end in time may write on: at the end of a sweep this is done
    once more."""
    for entry in ledger.with_status("stopped"):
        run = ledger.folder.child(TRIALS_FOLDER).child(entry.trial)
        free(run)
        run.remove(TEACHER)
        run.remove(STOP_NAME)
        write_status(run, "stopped", "training")


def _score_text(entry: Entry) -> str:
    return "no score yet" if entry.score is None else f"score {entry.score:.4f}"
