"""What the jobs share on the command line: a config, overrides, going on, and how they end."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable

from crossmost_ray.config import ConfigError

RESUME_HINT = "what was done is kept: go on with --resume"


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


def run_job(work: Callable[[], str], *, hint: str = "") -> None:
    """Runs a job such that its exit code and last line tell how it ended.

    Args:
        work: Does it, and says where the result is: the last line is `done: ...`.
        hint: What to type after an error that no config cures.

    Raises:
        SystemExit: With code 1; its line begins with `error: ` where the user can cure it, else
            with `failed: `, after the traceback.
    """
    try:
        outcome = work()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        words = str(error).strip().splitlines()
        said = f": {words[-1].strip()}" if words else ""
        sys.exit(f"failed: {type(error).__name__}{said}{hint and f'; {hint}'}")
    sys.stdout.write(f"done: {outcome}\n")
