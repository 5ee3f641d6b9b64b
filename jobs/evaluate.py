"""Measures model folders on labelled shards, zero-shot or adapted; trains nothing.

On this machine:    python jobs/evaluate.py configs/evaluate/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/evaluate.py CONFIG
"""

from __future__ import annotations

import sys

from crossmost_ray.command_line import job_parser
from crossmost_ray.config import ConfigError, EvaluateConfig, load_config


def main() -> None:
    args = job_parser(__doc__, EvaluateConfig).parse_args()
    try:
        config = load_config(EvaluateConfig, args.config, args.overrides)
        from rich.console import Console

        from crossmost_ray.evaluation.measure import evaluate
        from crossmost_ray.evaluation.report import summary_table

        folder, summary = evaluate(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    console = Console(width=max(100, Console().width))
    console.print(summary_table(summary))
    console.print(f"results: {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
