"""The tokenizer against loops over groups, neighbours and points; and its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossmost_ray.config import ConfigError
from crossmost_ray.models import point_tokenizer
from crossmost_ray.models.point_tokenizer import (
    EdgeConvolution,
    PointTokenizer,
    TokenizerSpec,
    load_tokenizer,
    save_tokenizer,
)
from crossmost_ray.models.pretrained import load_model
from tests.models.foreign_files import dvae_of_tokenizer, random_numbers

Floats = npt.NDArray[np.float64]

SMALL = TokenizerSpec(
    group_size=16, group_width=12, input_width=8, edge_widths=(16, 12, 8, 20), vocabulary=64
)


def small_tokenizer(seed: int = 0) -> PointTokenizer:
    tokenizer = PointTokenizer(SMALL)
    tokenizer.load_state_dict(random_numbers(tokenizer.state_dict(), seed))
    return tokenizer


def random_groups(B: int, G: int, M: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Groups of many sizes and flatnesses around random centres."""
    rng = torch.Generator().manual_seed(seed)
    sizes = 2 * torch.rand(B, G, 1, 3, generator=rng)
    return sizes * torch.randn(B, G, M, 3, generator=rng), torch.randn(B, G, 3, generator=rng)


# The reference, with the names of the published file


def leaky(x: Floats) -> Floats:
    return np.where(x > 0, x, 0.2 * x)


def group_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """Normalises one cloud's (..., C) by quarters of its channels."""
    parts = [(part - part.mean()) / np.sqrt(part.var() + 1e-5) for part in np.split(x, 4, axis=-1)]
    return np.concatenate(parts, axis=-1) * weight + bias


def encoded_by_loops(w: Mapping[str, Floats], group: Floats) -> Floats:
    """One group's vector from its (M, 3) points."""

    def layers(name: str, x: Floats) -> Floats:
        x = w[f"{name}.0.weight"][..., 0] @ x + w[f"{name}.0.bias"]
        x = (x - w[f"{name}.1.running_mean"]) / np.sqrt(w[f"{name}.1.running_var"] + 1e-5)
        x = np.maximum(x * w[f"{name}.1.weight"] + w[f"{name}.1.bias"], 0)
        return w[f"{name}.3.weight"][..., 0] @ x + w[f"{name}.3.bias"]

    local = [layers("encoder.first_conv", point) for point in group]
    overall = np.max(local, axis=0)
    mixed = [layers("encoder.second_conv", np.concatenate([overall, x])) for x in local]
    return np.max(mixed, axis=0)


def edges_by_loops(
    weight: Floats, norm: tuple[Floats, Floats], x: list[Floats], nearest: list[list[int]]
) -> list[Floats]:
    """An edge convolution over one cloud: a vector for each group."""
    edges = [
        [weight @ np.concatenate([x[j] - x[i], x[i]]) for j in nearest[i]] for i in range(len(x))
    ]
    normed = leaky(group_norm(np.array(edges), *norm))
    return [normed[i].max(axis=0) for i in range(len(x))]


def scores_by_loops(tensors: Mapping[str, Tensor], groups: Tensor, centers: Tensor) -> Floats:
    """(B, G, K) scores, from the tensors of a `dVAE.pth`."""
    wanted = ("encoder.", "dgcnn_1.")
    w = {k: v.double().numpy() for k, v in tensors.items() if k.startswith(wanted)}

    def norm_of(name: str) -> tuple[Floats, Floats]:
        return w[f"{name}.1.weight"], w[f"{name}.1.bias"]

    scores = []
    for cloud, places in zip(groups.double().numpy(), centers.double().numpy(), strict=True):
        nearest = [
            sorted(range(len(places)), key=lambda j: float(((places[j] - place) ** 2).sum()))[:4]
            for place in places
        ]
        into, offset = w["dgcnn_1.input_trans.weight"][..., 0], w["dgcnn_1.input_trans.bias"]
        x = [into @ encoded_by_loops(w, group) + offset for group in cloud]
        seen = []
        for k in range(1, 5):
            name = f"dgcnn_1.layer{k}"
            x = edges_by_loops(w[f"{name}.0.weight"][..., 0, 0], norm_of(name), x, nearest)
            seen.append(np.array(x))
        out = np.concatenate(seen, axis=1) @ w["dgcnn_1.layer5.0.weight"][..., 0].T
        scores.append(leaky(group_norm(out, *norm_of("dgcnn_1.layer5"))))
    return np.array(scores)


# What it computes


@given(
    B=st.integers(1, 3),
    C=st.integers(1, 9),
    out=st.sampled_from([4, 8, 12]),
    G=st.integers(2, 7),
    k=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_an_edge_convolution_is_a_loop_over_neighbours(
    B: int, C: int, out: int, G: int, k: int, seed: int
) -> None:
    edge = EdgeConvolution(C, out)
    edge.load_state_dict(random_numbers(edge.state_dict(), seed))
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, G, generator=rng)
    neighbors = torch.randint(G, (B, G, k), generator=rng)
    with torch.no_grad():
        found = edge(x, neighbors)
    weight, *norm = (p.detach().double().numpy() for p in edge.parameters())
    for cloud in range(B):
        columns = list(x[cloud].t().double().numpy())
        near = neighbors[cloud].tolist()
        expected = np.array(edges_by_loops(weight, (norm[0], norm[1]), columns, near)).T
        # Equal answers, as of one group with itself, have a variance of rounding errors alone.
        np.testing.assert_allclose(found[cloud], expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("G", "M"), [(4, 16), (9, 5), (30, 16)])
def test_a_tokenizer_is_a_loop_over_its_groups(G: int, M: int) -> None:
    tokenizer = small_tokenizer()
    groups, centers = random_groups(2, G, M)
    expected = scores_by_loops(dvae_of_tokenizer(tokenizer.state_dict()), groups, centers)
    np.testing.assert_allclose(tokenizer(groups, centers), expected, atol=1e-4, rtol=1e-4)
    ids = tokenizer.token_ids(groups, centers)
    assert (ids.shape, ids.dtype) == ((2, G), torch.int64)
    np.testing.assert_array_equal(ids, expected.argmax(axis=-1))
    assert len(ids.unique()) > 2, "or else the ids would prove little"


@given(seed=st.integers(0, 999))
def test_the_order_of_groups_and_of_points_tells_nothing(seed: int) -> None:
    tokenizer = small_tokenizer()
    groups, centers = random_groups(2, 12, 16, seed)
    rng = torch.Generator().manual_seed(seed)
    order, inside = torch.randperm(12, generator=rng), torch.randperm(16, generator=rng)
    scores = tokenizer(groups, centers)
    shuffled = tokenizer(groups[:, order][:, :, inside], centers[:, order])
    torch.testing.assert_close(shuffled, scores[:, order], atol=1e-4, rtol=1e-4)


def test_clouds_do_not_meddle_and_only_the_nearest_centres_count() -> None:
    tokenizer = small_tokenizer()
    groups, centers = random_groups(3, 12, 16)
    scores = tokenizer(groups, centers)
    alone = tokenizer(groups[1:2], centers[1:2])
    torch.testing.assert_close(alone, scores[1:2], atol=1e-5, rtol=1e-4)
    # Who is near whom is all that the centres say.
    torch.testing.assert_close(tokenizer(groups, 3 * centers + 5), scores, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tokenizer(groups, centers.flip(1)), scores, atol=1e-2)


def test_mixed_precision_changes_no_id() -> None:
    tokenizer = small_tokenizer()
    groups, centers = random_groups(4, 32, 16)
    expected = tokenizer.token_ids(groups, centers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.token_ids(groups, centers), expected)
        rough = tokenizer(groups, centers).argmax(dim=-1)
    assert not torch.equal(rough, expected), "or else there would be nothing to guard against"


def test_a_tokenizer_stands_still() -> None:
    tokenizer = small_tokenizer()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a cloud of 3 groups .* its 4 nearest"):
        small_tokenizer()(*random_groups(1, 3, 16))


def test_the_published_sizes_are_the_default() -> None:
    with torch.device("meta"):
        tokenizer = PointTokenizer(TokenizerSpec())
    shapes = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    widths = [shapes[f"edges.{k}.linear.weight"] for k in range(4)]
    assert widths == [(256, 256), (512, 512), (512, 1024), (1024, 1024)]
    assert shapes["output.weight"] == (8192, 2304)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocabulary": 10**12},
        {"vocabulary": 30},
        {"vocabulary": 0},
        {"group_width": -4},
        {"group_width": 8.0},
        {"group_width": True},
        {"edge_widths": (16, 10)},
        {"edge_widths": (16, "8")},
        {"edge_widths": 16},
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(SMALL, **sizes)


# Its folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer"
    save_tokenizer(path, small_tokenizer(), card="# A tokenizer\n", origin={"file": "x"})
    return path


def test_what_is_saved_comes_back(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), small_tokenizer()
    assert ours.spec == SMALL
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    seen = random_groups(2, 8, 16)
    assert torch.equal(ours.token_ids(*seen), theirs.token_ids(*seen))
    assert (folder / "README.md").read_text() == "# A tokenizer\n"
    assert json.loads((folder / "config.json").read_text())["origin"] == {"file": "x"}
    assert folder.stat().st_mode & 0o055 == 0o055


def test_a_save_that_fails_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(point_tokenizer.Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            save_tokenizer(folder, small_tokenizer(1), card="")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save_tokenizer(folder, small_tokenizer(1), card="")
    assert torch.equal(load_tokenizer(folder).output.weight, small_tokenizer(1).output.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'no/such'.*jobs/convert\.py dVAE\.pth --as-tokenizer"):
        load_tokenizer("no/such")
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=rf"lacks its {name}; copy it whole"):
            load_tokenizer(folder)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_weights_cut_short_are_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut short.*copy it"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "{}",
        '{"tokenizer": [1]}',
        '{"tokenizer": {"more": 1}}',
        '{"tokenizer": {"vocabulary": 1000000000000}}',
        '{"tokenizer": {"edge_widths": [256, 512, 512, 1e9]}}',
        '{"tokenizer": {"edge_widths": {"a": 1}}}',
    ],
)
def test_a_config_that_is_none_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is not a tokenizer's config.*copy the"):
        load_tokenizer(folder)


def test_weights_of_another_tokenizer_are_named_tensor_by_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = torch.zeros(1)
    tensors["output.weight"] = torch.zeros(8, 8)
    del tensors["edges.2.norm.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        load_tokenizer(folder)
    assert str(refused.value).splitlines()[:4] == [
        f"{folder / 'model.safetensors'} does not fit the model that is to be loaded:",
        "  edges.2.norm.bias is missing",
        "  surplus is unknown",
        "  output.weight has shape (8, 8), expected (64, 56)",
    ]


def test_a_tokenizer_is_not_taken_for_a_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not a model's config"):
        load_model(folder)
