"""Objects to pairs, without a cluster; tests/jobs streams them for real."""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.config import ConfigError, DataConfig
from crossmost_ray.data.decode import decode_points, decode_view, ring_views
from crossmost_ray.data.shards import BadRow, ShardCheck, list_shards
from crossmost_ray.data.stream import (
    MAX_NAMED_ROWS,
    BrokenViewError,
    Epochs,
    RawCollate,
    name_left_out,
    pair_rows,
    read_rows,
    steps_per_epoch,
)
from crossmost_ray.schema import SHARD_SCHEMA
from tests.synthetic import broken_pixels, encode, view, write_shards


@given(stored=st.integers(1, 40), data=st.data())
def test_used_views_are_distinct_and_evenly_spread(stored: int, data: st.DataObject) -> None:
    used = data.draw(st.integers(1, stored))
    ring = ring_views(used, stored)
    assert len(set(ring)) == used
    assert max(ring) < stored
    gaps = [b - a for a, b in zip(ring, [*ring[1:], ring[0] + stored], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def table_of(*views: list[bytes]) -> pa.Table:
    rows = [
        {
            "object_id": f"o{place}",
            "points": [[place, 0, 0], [place, 1, 0]],
            "views": list(encoded),
        }
        for place, encoded in enumerate(views)
    ]
    names = ["object_id", "points", "views"]
    return pa.Table.from_pylist(rows, pa.schema([SHARD_SCHEMA.field(name) for name in names]))


def test_each_used_view_becomes_a_pair_with_views_from_around_the_ring() -> None:
    table = table_of([b"a0", b"a1", b"a2", b"a3"], [b"b0", b"b1", b"b2", b"b3"])
    pairs = pair_rows(table, num_views=4, teacher_views=2, left_out=frozenset())
    assert pairs["object_id"].to_pylist() == ["o0"] * 4 + ["o1"] * 4
    assert pairs["views"].to_pylist() == [
        [b"a0", b"a2"],
        [b"a1", b"a3"],
        [b"a2", b"a0"],
        [b"a3", b"a1"],
        [b"b0", b"b2"],
        [b"b1", b"b3"],
        [b"b2", b"b0"],
        [b"b3", b"b1"],
    ]
    assert decode_points(pairs["points"])[4].tolist() == [[1, 0, 0], [1, 1, 0]]


def test_objects_left_out_leave_no_pair_and_shift_no_other() -> None:
    table = table_of([b"a0", b"a1"], [b"b0", b"b1", b"b2"], [b"c0", b"c1"]).slice(0)
    pairs = pair_rows(table, num_views=2, teacher_views=1, left_out=frozenset({"o0"}))
    assert pairs["object_id"].to_pylist() == ["o1", "o1", "o2", "o2"]
    assert pairs["views"].to_pylist() == [[b"b0"], [b"b1"], [b"c0"], [b"c1"]]


def test_a_slice_of_a_block_gives_its_own_pairs() -> None:
    table = table_of([b"a0", b"a1"], [b"b0", b"b1"], [b"c0", b"c1"]).slice(1, 1)
    pairs = pair_rows(table, num_views=2, teacher_views=1, left_out=frozenset())
    assert pairs["views"].to_pylist() == [[b"b0"], [b"b1"]]


def test_collating_decodes_and_reads_a_caption_only_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", num_objects=4, num_files=1)
    table = pq.read_table(next(folder.glob("*.parquet")))
    columns = ["object_id", "points", "views"]
    batch = RawCollate(96)(
        pair_rows(table.select(columns), num_views=2, teacher_views=2, left_out=frozenset())
    )
    assert batch.images.shape == (8, 2, 3, 96, 96)
    assert batch.points.shape == (8, 128, 3)
    assert batch.captions == ()
    ids = batch.object_id.tolist()
    assert ids[0::2] == ids[1::2]
    assert len(set(ids)) == 4
    captioned = RawCollate(96)(table.select([*columns, "captions"]))
    assert captioned.captions == (("ball",), ("box",), ("cone",), ("pillar",))


def pairs_of(folder: Path) -> pa.Table:
    table = pq.read_table(next(folder.glob("*.parquet")), columns=["object_id", "points", "views"])
    return pair_rows(table, num_views=3, teacher_views=2, left_out=frozenset())


def test_any_number_of_threads_decodes_alike(tmp_path: Path) -> None:
    pairs = pairs_of(write_shards(tmp_path / "shards", num_objects=5, num_files=1))
    alone, *others = (RawCollate(40, threads=number)(pairs) for number in (1, 2, 5))
    views = [view for row in pairs["views"].to_pylist() for view in row]
    expected = torch.from_numpy(np.stack([decode_view(view, 40) for view in views]))
    assert torch.equal(alone.images.flatten(0, 1), expected)
    assert alone.images.permute(0, 1, 3, 4, 2).is_contiguous(), "the channels lie last"
    for other in others:
        assert torch.equal(other.images, alone.images)
        assert torch.equal(other.points, alone.points)
        assert other.names == alone.names


@pytest.mark.parametrize("threads", [1, 3])
def test_a_broken_view_is_named_the_same_by_any_number_of_threads(
    tmp_path: Path, threads: int
) -> None:
    pairs = pairs_of(write_shards(tmp_path / "shards", num_objects=3, num_files=1))
    views = pairs["views"].to_pylist()
    views[4] = [b"no image", views[4][1]]
    column = pa.array(views, pairs.schema.field("views").type)
    broken = pairs.set_column(pairs.schema.get_field_index("views"), "views", column)
    name = broken["object_id"][4].as_py()
    told = rf"a view of the object '{name}' can't be decoded \(it is no WebP, PNG or JPEG image\)"
    with pytest.raises(BrokenViewError, match=told):
        RawCollate(40, threads=threads)(broken)


def test_objects_that_are_all_kept_are_not_copied_to_leave_some_out() -> None:
    table = table_of([b"a0"], [b"b0"])
    kept, filtered = (
        pair_rows(table, num_views=1, teacher_views=1, left_out=names)
        for names in (frozenset[str](), frozenset({"another"}))
    )
    assert kept.equals(filtered)


def config(batch_size: int, num_views: int = 12) -> DataConfig:
    return DataConfig(shards="x", batch_size=batch_size, num_views=num_views)


def test_steps_are_those_that_the_poorest_worker_can_take() -> None:
    row = BadRow("part-00000.parquet", 0, "o", "is broken")
    check = ShardCheck(num_objects=12, bad=(row,), files=("part-00000.parquet",))
    # 11 objects of 12 views are 132 pairs: 66 for each of two workers, 8 steps of 8.
    assert steps_per_epoch(check, config(16), 2, 2) == 8
    assert steps_per_epoch(check, config(132), 1, 1) == 1
    # An elastic run takes the same steps with one worker and with three, which leave one pair out.
    assert steps_per_epoch(check, config(16), 1, 2) == 8
    assert steps_per_epoch(check, config(22), 1, 3) == 6
    with pytest.raises(ConfigError, match=r"would be 6 with 3 workers.*take at least 12"):
        steps_per_epoch(check, config(8), 1, 3)
    with pytest.raises(ConfigError, match="132 pairs"):
        steps_per_epoch(check, config(133), 1, 1)


def test_what_reads_and_slices_does_without_torch() -> None:
    # A run starts half a dozen processes that import the stream and never see a tensor.
    look = "import sys, crossmost_ray.data.stream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


@pytest.mark.ray
def test_how_rows_are_cut_follows_from_the_shards_not_from_the_cluster(
    ray_cluster: None, tmp_path: Path
) -> None:
    # Blocks are what workers share. Eleven rows in three files; Ray alone would cut them in eight.
    shards = write_shards(tmp_path / "shards", num_objects=11, num_files=3)
    rows = read_rows(str(shards), list_shards(str(shards), ()), ("object_id",)).materialize()
    parts = [
        meta.num_rows for bundle in rows.iter_internal_ref_bundles() for meta in bundle.metadata
    ]
    assert parts == [4, 4, 3]
    assert [row["object_id"] for row in rows.take_all()] == [f"synthetic/0-{k}" for k in range(11)]


def test_a_view_that_decoding_finds_broken_is_named_by_its_object() -> None:
    good = encode(view(0, 0, np.random.default_rng(0)))
    table = table_of([good, good], [good, broken_pixels()], [good, good])
    with pytest.raises(
        BrokenViewError, match=r"a view of the object 'o1' can't be decoded \(.+\)$"
    ):
        RawCollate(32)(table)
    told = pickle.loads(pickle.dumps(BrokenViewError("o1", "why")))
    assert (told.object_id, told.reason) == ("o1", "why")


def test_of_many_rows_that_are_left_out_a_few_are_named() -> None:
    bad = [BadRow("part-00000.parquet", row, f"o{row}", "is broken") for row in range(100)]
    few = name_left_out(bad[:MAX_NAMED_ROWS])
    assert few[0] == "left out: part-00000.parquet, row 0 (o0): is broken"
    assert len(few) == MAX_NAMED_ROWS
    assert name_left_out(bad) == [*few, f"left out: {100 - MAX_NAMED_ROWS} more"]
    assert name_left_out([]) == []


class Source:
    """Epochs of batches that tell what they are: (epoch, place)."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self.begun: queue.Queue[int] = queue.Queue()
        self.open = False

    def begin(self, epoch: int) -> Generator[Any, None, None]:
        self.begun.put(epoch)
        assert not self.open, "Ray knows one iteration of a share at a time"
        self.open = True
        try:
            for place in range(self.num_batches):
                yield epoch, place
        finally:
            self.open = False


def test_every_epoch_gives_its_batches_less_those_that_were_taken_before() -> None:
    # The source has one more than every worker takes.
    epochs = Epochs(Source(4).begin, first=1, num_epochs=3, num_batches=3)
    assert list(epochs.batches(skip=2)) == [(1, 2)]
    assert list(epochs.batches()) == [(2, 0), (2, 1), (2, 2)]


def test_an_epoch_begins_while_the_last_step_of_the_one_before_is_taken() -> None:
    source = Source(3)
    epochs = Epochs(source.begin, first=0, num_epochs=2, num_batches=3)
    first = epochs.batches()
    assert [next(first), next(first)] == [(0, 0), (0, 1)]
    assert (source.begun.get(timeout=30), source.begun.empty()) == (0, True)
    assert next(first) == (0, 2)
    assert source.begun.get(timeout=30) == 1
    assert list(first) == []
    assert list(epochs.batches()) == [(1, 0), (1, 1), (1, 2)]
    assert source.begun.empty(), "none begins after the last"


def test_what_breaks_an_epoch_is_raised_where_its_batches_are_asked_for() -> None:
    def begin(epoch: int) -> Generator[Any, None, None]:
        if epoch == 1:
            raise BrokenViewError("a chair", "cut short")
        yield epoch

    epochs = Epochs(begin, first=0, num_epochs=2, num_batches=1)
    assert list(epochs.batches()) == [0]
    with pytest.raises(BrokenViewError, match="a chair"):
        next(epochs.batches())
