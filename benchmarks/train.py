"""Trains a config in Ray's worker and notes when, without the evaluation that jobs/adapt.py adds.

python benchmarks/train.py CONFIG [key=value ...]
"""

from __future__ import annotations

import sys

from marks import marked_worker

from crossmost_ray.config import AdaptConfig, load_config
from crossmost_ray.training import trainer


def main() -> None:
    setattr(trainer, "run_worker", marked_worker)  # noqa: B010
    trainer.train(load_config(AdaptConfig, sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
