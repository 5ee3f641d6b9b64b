"""Tells how far the label-free scores of a finished sweep may be trusted, where labels exist.

    python jobs/trust.py runs/evidence

Accuracy is read for this report alone: the sweep itself has chosen without it. Prints the rank
correlation of each score with accuracy and the accuracy lost by choosing with it; writes both to
trust.md and trust.json in the sweep's folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from crossmost_ray.command_line import run_job


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="folder of a finished sweep, or its address")
    args = parser.parse_args()

    def judge() -> str:
        # Imported here: torch takes seconds, and --help should not.
        from crossmost_ray.evaluation.trust import sweep_trust, trust_markdown
        from crossmost_ray.storage import Store

        sweep = Store(args.sweep, key="the folder on the command line")
        trust = sweep_trust(sweep)
        table = trust_markdown(trust)
        print(table)
        sweep.write("trust.md", table)
        sweep.write("trust.json", json.dumps(asdict(trust), indent=1) + "\n")
        return f"the table is at {sweep}/trust.md"

    run_job(judge)


if __name__ == "__main__":
    main()
