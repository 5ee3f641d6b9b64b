"""A sweep on a cluster of two CPUs, whose driver is killed in its midst, as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossmost_ray.config import AdaptConfig, ConfigError, load_config
from crossmost_ray.models.pretrained import load_model
from crossmost_ray.storage import Store
from crossmost_ray.tuning.config import SweepConfig, load_base
from crossmost_ray.tuning.sweep import open_sweep
from tests.jobs.runs import values, write_inputs

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.ray

WHOLE, BROKEN, TWIN, BAD = (f"trial-{place:05d}" for place in range(4))

EPOCHS = 3

# On this machine's own CPUs, two trials of one worker each would prove nothing.
DRIVER = """
import runpy, sys
sys.argv.pop(0)
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Swept:
    """A sweep that was killed and gone on with."""

    folder: Path
    config: Path
    killed: dict[str, dict[str, Any]]
    """The ledger as the killed driver left it, by trial."""
    ended: dict[str, dict[str, Any]]
    said: str
    """By the driver that went on."""


def ledger(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "trials.json"
    listed = json.loads(path.read_text())["trials"] if path.exists() else []
    return {entry["trial"]: entry for entry in listed}


def start(*arguments: str) -> subprocess.Popen[str]:
    job = str(ROOT / "jobs/sweep.py")
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, job, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    inputs = write_inputs(tmp_path_factory.mktemp("sweep"))
    base = values(inputs, optim={"epochs": EPOCHS}, evaluation={"num_views": 1})
    (inputs / "base.yaml").write_text(yaml.safe_dump(base))
    config = inputs / "sweep.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "sweep",
                "base": str(inputs / "base.yaml"),
                "output": str(inputs / "runs"),
                "trials": [{}, {"optim.lr": 1e30}, {}, {"optim.lr": 0.3}],
                "scheduler": "asha",
            }
        )
    )
    folder = inputs / "runs/sweep"
    driver = start(str(config))
    deadline = time.monotonic() + 900
    while True:
        told = ledger(folder)
        if told and told[WHOLE]["status"] == "done" and told[TWIN]["epochs"] > 0:
            break
        assert driver.poll() is None, driver.stdout.read() if driver.stdout else ""
        assert time.monotonic() < deadline, f"no trial was done after a quarter of an hour: {told}"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    killed = ledger(folder)
    # What Tune itself remembers is of no use to anyone, and may be damaged.
    for state in (folder / "tune").glob("*state*"):
        state.write_text("{")
    driver = start(str(config), "--resume")
    said, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    return Swept(folder, config, killed, ledger(folder), said)


def test_every_trial_ends_in_its_own_way_and_two_ran_at_once(swept: Swept) -> None:
    assert {name: entry["status"] for name, entry in swept.ended.items()} == {
        WHOLE: "done",
        BROKEN: "failed",
        TWIN: "done",
        BAD: "stopped",
    }
    assert "2 at once" in swept.said
    assert [swept.ended[name]["epochs"] for name in (WHOLE, BROKEN, TWIN, BAD)] == [
        *(EPOCHS, 0, EPOCHS, 1)
    ]
    # The failed one did not stop the rest, and says why.
    assert "the loss is not finite" in swept.ended[BROKEN]["error"]
    assert "\n" not in swept.ended[BROKEN]["error"]
    assert swept.ended[BAD]["score"] < swept.ended[WHOLE]["score"]


def rows(swept: Swept, trial: str) -> list[dict[str, Any]]:
    text = (swept.folder / "trials" / trial / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_killed_trial_goes_on_from_its_checkpoint_and_ends_like_its_twin(swept: Swept) -> None:
    assert swept.killed[TWIN]["status"] == "running"
    assert 0 < swept.killed[TWIN]["epochs"] < EPOCHS
    # What was done stays as it was: not trained again.
    assert swept.ended[WHOLE] == swept.killed[WHOLE]
    events = (swept.folder / "trials" / TWIN / "events.jsonl").read_text().splitlines()
    begun = [told["step"] for told in map(json.loads, events) if told["event"] == "started"]
    # Training is ahead of the ledger by what Tune has not told of yet.
    assert begun in ([0, 4], [0, 8])
    left, right = rows(swept, WHOLE), rows(swept, TWIN)
    assert len(left) == len(right) == EPOCHS
    for one, other in zip(left, right, strict=True):
        keys = [key for key in one if key.startswith(("loss", "selection/", "pseudo/"))]
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    assert swept.ended[TWIN]["score"] == swept.ended[WHOLE]["score"]


def test_the_disk_holds_a_model_of_what_is_done_and_no_checkpoint_of_what_ended(
    swept: Swept,
) -> None:
    for name in (WHOLE, TWIN):
        run = swept.folder / "trials" / name
        assert load_model(run / "teacher").classes is not None
        assert not (run / "student").exists()
    assert list(swept.folder.glob("trials/*/step-*")) == []
    told = json.loads((swept.folder / "trials" / BAD / "status.json").read_text())
    assert told["status"] == "stopped"


def test_the_outcome_is_ranked_without_labels_and_accuracy_stands_beside(swept: Swept) -> None:
    summary = json.loads((swept.folder / "summary.json").read_text())
    listed = summary["trials"]
    # Equal scores keep their order; then what was stopped, then what failed.
    assert [entry["trial"] for entry in listed] == [WHOLE, TWIN, BAD, BROKEN]
    assert summary["best"] == WHOLE
    measured = json.loads((swept.folder / "evaluation/metrics.json").read_text())
    assert measured["models"] == ["zero-shot", WHOLE, TWIN]
    for entry in listed[:2]:
        top1 = measured["splits"]["transductive"][entry["trial"]]["fused"]["top1"]
        assert entry["report_only"] == {"transductive": top1}
        assert entry["score"] == swept.ended[entry["trial"]]["score"]
    assert listed[2]["report_only"] is None
    report = (swept.folder / "summary.md").read_text()
    assert "(report only)" in report
    # In the terminal a narrow column breaks its head.
    assert "only)" in swept.said
    told = json.loads((swept.folder / "status.json").read_text())
    assert (told["status"], told["stage"]) == ("done", "evaluating")


def test_the_best_run_is_ready_to_be_trained_by_the_command_that_is_printed(swept: Swept) -> None:
    path = swept.folder / "best.yaml"
    assert f"python jobs/adapt.py {path}" in swept.said
    best = load_config(AdaptConfig, path)
    base = load_config(AdaptConfig, swept.config.with_name("base.yaml"), ["name=sweep-best"])
    assert best == base


def test_a_finished_sweep_is_not_begun_again_and_another_one_not_taken_for_it(
    swept: Swept,
) -> None:
    folder = Store(str(swept.folder))

    def reopen(*overrides: str, resume: bool, at: Store = folder) -> None:
        config = load_config(SweepConfig, swept.config, overrides)
        open_sweep(config, load_base(config), at, resume=resume)

    reopen(resume=True)
    reopen("max_concurrent=1", "overrides.cluster.cpus_per_worker=0.5", resume=True)
    with pytest.raises(ConfigError, match=r"sweep 'sweep' exists at .* --resume"):
        reopen(resume=False)
    with pytest.raises(ConfigError, match=r"other values of base_config\.seed \("):
        reopen("overrides.seed=1", resume=True)
    with pytest.raises(ConfigError, match=r"no sweep 'sweep' at .* to resume"):
        reopen(resume=True, at=folder.child("elsewhere"))
    with pytest.raises(ConfigError, match="holds a run"):
        reopen(resume=False, at=folder.child(f"trials/{WHOLE}"))
