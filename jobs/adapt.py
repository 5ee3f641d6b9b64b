"""Adapts a two-tower classifier to unlabelled shards, and measures what that gained.

On this machine:    python jobs/adapt.py configs/adapt/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/adapt.py CONFIG
Change a setting:   python jobs/adapt.py CONFIG seed=1 optim.epochs=4
"""

from __future__ import annotations

from crossmost_ray.command_line import RESUME_HINT, job_parser, run_job
from crossmost_ray.config import AdaptConfig, load_config


def main() -> None:
    args = job_parser(__doc__, AdaptConfig, resume=True).parse_args()

    def adapt() -> str:
        config = load_config(AdaptConfig, args.config, args.overrides)
        # Imported once the config is known to be good: torch and Ray take seconds.
        from crossmost_ray.evaluation.adaptation import adapt_and_evaluate
        from crossmost_ray.evaluation.report import print_summary

        run, summary = adapt_and_evaluate(config, resume=args.resume)
        print_summary(summary, run)
        return f"the run is at {run}"

    run_job(adapt, hint=RESUME_HINT)


if __name__ == "__main__":
    main()
