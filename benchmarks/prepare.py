"""How many objects a second does the preparation make, and do two workers make twice as many?

    python benchmarks/prepare.py [CONFIG] [key=value ...] [--workers 1 2]

Starts a Ray of its own for each number of workers, prepares a few objects to warm up (they load
VTK), then the rest, and appends one line to benchmarks/results/prepare.jsonl. By default the
furniture catalogues, 24 objects of each; they need Debian's sweethome3d packages.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray reads it: a cluster of our own, on loopback

import ray
from measure import append_result

from crossmost_ray.config import load_config
from crossmost_ray.prepare.config import PrepareConfig
from crossmost_ray.prepare.pipeline import prepare


def objects_per_second(config: str, overrides: list[str], num_workers: int) -> float:
    """Prepares with a Ray of so many CPUs, each of which takes a task."""
    ray.init(address="local", num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Small shards, so that there is one for every worker all the time.
            settings = [*overrides, "overwrite=false", "shard_mb=0.1"]
            for name, more in (("warm", "limit=1"), ("measured", "seed=0")):
                loaded = [*settings, f"output={folder}/{name}", more]
                prepared = prepare(load_config(PrepareConfig, config, loaded))
            return prepared.num_built / prepared.seconds
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/prepare/furniture.yaml")
    parser.add_argument("overrides", nargs="*", default=["limit=24"])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rates = {n: objects_per_second(args.config, args.overrides, n) for n in args.workers}
    first = rates[args.workers[0]]
    for num_workers, rate in rates.items():
        print(f"{num_workers} worker(s): {rate:.2f} objects/s, {rate / first:.2f} times the first")
    append_result(
        "prepare",
        {
            "config": args.config,
            "overrides": args.overrides,
            "objects_per_second": {str(n): round(rate, 3) for n, rate in rates.items()},
        },
    )


if __name__ == "__main__":
    main()
