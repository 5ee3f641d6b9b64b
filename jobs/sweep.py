"""Trains many settings of one run and ranks them without a label.

On this machine:    python jobs/sweep.py configs/sweep/smallest.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/sweep.py SWEEP
Change a setting:   python jobs/sweep.py SWEEP seed=1 overrides.optim.epochs=4
After a stop:       python jobs/sweep.py SWEEP --resume
"""

from __future__ import annotations

from crossmost_ray.command_line import RESUME_HINT, job_parser, run_job
from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.tuning.config import SweepConfig


def main() -> None:
    parser = job_parser(__doc__, SweepConfig, resume=True)
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="with --resume: give failed trials another try, from their last checkpoints",
    )
    args = parser.parse_args()

    def sweep() -> str:
        if args.retry_failed and not args.resume:
            raise ConfigError("--retry-failed goes with --resume: a new sweep has no failed trials")
        config = load_config(SweepConfig, args.config, args.overrides)
        # Imported once the config is known to be good: torch and Ray take seconds.
        from crossmost_ray.tuning.outcome import print_outcome
        from crossmost_ray.tuning.sweep import run_sweep

        outcome = run_sweep(config, resume=args.resume, retry_failed=args.retry_failed)
        print_outcome(outcome)
        return f"the sweep is at {outcome.folder}"

    run_job(sweep, hint=RESUME_HINT)


if __name__ == "__main__":
    main()
