"""The ledger: what it writes down is what it reads back, and how it ranks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store
from crossmost_ray.tuning.ledger import LEDGER_NAME, PLACES, Entry, Ledger, ranked
from crossmost_ray.tuning.watch import last_line


def test_a_sweep_is_read_back_as_it_was_left(tmp_path: Path) -> None:
    folder = Store(str(tmp_path))
    ledger = Ledger.start(folder, [{"optim.lr": 0.1}, {"optim.lr": 0.2}, {"optim.lr": 0.3}])
    first, second, third = ledger.entries
    assert (first, third) == ("trial-00000", "trial-00002")
    ledger.begin(first, {"optim.lr": 0.1})
    ledger.advance(first, epochs=2, score=0.5, seconds=7.0)
    ledger.end(first, "done")
    ledger.begin(second, {"optim.lr": 0.2})
    ledger.end(second, "failed", "the loss is nan")
    ledger.begin(third, {"optim.lr": 0.3})

    again = Ledger.read(folder)
    assert again.entries == ledger.entries
    assert [entry.trial for entry in again.with_status("pending", "running")] == [third]
    listed = json.loads((tmp_path / LEDGER_NAME).read_text())["trials"]
    assert listed[0] == {
        "trial": first,
        "settings": {"optim.lr": 0.1},
        "status": "done",
        "epochs": 2,
        "score": 0.5,
        "seconds": 7.0,
        "error": None,
        "started": again.entries[first].started,
    }
    assert listed[1]["error"] == "the loss is nan"

    again.reopen_failed()
    assert again.entries[second].status == "pending"
    assert again.entries[second].error is None
    assert again.entries[first].status == "done"


def test_a_trial_that_is_proposed_on_the_way_is_added(tmp_path: Path) -> None:
    ledger = Ledger.start(Store(str(tmp_path)), [])
    ledger.begin("trial-00000", {"seed": 1})
    assert Ledger.read(Store(str(tmp_path))).entries["trial-00000"].settings == {"seed": 1}


def test_taken_up_again_a_trial_keeps_the_time_it_first_began(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)), [Entry("trial-00000", {}, started="long ago")])
    assert ledger.begin("trial-00000", {}).started == "long ago"


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_what_is_no_score_is_written_as_none(tmp_path: Path, score: float | None) -> None:
    ledger = Ledger.start(Store(str(tmp_path)), [{}])
    ledger.advance("trial-00000", epochs=1, score=score, seconds=1.0)
    assert json.loads((tmp_path / LEDGER_NAME).read_text())["trials"][0]["score"] is None


@pytest.mark.parametrize("damage", [None, b"", b'{"trials": [{"tri', b'{"trials": [{"who": 1}]}'])
def test_a_damaged_ledger_is_named_with_the_way_out(tmp_path: Path, damage: bytes | None) -> None:
    if damage is not None:
        (tmp_path / LEDGER_NAME).write_bytes(damage)
    with pytest.raises(ConfigError, match=r"trials\.json can't be read.*another `name`"):
        Ledger.read(Store(str(tmp_path)))


ENTRIES = st.lists(
    st.builds(
        Entry,
        trial=st.uuids().map(str),
        settings=st.just({}),
        status=st.sampled_from(PLACES),
        score=st.none() | st.floats(-5, 5),
    ),
    max_size=12,
)


@given(ENTRIES)
def test_ranking_only_sorts_and_puts_finished_trials_and_high_scores_first(
    entries: list[Entry],
) -> None:
    listed = ranked(entries)
    assert sorted(id(one) for one in listed) == sorted(id(one) for one in entries)
    for one, after in itertools.pairwise(listed):
        assert PLACES.index(one.status) <= PLACES.index(after.status)
        if one.status == after.status and after.score is not None:
            assert one.score is not None
            assert one.score >= after.score


def test_the_last_line_of_a_traceback_says_why() -> None:
    told = (
        "Failure # 1 (occurred at noon)\n"
        "ray::ImplicitFunc.train() (pid=1, ip=127.0.0.1)\n"
        '  File "trial.py", line 3, in run\n'
        "ray.exceptions.RayTaskError(ConfigError): ray::_work() (pid=2)\n"
        "crossmost_ray.config.ConfigError: the loss is nan at step 3: lower optim.lr. So it is\n\n"
    )
    assert last_line(told) == "the loss is nan at step 3: lower optim.lr"
    assert last_line("ValueError: 3 is not 4\n") == "3 is not 4"
    assert last_line("killed: out of memory") == "killed: out of memory"
    assert last_line("ray.exceptions.OutOfMemoryError: 9 were killed. On it\nRead on\n") == (
        "9 were killed"
    )
    assert last_line("\n") == "it said nothing"
