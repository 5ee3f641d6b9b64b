"""The list of a sweep's trials: what each was, how far it came, how it ended. It is written whole
after every change, and all that going on with a sweep relies on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.tuning.space import trial_name

LEDGER_NAME = "trials.json"

Status = Literal["pending", "running", "done", "stopped", "failed"]

OPEN: tuple[Status, ...] = ("pending", "running")
"""Of trials that have something left to do."""

PLACES: tuple[Status, ...] = ("done", "stopped", "running", "pending", "failed")
"""How trials are listed: scores after all epochs first, for a score after fewer says less."""


@dataclasses.dataclass
class Entry:
    """One trial."""

    trial: str
    settings: dict[str, Any]
    status: Status = "pending"
    epochs: int = 0
    """Finished ones."""
    score: float | None = None
    """The sweep's metric after the last of them."""
    seconds: float = 0.0
    """Spent in its epochs."""
    error: str | None = None
    """One line, where it failed."""
    started: str | None = None
    """When it first began, in UTC."""


class Ledger:
    """The trials of a sweep, in their order."""

    def __init__(self, folder: Store, entries: Iterable[Entry] = ()) -> None:
        self.folder = folder
        self.entries = {entry.trial: entry for entry in entries}

    @classmethod
    def start(cls, folder: Store, planned: Iterable[Mapping[str, Any]]) -> Ledger:
        """Writes the ledger of a new sweep."""
        ledger = cls(
            folder,
            (Entry(trial_name(place), dict(settings)) for place, settings in enumerate(planned)),
        )
        ledger.write()
        return ledger

    @classmethod
    def read(cls, folder: Store) -> Ledger:
        """Reads the ledger of a sweep.

        Raises:
            ConfigError: If there is none, or it is damaged.
        """
        stored = folder.read(LEDGER_NAME)
        try:
            entries = [Entry(**values) for values in json.loads(stored or b"")["trials"]]
        except (ValueError, KeyError, TypeError) as broken:
            reason = "it is missing" if stored is None else str(broken)
            raise ConfigError(
                f"{folder}/{LEDGER_NAME} can't be read ({reason}), and only it knows which trials "
                f"are done; put a copy of it back, or start the sweep under another `name` "
                f"(what its trials left is in {folder}/trials)"
            ) from None
        return cls(folder, entries)

    def write(self) -> None:
        """Writes all entries; a reader finds the old list or the new one."""
        listed = [dataclasses.asdict(entry) for entry in self.entries.values()]
        self.folder.write(LEDGER_NAME, json.dumps({"trials": listed}, indent=1) + "\n")

    def begin(self, trial: str, settings: Mapping[str, Any]) -> Entry:
        """Notes that a trial runs; one that is proposed on the way is new."""
        entry = self.entries.setdefault(trial, Entry(trial, dict(settings)))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry.status, entry.error, entry.started = "running", None, entry.started or now
        self.write()
        return entry

    def advance(self, trial: str, *, epochs: int, score: float | None, seconds: float) -> Entry:
        """Notes how far a trial is."""
        entry = self.entries[trial]
        entry.epochs, entry.seconds = epochs, seconds
        # JSON has no NaN, and nothing can be ranked by one.
        entry.score = score if score is not None and math.isfinite(score) else None
        self.write()
        return entry

    def end(self, trial: str, status: Status, error: str | None = None) -> Entry:
        """Notes how a trial ended."""
        entry = self.entries[trial]
        entry.status, entry.error = status, error
        self.write()
        return entry

    def reopen_failed(self) -> None:
        """Gives failed trials another try."""
        for entry in self.entries.values():
            if entry.status == "failed":
                entry.status, entry.error = "pending", None
        self.write()

    def with_status(self, *statuses: Status) -> list[Entry]:
        """Lists the trials of some statuses, in their order."""
        return [entry for entry in self.entries.values() if entry.status in statuses]


def ranked(entries: Iterable[Entry]) -> list[Entry]:
    """Sorts trials by the label-free score, best first, finished ones before all others.

    Trials of equal score keep their order.
    """
    return sorted(
        entries,
        key=lambda entry: (
            PLACES.index(entry.status),
            math.inf if entry.score is None else -entry.score,
        ),
    )
