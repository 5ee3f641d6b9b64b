"""What the load benchmarks measure with, on real processes and against closed forms."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.apart import Watch, apart, held_mb
from benchmarks.compare import changes, is_worse, ratios
from benchmarks.copies import NUM_POINTS, NUM_VIEWS, SHARD_OBJECTS, write_copies
from benchmarks.marks import Mark, periods, split_epochs, split_start
from benchmarks.memory import (
    Point,
    growth,
    process_name,
    processes,
    pss_mb,
    roles,
    settled,
    sparkline,
    trend,
)
from benchmarks.plot import exponent, svg
from crossmost_ray.data.shards import check_file, class_names, list_shards
from crossmost_ray.data.stream import TRAIN_COLUMNS
from crossmost_ray.schema import SHARD_SCHEMA

EVER = (1,)
"""The life of a process that is never replaced."""


def test_processes_are_a_process_and_its_descendants() -> None:
    # A shell that has a child of its own, and tells when it has.
    command = "sleep 60 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
        found = processes(os.getpid())
        assert found[shell.pid] == "sh"
        assert found[sleeper] == "sleep"
        assert os.getppid() not in found
        assert set(processes(shell.pid)) == {shell.pid, sleeper}
        seen = roles(os.getpid())
        assert (seen[os.getpid()], seen[sleeper]) == ("driver", "services")
        os.kill(sleeper, 9)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["/opt/ray/raylet", "--worker=python default_worker.py"], "raylet"),
        (["/usr/bin/python3", "-u", "/opt/ray/default_worker.py", "--x"], "default_worker.py"),
        (["ray::ReadParquet->Split(4)", "", ""], "ray::ReadParquet->Split(4)"),
        (["python", "-m", "pytest"], "python"),
        ([""], ""),
    ],
)
def test_a_process_is_called_by_its_title_its_program_or_its_script(
    arguments: list[str], name: str
) -> None:
    assert process_name(arguments) == name


def test_memory_that_is_touched_is_counted() -> None:
    before = pss_mb(os.getpid())
    # Not from malloc, which may hand out again what a test before this one touched.
    with mmap.mmap(-1, 300_000_000) as held:
        for _ in range(300):
            held.write(b"1" * 1_000_000)
        after = pss_mb(os.getpid())
    assert before is not None
    assert after is not None
    # Libraries that a process beside this one has just loaded, or let go, are shared out anew.
    assert after - before == pytest.approx(300, abs=60)


def test_a_process_that_is_gone_has_no_memory() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert pss_mb(gone.pid) is None


@given(slope=st.floats(-50, 50), start=st.floats(100, 1000))
def test_growth_of_a_line_is_its_slope_whatever_a_quarter_of_the_points_do(
    slope: float, start: float
) -> None:
    points = [
        Point(step, 9000.0 if step % 4 == 0 else start + slope * step / 100, EVER)
        for step in range(40)
    ]
    # Of 780 pairs, 30 * 29 / 2 = 435 lie on the line: more than half, so their median is its slope.
    assert growth(points) == pytest.approx(slope, abs=1e-6)


def test_growth_sees_a_leak_that_restarts_take_back() -> None:
    # 20 MB per 100 steps, and 100 steps a life: over all of them the memory stays where it is.
    points = [Point(step, 300 + 0.2 * (step % 100), (step // 100,)) for step in range(0, 400, 5)]
    assert growth(points) == pytest.approx(20)
    as_one = growth([point._replace(life=EVER) for point in points])
    assert as_one is not None
    assert as_one < 10


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Point(0, 1.0, EVER)],
        [Point(7, 1.0, EVER), Point(7, 2.0, EVER)],
        [Point(0, 1.0, (1,)), Point(9, 2.0, (2,))],
    ],
)
def test_growth_is_not_told_from_less_than_two_steps_of_a_life(points: list[Point]) -> None:
    assert growth(points) is None


def test_the_first_third_of_every_life_does_not_count() -> None:
    first = [Point(step, 1.0, (1,)) for step in range(0, 31, 10)]
    second = [Point(step, 1.0, (2,)) for step in range(30, 91, 10)]
    assert [point.step for point in settled(first + second)] == [10, 20, 30, 50, 60, 70, 80, 90]


def test_a_trend_begins_when_warm_and_peaks_anywhere() -> None:
    # 600 MB once while starting; from step 30 on 400 MB and 10 MB more every 100 steps.
    points = [Point(step, 600 if step < 30 else 397 + step / 10, EVER) for step in range(91)]
    seen = trend(points)
    assert seen.peak == 600
    assert seen.start == 397 + 3.2, "the median of steps 30 to 34"
    assert seen.end == 397 + 8.8, "the median of steps 86 to 90"
    assert seen.slope == pytest.approx(10)


def test_a_sparkline_goes_from_nothing_to_its_largest() -> None:
    assert sparkline([0, 1, 2, 4, 8], width=60) == " ▁▂▄█"
    assert sparkline([5.0] * 100, width=10) == "█" * 10
    assert sparkline([]) == ""


def test_copies_are_shards_that_training_takes_each_object_once(tmp_path: Path) -> None:
    shards, number = str(tmp_path / "copies"), SHARD_OBJECTS + 6
    mb = write_copies(Path(shards), number)
    names = list_shards(shards, TRAIN_COLUMNS)
    checks = [
        check_file(
            shards, name, TRAIN_COLUMNS, num_points=NUM_POINTS, num_views=NUM_VIEWS, view_size=96
        )
        for name in names
    ]
    assert [check.num_objects for check in checks] == [SHARD_OBJECTS, 6]
    assert not [row for check in checks for row in check.bad]
    table = pa.concat_tables(pq.read_table(tmp_path / "copies" / name) for name in names)
    assert table.schema.equals(SHARD_SCHEMA)
    assert len(set(table["object_id"].to_pylist())) == number
    assert len(class_names(None, shards)) == 16
    # The points alone: 12 bytes each. What is told is what is stored and what must be moved.
    stored = sum(path.stat().st_size for path in Path(shards).glob("*.parquet")) / 1e6
    assert mb > number * NUM_POINTS * 12 / 1e6
    assert stored == pytest.approx(mb, rel=0.1)


def line(size: int, ratio: float, **more: object) -> dict[str, object]:
    ways = {"ours": {"s": 1.0, "ratio": ratio}, "published": {"ratio": 1.0}}
    return {"date": str(ratio), "batch_size": size, "groups": ways, **more}


def test_ratios_are_found_wherever_they_lie() -> None:
    assert dict(ratios(line(4, 2.5))) == {"groups / ours": 2.5}
    assert dict(ratios({"ratio": 3, "deep": {"er": {"ratio": 0.5}}})) == {"": 3, "deep / er": 0.5}


def test_the_newest_line_is_compared_with_the_middle_of_those_at_its_settings() -> None:
    lines = [line(4, 2.0), line(4, 9.0), line(8, 1.0), line(4, 3.0), line(4, 2.2, load=7.5)]
    # Of 2, 9 and 3 the middle; the load of the machine is no setting, the batch is.
    assert list(changes(lines)) == [("groups / ours", 3.0, 2.2)]


def test_what_is_gained_must_not_fall_and_what_is_paid_must_not_rise() -> None:
    assert is_worse(2.0, 1.6, cost=False)
    assert not is_worse(2.0, 1.8, cost=False)
    assert not is_worse(2.0, 3.0, cost=False)
    assert is_worse(1.0, 1.2, cost=True)
    assert not is_worse(1.0, 0.5, cost=True)


@given(power=st.floats(-1, 3), factor=st.floats(0.01, 100))
def test_the_exponent_of_a_power_is_that_power(power: float, factor: float) -> None:
    points = [(x, factor * x**power) for x in (10.0, 300.0, 7000.0)]
    assert exponent(points) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)], [(1, 0), (2, 1)]])
def test_there_is_no_exponent_of_one_size_or_of_nothing(points: list[tuple[float, float]]) -> None:
    assert exponent(points) is None


def test_a_picture_holds_a_point_for_each_measure_and_says_how_fast_it_grows() -> None:
    panels = {
        "seconds": {"a < b": [(10.0, 1.0), (100.0, 10.0), (1000.0, 0.0)]},
        "MB": {"c": [(10.0, 5.0), (1000.0, 5.0)], "nothing": [(10.0, 0.0)]},
    }
    drawing = ElementTree.fromstring(svg("objects", panels))
    texts = [part.text for part in drawing.iter() if part.tag.endswith("text")]
    said = {"a < b, exponent 1.00", "c, exponent 0.00", "nothing", "seconds", "MB", "objects"}
    assert said | {"1,000"} <= set(texts)
    circles = [part for part in drawing.iter() if part.tag.endswith("circle")]
    assert len(circles) == 4, "none for what is not above 0"
    (_, low), (_, high) = (
        (float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in circles[:2]
    )
    assert high < low, "more is further up"


def hold(watch: Watch, mb: int) -> None:
    for name, size in (("large", mb), ("small", mb // 4)):
        # Straight from the system: what earlier tests have freed may still lie in the process.
        with watch.part(name), mmap.mmap(-1, size * 1_000_000) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
    watch.note("told", 7.0)


def test_work_apart_is_measured_part_by_part_and_leaves_nothing_here() -> None:
    before = held_mb("VmRSS")
    found = apart(hold, 200)
    assert found["told"] == 7
    assert found["large MB"] == pytest.approx(200, abs=30)
    # The peak of the part before it is forgotten.
    assert found["small MB"] == pytest.approx(50, abs=30)
    assert found["large s"] > 0
    assert held_mb("VmRSS") - before < 100


def run_marks() -> list[Mark]:
    """A run whose every part takes another time: two epochs of three steps each."""
    starts = [
        *(Mark("python", 1, 1), Mark("config", 2, 2), Mark("imports", 5, 5)),
        *(Mark("inspect_model", 5, 6), Mark("list_shards", 6, 6.5), Mark("connect", 7, 10)),
        *(Mark("check_shards", 10, 12), Mark("worker", 20, 20), Mark("build_task", 20, 21)),
        *(Mark("build_optimizer", 21, 21.5), Mark("_restore", 21.5, 22)),
    ]
    steps = [Mark("train_step", 25 + k, 25.8 + k) for k in range(3)]
    end = [
        *(Mark("finish_epoch", 28, 30), Mark("_write_down", 30, 31)),
        Mark("_save_and_report", 31, 35),
    ]
    more = [Mark("train_step", 36 + 2 * k, 37 + 2 * k) for k in range(3)]
    last = [
        *(Mark("finish_epoch", 42, 43), Mark("_write_down", 43, 44)),
        *(Mark("_save_and_report", 44, 45), Mark("fit", 13, 50)),
    ]
    return [Mark("spawn", 0, 0), *starts, *steps, *end, *more, *last]


def test_the_start_of_a_run_is_split_without_rest() -> None:
    found = split_start(run_marks())
    assert found["whole"] == 25.8
    assert found.pop("whole") == pytest.approx(sum(found.values()))
    assert found["imports"] == 3
    assert found["ray.init"] == 3
    assert found["start worker"] == 7
    assert found["first batch"] == 3
    assert found["other"] == pytest.approx(0.5 + 1)


def test_what_lies_between_epochs_is_split_without_rest() -> None:
    found = split_epochs(run_marks())
    assert found.pop("whole") == pytest.approx(36 - 27.8)
    assert found == pytest.approx(
        {"votes and health": 2, "write votes": 1, "checkpoint, report": 4, "next batch": 1.2}
    )


def test_periods_of_steps_lie_within_epochs() -> None:
    marks = run_marks()
    # Of each epoch's three steps the first is left out, and the second has none before it.
    assert periods(marks, "train_step") == pytest.approx([1, 2])
    decoded = [Mark("decoded step", 60 + k, 60.5 + k) for k in range(3)]
    assert periods([*marks, *decoded], "decoded step") == [0.5, 0.5]
