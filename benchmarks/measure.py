"""What a benchmark says of its machine, and where its results go."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Names the processor's kind, the number of CPUs and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GB"


def append_result(name: str, values: Mapping[str, Any]) -> None:
    """Appends a line of JSON, headed by date and machine, to benchmarks/results/NAME.jsonl."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"date": now, "machine": machine(), **values}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as results:
        results.write(json.dumps(line) + "\n")
