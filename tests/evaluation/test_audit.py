"""The audit of conventions: on the embedded model and furniture, and on answers made up."""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crossmost_ray.config import ConfigError, parse_config, resolve_path
from crossmost_ray.data.decode import decode_points, hash_id
from crossmost_ray.evaluation.audit import (
    Audit,
    AuditConfig,
    Sample,
    audit,
    audit_table,
    conclude,
    read_sample,
    state_facts,
)
from crossmost_ray.evaluation.conventions import (
    IMAGE_CONVENTIONS,
    UP_AXES,
    mirror_of,
    sorted_ups,
    turn_up,
    write_axes,
)
from crossmost_ray.evaluation.verdict import Scores, information, judge, score
from crossmost_ray.models.classifier import ModelSpec
from crossmost_ray.prepare.axes import axes_matrix
from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA
from tests.synthetic import CLASSES, tiny_model, write_shards

MODEL = "assets:models/furniture-start"
FURNITURE = resolve_path("assets:furniture/target_a")
ROOT = Path(__file__).parents[2]
AS_THEY_ARE = axes_matrix("xyz")


def clouds(shards: Path) -> np.ndarray:
    """Points of all objects, in the order of the shards."""
    files = sorted(shards.glob("*.parquet"))
    return np.stack([cloud for f in files for cloud in decode_points(pq.read_table(f)["points"])])


def write_furniture(
    folder: Path,
    *,
    axes: str = "xyz",
    convert: Callable[[np.ndarray], np.ndarray] = lambda image: image,
) -> Path:
    """The embedded half a, without labels, with points and images changed. Of the twelve views, the
    four that an audit looks at."""
    folder.mkdir()
    for file in sorted(FURNITURE.glob("*.parquet")):
        table = pq.read_table(file)
        rows = table.to_pylist()
        for row, cloud in zip(rows, decode_points(table["points"]), strict=True):
            row["label"] = None
            row["points"] = list((cloud @ axes_matrix(axes).T).astype(np.float16))
            row["views"] = [png(convert(pixels(row["views"][place]))) for place in (0, 3, 6, 9)]
        pq.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), folder / file.name)
    manifest = (FURNITURE / MANIFEST_NAME).read_text(encoding="utf-8")
    (folder / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
    return folder


def pixels(view: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view)).convert("RGB"))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def run(shards: Path | str, model: Path | str = MODEL, **keys: object) -> Audit:
    values = {"model": str(model), "shards": str(shards)} | keys
    return audit(parse_config(AuditConfig, values, "the test"))


# The embedded model on the embedded furniture ----------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> Audit:
    return run(FURNITURE)


def test_furniture_as_it_is_suits_its_model(stored: Audit) -> None:
    lines = conclude(stored, AS_THEY_ARE)
    assert lines[0] == "points: the stored orientation suits the model (+y up)"
    # Chairs and tables look the same in a mirror. What nobody can tell is not claimed.
    assert lines[1].startswith("points: cannot tell whether left and right are swapped")
    assert lines[2:] == ["images: as stored, they suit the model"]
    assert stored.num_objects == 64
    assert stored.verdict.up.shares["+y"] > 0.99
    assert stored.facts[0] == "up axis: +y in the manifest, as in the model's training"
    assert stored.facts[1].startswith("scale: the clouds lie in the unit sphere")


def test_the_columns_are_the_scores_and_the_oracle_is_named_so(stored: Audit) -> None:
    table = audit_table(stored)
    assert table.row_count == 12 + 4 == len(stored.points) + len(stored.images)
    heads = [str(column.header) for column in table.columns]
    assert heads[-1] == "oracle top-1"
    # Not the verdict's to know: it has no argument that could hold a label.
    assert set(inspect.signature(judge).parameters) == {"plain", "mirrored", "images"}
    accuracy = {name: scores.oracle_top1 for name, scores in stored.points.items()}
    assert accuracy["+y up"] > 50 > 25 > accuracy["+z up"], "the embedded model's card says 74.7"


def test_furniture_on_its_back_is_turned_up_again_without_a_label(
    stored: Audit, tmp_path: Path
) -> None:
    # By 90 degrees about x: y goes to z, and z to -y.
    shards = write_furniture(tmp_path / "lying", axes="x-zy")
    lying = run(shards)
    assert lying.verdict.up.best == "+z"
    line = conclude(lying, AS_THEY_ARE)[0]
    assert line == (
        "points: the model understands these objects better with +z up: "
        "set `axes: xz-y` in the source's config (now `xyz`)"
    )
    turned = clouds(shards)
    assert not np.allclose(turned, clouds(FURNITURE))
    assert np.array_equal(turned @ axes_matrix("xz-y").T, clouds(FURNITURE))
    # Had the source's config turned them so, the string takes that back.
    again = conclude(lying, axes_matrix("x-zy"))[0]
    assert "set `axes: xyz` in the source's config (now `x-zy`)" in again

    assert_same(lying.points["+z up"], stored.points["+y up"])


def assert_same(found: Scores, expected: Scores) -> None:
    """The same answers, once with labels and once without."""
    assert found.oracle_top1 is None
    assert expected.oracle_top1 is not None
    expected = dataclasses.replace(expected, oracle_top1=None)
    assert dataclasses.astuple(found)[:-1] == pytest.approx(dataclasses.astuple(expected)[:-1])


def test_swapped_channels_are_noticed(stored: Audit, tmp_path: Path) -> None:
    swapped = run(write_furniture(tmp_path / "bgr", convert=lambda image: image[..., ::-1]))
    choice = swapped.verdict.images
    assert choice.best == "channels swapped"
    # It wins 93 % of the resamples: enough to be named, too close to the bound to be relied on.
    assert choice.shares["channels swapped"] > 0.8
    assert choice.shares["as stored"] < 0.05
    assert conclude(swapped, AS_THEY_ARE)[-1] != "images: as stored, they suit the model"
    assert_same(swapped.images["channels swapped"], stored.images["as stored"])
    assert_same(swapped.images["as stored"], stored.images["channels swapped"])
    assert swapped.verdict.up.best == "+y"
    assert swapped.verdict.up.is_sure, "wrong images do not spoil the verdict on points"


# The verdict on answers made up ------------------------------------------------------------------


def one_hot(classes: np.ndarray, num_classes: int = 4, sure: float = 1.0) -> np.ndarray:
    return sure * np.eye(num_classes)[classes] + (1 - sure) / num_classes


def conventions(right: np.ndarray, wrong: np.ndarray, best: str) -> dict[str, np.ndarray]:
    return {up: right if up == best else wrong for up in UP_AXES}


EVERYTHING = np.arange(64) % 4
NOTHING = np.zeros(64, np.int64)
IMAGES = {name: one_hot(EVERYTHING, sure=0.9) for name in IMAGE_CONVENTIONS}


def test_information_of_answers_that_can_be_reckoned() -> None:
    weights = np.full((1, 64), 1 / 64)
    answers = np.stack(
        [
            one_hot(EVERYTHING),  # sure, each class as often: log C
            one_hot(NOTHING),  # sure, always the same: 0
            one_hot(EVERYTHING, sure=0.0),  # never sure: 0
            one_hot(EVERYTHING % 2),  # sure, two of four classes: log 2
        ]
    )
    assert information(weights, answers)[0] == pytest.approx([1, 0, 0, math.log(2) / math.log(4)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 9))
def test_information_is_a_share_and_knows_no_order(seed: int, n: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    answers = rng.dirichlet(np.full(num_classes, 0.3), size=(2, n))
    weights = rng.dirichlet(np.ones(n), size=3)
    shares = information(weights, answers)
    assert shares.min() > -1e-9, "Jensen: the entropy of a mean is at least the mean entropy"
    assert shares.max() < 1 + 1e-9
    objects, classes = rng.permutation(n), rng.permutation(num_classes)
    again = information(weights[:, objects], answers[:, objects][..., classes])
    assert again == pytest.approx(shares)


@pytest.mark.parametrize("best", UP_AXES)
def test_the_axis_whose_answers_differ_from_object_to_object_wins(best: str) -> None:
    points = conventions(one_hot(EVERYTHING, sure=0.9), one_hot(NOTHING), best)
    verdict = judge(points, points, IMAGES)
    assert verdict.up.best == best
    assert verdict.up.shares[best] == 1
    assert verdict.images.is_sure


@given(st.integers(0, 2**32 - 1), st.integers(16, 80), st.integers(2, 45))
def test_what_is_stored_wins_a_tie(seed: int, n: int, num_classes: int) -> None:
    # Grey images, say: summed in another order, equal scores may differ in their last digits.
    rng = np.random.default_rng(seed)
    points = {up: rng.dirichlet(np.full(num_classes, 0.2), size=n) for up in UP_AXES}
    answers = rng.dirichlet(np.full(num_classes, 0.2), size=n)
    verdict = judge(points, points, dict.fromkeys(IMAGE_CONVENTIONS, answers))
    assert verdict.images.best == "as stored"
    assert verdict.images.shares["as stored"] == 1
    assert verdict.mirrored.shares["plain"] == 1


def test_agreement_decides_where_both_axes_are_equally_sure() -> None:
    # The wrong axis is as sure and as diverse, but it names other classes than the images.
    points = conventions(one_hot(EVERYTHING), one_hot((EVERYTHING + 1) % 4), "-z")
    verdict = judge(points, points, IMAGES)
    assert verdict.up.best == "-z"
    assert verdict.up.is_sure


def test_both_kinds_of_mistake_are_found_at_once() -> None:
    points = conventions(one_hot(EVERYTHING), one_hot(NOTHING, sure=0.9), "-y")
    images = {name: one_hot((EVERYTHING + 2) % 4, sure=0.5) for name in IMAGE_CONVENTIONS}
    images["upside down"] = one_hot(EVERYTHING, sure=0.9)
    verdict = judge(points, points, images)
    assert (verdict.up.best, verdict.images.best) == ("-y", "upside down")
    lines = conclude(Audit(64, "y", {}, {}, verdict, []), AS_THEY_ARE)
    assert "better with -y up: set `axes: -x-yz` in the source's config (now `xyz`)" in lines[0]
    assert lines[-1] == (
        "images: the model understands these objects better with their images upside down: "
        "save them with the top row first, and prepare the shards anew"
    )


def test_a_little_better_is_no_reason_to_change_and_much_better_is() -> None:
    # Without agreement to gain, the score is the information, which grows with how sure they are.
    points = conventions(one_hot(EVERYTHING, sure=0.9), one_hot(NOTHING), "+y")
    images = {name: np.full((64, 4), 0.25) for name in IMAGE_CONVENTIONS}
    for sure, mirrored in ((0.91, False), (0.99, True)):
        other = points | {"+y": one_hot(EVERYTHING, sure=sure)}
        choice = judge(points, other, images).mirrored
        assert choice.best == "mirrored"
        assert choice.is_sure is mirrored
        assert choice.shares["plain"] == 0


def test_a_mirror_that_suits_the_model_is_in_the_axes() -> None:
    points = conventions(one_hot(NOTHING), one_hot(NOTHING), "+y")
    points["+z"] = one_hot(EVERYTHING, sure=0.5)
    mirrored = points | {"+z": one_hot(EVERYTHING)}
    result = Audit(64, "y", {}, {}, judge(points, mirrored, IMAGES), [])
    (line, _) = conclude(result, AS_THEY_ARE)
    assert "with +z up, mirrored left to right: set `axes: -xz-y`" in line


def test_a_model_that_knows_nothing_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    points = {up: rng.dirichlet(np.ones(4), size=64) for up in UP_AXES}
    images = {name: rng.dirichlet(np.ones(4), size=64) for name in IMAGE_CONVENTIONS}
    result = Audit(64, "y", {}, {}, judge(points, points, images), [])
    lines = conclude(result, AS_THEY_ARE)
    assert lines[0].startswith("points: cannot tell which axis is up: of 1000 resamples, ")
    assert lines[-1].startswith("images: cannot tell how they are meant: of 1000 resamples, ")


def test_few_objects_tell_nothing_however_they_agree() -> None:
    points = conventions(one_hot(EVERYTHING[:15]), one_hot(NOTHING[:15]), "+z")
    verdict = judge(points, points, {name: one_hot(EVERYTHING[:15]) for name in IMAGE_CONVENTIONS})
    assert verdict.up.shares["+z"] > 0.9
    assert not verdict.up.is_sure
    assert "15 objects are too few" in verdict.up.doubt


def test_scores_of_answers_that_can_be_reckoned() -> None:
    labels = np.where(np.arange(64) < 32, EVERYTHING, -1)
    scores = score(one_hot(EVERYTHING, sure=0.6), one_hot(NOTHING), labels)
    assert scores.confidence == pytest.approx(70)  # 0.6 + 0.4 / 4
    assert scores.entropy == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.1))
    assert scores.information == pytest.approx(100 * (1 - scores.entropy / math.log(4)))
    # Of four objects one is of the class that the other tower names: (0.7 + 3 * 0.1) / 4.
    assert scores.agreement == pytest.approx(25)
    assert scores.oracle_top1 == 100
    assert score(one_hot(NOTHING), one_hot(NOTHING), np.full(64, -1)).oracle_top1 is None


# Conventions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_up", ["x", "y", "z"])
def test_each_turn_brings_its_axis_up_and_mirrors_nothing(model_up: str) -> None:
    ups = sorted_ups(model_up)
    assert ups[0] == f"+{model_up}"
    assert sorted(ups) == sorted(UP_AXES)
    up = axes_matrix("xyz")["xyz".index(model_up)]
    assert np.array_equal(turn_up(ups[0], model_up), np.eye(3))
    for name in ups:
        turn = turn_up(name, model_up)
        stored = (-1 if name[0] == "-" else 1) * AS_THEY_ARE["xyz".index(name[1])]
        assert np.array_equal(stored @ turn.T, up)
        assert np.linalg.det(turn) == pytest.approx(1)
        assert np.array_equal(axes_matrix(write_axes(turn)), turn)
    mirror = mirror_of(model_up)
    assert np.array_equal(up @ mirror.T, up)
    assert np.linalg.det(mirror) == pytest.approx(-1)


def test_axes_are_written_as_they_are_read() -> None:
    for letters in itertools.permutations("xyz"):
        for signs in itertools.product(("", "-"), repeat=3):
            axes = "".join(map("".join, zip(signs, letters, strict=True)))
            assert write_axes(axes_matrix(axes)) == axes
            assert yaml.safe_load(f"axes: {axes}") == {"axes": axes}, "no quotes are needed"


def test_image_conventions_do_what_they_say_and_undo_themselves() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert IMAGE_CONVENTIONS["channels swapped"](image)[0].equal(image[2])
    assert IMAGE_CONVENTIONS["upside down"](image)[:, 0].equal(image[:, 1])
    assert IMAGE_CONVENTIONS["inverted"](image)[0, 0, 0] == 255
    for convert in IMAGE_CONVENTIONS.values():
        assert convert(convert(image)).equal(image)


# Objects -----------------------------------------------------------------------------------------


def test_objects_come_evenly_from_the_shards_by_the_lowest_hashes(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=20, num_files=3)
    files = sorted(file.name for file in shards.glob("*.parquet"))
    sample = read_sample(str(shards), files, 9, 48)
    expected = []
    for file in files:
        table = pq.read_table(shards / file)  # of 7, 7 and 6 objects: 3 each
        rows = sorted(
            range(table.num_rows), key=lambda row: hash_id(table["object_id"][row].as_py())
        )
        expected += [decode_points(table["points"])[row] for row in sorted(rows[:3])]
    assert np.array_equal(sample.points.numpy(), np.stack(expected))
    assert sample.images.shape == (9, 4, 3, 48, 48)
    assert sample.colored == 9
    assert len(read_sample(str(shards), files, 999, 48).points) == 20, "at most all of them"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("nan", "points are NaN or infinite"),
        ("no_points", "it has no points"),
        ("bad_view", "it is no WebP, PNG or JPEG image"),
        ("null_view", "it is no WebP, PNG or JPEG image"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, fault: str, problem: str) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=6, num_files=2, corrupt={4: fault})
    with pytest.raises(ConfigError) as error:
        read_sample(str(shards), sorted(file.name for file in shards.glob("*.parquet")), 6, 48)
    assert f"part-00001.parquet, row 1 (synthetic/0-4) can't be used: {problem}" in str(error.value)


def test_shards_that_cannot_be_used_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder of shards"):
        run(tmp_path / "nowhere", tmp_path / "no-model")
    file = tmp_path / "part-00000.parquet"
    pq.write_table(SHARD_SCHEMA.empty_table(), file)
    with pytest.raises(ConfigError, match="hold no object"):
        read_sample(str(tmp_path), [file.name], 6, 48)
    pq.write_table(SHARD_SCHEMA.empty_table().drop_columns(["views"]), file)
    with pytest.raises(ConfigError, match="lacks the column views"):
        run(tmp_path, tmp_path / "no-model")


def test_facts_say_what_contradicts_the_model() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(2, 500, 3))
    cloud -= cloud.mean(axis=1, keepdims=True)
    cloud /= np.linalg.norm(cloud, axis=-1).max(axis=1)[:, None, None]
    points = torch.from_numpy(cloud).float()
    grey = torch.full((2, 4, 3, 8, 8), 7, dtype=torch.uint8)
    colored = grey.clone()
    colored[1, 0, 2] = 200
    spec = ModelSpec("vit_small_64", "pointbert_small")
    good = state_facts(Sample(points, colored, [None] * 2, 1), {"up_axis": "+y"}, spec)
    bad = state_facts(Sample(points + 0.5, grey, [None] * 2, 0), {"up_axis": "+z"}, spec)
    silent = state_facts(Sample(points * 3, grey, [None] * 2, 0), {}, spec)
    assert good[0] == "up axis: +y in the manifest, as in the model's training"
    assert bad[0] == "up axis: +z in the manifest, BUT +y in the model's training"
    assert silent[0] == "up axis: not stated by a manifest; +y in the model's training"
    assert ["NOT in the unit sphere" in facts[1] for facts in (good, bad, silent)] == [
        False,
        True,
        True,
    ]
    assert good[3].startswith("colour: in the views of 1 of 2 objects, and on the points of 1,")
    assert bad[3].startswith("colour: in the views of 0 of 2 objects, and on the points of 0,")


# The job -----------------------------------------------------------------------------------------


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
    runpy.run_path(str(ROOT / "jobs" / "audit.py"), run_name="__main__")


def test_the_job_prints_table_facts_and_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=8, labels=False)
    model = tiny_model(tmp_path / "model")
    arguments = ["--objects", "5", "--classes", "[ball, box]", "--templates", "['one {}.']"]
    run_job(monkeypatch, str(model), str(shards), *arguments, "--axes=-yxz")
    printed = capsys.readouterr().out
    assert "5 objects under each convention" in printed
    assert "up axis: +y in the manifest" in printed
    assert "points: cannot tell which axis is up: 5 objects are too few" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no model folder 'no/model'"),
        (["--axes", "xxz"], "--axes: axes 'xxz' must name x, y and z once each"),
        (["--objects", "0"], "objects: Input should be greater than or equal to 1, got 0"),
        (["--classes", "no-such-list"], "there is no list and no file 'no-such-list'"),
        (["--classes", "[chair"], "while parsing a flow sequence"),
        (["--templates", "['a chair.']"], "must hold {} once"),
    ],
)
def test_the_job_ends_with_one_line_of_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=2, num_files=1)
    with pytest.raises(SystemExit) as stopped:
        run_job(monkeypatch, "no/model", str(shards), *arguments)
    # A text as exit code is printed to stderr, and the process ends with 1.
    assert str(stopped.value.code).startswith("error: ")
    assert message in str(stopped.value.code)
    assert "\n" not in str(stopped.value.code)


def test_classes_come_from_the_manifest_unless_they_are_given(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_objects=4, num_files=1)
    model = tiny_model(tmp_path / "model")
    assert run(shards, model).images["as stored"].oracle_top1 is not None
    assert run(shards, model, classes=["cup", "fork"]).images["as stored"].oracle_top1 is None
    manifest = json.loads((shards / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert manifest.pop("classes") == list(CLASSES)
    (shards / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match="names classes"):
        run(shards, model)
