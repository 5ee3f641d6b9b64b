"""Measures model folders on labelled shards, zero-shot or adapted; trains nothing.

On this machine:    python jobs/evaluate.py configs/evaluate/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/evaluate.py CONFIG
"""

from __future__ import annotations

import argparse
import sys

from crossmost_ray.config import ConfigError, EvaluateConfig, load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file with the fields of EvaluateConfig")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, wins over the file")
    args = parser.parse_args()
    try:
        config = load_config(EvaluateConfig, args.config, args.overrides)
        from rich.console import Console

        from crossmost_ray.evaluation.report import summary_table
        from crossmost_ray.evaluation.zero_shot import evaluate

        folder, summary = evaluate(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    console = Console(width=max(100, Console().width))
    console.print(summary_table(summary))
    console.print(f"results: {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
