"""Turns the meshes of public collections into checked Parquet shards.

On this machine:    python jobs/prepare.py configs/prepare/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/prepare.py CONFIG
For a quick look:   python jobs/prepare.py CONFIG limit=8 output=/tmp/look
"""

from __future__ import annotations

import logging
import sys

from crossmost_ray.command_line import job_parser
from crossmost_ray.config import ConfigError, load_config
from crossmost_ray.prepare.config import PrepareConfig
from crossmost_ray.prepare.pipeline import prepare


def main() -> None:
    args = job_parser(__doc__, PrepareConfig).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepared = prepare(load_config(PrepareConfig, args.config, args.overrides))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for reject in prepared.rejects:
        print(f"left out {reject['object_id']}: {reject['reason']}")
    for name, num_rows in prepared.num_rows.items():
        print(f"{prepared.folder / name}: {num_rows} objects")


if __name__ == "__main__":
    main()
