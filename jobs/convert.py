"""Turns a published checkpoint into a model folder; docs/checkpoints.md says where they are.

A whole model:      python jobs/convert.py ViT-B-16.pt --output models/clip-vit-b16
An adapted one:     python jobs/convert.py checkpoint-best.pth --output models/adapted
                        --start models/clip-vit-b16 --classes modelnet40 --weights teacher
From open_clip:     python jobs/convert.py --clip ViT-B-16 --pretrained laion2b_s34b_b88k
                        --output models/laion
A tokenizer:        python jobs/convert.py dVAE.pth --output models/dvae-tokenizer --as-tokenizer
"""

from __future__ import annotations

import argparse
import sys

import yaml

from crossmost_ray.config import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="checkpoint; what it is, its tensors say")
    parser.add_argument("--output", required=True, help="model folder to write")
    parser.add_argument("--clip", help="image-text model that the file's towers are")
    parser.add_argument("--pretrained", help="open_clip's tag of weights, in place of a file")
    parser.add_argument("--backbone", help="point backbone, in place of the file's own")
    parser.add_argument("--start", help="model folder that gives what the file lacks")
    parser.add_argument("--weights", choices=("student", "teacher"), help="of a file with both")
    parser.add_argument("--classes", help="name of a list, a file, or [chair, table]")
    parser.add_argument("--seed", type=int, default=0, help="of what stays untrained")
    parser.add_argument(
        "--as-tokenizer",
        action="store_true",
        help="of Point-BERT's dVAE.pth, what names groups of points (point_tokenizer of a config)",
    )
    args = parser.parse_args()
    if args.as_tokenizer:
        others = ("clip", "pretrained", "backbone", "start", "weights", "classes")
        useless = [f"--{name}" for name in others if getattr(args, name)]
        if useless or args.file is None:
            said = f", not {', '.join(useless)}" if useless else ""
            parser.error(f"--as-tokenizer takes a file and --output alone{said}")
    is_list = args.classes is not None and args.classes.startswith("[")
    try:
        # Imported here: torch takes seconds, and --help should not.
        from crossmost_ray.models.foreign.convert import convert
        from crossmost_ray.models.foreign.tokenizer import convert_tokenizer

        report = (
            convert_tokenizer(args.file, args.output)
            if args.as_tokenizer
            else convert(
                args.file,
                args.output,
                clip=args.clip,
                pretrained=args.pretrained,
                backbone=args.backbone,
                start=args.start,
                weights=args.weights,
                classes=yaml.safe_load(args.classes) if is_list else args.classes,
                seed=args.seed,
            )
        )
    except (ConfigError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    print(f"{report.source}: {report.layout}")
    print(f"{report.made}\n\n{report.table()}\n")
    print(*report.remarks(), sep="\n")
    print(f"\nwritten: {report.folder}\nnext: {report.next_command}")


if __name__ == "__main__":
    main()
