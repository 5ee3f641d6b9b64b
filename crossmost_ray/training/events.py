"""The log of what befell a run: who writes to it, and how a line of it reads."""

from __future__ import annotations

import datetime
import json
from typing import Any

from crossmost_ray.storage import Store

EVENTS_NAME = "events.jsonl"


def log_event(run: Store, event: str, **facts: Any) -> None:
    """Adds a line to a run's log. Happens a few times in a run, one writer at a time."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event, **facts})
    run.write(EVENTS_NAME, (run.read(EVENTS_NAME) or b"") + line.encode() + b"\n")


def read_events(run: Store) -> list[dict[str, Any]]:
    """Reads the log, oldest first; empty where there is none."""
    return run.read_lines(EVENTS_NAME)


def event_line(event: dict[str, Any]) -> str:
    """Says in one line what happened."""
    kind = event["event"]
    if kind == "started":
        return f"{event['time']}  {event['num_workers']} worker(s), from step {event['step']}"
    if kind == "preemption":
        return (
            f"{event['time']}  {event['nodes']} node(s) will be taken away: a checkpoint is "
            f"written after step {event['step']}"
        )
    if kind == "health":
        acts = {
            "none": "nothing is done about it (see `guard` in the config)",
            "stop": "the run stops",
            "rollback": "the run goes back to its last healthy teacher, at half the learning rate",
            "lower": "their thresholds are lowered",
        }
        return (
            f"{event['time']}  epoch {event['epoch'] + 1}: {event['kind']}: {event['says']}; "
            f"{acts[event['action']]}"
        )
    if kind != "workers lost":
        return f"{event['time']}  {kind}: {event['says']}"
    words = "; ".join(f"worker {rank}: {said}" for rank, said in sorted(event["workers"].items()))
    return f"{event['time']}  workers lost, going on from the last checkpoint ({words})"
