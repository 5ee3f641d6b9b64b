"""Curves to Weights & Biases: to its server, or offline into the folder `wandb` of the run."""

from __future__ import annotations

import contextlib
import netrc
import os
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.trackers.tracker import PROJECT, Enrolment

OFFLINE = ("offline", "dryrun")

HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Under these `wandb login` keeps the key of the public server in `~/.netrc`."""

START_LIMIT_S = 30.0
FINISH_LIMIT_S = 60.0
"""How long the training waits for a server that does not answer. What it has not got by then lies
in the run's folder, for `wandb sync`."""

FLUSH_S = 1.0
"""After so long a row is in the file. By default it takes 15 s, and a process that is killed before
loses it, though it counts as logged."""


def check_place(output: Store) -> None:
    """Refuses what W&B would ask about in the middle of a run.

    Raises:
        ConfigError: If there is no key and no offline mode, or no folder for offline files.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        return
    if mode not in OFFLINE and not _has_key():
        raise ConfigError(
            "`trackers` names wandb, and there is no key for its server; set WANDB_API_KEY (or run "
            "`wandb login` on this machine), or set WANDB_MODE=offline, which writes files that "
            "`wandb sync` sends later"
        )
    if mode in OFFLINE and output.local is None and "WANDB_DIR" not in os.environ:
        raise ConfigError(
            f"WANDB_MODE is {mode}, whose files can't lie at {output}; set WANDB_DIR to a folder "
            "of this machine"
        )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    hosts = (urlsplit(own).netloc,) if own else HOSTS
    return any(known.authenticators(host) for host in hosts)


class Wandb:
    """A run of W&B."""

    def __init__(self, run: Store, enrolment: Enrolment) -> None:
        # Not above: W&B is optional.
        import wandb

        with contextlib.ExitStack() as undo:
            # A start that failed leaves the id in use: each later one would be refused for that.
            undo.callback(wandb.teardown)
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=enrolment.name,
                id=enrolment.id,
                resume="allow",
                # Without it, a second run of this process would be the first one.
                reinit="create_new",
                dir=None if run.local is None or "WANDB_DIR" in os.environ else str(run.local),
                config=dict(enrolment.parameters),
                allow_val_change=True,
                settings=wandb.Settings(
                    # The process is Ray's: its output is Ray's to show.
                    console="off",
                    silent=True,
                    # The working directory is Ray's, too: its git would be of something else.
                    disable_git=True,
                    x_transaction_log_flush_interval=FLUSH_S,
                    init_timeout=START_LIMIT_S,
                    finish_timeout=FINISH_LIMIT_S,
                    finish_timeout_raises=True,
                ),
            )
            undo.pop_all()

    @staticmethod
    def enrol(run: Store, enrolment: Enrolment) -> str:
        """Gives the run's id: W&B takes any, so one is made up where there is none."""
        return enrolment.id or secrets.token_hex(4)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        # With a step of ours, W&B would wait for a later one before it counts this one.
        self._run.log(dict(numbers), step=step, commit=True)

    def summarize(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes into the run's summary: its curves have this step already."""
        self._run.summary.update(dict(numbers))

    def finish(self) -> None:
        """Waits until the server has it all, or the files do."""
        self._run.finish()
