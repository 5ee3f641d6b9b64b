"""Has anything become slower than it was?

    python benchmarks/compare.py [RESULTS]

Compares the newest line of each file of benchmarks/results with those before it that answer the
same question at the same settings. Looks at ratios alone: both their sides were measured in one
run, so that another machine, or a neighbour on this one, matters little. Marks what has changed by
more than MARGIN to the worse.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

MARGIN = 0.15
"""Share by which medians of few turns differ from run to run on a shared machine."""

COSTS = ("startup",)
"""Files whose ratios are what is paid, not what is gained: more is worse."""

Line = dict[str, Any]


def ratios(values: Line, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the ratios of a line by their path, those to themselves left out."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from ratios(value, f"{path} / ")
        elif key == "ratio" and value != 1.0:
            yield prefix.removesuffix(" / "), float(value)


def settings(line: Line) -> dict[str, Any]:
    """Gives what a line was measured at: its plain values, but for when, where and how often."""
    beside = ("date", "machine", "load", "turns", "passes", "gflop")
    return {
        key: value
        for key, value in line.items()
        if isinstance(value, str | int | float | bool) and key not in beside
    }


def newest(lines: list[Line]) -> Iterator[tuple[Line, list[Line]]]:
    """Yields the last line of each question and setting, with those before it."""
    alike: dict[str, list[Line]] = {}
    for line in lines:
        alike.setdefault(json.dumps(settings(line), sort_keys=True), []).append(line)
    for group in alike.values():
        yield group[-1], group[:-1]


def changes(lines: list[Line]) -> Iterator[tuple[str, float, float]]:
    """Yields each ratio of the newest lines that was measured before: path, before, now."""
    for line, earlier in newest(lines):
        known: dict[str, list[float]] = {}
        for before in earlier:
            for path, ratio in ratios(before):
                known.setdefault(path, []).append(ratio)
        question = str(line.get("question", ""))
        for path, ratio in ratios(line):
            if path in known:
                yield f"{question} {path}".strip(), statistics.median(known[path]), ratio


def is_worse(before: float, now: float, *, cost: bool) -> bool:
    """Tells whether a ratio has changed to the worse by more than `MARGIN`."""
    return now > before * (1 + MARGIN) if cost else now < before * (1 - MARGIN)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="a folder")
    folder = parser.parse_args().results
    worse = 0
    print(f"{'ratio':60}{'before':>9}{'now':>9}")
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, before, now in changes(lines):
            fallen = is_worse(before, now, cost=path.stem in COSTS)
            worse += fallen
            mark = "  <- worse" if fallen else ""
            print(f"{path.stem + ': ' + name:60}{before:>9.2f}{now:>9.2f}{mark}")
    print(f"{worse} ratio(s) are worse than before by more than {MARGIN:.0%}")


if __name__ == "__main__":
    main()
