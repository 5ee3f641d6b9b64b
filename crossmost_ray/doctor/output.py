"""Whether the run's `output` can be written and read, from here and from every node."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from crossmost_ray.config import ConfigError
from crossmost_ray.doctor.finding import Case, Finding, fail, ok, size_text, warn
from crossmost_ray.doctor.machine import GIB, nearest_folder
from crossmost_ray.doctor.nodes import Answer, Node, alive_nodes, ask_nodes
from crossmost_ray.storage import Store

LEAST_FREE = GIB
WANTED_FREE = 10 * GIB
"""A checkpoint holds student, teacher and optimiser: of a ViT-B/16 about three of these."""


def check_output(case: Case) -> Iterator[Finding]:
    """Writes, reads and removes a small file in `output`, from here."""
    assert case.config is not None, "the table says that this check needs a config"
    store = Store(case.config.output)
    with left_as_found(store):
        yield write_finding(store)
    if store.local is not None:
        try:
            free = shutil.disk_usage(nearest_folder(store.local)).free
        except OSError as refused:
            yield fail("output disk", f"{store} can't be reached ({refused})", "mend `output`")
        else:
            yield disk_finding(free, str(store))


@contextmanager
def left_as_found(store: Store) -> Iterator[None]:
    """Removes the folder again, and those above it, if it had to be made and is empty."""
    if store.local is None:
        yield
        return
    before = nearest_folder(store.local)
    try:
        yield
    finally:
        with suppress(OSError):  # One of them is not empty, or was never made.
            for folder in (store.local, *store.local.parents):
                if folder == before:
                    break
                folder.rmdir()


def write_finding(store: Store) -> Finding:
    """Judges whether a file comes back as it was written."""
    name, written = f".doctor-{secrets.token_hex(4)}", secrets.token_bytes(64)
    try:
        store.write(name, written)
        read = store.read(name)
        store.remove(name)
    except (ConfigError, OSError) as refused:
        return fail("output", str(refused), "take a folder that exists and may be written")
    if read != written:
        return fail("output", f"what was written to {store} reads otherwise", "mend the storage")
    return ok("output", f"{store} can be written, read and cleared from here")


def disk_finding(
    free: int, where: str, *, least: int = LEAST_FREE, wanted: int = WANTED_FREE
) -> Finding:
    """Judges the room for checkpoints; sizes in bytes."""
    found, cure = f"{size_text(free)} free at {where}", "make room, or set `output` to another disk"
    if free < least:
        return fail("output disk", f"{found}, less than one checkpoint may take", cure)
    if free < wanted:
        return warn("output disk", f"{found}, {size_text(wanted)} are wanted for a run", cure)
    return ok("output disk", found)


def check_shared_output(case: Case) -> Iterator[Finding]:
    """Lets every node write into `output`, and every node read what all of them wrote."""
    assert case.config is not None, "the table says that this check needs a config"
    # Made absolute here: a task's working directory is another one.
    place = Store(case.config.output)
    store = Store(str(place.local) if place.local is not None else place.address)
    env = case.config.cluster.env
    nodes = alive_nodes()
    folder = f".doctor-{secrets.token_hex(4)}"
    files = {node.id: f"{folder}/{node.id}" for node in nodes}
    write = {node.id: (node, partial(write_from, store, files[node.id])) for node in nodes}
    look = partial(read_from, store, sorted(files.values()))
    clear = partial(clear_from, store, folder)
    with left_as_found(store):
        try:
            wrote = ask_nodes(write, env=env)
            read = ask_nodes({node.id: (node, look) for node in nodes}, env=env)
        finally:
            ask_nodes({node.id: (node, clear) for node in nodes}, env=env)
    yield shared_finding(str(store), nodes, files, wrote, read)


def write_from(store: Store, name: str) -> str:
    """Writes a file that says its own name; gives the error's text, or nothing."""
    try:
        store.write(name, name)
    except ConfigError as refused:
        return str(refused)
    return ""


def read_from(store: Store, names: Sequence[str]) -> list[str]:
    """Gives those of the names whose files are there and say their own name."""
    return [name for name in names if store.read(name) == name.encode()]


def clear_from(store: Store, folder: str) -> None:
    """Removes what was written; another node may be faster."""
    try:
        store.remove(folder)
    except FileNotFoundError:
        return


def shared_finding(
    where: str,
    nodes: Sequence[Node],
    files: Mapping[str, str],
    wrote: Mapping[str, Answer[str]],
    read: Mapping[str, Answer[list[str]]],
) -> Finding:
    """Judges whether all nodes write and read one and the same place.

    Args:
        where: The storage, as a message names it.
        nodes: All nodes.
        files: What each of them wrote, by its id.
        wrote: An error's text, or "", by the node's id.
        read: What each of them found, by its id.
    """
    for node in nodes:
        problem = wrote[node.id].error or wrote[node.id].value or read[node.id].error
        if problem:
            return fail(
                "shared output",
                f"{node} can't use {where}: {problem}",
                "mount it there with the same rights, or set `output` to an address such as "
                "s3://bucket/runs and give its keys to all nodes",
            )
    for reader in nodes:
        for writer in nodes:
            if files[writer.id] not in (read[reader.id].value or ()):
                return fail(
                    "shared output",
                    f"what {writer} wrote to {where} is not there for {reader}: each node has a "
                    "folder of its own",
                    "set `output` to a folder that all nodes mount, or to an address such as "
                    "s3://bucket/runs",
                )
    return ok("shared output", f"{len(nodes)} node(s) write to {where}, and read one another's")
