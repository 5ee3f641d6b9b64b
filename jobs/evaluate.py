"""Measures model folders on shards, labelled or not, zero-shot or adapted; trains nothing.

On this machine:    python jobs/evaluate.py configs/evaluate/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/evaluate.py CONFIG
Under corruptions:  python jobs/evaluate.py CONFIG evaluation.corruptions=[noise,rotation-3]

Started again with the same config, it goes on where it was stopped.
"""

from __future__ import annotations

import logging

from crossmost_ray.command_line import job_parser, run_job
from crossmost_ray.config import EvaluateConfig, load_config


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = job_parser(__doc__, EvaluateConfig).parse_args()

    def measure() -> str:
        config = load_config(EvaluateConfig, args.config, args.overrides)
        # Imported once the config is known to be good: torch and Ray take seconds.
        from crossmost_ray.evaluation.measure import evaluate
        from crossmost_ray.evaluation.report import print_evaluation

        results, summary = evaluate(config)
        print_evaluation(summary, results)
        return f"the results are at {results}"

    run_job(measure, hint="what was done is kept: the same command goes on")


if __name__ == "__main__":
    main()
