"""The shards that come with the package: every row of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from crossmost_ray.config import resolve_path
from crossmost_ray.prepare.render import decode_view, foreground_share
from crossmost_ray.schema import MANIFEST_NAME, SHARD_SCHEMA

FOLDER = resolve_path("assets:furniture")
DATASETS = ("source", "target_a", "target_b", "target_other")
TARGET_CATALOGUES = {"blendswap_cc0", "blendswap_cc_by", "kator_legaz"}


def shards_of(dataset: str) -> list[Path]:
    return sorted((FOLDER / dataset).glob("*.parquet"))


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    return {name: json.loads((FOLDER / name / MANIFEST_NAME).read_text()) for name in DATASETS}


@pytest.fixture(scope="module")
def facts() -> dict[str, list[dict[str, Any]]]:
    """What is known of each row besides its arrays, in the order of the shards."""
    columns = [name for name in SHARD_SCHEMA.names if name not in ("points", "colors", "views")]
    return {
        name: [
            row
            for path in shards_of(name)
            for row in pq.read_table(path, columns=columns).to_pylist()
        ]
        for name in DATASETS
    }


@pytest.mark.parametrize("path", [p for name in DATASETS for p in shards_of(name)], ids=str)
def test_every_row_of_a_shard_is_usable(path: Path, manifests: dict[str, dict[str, Any]]) -> None:
    manifest = manifests[path.parent.name]
    cameras = manifest["cameras"]
    table = pq.read_table(path)
    assert table.schema.equals(SHARD_SCHEMA)
    for row in table.to_pylist():
        points = np.array(row["points"], np.float32)
        assert points.shape == (manifest["num_points"], 3), row["object_id"]
        assert manifest["num_points"] >= 2048
        assert np.isfinite(points).all(), row["object_id"]
        # Half precision moves a coordinate of up to 1 by up to 2^-12.
        assert np.linalg.norm(points, axis=-1).max() == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-3)
        # Some models state no colour at all.
        assert row["colors"] is None or np.shape(row["colors"]) == points.shape
        assert len(row["views"]) == cameras["num_views"] == len(cameras["views"])
        for data in row["views"]:
            view = decode_view(data)
            assert view.shape == (cameras["resolution"], cameras["resolution"], 3)
            # The codec blurs what is thin, so a little less than `prepare` asks.
            share = foreground_share(view, cameras["background"])
            assert share > cameras["least_foreground"] / 2, row["object_id"]
            assert view.std() > 1, row["object_id"]


def test_checksums_and_sizes_are_those_of_the_manifest(
    manifests: dict[str, dict[str, Any]],
) -> None:
    for name, manifest in manifests.items():
        assert [shard["file"] for shard in manifest["shards"]] == [p.name for p in shards_of(name)]
        for shard in manifest["shards"]:
            data = (FOLDER / name / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"], (name, shard["file"])
            assert len(data) == shard["bytes"]


def test_counts_are_those_of_the_manifest(
    manifests: dict[str, dict[str, Any]], facts: dict[str, list[dict[str, Any]]]
) -> None:
    for name, manifest in manifests.items():
        rows, counts = facts[name], manifest["counts"]
        assert counts["rows"] == len(rows) == sum(shard["rows"] for shard in manifest["shards"])
        for key, column in (("classes", "label"), ("sources", "source"), ("licenses", "license")):
            values = [row[column] or "null" for row in rows]
            assert counts[key] == {value: values.count(value) for value in sorted(set(values))}


def test_everything_fits_into_forty_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40e6


def test_all_but_a_few_objects_state_their_colours(manifests: dict[str, dict[str, Any]]) -> None:
    for name, manifest in manifests.items():
        colored = [
            color is not None
            for path in shards_of(name)
            for color in pq.read_table(path, columns=["colors"])["colors"].to_pylist()
        ]
        assert sum(colored) == manifest["colors"]["objects_with"]
        assert sum(colored) > 0.9 * len(colored)


def test_ids_are_unique_over_all_datasets(facts: dict[str, list[dict[str, Any]]]) -> None:
    ids = [row["object_id"] for rows in facts.values() for row in rows]
    assert len(ids) == len(set(ids))
    assert len(ids) > 850


def test_domains_do_not_mix(facts: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in facts.items():
        from_target = {row["source"] in TARGET_CATALOGUES for row in rows}
        assert from_target == {name != "source"}


def test_halves_follow_the_hash_of_the_id(facts: dict[str, list[dict[str, Any]]]) -> None:
    for half in "ab":
        for row in facts[f"target_{half}"]:
            digest = hashlib.sha256(row["object_id"].encode()).hexdigest()
            assert int(digest, 16) % 2 == "ab".index(half), row["object_id"]


def test_the_halves_hold_labelled_objects_and_the_rest_none(
    facts: dict[str, list[dict[str, Any]]], manifests: dict[str, dict[str, Any]]
) -> None:
    for name, rows in facts.items():
        labels = {row["label"] for row in rows}
        if name == "target_other":
            assert labels == {None}
        else:
            assert labels - {None} <= set(manifests[name]["classes"])
            assert (None in labels) == (name == "source")


def test_only_source_objects_have_their_class_among_the_captions(
    facts: dict[str, list[dict[str, Any]]],
) -> None:
    for name, rows in facts.items():
        for row in rows:
            taxonomy = [row["label"]] if name == "source" and row["label"] else []
            assert row["captions"][1:] == taxonomy, row["object_id"]
            assert row["captions"][0], row["object_id"]


def test_fourteen_classes_have_five_objects_on_both_sides(
    facts: dict[str, list[dict[str, Any]]], manifests: dict[str, dict[str, Any]]
) -> None:
    classes = manifests["source"]["classes"]
    assert len(classes) >= 14
    assert all(manifest["classes"] == classes for manifest in manifests.values())
    source = [row["label"] for row in facts["source"]]
    target = [row["label"] for name in ("target_a", "target_b") for row in facts[name]]
    assert all(source.count(name) >= 5 for name in classes)
    assert all(target.count(name) >= 5 for name in classes)


def test_neighbours_in_a_shard_are_of_mixed_classes(
    facts: dict[str, list[dict[str, Any]]],
) -> None:
    labels = [row["label"] for row in facts["target_a"]]
    same = sum(one == other for one, other in itertools.pairwise(labels))
    assert same < len(labels) / 3


def test_every_author_and_licence_is_attributed(facts: dict[str, list[dict[str, Any]]]) -> None:
    sections = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8").split("\n## ")
    for row in (row for rows in facts.values() for row in rows):
        assert any(
            section.splitlines()[0].endswith(f": {row['license']}")
            and f"- **{row['author']}**: " in section
            and f"`{row['object_id']}`" in section
            for section in sections
        ), row


def test_what_was_left_out_has_a_reason(facts: dict[str, list[dict[str, Any]]]) -> None:
    rejects = json.loads((FOLDER / "rejects.json").read_text(encoding="utf-8"))["rejects"]
    ids = {row["object_id"] for rows in facts.values() for row in rows}
    assert all(reject["reason"] for reject in rejects)
    assert not ids & {reject["object_id"] for reject in rejects}
    # The catalogues list 395 + 25 + 100 + 175 + 135 + 90 objects.
    assert len(ids) + len(rejects) == 920
