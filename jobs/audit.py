"""Tells whether a model understands shards as they are stored, or with other axes or colours.

    python jobs/audit.py assets:models/furniture-start assets:furniture/target_a

Labels are not needed. If there are any, a column that says oracle shows the accuracies; the verdict
does not know them.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml

from crossmost_ray.config import ConfigError, parse_config


def listed(text: str) -> Any:
    """Reads a list in brackets; a name or a file stays as it is."""
    return yaml.safe_load(text) if text.startswith("[") else text


def stored_axes(shards: str) -> str:
    """Reads from the manifest with which axes shards were prepared; "xyz" where it doesn't say.

    Raises:
        ConfigError: If the sources in the folder were prepared with different axes.
    """
    from crossmost_ray.data.shards import read_manifest

    sources = read_manifest(shards).get("sources", {})
    found = sorted({source["axes"] for source in sources.values()})
    if len(found) > 1:
        raise ConfigError(
            f"the sources in '{shards}' were prepared with axes {' and '.join(found)}: "
            "say with --axes which of them you mean"
        )
    return found[0] if found else "xyz"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument("shards", help="folder of shards")
    parser.add_argument("--objects", type=int, default=64, help="most objects to look at")
    parser.add_argument("--classes", help="name of a list, a file, or [chair, table]")
    parser.add_argument("--templates", help="name of a set, a file, or ['a {}.', 'one {}.']")
    parser.add_argument(
        "--axes",
        help="`axes` of the source's config that the shards were prepared with, such as --axes=yzx;"
        " the manifest's by default",
    )
    args = parser.parse_args()
    try:
        # Imported here: torch takes seconds, and --help should not.
        from rich.console import Console

        from crossmost_ray.evaluation.audit import AuditConfig, audit, audit_table, conclude
        from crossmost_ray.prepare.axes import axes_matrix

        values = {"model": args.model, "shards": args.shards, "objects": args.objects}
        for key in ("classes", "templates"):
            if getattr(args, key) is not None:
                values[key] = listed(getattr(args, key))
        config = parse_config(AuditConfig, values, "the command line")
        try:
            axes = axes_matrix(args.axes or stored_axes(args.shards))
        except ValueError as unfit:
            raise ConfigError(f"--axes: {unfit}") from None
        result = audit(config)
    except (ConfigError, yaml.YAMLError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    console = Console(width=max(110, Console().width))
    console.print(audit_table(result))
    print(*result.facts, sep="\n")
    print("", *conclude(result, axes), sep="\n")


if __name__ == "__main__":
    main()
