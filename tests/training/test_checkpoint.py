"""Checkpoints: what is written comes back, what is damaged is named, and nothing in it runs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.training.checkpoint import (
    STATE_NAME,
    best_checkpoint,
    checkpoint_name,
    load_state,
    save_state,
)

STATE = {
    "task": {"student": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.5}]},
    "history": [{"epoch": 0, "loss": 1.5}],
}


def test_a_state_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    loaded = load_state(Store(str(tmp_path)))
    assert torch.equal(
        loaded["task"]["student"]["weight"],
        STATE["task"]["student"]["weight"],  # type: ignore[index]
    )
    assert loaded["task"]["student"]["count"].dtype == torch.int64
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.5}]
    assert loaded["history"] == STATE["history"]
    assert [file.name for file in tmp_path.iterdir()] == [STATE_NAME]


def test_the_state_of_an_optimizer_comes_back_whole(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 0.5}])
    weight.sum().backward()
    optimizer.step()
    save_state(tmp_path, {"optimizer": optimizer.state_dict()})
    other = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(3))], "lr_scale": 1.0}])
    other.load_state_dict(load_state(Store(str(tmp_path)))["optimizer"])
    assert other.param_groups[0]["lr_scale"] == 0.5
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_save_that_fails_leaves_the_old_state(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_state(tmp_path, {"broken": (lambda: 0)})
    assert load_state(Store(str(tmp_path)))["history"] == STATE["history"]


def test_a_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"the checkpoint '{tmp_path}' lacks its state.pt; use an"
    ):
        load_state(Store(str(tmp_path)))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_state_cut_short_is_named(tmp_path: Path, share: float) -> None:
    save_state(tmp_path, STATE)
    file = tmp_path / STATE_NAME
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=r"state\.pt is damaged or cut short \(.+\); use another"):
        load_state(Store(str(tmp_path)))


@pytest.mark.parametrize("data", [b"hello", b"PK\x03\x04 and so on", bytes(100), b"\x80\x02}"])
def test_a_file_that_is_no_state_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / STATE_NAME).write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged or cut short"):
        load_state(Store(str(tmp_path)))


class Hostile:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["torch", "pickle", "zip"])
def test_code_in_a_state_is_never_run(tmp_path: Path, form: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / STATE_NAME
    if form == "torch":
        torch.save({"task": Hostile(mark)}, file)
    elif form == "pickle":
        file.write_bytes(pickle.dumps({"task": Hostile(mark)}, protocol=2))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Hostile(mark), protocol=2))
            archive.writestr("archive/version", "3")
    with pytest.raises(ConfigError, match="is damaged or cut short"):
        load_state(Store(str(tmp_path)))
    assert not mark.exists()


def test_the_best_checkpoint_is_the_earliest_of_the_highest_score(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    for step in (4, 8, 10, 12):
        folder = tmp_path / checkpoint_name(step)
        folder.mkdir()
        save_state(folder, {})
    # Step 10 lies within an epoch and has no score; the checkpoint of step 16 is gone.
    scores = {4: 0.2, 8: 0.7, 12: 0.7, 16: 0.9}
    assert best_checkpoint(run, scores).address.endswith(checkpoint_name(8))
    with pytest.raises(ConfigError, match="no checkpoint with a label-free score"):
        best_checkpoint(run, {16: 0.9})
