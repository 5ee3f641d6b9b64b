"""What the jobs share on the command line: a config, overrides, and going on with a run."""

from __future__ import annotations

import argparse


def job_parser(
    description: str | None, config_class: type, *, resume: bool = False
) -> argparse.ArgumentParser:
    """Builds the parser of a job that runs one config.

    Args:
        description: The job's docstring, shown as it stands.
        config_class: Class of the config, for the help.
        resume: Whether the job can go on with a run.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help=f"YAML file with the fields of {config_class.__name__}")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value, wins over the file")
    if resume:
        parser.add_argument("--resume", action="store_true", help="go on with the run of this name")
    return parser
