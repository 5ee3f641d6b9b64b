"""Runs a config in both directions, with several seeds, as CrossMoST and as the baseline, and
writes the result table. Finished runs are kept: what was interrupted goes on.

    python jobs/reproduce.py configs/adapt/furniture.yaml
"""

from __future__ import annotations

import json

from crossmost_ray.command_line import job_parser, run_job
from crossmost_ray.config import AdaptConfig, load_config


def main() -> None:
    parser = job_parser(__doc__, AdaptConfig)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["crossmost", "baseline"])
    args = parser.parse_args()

    def compare() -> str:
        config = load_config(AdaptConfig, args.config, args.overrides)
        from crossmost_ray.evaluation.reproduce import markdown, reproduce
        from crossmost_ray.storage import Store

        result = reproduce(config, modes=args.modes, seeds=args.seeds)
        table = markdown(result, args.modes)
        folder = Store(config.output)
        folder.write(f"{config.name}-comparison.json", json.dumps(result, indent=1) + "\n")
        folder.write(f"{config.name}-comparison.md", table + "\n")
        print(f"{table}\n\n{result['objects']} objects, {result['opinions_per_object']} seeds")
        return f"the comparison is at {folder}/{config.name}-comparison.json"

    run_job(compare, hint="start it again: finished runs are kept")


if __name__ == "__main__":
    main()
