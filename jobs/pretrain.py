"""Trains a small two-tower model from nothing on captioned shards: the start of adaptation.

On this machine:    python jobs/pretrain.py configs/pretrain/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/pretrain.py CONFIG
"""

from __future__ import annotations

import sys
import time

from crossmost_ray.command_line import job_parser
from crossmost_ray.config import ConfigError, PretrainConfig, load_config


def main() -> None:
    args = job_parser(__doc__, PretrainConfig, resume=True).parse_args()
    try:
        config = load_config(PretrainConfig, args.config, args.overrides)
        from crossmost_ray.evaluation.pretraining import pretrain_and_evaluate

        command = " ".join(["python jobs/pretrain.py", args.config, *args.overrides])
        started = time.monotonic()
        folder = pretrain_and_evaluate(config, command=command, resume=args.resume)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"the model: {folder} ({(time.monotonic() - started) / 60:.0f} minutes)")
    print(f"next: python jobs/adapt.py configs/adapt/furniture.yaml name=mine model={folder}")


if __name__ == "__main__":
    main()
