"""The way to a cluster: is it reachable, does it want a token, and is the right one at hand?"""

from __future__ import annotations

import http.client
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from crossmost_ray.doctor.finding import Case, Finding, fail, ok, warn

CONNECT_LIMIT_S = 5.0
DASHBOARD_PORT = 8265
DEFAULT_PORTS = {"http": 80, "https": 443, "ray": 10001}
LOOPBACK = ("127.", "localhost", "::1")
VERSION_PATH = "/api/version"
"""Of the jobs API: answers 200, or 401 without a token, or 403 with a wrong one."""


@dataclass(frozen=True)
class Address:
    """Where a cluster, or its jobs API, listens."""

    scheme: str
    """ "" is the cluster itself, ray:// its server for clients, http(s):// its jobs API."""

    host: str
    port: int

    @property
    def joinable(self) -> bool:
        """Whether a program can join the cluster there."""
        return self.scheme in ("", "ray")

    def __str__(self) -> str:
        """Writes host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Token:
    """What opens a cluster."""

    text: str
    source: str
    """The variable or the file that it was found in."""

    @property
    def usable(self) -> bool:
        """Whether it is one word, as a header wants it."""
        return self.text.isascii() and self.text.split() == [self.text]


def parse_address(address: str | None) -> Address | None:
    """Reads what RAY_ADDRESS may hold.

    Returns:
        None where it names no host: unset, `auto` or `local`.

    Raises:
        ValueError: If it is neither `host:port` nor one of the schemes.
    """
    if address in (None, "", "auto", "local"):
        return None
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    if parts.scheme not in ("", *DEFAULT_PORTS) or not parts.hostname or port is None:
        raise ValueError("it must be host:port, ray://host:port or http://host:port")
    return Address(parts.scheme, parts.hostname, port)


def jobs_address(case: Case, environ: Mapping[str, str]) -> tuple[Address, bool] | None:
    """Tells where the jobs API listens, and whether that was said or only guessed.

    Raises:
        ValueError: If what was said is no address.
    """
    cluster = parse_address(case.address)
    if cluster is not None and not cluster.joinable:
        return cluster, True
    said = parse_address(environ.get("RAY_API_SERVER_ADDRESS"))
    if said is not None:
        return said, True
    return (Address("http", cluster.host, DASHBOARD_PORT), False) if cluster else None


def check_address(case: Case) -> Iterator[Finding]:
    """Dials the cluster's address."""
    try:
        address = parse_address(case.address)
    except ValueError as unfit:
        yield fail("address", f"'{case.address}' is no address: {unfit}", "mend RAY_ADDRESS")
        return
    if address is None:
        yield ok("address", "none given: a job joins the cluster of this machine, or starts one")
    else:
        yield dial(address)


def dial(address: Address, limit_s: float = CONNECT_LIMIT_S) -> Finding:
    """Opens and closes a connection."""
    try:
        socket.create_connection((address.host, address.port), limit_s).close()
    except socket.gaierror:
        return fail(
            "address",
            f"the name '{address.host}' isn't known here",
            "mend --address or RAY_ADDRESS, or give the head node's IP address",
        )
    except ConnectionRefusedError:
        return fail(
            "address",
            f"{address.host} answers, but nothing listens on its port {address.port}",
            "start the cluster (`ray start --head` names its address), or mend the port: 6379 is "
            "the cluster's, 8265 the jobs API's; if it listens on 127.0.0.1 only, make a tunnel",
        )
    except TimeoutError:
        return fail(
            "address",
            f"{address} doesn't answer within {limit_s:g} s",
            "open the port in the firewall, or reach it by `ssh -L` or `kubectl port-forward`",
        )
    except OSError as refused:
        return fail(
            "address", f"{address} can't be reached ({refused})", "mend the network or the address"
        )
    return ok("address", f"{address} can be reached")


def find_token(environ: Mapping[str, str], home: Path) -> Token | None:
    """Finds the token where Ray looks for it, in its order.

    Raises:
        OSError: If a file is there and can't be read, or RAY_AUTH_TOKEN_PATH names none.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        return Token(environ["RAY_AUTH_TOKEN"].strip(), "RAY_AUTH_TOKEN")
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    if not named and not path.exists():
        return None
    return Token(path.read_text(encoding="utf-8").strip(), str(path))


def check_token(case: Case) -> Iterator[Finding]:
    """Looks for the token, and who else may read it."""
    yield from token_findings(os.environ, Path.home())


def token_findings(environ: Mapping[str, str], home: Path) -> Iterator[Finding]:
    """Judges the token of this machine; whether it is the right one, only the cluster can tell."""
    wanted = environ.get("RAY_AUTH_MODE", "").lower() == "token"
    try:
        token = find_token(environ, home)
    except (OSError, UnicodeDecodeError) as refused:
        yield fail(
            "token",
            f"its file can't be read ({refused})",
            "mend RAY_AUTH_TOKEN_PATH or the file: `ray get-auth-token --generate` writes one",
        )
        return
    if token is None:
        if wanted:
            yield fail(
                "token",
                "RAY_AUTH_MODE is token, and there is none: Ray's server would not start",
                "copy the cluster's into ~/.ray/auth_token; for one of this machine run "
                "`ray get-auth-token --generate`, or unset RAY_AUTH_MODE",
            )
        else:
            yield ok("token", "none, and none is asked for")
        return
    if not token.usable:
        yield fail(
            "token",
            f"{token.source} holds no token: it must be one word",
            "copy the cluster's token there, or run `ray get-auth-token --generate`",
        )
        return
    if token.source != "RAY_AUTH_TOKEN":
        mode = stat.S_IMODE(Path(token.source).stat().st_mode)
        if mode & 0o077:
            yield warn(
                "token",
                f"others on this machine may read {token.source} (mode {mode:04o}), and run "
                "anything on the cluster",
                f"chmod 600 {token.source}",
            )
            return
    yield ok("token", f"found in {token.source}")


def check_jobs_api(case: Case) -> Iterator[Finding]:
    """Asks the jobs API, without the token and, if it wants one, with it."""
    try:
        where = jobs_address(case, os.environ)
    except ValueError as unfit:
        yield fail(
            "jobs api",
            f"its address can't be read: {unfit}",
            "mend RAY_ADDRESS or RAY_API_SERVER_ADDRESS",
        )
        return
    try:
        token = find_token(os.environ, Path.home())
    except (OSError, UnicodeDecodeError):
        token = None  # The check of the token says why.
    if token is not None and not token.usable:
        token = None
    if where is not None:
        address, said = where
        mode = os.environ.get("RAY_AUTH_MODE", "")
        yield api_finding(address, token, mode=mode, said=said)


def api_finding(
    address: Address,
    token: Token | None,
    *,
    mode: str,
    said: bool,
    limit_s: float = CONNECT_LIMIT_S,
) -> Finding:
    """Judges whether the jobs API lets this machine in.

    Args:
        address: Its own.
        token: The one of this machine.
        mode: RAY_AUTH_MODE.
        said: Whether the address was given; a guess may be wrong.
        limit_s: For each question.
    """
    try:
        status = ask_version(address, None, limit_s)
        open_to_all = status == 200
        if status == 401 and token is not None:
            status = ask_version(address, token, limit_s)
    except (OSError, http.client.HTTPException) as refused:
        return (fail if said else warn)(
            "jobs api",
            f"no answer from {address} ({refused}): `ray job submit` can't reach it",
            "start the head with --dashboard-host, or set RAY_API_SERVER_ADDRESS to where it is",
        )
    if open_to_all:
        if address.host.startswith(LOOPBACK):
            return ok("jobs api", f"{address} answers, and asks for no token")
        return warn(
            "jobs api",
            f"{address} asks for no token: whoever reaches it can run anything there",
            "`ray get-auth-token --generate` on the head, then start Ray with RAY_AUTH_MODE=token",
        )
    if status == 401:
        return fail(
            "jobs api",
            f"{address} wants a token, and this machine has none (401)",
            "copy ~/.ray/auth_token of the head node to here, `chmod 600` it, and export "
            "RAY_AUTH_MODE=token",
        )
    if status == 403:
        source = token.source if token else "none"
        return fail(
            "jobs api",
            f"{address} refuses the token in {source} (403)",
            "it is another cluster's: copy ~/.ray/auth_token of this cluster's head node",
        )
    if status != 200:
        return fail(
            "jobs api",
            f"{address}{VERSION_PATH} answers {status}: it is no jobs API, or broken",
            "mend --address or RAY_API_SERVER_ADDRESS: the API is on the dashboard's port, 8265",
        )
    if mode.lower() != "token":
        return fail(
            "jobs api",
            f"{address} takes the token, but RAY_AUTH_MODE is '{mode}': Ray would not send it",
            "export RAY_AUTH_MODE=token",
        )
    return ok("jobs api", f"{address} takes the token")


def ask_version(address: Address, token: Token | None, limit_s: float) -> int:
    """Asks the jobs API for its version, and gives the status of the answer.

    Raises:
        OSError: If there is no answer.
        http.client.HTTPException: If it isn't HTTP.
    """
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    # By hand: a library that follows redirects would take the token along to wherever they lead.
    connection = kind(address.host, address.port, timeout=limit_s)
    headers = {"Authorization": f"Bearer {token.text}"} if token else {}
    try:
        connection.request("GET", VERSION_PATH, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
