"""Writing to a folder on this disk, and to a store that speaks S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.storage import Store


@pytest.fixture(params=["disk", "s3", "fsspec"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Store(request.getfixturevalue("s3").format(tmp_path.name))
    return Store(str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}")


def test_what_is_written_is_read_listed_replaced_and_removed(store: Store) -> None:
    assert store.read("a/b.txt") is None
    assert store.names("a") == []
    store.write("a/b.txt", b"one")
    store.write("a/c/d.txt", b"two")
    assert store.read("a/b.txt") == b"one"
    assert store.names("a") == ["b.txt", "c"]
    assert store.child("a").sizes() == {"b.txt": 3}
    store.write("a/b.txt", b"three")
    assert store.read("a/b.txt") == b"three"
    store.remove("a/b.txt")
    assert store.names("a") == ["c"]
    store.remove("a")
    store.remove("a")
    assert store.read("a/c/d.txt") is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"file: x.txt can't be written .*mend `output`"):
        Store(str(tmp_path / "file")).write("x.txt", b"")


def test_an_address_that_nothing_opens_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://x can't be opened"):
        Store("nosuch://x").write("a", b"")


def test_a_folder_stays_the_same_wherever_a_process_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, assets = Store("runs"), Store("assets:furniture")
    monkeypatch.chdir("/")
    store.child("one").write("a", b"1")
    assert (tmp_path / "runs/one/a").read_bytes() == b"1"
    # What comes with the package is found by each node for itself.
    assert assets.address == "assets:furniture"
    assert assets.is_folder()
