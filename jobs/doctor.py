"""Looks for what goes wrong most: libraries, rendering, memory, disks, the cluster, its storage.

This machine:       python jobs/doctor.py
For a run:          python jobs/doctor.py configs/adapt/furniture.yaml cluster.num_workers=2
A cluster:          python jobs/doctor.py CONFIG --address 10.0.0.1:6379
From inside it:     ray job submit --working-dir . -- python jobs/doctor.py CONFIG

Ends with exit code 1 if a check failed. Each warning and failure says how to mend it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict

from crossmost_ray.config import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="YAML file of an adaptation or a pre-training")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, wins over the file")
    parser.add_argument("--address", help="the cluster's host:port, or http://host:8265")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args()
    if args.address is not None:
        os.environ["RAY_ADDRESS"] = args.address
    # Imported here: Ray takes seconds, and --help should not.
    from crossmost_ray.doctor.examine import examine, load_case

    try:
        case = load_case(args.config, args.overrides, os.environ.get("RAY_ADDRESS"))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    findings = []
    for finding in examine(case):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    counts = Counter(finding.status for finding in findings)
    if not args.json:
        print(f"{counts['fail']} failed, {counts['warn']} warnings, {counts['ok']} well")
    sys.exit(1 if counts["fail"] else 0)


if __name__ == "__main__":
    main()
