"""Whether workers on different nodes can add up a tensor, as every training step does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from crossmost_ray.doctor.finding import Case, Finding, brief, fail, ok
from crossmost_ray.doctor.member import Backend, Member, Outcome, Place, Seat
from crossmost_ray.doctor.nodes import Node, alive_nodes, placed

PLACE_LIMIT_S = 60.0
MEET_LIMIT_S = 10.0


def check_all_reduce(case: Case) -> Iterator[Finding]:
    """Lets as many processes as the config has workers, and at least two, add up a tensor."""
    cluster = case.config.cluster if case.config is not None else None
    use_gpu = cluster is not None and cluster.use_gpu
    nodes = alive_nodes()
    size = max(2, cluster.most_workers if cluster is not None else len(nodes))
    spread = spread_over(nodes, size, use_gpu=use_gpu)
    if len(spread) < 2:
        yield ok("all-reduce", "the cluster has one GPU or none: there is nothing to add up")
        return
    env = cluster.env if cluster is not None else {}
    yield probe(spread, backend="nccl" if use_gpu else "gloo", env=env)


def spread_over(nodes: Sequence[Node], size: int, *, use_gpu: bool) -> list[Node]:
    """Deals out members to nodes in turn.

    Args:
        nodes: All nodes.
        size: How many members are wanted.
        use_gpu: Whether each member takes a GPU; there are then no more of them than GPUs.
    """
    if not use_gpu:
        return list(itertools.islice(itertools.cycle(nodes), size))
    gpus = {node: int(node.resources.get("GPU", 0)) for node in nodes}
    rounds = range(max(gpus.values(), default=0))
    return [node for turn in rounds for node in nodes if gpus[node] > turn][:size]


def probe(
    nodes: Sequence[Node],
    *,
    backend: Backend,
    env: Mapping[str, str],
    limit_s: float = MEET_LIMIT_S,
) -> Finding:
    """Starts a member on each of the nodes, lets them add up, and ends them.

    Args:
        nodes: One entry for each member.
        backend: What adds up.
        env: Environment variables of the members.
        limit_s: For each stage.
    """
    actor: Any = ray.remote(max_restarts=0)(Member)
    gpus = {"num_gpus": 1} if backend == "nccl" else {}
    members = [actor.options(**placed(node, env), **gpus).remote() for node in nodes]
    try:
        calls = [
            member.place.remote(str(node)) for member, node in zip(members, nodes, strict=True)
        ]
        found = _gather(calls, PLACE_LIMIT_S)
        places = [place for place in found if isinstance(place, Place)]
        if len(places) < len(nodes):
            problems = [
                f"on {node}: {place}"
                for node, place in zip(nodes, found, strict=True)
                if not isinstance(place, Place)
            ]
            return fail(
                "all-reduce",
                f"{len(problems)} of {len(nodes)} processes could not be started "
                f"({'; '.join(problems)})",
                "see that torch is installed there and that the node's memory and GPUs are free",
            )
        head = places[0]
        seats = [
            Seat(rank, len(nodes), head.address, head.port, backend, limit_s)
            for rank in range(len(nodes))
        ]
        turns = [
            member.all_reduce.remote(seat) for member, seat in zip(members, seats, strict=True)
        ]
        # Three stages, each with the limit; NCCL may hang where it should give up.
        outcomes = _gather(turns, 3 * limit_s + 5)
    finally:
        for member in members:
            ray.kill(member)
    return reduce_finding(
        places,
        [
            outcome if isinstance(outcome, Outcome) else Outcome("add", str(outcome))
            for outcome in outcomes
        ],
        backend=backend,
        limit_s=limit_s,
    )


def _gather(references: Sequence[Any], limit_s: float) -> list[Any]:
    """Gives each result, or the text of what came in its stead."""
    ray.wait(list(references), num_returns=len(references), timeout=limit_s)
    results: list[Any] = []
    for reference in references:
        try:
            results.append(ray.get(reference, timeout=0))
        except ray.exceptions.GetTimeoutError:
            results.append(f"no answer within {limit_s:g} s")
        except ray.exceptions.RayError as failed:
            results.append(brief(failed))
    return results


def reduce_finding(
    places: Sequence[Place], outcomes: Sequence[Outcome], *, backend: Backend, limit_s: float
) -> Finding:
    """Judges how far the members came, and names what could not be reached.

    Args:
        places: Of the members, by rank.
        outcomes: Of the same.
        backend: What adds up.
        limit_s: How long each waited.
    """
    head, variable = places[0], f"{backend.upper()}_SOCKET_IFNAME"
    nodes = len({place.node for place in places})
    if all(outcome.stage == "done" for outcome in outcomes):
        slowest = max(outcome.ms for outcome in outcomes)
        return ok(
            "all-reduce",
            f"{len(places)} processes on {nodes} node(s) add up 1 MiB by {backend} in "
            f"{slowest:.0f} ms",
        )
    chosen = f"cluster.env.{variable}={head.interface or 'eth0'}"
    cure = (
        f"open all ports between the nodes in the firewall; where they have several networks, set "
        f"{chosen}, the interface of the one that they share"
    )
    astray = [rank for rank, outcome in enumerate(outcomes) if outcome.stage == "meet"]
    if astray:
        lost = [rank for rank in astray if rank > 0] or list(range(1, len(places)))
        told = ", ".join(f"rank {rank} on {places[rank]}" for rank in lost)
        return fail(
            "all-reduce",
            f"{told} did not reach rank 0 at {head.address}:{head.port}, interface "
            f"{head.interface or 'unknown'}, within {limit_s:g} s ({outcomes[astray[0]].problem})",
            cure,
        )
    rank, outcome = next((r, o) for r, o in enumerate(outcomes) if o.stage != "done")
    loopback = [place.node for place in places if place.by_name.startswith("127.")]
    if backend == "gloo" and nodes > 1 and loopback and variable not in os.environ:
        cure = (
            f"on {', '.join(loopback)} the host's own name stands for a loopback address, which "
            f"others can't dial: mend /etc/hosts there, or set {chosen}; else {cure}"
        )
    verb = "connect" if outcome.stage == "connect" else "add up"
    return fail(
        "all-reduce",
        f"the processes met at {head.address}:{head.port}, but rank {rank} on {places[rank]} "
        f"could not {verb} by {backend} within {limit_s:g} s ({outcome.problem})",
        cure,
    )
