"""One member of the all-reduce probe, as it runs in a process of its own."""

from __future__ import annotations

import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Literal

import ray

Backend = Literal["gloo", "nccl"]

ELEMENTS = 2**18
"""1 MiB of float32: a path that loses large packets must not pass for a good one."""

GET_INTERFACE_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""


@dataclass(frozen=True)
class Seat:
    """A member's part in the probe."""

    rank: int
    size: int
    host: str
    port: int
    """Where rank 0 waits for the others."""

    backend: Backend
    limit_s: float


@dataclass(frozen=True)
class Place:
    """Where a member is."""

    node: str
    address: str
    interface: str
    """Of the address; empty if it can't be told."""

    by_name: str
    """What the host's own name stands for: gloo's choice, unless GLOO_SOCKET_IFNAME says another.
    Empty if the name isn't known."""

    port: int
    """A free one."""

    def __str__(self) -> str:
        """Names address and interface."""
        return f"{self.address} ({self.interface or 'interface unknown'})"


@dataclass(frozen=True)
class Outcome:
    """How far a member came."""

    stage: Literal["meet", "connect", "add", "done"]
    """meet: rank 0's port. connect, add: between all members, by the backend."""

    problem: str = ""
    ms: float = 0.0
    """For one all-reduce, after a first."""


def all_reduce(seat: Seat) -> Outcome:
    """Meets the other members and adds up what each of them brings: its rank plus one.

    Args:
        seat: This member's part. Each stage ends after `seat.limit_s`.

    Returns:
        How far it came. The sum of 1 to W has to be W (W + 1) / 2.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=seat.limit_s)
    try:
        # Public by torch's documentation, if not by its stubs.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            seat.host, seat.port, seat.size, seat.rank == 0, limit
        )
    except (RuntimeError, ValueError, OSError) as refused:
        return Outcome("meet", _first_line(refused))
    stage: Literal["connect", "add"] = "connect"
    try:
        dist.init_process_group(
            seat.backend, store=store, rank=seat.rank, world_size=seat.size, timeout=limit
        )
        stage = "add"
        device = torch.device("cuda" if seat.backend == "nccl" else "cpu")
        for _ in range(2):
            start = time.perf_counter()
            brought = torch.full((ELEMENTS,), seat.rank + 1.0, device=device)
            dist.all_reduce(brought)
            least, most = brought.min().item(), brought.max().item()
            ms = 1e3 * (time.perf_counter() - start)
        # Rank 0 holds the store: were it to leave first, the others would fail at the last step.
        dist.barrier()
    except (RuntimeError, ValueError, OSError) as refused:
        return Outcome(stage, _first_line(refused))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    expected = seat.size * (seat.size + 1) / 2
    if (least, most) != (expected, expected):
        return Outcome("add", f"the sum is {least:g} to {most:g}, not {expected:g}")
    return Outcome("done", ms=ms)


def _first_line(error: Exception) -> str:
    """Leaves out the native frames that torch may list below."""
    return str(error).partition("\n")[0] or type(error).__name__


class Member:
    """A process on a node, as a worker would be."""

    def place(self, node: str) -> Place:
        """Tells where this process is; imports torch, so that the meeting need not wait for it."""
        import torch.distributed  # noqa: F401

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        try:
            by_name = socket.gethostbyname(socket.gethostname())
        except OSError:
            by_name = ""
        return Place(node, address, interface_of(address), by_name, port)

    def all_reduce(self, seat: Seat) -> Outcome:
        """Takes part."""
        return all_reduce(seat)


def interface_of(address: str) -> str:
    """Names the network interface that has an IPv4 address; empty if it can't be told."""
    if not sys.platform.startswith("linux"):
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(asking.fileno(), GET_INTERFACE_ADDRESS, request)
            except OSError:
                continue  # It has no IPv4 address.
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return ""
