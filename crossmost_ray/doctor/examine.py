"""A case in, findings out: each check in its turn, none for longer than its limit."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import ray

from crossmost_ray.cluster import connect
from crossmost_ray.config import AdaptConfig, ConfigError, PretrainConfig, load_config
from crossmost_ray.doctor import allreduce, libraries, machine, network, nodes, output, room
from crossmost_ray.doctor.finding import Case, Finding, fail, ok, warn


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    name: str
    look: Callable[[Case], Iterable[Finding]]
    needs_config: bool = False
    needs_cluster: bool = False
    limit_s: float = 30.0
    """Seconds after which the doctor goes on without it; a check with a limit of its own, which
    knows what it waits for, has a longer one here."""


CHECKS = (
    Check("python", machine.check_python),
    Check("machine", machine.check_machine),
    Check("libraries", libraries.check_libraries, limit_s=120),
    Check("rendering", libraries.check_render, limit_s=90),
    Check("output", output.check_output, needs_config=True),
    Check("address", network.check_address),
    Check("token", network.check_token),
    Check("jobs api", network.check_jobs_api),
    Check("clusters", nodes.check_other_clusters, needs_cluster=True),
    Check("nodes", nodes.check_nodes, needs_cluster=True, limit_s=60),
    Check("room", room.check_room, needs_config=True, needs_cluster=True),
    Check(
        "shared output",
        output.check_shared_output,
        needs_config=True,
        needs_cluster=True,
        limit_s=120,
    ),
    Check("all-reduce", allreduce.check_all_reduce, needs_cluster=True, limit_s=150),
)

BARRIERS = ("address", "jobs api", "token")
"""What must not fail for the cluster to be worth dialling: Ray would wait for long, or for ever."""


def load_case(path: str | None, overrides: Sequence[str], address: str | None) -> Case:
    """Reads the config of an adaptation or of a pre-training.

    Raises:
        ConfigError: If it is neither: the errors of the one that it is nearer to.
    """
    if path is None:
        return Case(None, address)
    refused = []
    kinds: tuple[type[AdaptConfig | PretrainConfig], ...] = (AdaptConfig, PretrainConfig)
    for kind in kinds:
        try:
            return Case(load_config(kind, path, overrides), address)
        except ConfigError as unfit:
            refused.append(unfit)
    raise min(refused, key=lambda error: str(error).count("\n"))


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """Runs the checks that the case allows, those of the machine before those of the cluster.

    Args:
        case: What is to be looked at.
        checks: In the order of their findings.

    Yields:
        The findings, as they come.
    """
    asked = [check for check in checks if case.config is not None or not check.needs_config]
    barred = False
    for finding in _look_at_once(case, [check for check in asked if not check.needs_cluster]):
        barred = barred or (finding.name in BARRIERS and finding.status == "fail")
        yield finding
    inside = [check for check in asked if check.needs_cluster]
    if not inside:
        return
    if barred:
        yield warn("cluster", "not looked at, for the way there is barred", "mend that first")
        return
    joined = join(case)
    yield joined
    if joined.status == "ok":
        yield from _look_at_once(case, inside)


def join(case: Case) -> Finding:
    """Joins the cluster, or starts one on this machine, as every job does."""
    address = network.parse_address(case.address)
    if address is not None and not address.joinable:
        return warn(
            "cluster",
            f"{case.address} is the address of the jobs API: the nodes are seen only from inside",
            f"ray job submit --address {case.address} --working-dir . -- python jobs/doctor.py "
            "with the same arguments but --address",
        )
    # In the main thread, not in one with a limit: Ray sets its signal handlers only there, and has
    # limits of its own.
    try:
        connect()
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as refused:
        return fail(
            "cluster",
            f"it can't be joined ({type(refused).__name__}: {' '.join(str(refused).split())})",
            "see that Python and Ray are the cluster's, that RAY_AUTH_MODE is (token, or "
            "disabled), and that the head runs: `ray status` there",
        )
    have = ray.cluster_resources()
    whose = "joined" if case.address else "joined or started on this machine"
    counts = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
    return ok("cluster", f"{whose}, with {counts}")


def _look_at_once(case: Case, checks: Sequence[Check]) -> Iterator[Finding]:
    """Starts all checks, and yields their findings in the order of the checks."""
    looks = [(check, _start(check, case)) for check in checks]
    for check, look in looks:
        yield from _findings(check, look)


def _start(check: Check, case: Case) -> Future[list[Finding]]:
    """Runs a check in a thread that does not keep the program from ending."""
    future: Future[list[Finding]] = Future()

    def run() -> None:
        try:
            future.set_result(list(check.look(case)))
        # A bug of one check must not cost the findings of the others.
        except Exception as broken:  # noqa: BLE001
            future.set_exception(broken)

    threading.Thread(target=run, name=f"doctor {check.name}", daemon=True).start()
    return future


def _findings(check: Check, look: Future[list[Finding]]) -> list[Finding]:
    done, _ = wait([look], timeout=check.limit_s)
    if not done:
        return [
            fail(
                check.name,
                f"no answer within {check.limit_s:g} s",
                "what it looks at hangs: a disk, a store or a network that doesn't answer",
            )
        ]
    broken = look.exception()
    if broken is None:
        return look.result()
    at = traceback.extract_tb(broken.__traceback__)[-1]
    what = f"{type(broken).__name__}: {broken}"
    return [
        fail(
            check.name,
            f"the check itself broke: {what} ({at.filename}:{at.lineno})",
            "please report it; the other findings hold",
        )
    ]
