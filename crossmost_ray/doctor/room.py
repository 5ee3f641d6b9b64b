"""Whether the cluster has what the config's `cluster` section asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor

from crossmost_ray.config import ClusterConfig, ConfigError
from crossmost_ray.data.shards import list_shards, shard_store
from crossmost_ray.doctor.finding import Case, Finding, fail, ok, size_text, warn
from crossmost_ray.doctor.nodes import Node, alive_nodes

DECODING_CPUS = 1.0
"""Left beside the workers, they read and slice the shards without taking the workers' time."""


def check_room(case: Case) -> Iterator[Finding]:
    """Counts the CPUs, the GPUs and the object store against the config."""
    assert case.config is not None, "the table says that this check needs a config"
    nodes = alive_nodes()
    yield from worker_findings(case.config.cluster, nodes)
    yield shards_finding(case.config.data.shards, nodes)


def places(nodes: Sequence[Node], *, cpus: float, gpus: float) -> int:
    """Counts the workers that fit, each whole on one node."""
    count = 0
    for node in nodes:
        # CPUs are counted in ten-thousandths: three times 0.1 must fit into 0.3.
        fits = [floor(node.resources.get("CPU", 0.0) / cpus + 1e-6)]
        if gpus:
            fits.append(floor(node.resources.get("GPU", 0.0) / gpus + 1e-6))
        count += min(fits)
    return count


def worker_findings(config: ClusterConfig, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Judges whether the workers fit, and what they leave."""
    have = {kind: sum(node.resources.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    asked = config.most_workers * config.cpus_per_worker
    each = f"{config.cpus_per_worker:g} CPU each"
    fit = places(nodes, cpus=config.cpus_per_worker, gpus=0)
    cures = [f"cluster.num_workers={fit}"] if fit else []
    cures += [f"cluster.cpus_per_worker={_share(config, nodes):g}"] if _share(config, nodes) else []
    cure = " or ".join([*cures, "add nodes"])
    if config.fewest_workers > fit:
        yield fail(
            "cpus",
            f"{config.fewest_workers} worker(s) with {each} are asked for, and {fit} fit into the "
            f"{have['CPU']:g} CPUs of {len(nodes)} node(s): the run would wait for ever",
            cure,
        )
    elif config.most_workers > fit:
        yield warn(
            "cpus",
            f"of at most {config.most_workers} workers with {each}, {fit} fit into the "
            f"{have['CPU']:g} CPUs of {len(nodes)} node(s)",
            cure,
        )
    elif have["CPU"] - asked < DECODING_CPUS:
        yield warn(
            "cpus",
            f"the workers take {asked:g} of {have['CPU']:g} CPUs; reading the shards shares them",
            f"leave {DECODING_CPUS:g} CPU: lower cluster.num_workers or cluster.cpus_per_worker",
        )
    else:
        yield ok("cpus", f"the workers take {asked:g} of {have['CPU']:g}")

    with_gpu = places(nodes, cpus=config.cpus_per_worker, gpus=1)
    if not config.use_gpu:
        if have["GPU"]:
            yield warn(
                "gpus",
                f"the cluster has {have['GPU']:g}, and the run would use none",
                "cluster.use_gpu=true",
            )
    elif config.most_workers > with_gpu:
        yield (fail if config.fewest_workers > with_gpu else warn)(
            "gpus",
            f"{config.num_workers} worker(s) with a GPU and {each} are asked for, and {with_gpu} "
            f"fit into {have['GPU']:g} GPUs and {have['CPU']:g} CPUs",
            f"cluster.num_workers={with_gpu} or add nodes" if with_gpu else "cluster.use_gpu=false",
        )
    else:
        yield ok("gpus", f"the workers take {config.most_workers} of {have['GPU']:g}")


def _share(config: ClusterConfig, nodes: Sequence[Node]) -> float:
    """Largest round number of CPUs with which all workers fit and one is left; or 0."""
    total = sum(node.resources.get("CPU", 0.0) for node in nodes)
    for cpus in (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1):
        fits = places(nodes, cpus=cpus, gpus=0) >= config.most_workers
        if fits and total - cpus * config.most_workers >= min(DECODING_CPUS, total / 2):
            return cpus
    return 0.0


def shards_finding(shards: str, nodes: Sequence[Node]) -> Finding:
    """Compares the shards with the object store that they stream through."""
    try:
        size = shard_bytes(shards)
    except ConfigError as missing:
        return fail("shards", str(missing), "mend data.shards")
    room = int(sum(node.resources.get("object_store_memory", 0.0) for node in nodes))
    if size > room:
        return warn(
            "shards",
            f"{size_text(size)}, more than the object store's {size_text(room)}: what is read "
            "ahead may go to the temporary disk",
            "start Ray with more --object-store-memory, or see that the temporary disk is fast "
            f"and has {size_text(size)} to spare",
        )
    return ok("shards", f"{size_text(size)}, the object store has {size_text(room)}")


def shard_bytes(shards: str) -> int:
    """Adds up the sizes of the files.

    Raises:
        ConfigError: If the folder is missing or empty, or can't be read.
    """
    store = shard_store(shards)
    paths = [store.path(name) for name in list_shards(shards, ())]
    return sum(info.size for info in store.system.get_file_info(paths))
