"""A folder of results in, its runs and sweeps out; what can't be read is named, and the rest shown.

A sweep of a thousand trials is one ledger: what a trial's own files hold is read when it is asked
for. Neither torch nor Ray is needed, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import posixpath
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow.fs as pafs

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard.accuracy import part_of_evaluation
from crossmost_ray.dashboard.configs import lookup, merged
from crossmost_ray.dashboard.files import (
    UNREADABLE,
    digest,
    fingerprint,
    json_mapping,
    json_names,
    number,
    problem,
    read_status,
    try_read,
    yaml_mapping,
)
from crossmost_ray.storage import Store

DEPTH = 3
"""Levels below the results' root at which runs and sweeps are looked for."""

FINISHED = ("done", "failed", "stopped")
"""Statuses that don't change by themselves."""

LABEL_FREE_SCORE = "selection/score"
"""The score that rows of every run hold, and by which sweeps choose unless told otherwise."""

SMALL_FILES = (
    *("config.yaml", "run.json", "classes.json", "metrics.jsonl", "progress.json", "events.jsonl"),
)
"""What is read before a run is shown, if it stands alone or is still going on."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """One run, or one trial of a sweep. Two are equal if they show the same.

    Its files are parsed when they are first asked for; those that can't be are named in `problems`.
    """

    name: str
    """Path below the results' root, such as `furniture` or `sweep/trials/trial-00003`."""
    version: str
    """Changes with whatever there is to show."""
    status: str = field(compare=False)
    """running, interrupted, done, failed, stopped or pending."""
    error: str | None = field(compare=False)
    """Why it failed, in one line."""
    stage: str | None = field(compare=False)
    """What it is at while it runs: training or evaluating."""
    root: Store = field(compare=False, repr=False)
    """The results' root."""
    folder: str = field(compare=False, repr=False)
    """Its folder below the root; empty where the root is the run."""
    stamp: str = field(default="", compare=False, repr=False)
    """Digest of what says that it is over: as long as that stays, so does the rest."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Dotted keys that its sweep has set; empty for a run that stands alone."""
    sweep: str | None = field(default=None, compare=False)
    """Name of its sweep."""
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Its entry in the sweep's ledger."""
    base: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The config that its sweep starts from."""
    evaluation: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """Metrics of all its sweep's trials."""
    files: Mapping[str, bytes | None] = field(default_factory=dict, compare=False, repr=False)
    """Files that are already read, by name."""
    problems: list[str] = field(default_factory=list, compare=False, repr=False)
    """Files that could not be read, so far: one line each."""

    @property
    def title(self) -> str:
        """Name that it is shown under."""
        return self.name.rpartition("/")[2]

    @functools.cached_property
    def store(self) -> Store:
        """Its folder."""
        return self.root.child(self.folder) if self.folder else self.root

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config; of a trial that has not begun, what its sweep has set."""
        return self._parsed("config.yaml", yaml_mapping) or merged(self.base, self.settings)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Command, versions, host and sizes, as `run.json` holds them."""
        return self._parsed("run.json", json_mapping) or {}

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """C names."""
        return self._parsed("classes.json", json_names) or ()

    @functools.cached_property
    def rows(self) -> tuple[dict[str, float], ...]:
        """What was measured in each finished epoch."""
        return tuple(
            {key: known for key, value in row.items() if (known := number(value)) is not None}
            for row in self._lines("metrics.jsonl")
        )

    @functools.cached_property
    def progress(self) -> dict[str, Any] | None:
        """How far its epoch is; None where nothing says so."""
        return self._parsed("progress.json", json_mapping) or None

    @functools.cached_property
    def events(self) -> tuple[dict[str, Any], ...]:
        """What befell it, oldest first."""
        return tuple(self._lines("events.jsonl"))

    @functools.cached_property
    def metrics(self) -> dict[str, Any] | None:
        """Its evaluation; of a trial, its part of the sweep's, as if it were a run's own."""
        if self.sweep is not None:
            return part_of_evaluation(self.evaluation, self.title)
        return self._parsed("metrics.json", json_mapping) or None

    @functools.cached_property
    def epoch_files(self) -> tuple[str, ...]:
        """Names of the files of votes, in the order of the epochs."""
        try:
            listed = self.root.names(posixpath.join(self.folder, "votes"))
        except ConfigError as unreachable:
            self.note_problem(str(unreachable))
            return ()
        return tuple(name for name in listed if name.endswith(".parquet"))

    @property
    def command(self) -> str:
        """What was typed to start it; empty where it is not known."""
        said = self.about.get("command")
        return shlex.join(str(part) for part in said) if isinstance(said, list) else ""

    @property
    def seconds(self) -> float:
        """Seconds that it took so far; of a trial, as its sweep's ledger has them."""
        counted = number(self.entry.get("seconds"))
        return sum(self.column("seconds")) if counted is None else counted

    @property
    def epochs(self) -> int:
        """Epochs that are finished."""
        counted = number(self.entry.get("epochs"))
        return len(self.rows) if counted is None else int(counted)

    @property
    def score(self) -> float | None:
        """The label-free score of the epoch that is its result, the best unless its config says
        otherwise; of a trial, what its sweep ranks by."""
        if self.entry:
            return number(self.entry.get("score"))
        if lookup(self.config, "compat.select_on") == "score" and self.has(LABEL_FREE_SCORE):
            return max(self.column(LABEL_FREE_SCORE))
        return self.last(LABEL_FREE_SCORE)

    @property
    def workers(self) -> float | None:
        """Workers that it trains on; None where nothing says how many."""
        # A trial is asked without opening its files: the sweep's config answers for it.
        asked = self.settings.get("cluster.num_workers", lookup(self.base, "cluster.num_workers"))
        counted = number(asked)
        return self.last("num_workers") if counted is None else counted

    def has(self, key: str) -> bool:
        """Whether any epoch has measured it."""
        return any(key in row for row in self.rows)

    def column(self, key: str) -> list[float]:
        """Gives its value at every epoch that has it."""
        return [row[key] for row in self.rows if key in row]

    def epochs_of(self, key: str) -> list[int]:
        """Gives the epochs that have it."""
        return [int(row.get("epoch", place)) for place, row in enumerate(self.rows) if key in row]

    def last(self, key: str) -> float | None:
        """Gives its last value; None if no epoch has it."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def read(self, name: str) -> bytes | None:
        """Reads a file below its folder; None if there is none, or it can't be reached."""
        if name in self.files:
            return self.files[name]
        return try_read(self.root, posixpath.join(self.folder, name), self.problems)

    def note_problem(self, line: str) -> None:
        """Adds a line to `problems`, once."""
        if line not in self.problems:
            self.problems.append(line)

    def parse_all(self) -> None:
        """Parses what `SMALL_FILES` names, so that `problems` lists the broken ones."""
        for part in ("config", "about", "classes", "rows", "progress", "events", "metrics"):
            getattr(self, part)

    def _parsed(self, name: str, parse: Callable[[bytes], Value]) -> Value | None:
        data = self.read(name)
        if data is None:
            return None
        try:
            return parse(data)
        except UNREADABLE as broken:
            self.note_problem(problem(posixpath.join(self.name, name), broken))
            return None

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        for place, line in enumerate((self.read(name) or b"").splitlines()):
            try:
                if line.strip():
                    yield json_mapping(line)
            except ValueError as broken:
                where = f"{posixpath.join(self.name, name)}, line {place + 1},"
                self.note_problem(problem(where, broken))


@dataclass(frozen=True)
class Sweep:
    """Trials that were started together."""

    name: str
    """Path below the results' root."""
    store: Store = field(compare=False, repr=False)
    config: Mapping[str, Any] = field(compare=False, repr=False)
    """What `sweep.yaml` holds; the config that it starts from is under `base_config`."""
    status: str
    error: str | None
    runs: tuple[Run, ...]
    """The trials, in the order of the ledger."""
    summary: Mapping[str, Any] | None = field(compare=False, repr=False)
    """What `summary.json` holds; None until the sweep is over."""
    metric: str
    """The score that it ranks by."""
    evaluation: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """Metrics of all trials that were measured."""
    evaluated: str = field(default="", repr=False)
    """Changes with the file of those."""

    @property
    def title(self) -> str:
        """Name that it is shown under."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Results:
    """All that was found below a folder."""

    root: Store
    runs: tuple[Run, ...] = ()
    """All runs, trials included."""
    sweeps: tuple[Sweep, ...] = ()
    unread: tuple[str, ...] = ()
    """Files that could not be read while looking for runs: one line each."""

    @property
    def problems(self) -> tuple[str, ...]:
        """All files that could not be read, so far: one line each."""
        return tuple(dict.fromkeys([*self.unread, *(p for run in self.runs for p in run.problems)]))

    @property
    def version(self) -> str:
        """Changes with whatever there is to show."""
        return digest(
            *(f"{run.name} {run.version}".encode() for run in self.runs),
            *(f"{one.name} {one.status} {one.error}".encode() for one in self.sweeps),
            *(line.encode() for line in self.problems),
        )


def load_results(root: Store, known: Results | None = None) -> Results:
    """Finds runs and sweeps at the root itself or up to three levels below.

    Args:
        root: A run's folder, a sweep's, or one that holds such folders.
        known: What was found before: finished runs that have not changed are taken from it.

    Returns:
        What can be read. Files that can't be are named in its `problems`.
    """
    try:
        found = list(_folders(root))
    except (ConfigError, OSError) as unreachable:
        line = problem(str(root), unreachable)
        return dataclasses.replace(known or Results(root), unread=(line,))
    known_runs = {run.name: run for run in known.runs} if known else {}
    known_sweeps = {sweep.name: sweep for sweep in known.sweeps} if known else {}

    def read_run(folder: str) -> Run:
        return _run(root, folder, known_runs.get(_name(root, folder)))

    # Threads, because a store far away answers one question in tens of milliseconds.
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(read_run, [place for place, kind in found if kind == "config.yaml"]))
    unread: list[str] = []
    sweeps = [
        _sweep(root, place, known_sweeps.get(_name(root, place)), unread)
        for place, kind in found
        if kind == "sweep.yaml"
    ]
    trials = [run for sweep in sweeps for run in sweep.runs]
    return Results(root, (*runs, *trials), tuple(sweeps), tuple(unread))


def _folders(root: Store) -> Iterator[tuple[str, str]]:
    """Yields folders of runs and sweeps with the file that tells which they are."""
    level = [""]
    for _ in range(DEPTH + 1):
        below: list[str] = []
        for folder in level:
            selector = pafs.FileSelector(root.path(folder), allow_not_found=True)
            infos = {info.base_name: info.type for info in root.system.get_file_info(selector)}
            kind = next((name for name in ("sweep.yaml", "config.yaml") if name in infos), None)
            if kind is not None:
                yield folder, kind
                continue
            below += [
                posixpath.join(folder, name)
                for name, of in sorted(infos.items())
                if of == pafs.FileType.Directory and not name.startswith(".")
            ]
        level = below


def _name(root: Store, folder: str) -> str:
    return folder or posixpath.basename(root.root.rstrip("/"))


def _run(root: Store, folder: str, known: Run | None) -> Run:
    """Reads a run that stands alone."""
    name = _name(root, folder)
    problems: list[str] = []
    said = try_read(root, posixpath.join(folder, "status.json"), problems)
    stamp = digest(said or b"")
    if known is not None and known.status in FINISHED and known.stamp == stamp:
        return known
    status, error, stage = read_status(said, posixpath.join(name, "status.json"), problems)
    files = {
        file: try_read(root, posixpath.join(folder, file), problems)
        for file in (*SMALL_FILES, "metrics.json")
    }
    if status is None:
        # It is about to begin, or of a version that wrote no status.
        status = "pending" if files["metrics.json"] is None else "done"
    version = _version([status, error, stage], files)
    if known is not None and known.version == version:
        return known
    run = Run(
        *(name, version, status, error, stage, root, folder, stamp), files=files, problems=problems
    )
    run.parse_all()
    return run


def _sweep(root: Store, folder: str, known: Sweep | None, unread: list[str]) -> Sweep:
    """Reads a sweep's own files, and those of the trials that are going on."""
    name = _name(root, folder)

    def parsed(file: str) -> dict[str, Any]:
        data = try_read(root, posixpath.join(folder, file), unread)
        if data is None:
            return {}
        try:
            return yaml_mapping(data) if file.endswith(".yaml") else json_mapping(data)
        except UNREADABLE as broken:
            unread.append(problem(posixpath.join(name, file), broken))
            return {}

    config = parsed("sweep.yaml")
    said = try_read(root, posixpath.join(folder, "status.json"), unread)
    status, error, _ = read_status(said, posixpath.join(name, "status.json"), unread)
    # Read again only when it is another file: of a thousand trials it is megabytes.
    evaluated = fingerprint(root, posixpath.join(folder, "evaluation/metrics.json"), unread)
    if known is not None and known.evaluated == evaluated:
        evaluation = known.evaluation
    else:
        evaluation = (parsed("evaluation/metrics.json") or None) if evaluated else None
    base = merged(_mapping(config.get("base_config")), _mapping(config.get("overrides")))
    sweep = Sweep(
        name=name,
        store=root.child(folder) if folder else root,
        config=config,
        status=status or "pending",
        error=error,
        runs=(),
        summary=parsed("summary.json") or None,
        metric=str(config.get("metric") or LABEL_FREE_SCORE),
        evaluation=evaluation,
        evaluated=evaluated,
    )
    before = {run.title: run for run in known.runs} if known else {}
    common = digest(json.dumps([evaluated, base], default=str).encode())
    trials = []
    listed = parsed("trials.json").get("trials")
    for entry in listed if isinstance(listed, list) else []:
        trial = _mapping(entry).get("trial")
        if isinstance(trial, str):
            place = posixpath.join(folder, "trials", trial)
            trials.append(_trial(root, place, before.get(trial), sweep, entry, base, common))
        else:
            unread.append(f"{name}/trials.json: an entry names no `trial`; it is left out")
    return dataclasses.replace(sweep, runs=tuple(trials))


def _trial(
    root: Store,
    folder: str,
    known: Run | None,
    sweep: Sweep,
    entry: Mapping[str, Any],
    base: Mapping[str, Any],
    common: str,
) -> Run:
    stamp = digest(common.encode(), json.dumps(entry, default=str).encode())
    if known is not None and known.status in FINISHED and known.stamp == stamp:
        return known
    status = str(entry.get("status") or "pending")
    if status == "running" and sweep.status != "running":
        status = "interrupted"
    problems: list[str] = []
    files = (
        {file: try_read(root, posixpath.join(folder, file), problems) for file in SMALL_FILES}
        if status == "running"
        else {}
    )
    version = _version([status, stamp], files)
    if known is not None and known.version == version:
        return known
    error = entry.get("error")
    run = Run(
        name=posixpath.join(sweep.name, "trials", str(entry["trial"])),
        version=version,
        status=status,
        error=None if error is None else str(error),
        stage="training" if status == "running" else None,
        root=root,
        folder=folder,
        stamp=stamp,
        settings=_mapping(entry.get("settings")),
        sweep=sweep.name,
        entry=entry,
        base=base,
        evaluation=sweep.evaluation,
        files=files,
        problems=problems,
    )
    if files:
        run.parse_all()
    return run


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _version(said: Sequence[str | None], files: Mapping[str, bytes | None]) -> str:
    return digest(json.dumps(said).encode(), *(files[name] or b"" for name in sorted(files)))
