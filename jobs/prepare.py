"""Turns collections of meshes, scans and photographs into checked Parquet shards.

On this machine:    python jobs/prepare.py configs/prepare/furniture.yaml
On a cluster:       ray job submit --working-dir . -- python jobs/prepare.py CONFIG
For a quick look:   python jobs/prepare.py CONFIG limit=8 output=/tmp/look --preview /tmp/look.png
One's own folder:   python jobs/prepare.py configs/prepare/my_folder.yaml sources.0.path=/meshes
What is in shards:  python jobs/prepare.py inspect SHARDS

Started again with the same config, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from crossmost_ray.command_line import job_parser
from crossmost_ray.config import ConfigError, load_config, resolve_path

MOST_REJECTS = 20
"""That are named in the terminal."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if sys.argv[1:2] == ["inspect"]:
            inspect(sys.argv[2:])
        else:
            run(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(arguments: list[str]) -> None:
    """Prepares what a config asks for."""
    from crossmost_ray.prepare.config import PrepareConfig

    parser = job_parser(__doc__, PrepareConfig)
    parser.add_argument("--ignore-labels", action="store_true", help="leave every label out")
    parser.add_argument(
        "--preview", type=Path, metavar="PNG", help="draw some objects of each dataset"
    )
    args = parser.parse_args(arguments)
    if args.preview is not None and args.preview.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ConfigError(f"--preview {args.preview}: name a .png, .jpg or .webp file")
    overrides = [*args.overrides, *(["ignore_labels=true"] if args.ignore_labels else [])]
    config = load_config(PrepareConfig, args.config, overrides)
    if args.preview is not None and "://" in config.output:
        raise ConfigError(
            f"--preview reads shards on this machine, and `output` is {config.output}"
        )
    # Imported once the config is known to be good: Ray and VTK take seconds.
    from crossmost_ray.prepare.pipeline import prepare
    from crossmost_ray.prepare.preview import write_preview

    prepared = prepare(config)
    for reject in prepared.rejects[:MOST_REJECTS]:
        print(f"left out {reject['object_id']}: {reject['reason']}")
    if len(prepared.rejects) > MOST_REJECTS:
        print(f"... and {len(prepared.rejects) - MOST_REJECTS} more: rejects.json names them all")
    for name, manifest in prepared.manifests.items():
        counts = manifest["counts"]
        num_classes = len(set(counts["classes"]) - {"null"})
        views = ", ".join(f"{kind} of {count}" for kind, count in counts["views"].items())
        print(
            f"{prepared.address}/{name}: {counts['rows']} objects of {num_classes} classes; "
            f"views: {views or 'none'}"
        )
    if prepared.num_built == 0:
        print("all of it was there; overwrite=true and another setting make it anew")
    else:
        rate = prepared.num_built / prepared.seconds
        print(
            f"{prepared.num_built} objects in {prepared.seconds:.0f} s, {rate:.1f} objects/s; "
            f"{len(prepared.rejects)} left out"
        )
    if args.preview is not None:
        for name in prepared.manifests:
            output = args.preview.with_stem(f"{args.preview.stem}-{name}")
            files = sorted((resolve_path(prepared.address) / name).glob("*.parquet"))
            write_preview(files, output)
            print(f"preview: {output}")


def inspect(arguments: list[str]) -> None:
    """Shows what a folder of shards holds."""
    from rich.console import Console

    from crossmost_ray.data.inspect import inspect_all
    from crossmost_ray.data.show import print_inspection

    parser = argparse.ArgumentParser(prog="prepare.py inspect", description=inspect.__doc__)
    parser.add_argument("shards", help="folder of shards, or a folder of such folders")
    parser.add_argument("--pictures", type=int, default=3, help="objects to show, 3 by default")
    args = parser.parse_args(arguments)
    for inspection in inspect_all(args.shards).values():
        print_inspection(inspection, Console(), pictures=args.pictures)


if __name__ == "__main__":
    main()
