"""The nodes of a joined cluster: what they are, whether they answer, and whether they agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crossmost_ray.doctor.finding import Case, Finding, brief, fail, ok, size_text, warn
from crossmost_ray.doctor.machine import MachineReport, machine_findings, report_machine

ANSWER_LIMIT_S = 30.0
MAX_CLOCK_GAP_S = 60.0
"""Signed requests to stores and tokens with a date are refused some minutes apart."""

LEAST_STORE = 256 * 2**20
"""Bytes of an object store that holds the blocks of a small stream."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    address: str
    resources: dict[str, float] = field(hash=False)

    def __str__(self) -> str:
        """Names it by its address."""
        return self.address


@dataclass(frozen=True)
class Answer(Generic[Result]):
    """What came back from a node."""

    value: Result | None
    error: str
    """Empty if there is a value."""

    asked: float
    answered: float
    """Seconds since 1970, by this machine's clock."""


def alive_nodes() -> list[Node]:
    """Lists the nodes that are alive, in the order of their addresses."""
    nodes = [
        Node(found["NodeID"], found["NodeManagerAddress"], found["Resources"])
        for found in ray.nodes()
        if found["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def placed(node: Node, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Gives the options of a task or an actor that must run on a node, and asks for no CPU.

    Args:
        node: Where.
        env: Environment variables for it.
    """
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": strategy}
    return options | ({"runtime_env": {"env_vars": dict(env)}} if env else {})


def _call(function: Callable[[], Any]) -> Any:
    return function()


def ask_nodes(
    questions: Mapping[str, tuple[Node, Callable[[], Result]]],
    *,
    limit_s: float = ANSWER_LIMIT_S,
    env: Mapping[str, str] | None = None,
) -> dict[str, Answer[Result]]:
    """Calls a function on each node, all at once.

    Args:
        questions: Node and function, by any key.
        limit_s: Seconds after which those that did not answer are given up.
        env: Environment variables for the functions.

    Returns:
        The answers by the same keys.
    """
    call = ray.remote(max_retries=0)(_call)
    asked = time.time()
    pending = {
        call.options(**placed(node, env)).remote(function): key
        for key, (node, function) in questions.items()
    }
    answers: dict[str, Answer[Result]] = {}
    end = time.monotonic() + limit_s
    while pending:
        ready, _ = ray.wait(list(pending), timeout=max(end - time.monotonic(), 0))
        if not ready:
            break
        answered = time.time()
        try:
            answer = Answer(ray.get(ready[0]), "", asked, answered)
        except ray.exceptions.RayError as failed:
            answer = Answer(None, brief(failed), asked, answered)
        answers[pending.pop(ready[0])] = answer
    for reference, key in pending.items():
        ray.cancel(reference, force=True)
        answers[key] = Answer(None, f"no answer within {limit_s:g} s", asked, time.time())
    return {key: answers[key] for key in questions}


def check_nodes(case: Case) -> Iterator[Finding]:
    """Runs a tiny task on every node, and compares what they say."""
    nodes = {node.id: node for node in alive_nodes()}
    here = report_machine(_temp_folder())
    answers = ask_nodes({key: (node, _report_node) for key, node in nodes.items()})
    reports: dict[str, MachineReport] = {}
    for key, answer in answers.items():
        if answer.value is None:
            yield fail(
                "nodes",
                f"a task on {nodes[key]} failed: {answer.error}",
                "install the same crossmost_ray there, or submit with `ray job submit "
                "--working-dir .`; if there was no answer, look at the node's logs",
            )
        else:
            reports[key] = answer.value
    if len(reports) == len(nodes):
        yield ok("nodes", f"{len(nodes)} alive, each runs a task")
    yield version_finding(here, {str(nodes[key]): report for key, report in reports.items()})
    yield clock_finding(
        {
            str(nodes[key]): clock_gap(answers[key].asked, report.clock, answers[key].answered)
            for key, report in reports.items()
        }
    )
    yield from store_findings([(node, reports.get(key)) for key, node in nodes.items()])
    for key, report in reports.items():
        if report.host != here.host:
            yield from machine_findings(report, where=f" on {nodes[key]}")


def _temp_folder() -> str:
    return str(ray.get_runtime_context().get_temp_dir())


def _report_node() -> MachineReport:
    return report_machine(_temp_folder())


def version_finding(here: MachineReport, nodes: Mapping[str, MachineReport]) -> Finding:
    """Judges whether the nodes run what this machine runs.

    Args:
        here: This machine's report.
        nodes: The nodes' reports, by address.
    """
    grave: list[str] = []
    slight: list[str] = []
    for name, there in nodes.items():
        if there.python != here.python:
            same_minor = there.python.split(".")[:2] == here.python.split(".")[:2]
            (slight if same_minor else grave).append(f"{name} has python {there.python}")
        for package, version in here.versions.items():
            other = there.versions.get(package)
            if other != version:
                line = f"{name} has {f'{package} {other}' if other else f'no {package}'}"
                (grave if other is None or package == "ray" else slight).append(line)
    ours = ", ".join(
        f"{name} {at}" for name, at in {"python": here.python, **here.versions}.items()
    )
    if not grave and not slight:
        return ok("versions", f"{ours} on all nodes")
    return (fail if grave else warn)(
        "versions",
        f"here {ours}, but {'; '.join(grave + slight)}",
        "use one image, or one constraints.txt, on all nodes and on the machine that submits",
    )


def clock_gap(asked: float, clock: float, answered: float) -> float:
    """Tells how far a clock is ahead at least, in seconds; negative if it is behind.

    The node read its clock between the question and the answer: what lies outside of the two is
    difference, what lies inside may be the way.
    """
    return max(clock - answered, 0.0) - max(asked - clock, 0.0)


def clock_finding(gaps: Mapping[str, float], limit_s: float = MAX_CLOCK_GAP_S) -> Finding:
    """Judges how far the nodes' clocks are from this machine's."""
    far = {name: gap for name, gap in gaps.items() if abs(gap) > limit_s}
    if not far:
        widest = max((abs(gap) for gap in gaps.values()), default=0.0)
        return ok("clocks", f"no two are known to differ by more than {max(widest, 1):.0f} s")
    told = ", ".join(
        f"{name} is {abs(gap):.0f} s {'ahead' if gap > 0 else 'behind'}"
        for name, gap in far.items()
    )
    return fail(
        "clocks",
        f"{told}; stores and tokens refuse requests whose time is off",
        "let the nodes keep time: `timedatectl set-ntp true`, or chrony",
    )


def store_findings(nodes: Sequence[tuple[Node, MachineReport | None]]) -> Iterator[Finding]:
    """Judges the object stores, and the shared memory that they should lie in."""
    sizes = {node: int(node.resources.get("object_store_memory", 0)) for node, _ in nodes}
    small = [f"{size_text(size)} on {node}" for node, size in sizes.items() if size < LEAST_STORE]
    if small:
        yield fail(
            "object store",
            f"{', '.join(small)}; a stream of shards needs {size_text(LEAST_STORE)}",
            "start Ray with --object-store-memory (bytes), or give the container more memory: by "
            "default it takes 30 %",
        )
    else:
        yield ok("object store", f"{size_text(sum(sizes.values()))} on {len(nodes)} node(s)")
    for node, report in nodes:
        if report is None or report.shm_total is None:
            continue
        found = f"{size_text(report.shm_total)} on {node}"
        if report.shm_total < sizes[node]:
            yield warn(
                "/dev/shm",
                f"{found}, less than its object store of {size_text(sizes[node])}: objects lie "
                "on the disk, and are slow",
                f"start the container with --shm-size={sizes[node] // 2**30 + 1}g, or mount an "
                "emptyDir of medium Memory at /dev/shm",
            )
        else:
            yield ok("/dev/shm", found)


def gcs_servers(proc: Path) -> dict[int, str]:
    """Finds the clusters whose head is this machine.

    Args:
        proc: /proc; where there is none, nothing is found.

    Returns:
        The hosts and sessions of the clusters by the process ids of their servers.
    """
    found = {}
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # It ended meanwhile.
        if Path(words[0]).name == "gcs_server":
            given = dict(word.lstrip("-").split("=", 1) for word in words[1:] if "=" in word)
            host, session = given.get("node-ip-address", "?"), given.get("session-name", "?")
            found[int(file.parent.name)] = f"{session} on {host}"
    return found


def check_other_clusters(case: Case) -> Iterator[Finding]:
    """Looks for a second cluster on this machine."""
    yield clusters_finding(gcs_servers(Path("/proc")), case.address)


def clusters_finding(servers: Mapping[int, str], address: str | None) -> Finding:
    """Judges whether clients can mistake one cluster for another."""
    if len(servers) < 2 or address not in (None, "", "auto", "local"):
        return ok("clusters", f"{len(servers)} on this machine")
    told = ", ".join(f"{where} (process {pid})" for pid, where in sorted(servers.items()))
    return warn(
        "clusters",
        f"{len(servers)} on this machine, and clients may take the wrong one: {told}",
        "export RAY_ADDRESS with the one that is meant, or end the others by their process ids",
    )
