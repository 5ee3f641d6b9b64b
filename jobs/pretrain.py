"""Trains a small two-tower model from nothing on captioned shards: the start of adaptation.

On this machine:    python jobs/pretrain.py configs/pretrain/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/pretrain.py CONFIG
"""

from __future__ import annotations

import time

from crossmost_ray.command_line import RESUME_HINT, job_parser, run_job
from crossmost_ray.config import PretrainConfig, load_config


def main() -> None:
    args = job_parser(__doc__, PretrainConfig, resume=True).parse_args()

    def pretrain() -> str:
        config = load_config(PretrainConfig, args.config, args.overrides)
        from crossmost_ray.evaluation.pretraining import pretrain_and_evaluate

        command = " ".join(["python jobs/pretrain.py", args.config, *args.overrides])
        started = time.monotonic()
        model = pretrain_and_evaluate(config, command=command, resume=args.resume)
        adapt = f"python jobs/adapt.py configs/adapt/furniture.yaml name=mine model={model}"
        print(f"next: {adapt}")
        return f"the model is at {model} ({(time.monotonic() - started) / 60:.0f} minutes)"

    run_job(pretrain, hint=RESUME_HINT)


if __name__ == "__main__":
    main()
