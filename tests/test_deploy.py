"""The image and the manifests fit together, and what they name exists. Neither Docker nor
Kubernetes is at hand: what they would refuse is looked for in the files."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray._private import ray_constants
from ray.scripts.scripts import start

from crossmost_ray import __version__
from crossmost_ray.config import AdaptConfig, ClusterConfig, load_config

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
IMAGE = f"crossmost_ray:{__version__}"
IMAGE_ROOT = "/opt/crossmost_ray"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

Json = dict[str, Any]


def documents(path: Path) -> list[Json]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    values = yaml.safe_load((ROOT / "tests/kuberay_schema.yaml").read_text(encoding="utf-8"))
    assert kind in values["$defs"]
    schema = {**values, "$ref": f"#/$defs/{kind}"}
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def errors_of(document: Json) -> list[str]:
    """What the schema of its kind says against a manifest."""
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator(document["kind"]).iter_errors(document)
    ]


def clusters() -> list[Any]:
    """Every cluster that a manifest makes: its specification, named after the file."""
    found = []
    for path in MANIFESTS:
        for document in documents(path):
            if document["kind"] != "PersistentVolumeClaim":
                spec = document["spec"]
                found.append(pytest.param(spec.get("rayClusterSpec", spec), id=path.name))
    return found


def jobs() -> list[Any]:
    return [
        pytest.param(document["spec"], id=path.name)
        for path in MANIFESTS
        for document in documents(path)
        if document["kind"] == "RayJob"
    ]


def groups(cluster: Json) -> list[Json]:
    """The head's group, then the workers'."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: Json) -> Json:
    (only,) = group["template"]["spec"]["containers"]
    return only


def size(quantity: str) -> float:
    """Bytes or CPUs of Kubernetes' way of writing them."""
    number, unit = re.fullmatch(r"([0-9]+)([A-Za-z]*)", quantity).groups()
    return int(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def pinned(package: str) -> str:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{package}==(.+)$", text, re.MULTILINE)[1]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's lines as (word, rest), comments left out and continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", "", kept).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def arguments(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def copied() -> list[str]:
    """What the Dockerfile takes from the checkout."""
    return [part for rest in arguments("COPY") for part in rest.split()[:-1]]


def left_out(path: str) -> bool:
    """Whether Docker leaves a file out of what it may copy: the last pattern that fits decides."""
    verdict = False
    parts = PurePosixPath(path).parts
    whole = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, part) for part in whole):
            verdict = not line.startswith("!")
    return verdict


# The manifests, by the schema


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_of_the_form_that_kuberay_takes(path: Path) -> None:
    for document in documents(path):
        assert errors_of(document) == []


def change(document: Json, path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        document = document[part]
    document[last] = value


WORKERS = "spec/rayClusterSpec/workerGroupSpecs/0"
POD = f"{WORKERS}/template/spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("apiVersion", "ray.io/v1alpha1"),
        ("metadata/name", "Crossmost_Adapt"),
        ("metadata/name", "a" * 48),
        ("spec/entryPoint", "python x.py"),
        ("spec/backoffLimit", "0"),
        ("spec/rayClusterSpec/rayVersion", 2.6),
        ("spec/rayClusterSpec/authOptions/mode", "on"),
        (f"{WORKERS}/maxReplicas", None),
        (f"{WORKERS}/rayStartParams/num-cpus", 4),
        (f"{POD}/containers", []),
        (f"{POD}/hostNetwork", True),
        (f"{POD}/containers/0/resources/limits/memory", 8),
        (f"{POD}/containers/0/resources/limits/memory", "8GB"),
        (f"{POD}/containers/0/volumeMounts/0/mountPath", "runs"),
        (f"{POD}/volumes/0/hostPath", {"path": "/"}),
    ],
)
def test_the_schema_refuses_a_slip(path: str, value: Any) -> None:
    (document,) = documents(DEPLOY / "kuberay/rayjob.yaml")
    assert errors_of(document) == []
    broken = copy.deepcopy(document)
    change(broken, path, value)
    assert errors_of(broken) != []


# The clusters


@pytest.mark.parametrize("cluster", clusters())
def test_a_cluster_runs_the_image_and_the_ray_that_are_built(cluster: Json) -> None:
    assert cluster["rayVersion"] == pinned("ray")
    assert {container(group)["image"] for group in groups(cluster)} == {IMAGE}


@pytest.mark.parametrize("cluster", clusters())
def test_a_cluster_asks_for_a_token_and_its_pods_for_no_privilege(cluster: Json) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    user, group = arguments("USER")[-1].split(":")
    for template in (group["template"]["spec"] for group in groups(cluster)):
        (only,) = template["containers"]
        assert template["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": int(user),
            "runAsGroup": int(group),
            "fsGroup": int(group),
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("cluster", clusters())
def test_memory_is_bounded_and_holds_the_object_store(cluster: Json) -> None:
    for group in groups(cluster):
        resources = container(group)["resources"]
        # Guaranteed pods: what is promised is what may be used, so the node's memory suffices.
        assert resources["requests"] == resources["limits"]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        # Ray puts the object store on disk where /dev/shm is too small for it, and what lies in
        # /dev/shm counts as the pod's memory.
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < size(shm["sizeLimit"]) < size(resources["limits"]["memory"]) / 2


@pytest.mark.parametrize("cluster", clusters())
def test_volumes_are_mounted_and_claims_are_made(cluster: Json) -> None:
    (claim,) = documents(DEPLOY / "kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(cluster):
        volumes = group["template"]["spec"]["volumes"]
        mounts = [mount["name"] for mount in container(group)["volumeMounts"]]
        assert sorted(mounts) == sorted({volume["name"] for volume in volumes})
        claims = [v["persistentVolumeClaim"] for v in volumes if "persistentVolumeClaim" in v]
        assert {each["claimName"] for each in claims} <= {claim["metadata"]["name"]}


@pytest.mark.parametrize("cluster", clusters())
def test_the_parameters_are_options_of_ray_start(cluster: Json) -> None:
    options = {name.removeprefix("--") for option in start.params for name in option.opts}
    for group in groups(cluster):
        assert set(group["rayStartParams"]) <= options
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("cluster", clusters())
def test_a_pod_outlives_the_time_that_ray_takes_to_leave(cluster: Json) -> None:
    for group in groups(cluster):
        env = {each["name"]: each["value"] for each in container(group).get("env", [])}
        drain = float(env.get(DRAIN, ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
        assert 0 < drain < group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert hasattr(ray_constants, DRAIN)


@pytest.mark.parametrize("cluster", clusters())
def test_a_cluster_that_grows_does_not_restart_its_pods(cluster: Json) -> None:
    for group in cluster["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if group["minReplicas"] < group["maxReplicas"]:
            assert cluster["enableInTreeAutoscaling"]
    if cluster.get("enableInTreeAutoscaling"):
        assert {each["template"]["spec"]["restartPolicy"] for each in groups(cluster)} == {"Never"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_no_manifest_holds_a_secret(path: Path) -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from (key, *texts(inner))
        elif isinstance(value, list):
            for inner in value:
                yield from texts(inner)
        else:
            yield str(value)

    for document in documents(path):
        assert document["kind"] != "Secret"
        for text in texts(document):
            assert not re.search(r"AWS_|ACCESS_KEY|PASSWORD|AUTH_TOKEN", text), text


# The jobs


@pytest.mark.parametrize("job", jobs())
def test_an_entrypoint_means_the_same_to_a_shell(job: Json) -> None:
    # KubeRay pastes it into the submitter's command line. With failglob, bash refuses a bracket
    # that it would look for among the files.
    command = ["bash", "-O", "failglob", "-c", f"printf '%s\\n' {job['entrypoint']}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == shlex.split(job["entrypoint"])


@pytest.mark.parametrize("job", jobs())
def test_an_entrypoint_is_a_job_with_a_config_that_its_cluster_can_meet(job: Json) -> None:
    python, script, path, *overrides = shlex.split(job["entrypoint"])
    assert arguments("WORKDIR") == [IMAGE_ROOT]
    assert python == "python"
    here = {}
    for name in (script, path):
        inner = PurePosixPath(name).relative_to(IMAGE_ROOT)
        assert any(inner.is_relative_to(source) for source in copied()), name
        here[name] = ROOT / inner
    assert here[script].is_file()
    config = load_config(AdaptConfig, here[path], overrides)

    asked = config.cluster
    workers = job["rayClusterSpec"]["workerGroupSpecs"]

    def room(replicas: str) -> int:
        """Workers that fit into so many pods of each group."""
        count = 0
        for group in workers:
            limits = container(group)["resources"]["limits"]
            fit = int(size(limits["cpu"]) // asked.cpus_per_worker)
            if asked.use_gpu:
                fit = min(fit, int(limits.get("nvidia.com/gpu", "0")))
            count += group[replicas] * fit
        return count

    assert asked.fewest_workers <= room("minReplicas")
    assert asked.most_workers <= room("maxReplicas")

    if "://" in config.output:
        assert all("envFrom" in container(group) for group in groups(job["rayClusterSpec"]))
    else:
        for group in groups(job["rayClusterSpec"]):
            assert config.output in {m["mountPath"] for m in container(group)["volumeMounts"]}


# The image


def test_the_image_is_built_from_what_exists_and_is_not_left_out() -> None:
    assert copied()
    for name in copied():
        files = [ROOT / name] if (ROOT / name).is_file() else list((ROOT / name).rglob("*"))
        assert files, name
        for file in files:
            inner = file.relative_to(ROOT).as_posix()
            waste = "__pycache__" in inner
            assert left_out(inner) == waste, inner


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/a/config.yaml",
        "tests/conftest.py",
        "s3.env",
        "a.pt",
    ],
)
def test_the_image_gets_nothing_else(name: str) -> None:
    assert left_out(name)


def test_the_image_installs_what_pyproject_names_within_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (base,) = arguments("FROM")
    assert re.fullmatch(rf"python:{project['tool']['mypy']['python_version']}-slim-\w+", base)
    first, second = [run for run in arguments("RUN") if run.startswith("pip install")]
    assert "-c constraints.txt" in first
    assert "--no-deps" in second
    choices = re.findall(r"(\w+)\) packages=", arguments("RUN")[0])
    assert choices == ["prepare"]
    assert set(choices) <= set(project["project"]["optional-dependencies"])


def test_the_image_draws_with_the_packages_that_the_makefile_installs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    needed = re.search(r"^GL_PACKAGES := (.+)$", makefile, re.MULTILINE)[1].split()
    plain, prepare = re.findall(r'packages="([^"]*)"', arguments("RUN")[0])
    assert plain.split() == ["wget"]
    assert prepare.split() == ["wget", *needed]


def test_the_image_ends_as_a_user_with_a_number_and_holds_no_secret() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments("USER")[-1])
    assert f"--uid {arguments('USER')[-1].split(':')[0]} " in " ".join(arguments("RUN"))
    named = " ".join(arguments("ENV") + arguments("ARG"))
    assert not re.search(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY", named)
    assert f"-t {IMAGE} " in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


# The page


def page() -> str:
    return (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def test_the_page_names_every_setting_of_the_cluster_and_no_other() -> None:
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    rows = set(re.findall(r"^\| `cluster\.(\w+)` \|", page(), re.MULTILINE))
    assert rows == fields
    assert set(re.findall(r"\bcluster\.(\w+)", page())) - {"md", "py"} == fields


def test_the_page_names_files_that_exist_and_the_image_that_is_built() -> None:
    for name in re.findall(r"\b((?:deploy|configs|jobs|crossmost_ray)/[\w./-]*\w)", page()):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"crossmost_ray:[\d.]+", page())) == {IMAGE}
