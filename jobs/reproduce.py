"""Runs a config in both directions, with several seeds, as CrossMoST and as the baseline, and
writes the result table. Finished runs are kept: what was interrupted goes on.

    python jobs/reproduce.py configs/adapt/furniture.yaml
"""

from __future__ import annotations

import json
import sys

from crossmost_ray.command_line import job_parser
from crossmost_ray.config import AdaptConfig, ConfigError, load_config, resolve_path


def main() -> None:
    parser = job_parser(__doc__, AdaptConfig)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["crossmost", "baseline"])
    args = parser.parse_args()
    try:
        config = load_config(AdaptConfig, args.config, args.overrides)
        from crossmost_ray.evaluation.reproduce import markdown, reproduce
        from crossmost_ray.training.worker import write_whole

        result = reproduce(config, modes=args.modes, seeds=args.seeds)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    table = markdown(result, args.modes)
    path = resolve_path(config.output) / f"{config.name}-comparison.json"
    write_whole(path, json.dumps(result, indent=1) + "\n")
    write_whole(path.with_suffix(".md"), table + "\n")
    print(f"{table}\n\n{result['objects']} objects, {result['opinions_per_object']} seeds; {path}")


if __name__ == "__main__":
    main()
