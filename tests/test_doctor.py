"""Each check of the doctor's on a situation that is well, and on one that is broken."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import runpy
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import AdaptConfig, ClusterConfig, ConfigError, PretrainConfig
from crossmost_ray.doctor import examine as examining
from crossmost_ray.doctor.allreduce import check_all_reduce, reduce_finding, spread_over
from crossmost_ray.doctor.examine import BARRIERS, CHECKS, Check, examine, load_case
from crossmost_ray.doctor.finding import Case, Finding, Status, fail, ok, warn
from crossmost_ray.doctor.libraries import cuda_finding, library_findings, render_finding
from crossmost_ray.doctor.machine import (
    GIB,
    Limits,
    free_memory,
    machine_findings,
    report_machine,
)
from crossmost_ray.doctor.member import Outcome, Place, Seat, all_reduce, interface_of
from crossmost_ray.doctor.network import (
    Address,
    Token,
    api_finding,
    check_address,
    check_jobs_api,
    dial,
    parse_address,
    token_findings,
)
from crossmost_ray.doctor.nodes import (
    Answer,
    Node,
    alive_nodes,
    ask_nodes,
    check_nodes,
    clock_finding,
    clock_gap,
    clusters_finding,
    gcs_servers,
    store_findings,
    version_finding,
)
from crossmost_ray.doctor.output import (
    check_output,
    check_shared_output,
    clear_from,
    disk_finding,
    read_from,
    shared_finding,
    write_finding,
    write_from,
)
from crossmost_ray.doctor.probes import run_probe
from crossmost_ray.doctor.room import places, shards_finding, worker_findings
from crossmost_ray.storage import Store
from tests.synthetic import write_shards

ROOT = Path(__file__).parents[1]
SECRET = "f00dfacef00dface"


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def node(name: str, *, cpus: float = 4, gpus: float = 0, store: float = GIB) -> Node:
    return Node(name, name, {"CPU": cpus, "GPU": gpus, "object_store_memory": store})


def case(folder: Path) -> Case:
    shards = write_shards(folder / "shards", num_objects=4)
    values = {"name": "run", "model": "m", "output": str(folder / "runs")}
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**values, "data": {"shards": str(shards)}}))
    return load_case(str(config), [], None)


# The machine


def test_a_machine_is_judged_by_its_limits() -> None:
    report = report_machine()
    frugal = Limits(0, 0, 0, 0, 1.0)
    assert {finding.status for finding in machine_findings(report, frugal)} == {"ok"}
    wanting = Limits(2**60, 2**59, sys.maxsize, 2**60, 1.0)
    scarce = dataclasses.replace(report, open_files=1024)
    found = by_name(machine_findings(scarce, wanting, where=" on far"))
    assert {name: finding.status for name, finding in found.items()} == {
        "memory": "fail",
        "open files": "warn",
        "temporary disk": "warn",
    }
    assert all("on far" in finding.found and finding.remedy for finding in found.values())
    full = dataclasses.replace(report, temp_total=1000 * GIB, temp_free=40 * GIB)
    assert by_name(machine_findings(full))["temporary disk"].status == "fail", "96 % are used"
    room = dataclasses.replace(report, temp_total=1000 * GIB, temp_free=60 * GIB)
    assert by_name(machine_findings(room))["temporary disk"].status == "ok"


def test_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  4194304 kB\n")
    assert free_memory(tmp_path) == 4 * GIB
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 4 * GIB
    (group / "memory.max").write_text(f"{5 * GIB}\n")
    assert free_memory(tmp_path) == 3 * GIB, "5 less 3, of which 1 can be given up"


FAKE_TORCH = """
__version__ = "9.9"
class version: cuda = None
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
"""


@pytest.mark.parametrize(
    ("module", "code", "found", "remedy"),
    [
        (
            "torchvision",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "RuntimeError: operator torchvision::nms does not exist",
            "built for torch 9.9",
        ),
        ("timm", "import os; os.abort()", "crashed (signal 6)", "import timm"),
        ("timm", "import time; time.sleep(60)", "did not end within", "import timm"),
        ("open_clip", "import nowhere", "No module named 'nowhere'", "open_clip_torch"),
    ],
)
def test_a_broken_library_is_named(
    tmp_path: Path, module: str, code: str, found: str, remedy: str
) -> None:
    modules = {
        "torch": FAKE_TORCH,
        "torchvision": "raise ImportError('not this one')",
        "timm": "__version__ = '1'",
        "open_clip": "__version__ = '2'",
    }
    for name, text in (modules | {module: code}).items():
        (tmp_path / f"{name}.py").write_text(text)
    limit = 8 if "sleep" in code else 60
    result = run_probe("libraries", limit_s=limit, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    findings = by_name(library_findings(result))
    assert findings[module].status == "fail"
    assert found in findings[module].found
    assert remedy in findings[module].remedy
    assert findings["torch"].status == "ok", "what came before is told even after a crash"
    assert "cuda" in findings


@pytest.mark.parametrize(
    ("build", "devices", "driver", "environ", "status", "said"),
    [
        ("13.2", ["H200", "H200"], "580", {}, "ok", "2 GPU(s), H200"),
        (None, [], None, {}, "ok", "no NVIDIA driver"),
        (None, [], "580", {}, "warn", "built without CUDA"),
        ("13.2", [], "470", {}, "warn", "a driver for CUDA 13.2"),
        ("13.2", [], "580", {"CUDA_VISIBLE_DEVICES": ""}, "warn", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_cuda_is_compared_with_the_driver(
    build: str | None,
    devices: list[str],
    driver: str | None,
    environ: dict[str, str],
    status: Status,
    said: str,
) -> None:
    finding = cuda_finding(build, devices, driver, environ)
    assert finding.status == status
    assert said in str(finding)


def test_rendering_draws_or_says_what_is_missing(tmp_path: Path) -> None:
    drawn = run_probe("render", limit_s=120)
    assert render_finding(drawn, for_training=False).status == "ok"
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    fake = tmp_path / "pyvista.py"
    fake.write_text("raise ModuleNotFoundError(name='pyvista')")
    finding = render_finding(run_probe("render", limit_s=60, env=path), for_training=False)
    assert finding.status == "warn"
    assert "crossmost_ray[prepare]" in finding.remedy
    fake.write_text("import os; os.abort()")
    crashed = run_probe("render", limit_s=60, env=path)
    finding = render_finding(crashed, for_training=False)
    assert finding.status == "fail"
    assert "crashed (signal 6)" in finding.found
    assert "libegl1" in finding.remedy
    assert render_finding(crashed, for_training=True).status == "warn", "training draws nothing"


# The way to a cluster


def test_addresses_are_read() -> None:
    assert parse_address("10.0.0.1:6379") == Address("", "10.0.0.1", 6379)
    assert parse_address("ray://head") == Address("ray", "head", 10001)
    assert parse_address("http://head:8265") == Address("http", "head", 8265)
    assert str(parse_address("[::1]:6379")) == "[::1]:6379"
    for nowhere in (None, "", "auto", "local"):
        assert parse_address(nowhere) is None
    for unfit in ("head", "ftp://head:1", "head:x", "head:99999", ":6379"):
        assert [f.status for f in check_address(Case(None, unfit))] == ["fail"], unfit


def test_an_address_is_dialled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert dial(Address("", "127.0.0.1", port)).status == "ok"
    finding = dial(Address("", "127.0.0.1", port))
    assert finding.status == "fail"
    assert f"nothing listens on its port {port}" in finding.found


def test_a_token_is_found_and_kept_from_others(tmp_path: Path) -> None:
    def one(environ: dict[str, str]) -> Finding:
        (finding,) = token_findings(environ, tmp_path)
        assert SECRET not in str(finding)
        return finding

    assert one({}).status == "ok"
    assert "--generate" in one({"RAY_AUTH_MODE": "token"}).remedy
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text(SECRET)
    file.chmod(0o644)
    finding = one({"RAY_AUTH_MODE": "token"})
    assert (finding.status, finding.remedy) == ("warn", f"chmod 600 {file}")
    assert "0644" in finding.found
    file.chmod(0o600)
    assert one({"RAY_AUTH_MODE": "token"}).status == "ok"
    file.write_text(f"{SECRET}\nInjected: header")
    assert one({}).status == "fail"
    assert one({"RAY_AUTH_TOKEN": SECRET}).found == "found in RAY_AUTH_TOKEN"
    assert one({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}).status == "fail"


@contextmanager
def jobs_api(*, token: str | None, moved: bool = False) -> Iterator[tuple[Address, list[str]]]:
    """A server that answers as Ray's does, and keeps the tokens that it was given."""
    given = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            word = self.headers.get("Authorization")
            given.append(word or "")
            status = 200 if token is None or word == f"Bearer {token}" else 403 if word else 401
            self.send_response(302 if moved and word else status)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Address("http", "127.0.0.1", server.server_port), given
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("wanted", "token", "mode", "status", "said"),
    [
        (None, None, "", "ok", "asks for no token"),
        (SECRET, SECRET, "token", "ok", "takes the token"),
        (SECRET, SECRET, "", "fail", "export RAY_AUTH_MODE=token"),
        (SECRET, None, "token", "fail", "(401)"),
        (SECRET, "another", "token", "fail", "(403)"),
    ],
)
def test_the_jobs_api_is_asked(
    wanted: str | None, token: str | None, mode: str, status: Status, said: str
) -> None:
    mine = Token(token, "the file") if token else None
    with jobs_api(token=wanted) as (address, _):
        finding = api_finding(address, mine, mode=mode, said=True)
    assert finding.status == status
    assert said in str(finding)
    assert SECRET not in str(finding)
    gone = api_finding(address, mine, mode=mode, said=True)
    assert gone.status == "fail", "the server has ended"
    assert api_finding(address, mine, mode=mode, said=False).status == "warn", "a guess"


def test_the_token_is_not_taken_where_a_redirect_leads() -> None:
    with jobs_api(token=SECRET, moved=True) as (address, given):
        finding = api_finding(address, Token(SECRET, "the file"), mode="token", said=True)
    assert finding.status == "fail"
    assert "answers 302" in finding.found
    assert given == ["", f"Bearer {SECRET}"]


def test_an_open_cluster_that_others_reach_is_a_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmost_ray.doctor.network.ask_version", lambda *args: 200)
    finding = api_finding(Address("http", "10.0.0.1", 8265), None, mode="", said=True)
    assert finding.status == "warn"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head")
    (finding,) = check_jobs_api(Case())
    assert "RAY_API_SERVER_ADDRESS" in finding.remedy


# The nodes


def test_two_clusters_on_one_machine_are_told(tmp_path: Path) -> None:
    for pid, words in {
        12: ["/x/gcs_server", "--session-name=session_a", "--node-ip-address=10.0.0.1"],
        34: ["/x/gcs_server", "--session-name=session_b", "--node-ip-address=10.0.0.1"],
        56: ["/x/raylet", "gcs_server"],
    }.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join(words).encode())
    servers = gcs_servers(tmp_path)
    assert servers == {12: "session_a on 10.0.0.1", 34: "session_b on 10.0.0.1"}
    finding = clusters_finding(servers, None)
    assert finding.status == "warn"
    assert "process 34" in finding.found
    assert clusters_finding(servers, "10.0.0.1:6379").status == "ok"
    assert clusters_finding({12: "session_a"}, None).status == "ok"
    assert gcs_servers(tmp_path / "none") == {}


def test_versions_are_compared() -> None:
    here = dataclasses.replace(
        report_machine(), python="3.11.7", versions={"ray": "2.60.0", "torch": "2.15.0"}
    )
    assert version_finding(here, {"a": here}).status == "ok"
    for changes, status, said in (
        ({"python": "3.11.9"}, "warn", "far has python 3.11.9"),
        ({"python": "3.12.1"}, "fail", "far has python 3.12.1"),
        ({"versions": {"ray": "2.60.0", "torch": "2.14.0"}}, "warn", "far has torch 2.14.0"),
        ({"versions": {"ray": "2.61.0", "torch": "2.15.0"}}, "fail", "far has ray 2.61.0"),
        ({"versions": {"ray": "2.60.0"}}, "fail", "far has no torch"),
    ):
        finding = version_finding(here, {"a": here, "far": dataclasses.replace(here, **changes)})
        assert finding.status == status
        assert said in finding.found


@given(
    asked=st.integers(0, 1000), took=st.integers(0, 100), at=st.floats(0, 1), ahead=st.integers()
)
def test_the_gap_of_a_clock_is_never_overstated(
    asked: int, took: int, at: float, ahead: int
) -> None:
    # The truth is `ahead`; the way there and back may hide at most `took` of it.
    gap = clock_gap(asked, asked + at * took + ahead, asked + took)
    assert abs(gap) <= abs(ahead) + 1e-6 * abs(ahead) + 1e-9
    assert abs(gap) >= abs(ahead) - took - 1e-6 * abs(ahead) - 1e-9
    assert gap * ahead >= 0


def test_a_clock_far_off_is_told() -> None:
    assert clock_finding({"a": 0.0, "b": -59.0}).status == "ok"
    finding = clock_finding({"a": 0.0, "b": -61.0})
    assert finding.status == "fail"
    assert "b is 61 s behind" in finding.found


def test_object_stores_and_shared_memory_are_weighed() -> None:
    report = dataclasses.replace(report_machine(), shm_total=GIB // 16)
    found = by_name(store_findings([(node("a"), report)]))
    assert found["object store"].status == "ok"
    assert "--shm-size=2g" in found["/dev/shm"].remedy
    small = by_name(store_findings([(node("a", store=GIB / 10), None)]))
    assert small["object store"].status == "fail"
    assert small.keys() == {"object store"}


@pytest.mark.parametrize(
    ("values", "cpus", "gpus"),
    [
        ({"num_workers": 2}, "ok", None),
        ({"num_workers": 4, "cpus_per_worker": 1}, "warn", None),  # none left
        ({"num_workers": 5}, "fail", None),
        ({"num_workers": [2, 5]}, "warn", None),
        ({"num_workers": 2, "cpus_per_worker": 1.5}, "ok", None),
        ({"num_workers": 1, "cpus_per_worker": 3}, "fail", None),  # 4 CPUs, but 2 on a node
        ({"num_workers": 1, "use_gpu": True}, "ok", "fail"),
    ],
)
def test_workers_are_fitted_into_two_nodes(
    values: dict[str, object], cpus: Status, gpus: Status | None
) -> None:
    nodes = [node("a", cpus=2), node("b", cpus=2)]
    found = by_name(worker_findings(ClusterConfig(**values), nodes))
    assert found["cpus"].status == cpus
    assert (found["gpus"].status if "gpus" in found else None) == gpus


def test_gpus_are_counted() -> None:
    nodes = [node("a", cpus=8, gpus=1), node("b", cpus=8, gpus=2)]
    assert places(nodes, cpus=1, gpus=1) == 3
    assert places([node("a", cpus=0.3)], cpus=0.1, gpus=0) == 3
    for values, status in (
        ({"num_workers": 3, "use_gpu": True}, "ok"),
        ({"num_workers": 4, "use_gpu": True}, "fail"),
        ({"num_workers": (2, 4), "use_gpu": True}, "warn"),
        ({"num_workers": 3}, "warn"),  # none would be used
    ):
        finding = by_name(worker_findings(ClusterConfig(**values), nodes))["gpus"]
        assert finding.status == status
    assert [str(found) for found in spread_over(nodes, 3, use_gpu=True)] == ["a", "b", "b"]
    assert [str(found) for found in spread_over(nodes, 3, use_gpu=False)] == ["a", "b", "a"]
    assert spread_over([node("a")], 2, use_gpu=True) == []


def test_shards_are_compared_with_the_object_store(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "shards", num_objects=4))
    assert shards_finding(shards, [node("a")]).status == "ok"
    finding = shards_finding(shards, [node("a", store=1000), node("b", store=1000)])
    assert finding.status == "warn"
    assert shards_finding(str(tmp_path / "none"), [node("a")]).status == "fail"


# The storage


def test_the_output_is_written_and_left_clean(tmp_path: Path) -> None:
    found = by_name(check_output(case(tmp_path)))
    assert found["output"].status == "ok"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("in the way")
    blocked = write_finding(Store(str(tmp_path / "file" / "runs")))
    assert blocked.status == "fail"
    assert str(tmp_path / "file") in blocked.found
    assert disk_finding(5, "here", least=3, wanted=4).status == "ok"
    assert disk_finding(5, "here", least=3, wanted=6).status == "warn"
    assert disk_finding(5, "here", least=6, wanted=7).status == "fail"


def test_a_folder_of_each_node_is_no_shared_storage(tmp_path: Path) -> None:
    nodes = [node("a"), node("b")]
    files = {"a": ".doctor-1/a", "b": ".doctor-1/b"}

    def finding(stores: dict[str, Store]) -> Finding:
        wrote = {key: Answer(write_from(stores[key], files[key]), "", 0, 0) for key in stores}
        read = {
            key: Answer(read_from(store, sorted(files.values())), "", 0, 0)
            for key, store in stores.items()
        }
        for store in [*stores.values(), *stores.values()]:
            clear_from(store, ".doctor-1")
        return shared_finding("the place", nodes, files, wrote, read)

    shared = Store(str(tmp_path / "shared"))
    assert finding({"a": shared, "b": shared}).status == "ok"
    assert list((tmp_path / "shared").iterdir()) == []
    apart = finding({"a": shared, "b": Store(str(tmp_path / "own"))})
    assert apart.status == "fail"
    assert "what b wrote to the place is not there for a" in apart.found
    (tmp_path / "file").write_text("in the way")
    refused = finding({"a": shared, "b": Store(str(tmp_path / "file"))})
    assert "b can't use the place" in refused.found


# The all-reduce


def test_a_member_that_never_comes_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    outcomes = [
        all_reduce(Seat(0, 2, "127.0.0.1", port, "gloo", 1.0)),
        Outcome("meet", "no answer within 1 s"),
    ]
    assert outcomes[0].stage == "meet"
    assert time.monotonic() - start < 20
    members = [
        Place("a", "10.0.0.1", "eth1", "10.0.0.1", port),
        Place("b", "10.0.0.2", "eth1", "10.0.0.2", 1),
    ]
    finding = reduce_finding(members, outcomes, backend="gloo", limit_s=1.0)
    assert finding.status == "fail"
    assert f"rank 1 on 10.0.0.2 (eth1) did not reach rank 0 at 10.0.0.1:{port}" in finding.found
    assert "cluster.env.GLOO_SOCKET_IFNAME=eth1" in finding.remedy
    alone = all_reduce(Seat(1, 2, "127.0.0.1", port, "gloo", 1.0))
    assert alone.stage == "meet", "nobody listens there"


def test_members_that_met_but_cannot_connect_are_told_why() -> None:
    members = [Place(name, f"10.0.0.{at}", "eth0", "127.0.1.1", 9) for at, name in enumerate("ab")]
    outcomes = [Outcome("connect", "timed out"), Outcome("connect", "timed out")]
    finding = reduce_finding(members, outcomes, backend="gloo", limit_s=1.0)
    assert "could not connect by gloo" in finding.found
    assert "/etc/hosts" in finding.remedy
    by_nccl = reduce_finding(members, outcomes, backend="nccl", limit_s=1.0)
    assert "NCCL_SOCKET_IFNAME" in by_nccl.remedy
    assert "/etc/hosts" not in by_nccl.remedy
    assert interface_of("127.0.0.1") == ("lo" if sys.platform == "linux" else "")
    assert interface_of("203.0.113.9") == ""


@pytest.mark.ray
def test_processes_of_a_cluster_add_up_and_share_the_output(
    ray_cluster: None, tmp_path: Path
) -> None:
    checks = [
        Check("nodes", check_nodes, needs_cluster=True, limit_s=120),
        Check("shared output", check_shared_output, True, True, limit_s=120),
        Check("all-reduce", check_all_reduce, needs_cluster=True, limit_s=180),
    ]
    found = by_name(examine(case(tmp_path), checks))
    expected = {"cluster", "nodes", "versions", "clocks", "shared output", "all-reduce"}
    assert {name for name in expected if found[name].status == "ok"} == expected
    assert "2 processes on 1 node(s) add up 1 MiB by gloo" in found["all-reduce"].found
    assert not (tmp_path / "runs").exists()
    (here,) = alive_nodes()
    slow = ask_nodes({"slow": (here, lambda: time.sleep(60))}, limit_s=1)
    assert slow["slow"].error == "no answer within 1 s"
    broken = ask_nodes({"broken": (here, lambda: 1 / 0)}, limit_s=60)
    assert "division by zero" in broken["broken"].error


# The whole


def test_a_check_that_breaks_or_hangs_does_not_end_the_others() -> None:
    held = threading.Event()

    def hang(_: Case) -> list[Finding]:
        held.wait(60)
        return []

    checks = [
        Check("broken", lambda _: [ok("broken", str({}["key"]))]),
        Check("hanging", hang, limit_s=0.2),
        Check("well", lambda _: [ok("well", "it is")]),
        Check("of a run", lambda _: [ok("of a run", "never asked")], needs_config=True),
    ]
    found = by_name(examine(Case(), checks))
    held.set()
    assert {name: finding.status for name, finding in found.items()} == {
        "broken": "fail",
        "hanging": "fail",
        "well": "ok",
    }
    assert "KeyError" in found["broken"].found
    assert "no answer within 0.2 s" in found["hanging"].found


def test_a_barred_or_outside_cluster_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("nothing is to be joined")

    monkeypatch.setattr(examining, "connect", never)
    inside = Check("inside", lambda _: [ok("inside", "never asked")], needs_cluster=True)
    for name in BARRIERS:
        bar = Check(name, lambda _, name=name: [fail(name, "shut", "open it")])
        found = by_name(examine(Case(), [bar, inside]))
        assert found.keys() == {name, "cluster"}
    found = by_name(examine(Case(None, "http://head:8265"), [inside]))
    assert "ray job submit --address http://head:8265" in found["cluster"].remedy


def test_a_cluster_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConnectionError("Version mismatch:\n Ray 2.61")

    monkeypatch.setattr(examining, "connect", refuse)
    inside = Check("inside", lambda _: [ok("inside", "never asked")], needs_cluster=True)
    (finding,) = examine(Case(), [inside])
    assert finding.status == "fail"
    assert "Version mismatch: Ray 2.61" in finding.found


def test_configs_of_both_kinds_are_taken(tmp_path: Path) -> None:
    assert isinstance(case(tmp_path).config, AdaptConfig)
    pretrain = load_case(str(ROOT / "configs/pretrain/furniture.yaml"), ["seed=3"], None)
    assert isinstance(pretrain.config, PretrainConfig)
    with pytest.raises(ConfigError, match="bach_size: no such key"):
        load_case(str(tmp_path / "run.yaml"), ["data.bach_size=1"], None)
    with pytest.raises(ConfigError, match=r"report\.a") as wrong:
        load_case(str(ROOT / "configs/pretrain/furniture.yaml"), ["report.a=1"], None)
    assert "mode" not in str(wrong.value)


def test_names_are_those_of_the_table() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert set(BARRIERS) <= {check.name for check in CHECKS if not check.needs_cluster}


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_job_tells_and_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: Status,
    code: int,
) -> None:
    found = {"ok": ok("x", "y"), "warn": warn("x", "y", "z"), "fail": fail("x", "y", "z")}[status]
    seen = []

    def pretend(asked: Case) -> Iterator[Finding]:
        seen.append(asked)
        yield found

    monkeypatch.setattr(examining, "examine", pretend)
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", "before:1")
    for flags in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--address", "head:6379", *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / "doctor.py"), run_name="__main__")
        assert ended.value.code == code
        said = capsys.readouterr().out
        if flags:
            assert json.loads(said) == [dataclasses.asdict(found)]
        else:
            assert said.startswith(f"{found}\n")
    assert seen == [Case(None, "head:6379")] * 2
