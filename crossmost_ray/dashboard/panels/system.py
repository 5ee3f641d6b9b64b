"""Rows and events of runs in, how fast they were, what befell them and how to repeat them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import yaml

from crossmost_ray.dashboard.chart import MOST_LINES, by_score, small_multiples
from crossmost_ray.dashboard.runs import Results, Run
from crossmost_ray.dashboard.table import Column, Table, Text

SPEED = {
    "objects_per_s": "objects a second",
    "pairs_per_s": "pairs a second",
    "data/wait_share": "time spent waiting for data",
    "system/memory_mb": "memory of the largest worker, MB",
    "seconds": "seconds an epoch",
    "num_workers": "workers",
}


def speed(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws speed, waiting and memory over the epochs."""
    return small_multiples(
        runs, SPEED, what="Speed, waiting and memory", percent=("data/wait_share",)
    )


def timeline(results: Results, runs: Sequence[Run]) -> Table | None:
    """Lists what befell the runs, oldest first: starts, losses, acts of the guard, failures."""
    if len(runs) > MOST_LINES:
        # Reading a thousand trials' logs takes seconds; what failed is in the ledger.
        failed = [run for run in runs if run.error]
        runs = [*by_score(runs)[:MOST_LINES], *failed]
    rows = []
    for run in dict.fromkeys(runs):
        for event in run.events:
            said = (str(event.get("event", "")), event_words(event))
            rows.append((_time(event.get("time")), run.title, *said))
        if run.error:
            rows.append(("", run.title, run.status, run.error))
    if not rows:
        return None
    # What has no time comes last: it is how a run ended.
    rows.sort(key=lambda row: (row[0] == "", row[0]))
    columns = (Column("time, UTC"), Column("run"), Column("event"), Column("what happened"))
    return Table("Starts, losses and acts of the guard, oldest first.", columns, tuple(rows))


def event_words(event: Mapping[str, Any]) -> str:
    """Says in one line what happened; the keys of an event that is not known here are listed."""
    kind = event.get("event")
    if "says" in event:
        action = event.get("action", "none")
        where = [f"epoch {event['epoch']}"] if "epoch" in event else []
        where += [str(event["kind"])] if "kind" in event else []
        return ": ".join([*where, str(event["says"])]) + (
            "" if action == "none" else f" (guard: {action})"
        )
    if kind == "started":
        return f"{event.get('num_workers')} worker(s), from step {event.get('step')}"
    if kind == "preemption":
        return (
            f"{event.get('nodes')} node(s) taken away; a checkpoint follows step "
            f"{event.get('step')}"
        )
    if kind == "workers lost" and isinstance(event.get("workers"), Mapping):
        return "; ".join(f"worker {rank}: {why}" for rank, why in sorted(event["workers"].items()))
    rest = {key: value for key, value in event.items() if key not in ("time", "event")}
    return ", ".join(f"{key} {value}" for key, value in rest.items())


def reproduce(results: Results, runs: Sequence[Run]) -> Text | None:
    """Gives the exact command, the versions and the whole config of the best of the runs."""
    if not runs:
        return None
    run = by_score(runs)[0]
    about = run.about
    versions = about.get("versions")
    facts = {
        "run": run.name,
        "started": about.get("started"),
        "host": about.get("host"),
        "objects": about.get("num_objects"),
        "steps an epoch": about.get("steps_per_epoch"),
        **(versions if isinstance(versions, Mapping) else {}),
    }
    lines = [f"{key}: {value}" for key, value in facts.items() if value is not None]
    blocks = [
        ("Command", run.command),
        ("Settings of this trial", _yaml(dict(run.settings)) if run.settings else ""),
        ("Machine and versions", "\n".join(lines)),
        ("Config, as it was used", _yaml(run.config) if run.config else ""),
    ]
    chosen = f", the best of {len(runs):,} by its label-free score" if len(runs) > 1 else ""
    return Text(
        f"How {run.title} was made{chosen}.",
        tuple((heading, text) for heading, text in blocks if text),
    )


def _time(said: Any) -> str:
    """Shortens an ISO time to seconds, without its offset: all are UTC."""
    return str(said or "")[:19].replace("T", " ")


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=88)
    return text.strip()
