"""Every point backbone: golden numbers of the published networks, and what the tower relies on."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crossmost_ray.config import ConfigError
from crossmost_ray.models.backbones import POINT_BACKBONES, PointTokens, build_point_backbone
from crossmost_ray.models.backbones.layers import Pointwise, PointwiseNorm
from crossmost_ray.models.image_tower import TowerOutput
from crossmost_ray.models.point_tower import PointTower
from tests.golden.recipe import fill_module, unit

GOLDEN = Path(__file__).parents[1] / "golden"
DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"
MODULE = "crossmost_ray.models.backbones"

seeds = st.integers(0, 2**31 - 1)


def clouds(batch: int, num_points: int, seed: int = 0, scale: float = 0.5) -> Tensor:
    return scale * torch.randn(batch, num_points, 3, generator=torch.Generator().manual_seed(seed))


# Golden numbers


def test_the_recipe_gives_the_numbers_that_the_golden_ones_were_made_with() -> None:
    expected = [0.7134822607, 0.9961113930, 0.3914912939, -0.5244750977]
    assert unit("visual.conv1.weight", (4,)).tolist() == pytest.approx(expected, abs=1e-9)


def assert_golden(ours: Tensor, golden: np.ndarray[Any, Any]) -> None:
    """Compares with a stored tensor, of which the first rows or channels may have been stored."""
    if ours.ndim < golden.ndim:
        ours = ours[..., None]
    elif golden.shape[-1] != ours.shape[-1]:
        ours = ours.mT  # the published networks lie channels first
    if ours.ndim == 3:
        ours = ours[:, : golden.shape[1]]
    assert tuple(ours.shape) == golden.shape
    # Ten times what rounding makes of it; a slip in the network changes the first digits.
    assert np.abs(ours.numpy() - golden).max() <= 1e-5 * np.abs(golden).max()


PUBLISHED = {
    "pointnet2_ssg": "pointnet2_ssg",
    "pointmlp": "pointmlp",
    "pointnext_s": "pointnext_s",
    "pointbert_ulip": "pointbert_512",
}


@pytest.mark.parametrize(("network", "name"), PUBLISHED.items())
def test_outputs_and_activations_are_those_of_the_published_network(
    network: str, name: str
) -> None:
    backbone: Any = build_point_backbone(name).eval()  # type: ignore[attr-defined]
    fill_module(backbone, "point_encoder.")
    with np.load(GOLDEN / "towers.npz") as golden:
        expected = {
            key.removeprefix(f"{network}/"): golden[key]
            for key in golden.files
            if key.startswith(f"{network}/")
        }
    outputs: dict[str, Any] = {}
    for name, module in backbone.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
    # PointNeXt's stored input holds the height, too, which ours works out.
    points = torch.from_numpy(expected["input"][..., :3])
    with torch.no_grad():
        pooled = backbone(backbone.tokenize(points)).pooled

    assert_golden(pooled, expected["output"])
    assert_golden(pooled, expected["output_float64"])
    activations = [key for key in expected if key.startswith("act/")]
    # The last stage of the published PointNeXt also hands on the points that it was given.
    for key in set(activations) - {"act/encoder.encoder.5/0"}:
        _, name, place = key.split("/")
        output = outputs[name]
        assert_golden(output[int(place)] if isinstance(output, tuple) else output, expected[key])
    assert activations


@pytest.mark.parametrize(("network", "name"), PUBLISHED.items())
def test_published_checkpoints_load_by_name(network: str, name: str) -> None:
    described = json.loads((GOLDEN / "towers.json").read_text())[network]
    expected = {
        name.removeprefix("point_encoder."): tuple(shape)
        for name, shape in described["state_dict"].items()
    }
    with torch.device("meta"):
        backbone: Any = POINT_BACKBONES[name]()
    ours = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    # ULIP's PointBERT is not mask-modelled; what that takes starts afresh.
    masked = {"mask_token", "lm_head.weight", "lm_head.bias"} & ours.keys()
    assert {name: shape for name, shape in ours.items() if name not in masked} == expected
    size = sum(backbone.get_parameter(name).numel() for name in masked)
    assert sum(p.numel() for p in backbone.parameters()) - size == described["n_params"]


# Every backbone in the table


@pytest.fixture(scope="module", params=POINT_BACKBONES)
def tower(request: pytest.FixtureRequest) -> PointTower:
    """A tower of each backbone with fresh weights. Shared: a test that changes it copies it."""
    torch.manual_seed(0)
    return PointTower(request.param, 32).eval()


def enough_points(tower: PointTower) -> int:
    """As few as can be: at 16 points, PointNeXt's last stage is left with one and sees little."""
    return max(64, tower.backbone.min_points)


@pytest.fixture(scope="module")
def pair(tower: PointTower) -> Tensor:
    """Two clouds, one larger: PointMLP divides by a spread, that of a cloud and not of a batch."""
    return clouds(2, enough_points(tower)) * torch.tensor([3.0, 1.0])[:, None, None]


@pytest.fixture(scope="module")
def embedded(tower: PointTower, pair: Tensor) -> tuple[PointTokens, TowerOutput]:
    """The pair, tokenised, and what the tower makes of it."""
    with torch.no_grad():
        seen = tower.tokenize(pair)
        return seen, tower(seen)


def test_the_table_keeps_its_promises_to_the_tower(
    tower: PointTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same trial that a backbone of one's own has to pass.
    kind = type(tower.backbone)
    name = next(
        name for name, build in POINT_BACKBONES.items() if build.__module__ == (kind.__module__)
    )
    path = f"{kind.__module__}:{name}"
    monkeypatch.setenv("CROSSMOST_RAY_BACKBONES", path)
    assert type(build_point_backbone(path)) is kind


def test_clouds_of_a_batch_do_not_see_each_other(
    tower: PointTower, pair: Tensor, embedded: tuple[PointTokens, TowerOutput]
) -> None:
    together = embedded[1].embed
    with torch.no_grad():
        torch.testing.assert_close(together[1:], tower.embed(pair[1:]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-4)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


def test_the_order_of_points_behind_the_first_does_not_matter(tower: PointTower) -> None:
    # Farthest points start at the first; and of a ball that overflows, the first points are
    # taken. This cloud is so wide that none does.
    num_points = enough_points(tower)
    points = clouds(1, num_points, scale=2.0)
    order = torch.randperm(num_points - 1, generator=torch.Generator().manual_seed(0)) + 1
    shuffled = points[:, torch.cat([torch.zeros(1, dtype=torch.int64), order])]
    with torch.no_grad():
        ours, same = tower.embed(points), tower.embed(shuffled)
    torch.testing.assert_close(ours, same, atol=1e-5, rtol=1e-4)


def test_a_part_of_each_cloud_is_hidden(
    tower: PointTower, embedded: tuple[PointTokens, TowerOutput]
) -> None:
    seen, plain = embedded
    mask = tower.draw_mask(seen, (0.5, 0.5), torch.Generator().manual_seed(0))
    assert mask.shape == seen.centers.shape[:2]
    assert mask.sum(dim=1).tolist() == [seen.centers.shape[1] // 2] * 2
    with torch.no_grad():
        first = PointTokens(None if seen.tokens is None else seen.tokens[:1], seen.centers[:1])
        hidden = tower(first, mask[:1]).embed
    assert not torch.allclose(plain.embed[:1], hidden, atol=1e-4)


def test_terms_that_need_tokens_can_be_had_where_there_are_some(
    tower: PointTower, embedded: tuple[PointTokens, TowerOutput]
) -> None:
    seen, out = embedded
    width = tower.backbone.token_width
    assert tower.has_tokens == (width is not None)
    if width is None:
        assert seen.tokens is None
        assert set(out[1:]) == {None}
        assert tower.backbone.frozen_modules() == []
        assert tower.local_projection is None
    else:
        groups = seen.centers.shape[1]
        assert out.global_embed.shape == (2, 32)
        assert out.local_embed.shape == (2, groups, 32)
        assert out.reconstruction.shape == out.target.shape == (2, groups, width)
        assert torch.equal(out.target, seen.tokens)


def test_a_gradient_reaches_every_parameter(tower: PointTower) -> None:
    tower = copy.deepcopy(tower).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Three: BatchNorm makes +1 and -1 of any two numbers, and their gradient vanishes; and of
        # a single cloud, a transformer's block may drop its branches.
        seen = tower.tokenize(clouds(3, enough_points(tower)))
        out = tower(seen, tower.draw_mask(seen, (0.3, 0.4), torch.Generator().manual_seed(0)))
        fields = [field for field in out if field is not None and field.is_floating_point()]
        sum((field * torch.randn_like(field)).sum() for field in fields).backward()
    unreached = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.grad is None or not 0 < parameter.grad.abs().max() < torch.inf
    ]
    assert unreached == []


def test_every_layer_has_parameters_and_the_projections_lie_in_the_last(
    tower: PointTower,
) -> None:
    layers: dict[int, list[str]] = {}
    for name, _ in tower.named_parameters():
        layers.setdefault(tower.layer_of(name), []).append(name)
    assert sorted(layers) == list(range(tower.depth + 2))
    assert "projection" in layers[tower.depth + 1]


def test_too_few_points_are_refused(tower: PointTower) -> None:
    least = tower.backbone.min_points
    message = f"have {least - 1} points, but .* needs at least {least}: raise data.num_points"
    with pytest.raises(ConfigError, match=message):
        tower.embed(clouds(1, least - 1))


def test_every_backbone_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\w+) \| (\d+) \|", DOCS.read_text(), re.M)
    expected = []
    for name, build in POINT_BACKBONES.items():
        with torch.device("meta"):
            backbone: Any = build()
        size = sum(p.numel() for p in backbone.parameters())
        tokens = "none" if backbone.token_width is None else str(backbone.num_tokens)
        expected.append((name, f"{size:,}", tokens, str(backbone.min_points)))
    assert sorted(rows) == sorted(expected)


# One or another


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("pointnet2_ssg", {"sa1.mlp_convs.0.bias": 0, "sa3.mlp_bns.2.weight": 2, "fc1.bias": 3}),
        (
            "pointmlp",
            {
                "embedding.net.0.weight": 0,
                "local_grouper_list.0.affine_alpha": 1,
                "pos_blocks_list.3.operation.1.net2.1.bias": 4,
                "classifier.4.weight": 5,
            },
        ),
        (
            "pointnext_s",
            {
                "encoder.encoder.0.0.convs.0.0.weight": 0,
                "encoder.encoder.4.0.skipconv.0.weight": 4,
                "encoder.encoder.5.0.convs.1.1.bias": 5,
                "prediction.head.2.0.weight": 6,
            },
        ),
    ],
)
def test_each_stage_is_a_layer(name: str, places: dict[str, int]) -> None:
    with torch.device("meta"):
        backbone: Any = POINT_BACKBONES[name]()
    assert places.keys() <= dict(backbone.named_parameters()).keys()
    assert {name: backbone.layer_of(name) for name in places} == places
    assert max(places.values()) == backbone.depth + 1


@pytest.mark.parametrize(
    ("name", "rate"), [("pointnet2_ssg", 0.4), ("pointmlp", 0.5), ("pointnext_s", 0.5)]
)
def test_heads_drop_out_at_the_published_rate(name: str, rate: float) -> None:
    backbone: Any = POINT_BACKBONES[name]()
    dropped: list[Tensor] = []
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == rate
            module.register_forward_hook(lambda module, inputs, output: dropped.append(output))
    with torch.no_grad():
        pooled = backbone(backbone.tokenize(clouds(2, backbone.min_points))).pooled
    # Behind each of the head's two layers.
    assert [tuple(x.shape) for x in dropped] == [(2, 512), (2, 256)]
    assert pooled is dropped[1]


@settings(max_examples=10)
@given(seed=seeds, num_points=st.integers(16, 60), share=st.floats(0.1, 0.9))
def test_hidden_points_are_not_seen(seed: int, num_points: int, share: float) -> None:
    tower = pointnext_tower()
    points = clouds(2, num_points, seed)
    seen = tower.tokenize(points)
    mask = tower.draw_mask(seen, (share, share), torch.Generator().manual_seed(seed))
    points[mask] = torch.nan
    with torch.no_grad():
        other = tower(tower.tokenize(points), mask).embed
        assert other.isfinite().all()
        points[mask] = 0.0
        assert torch.equal(other, tower(tower.tokenize(points), mask).embed)
        nothing = torch.zeros_like(mask)
        assert torch.equal(tower(tower.tokenize(points), nothing).embed, tower.embed(points))


@settings(max_examples=10)
@given(seed=seeds, num_points=st.integers(16, 60), batch=st.integers(2, 4))
def test_a_clouds_embedding_is_its_own(seed: int, num_points: int, batch: int) -> None:
    tower, points = pointnext_tower(), clouds(batch, num_points, seed)
    with torch.no_grad():
        together = tower.embed(points)
        alone = torch.cat([tower.embed(cloud[None]) for cloud in points])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@functools.cache
def pointnext_tower() -> PointTower:
    torch.manual_seed(0)
    return PointTower("pointnext_s", 16).eval()


@pytest.mark.parametrize("axes", [0, 1, 2])
def test_a_pointwise_layer_is_a_convolution_of_width_1(axes: int) -> None:
    torch.manual_seed(0)
    layer, norm = Pointwise(5, 7, axes=axes), PointwiseNorm(7)
    x = torch.randn(2, 3, 4, 5)
    if axes == 0:
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    elif axes == 1:
        flat = nn.functional.conv1d(x.flatten(0, 1).mT, layer.weight, layer.bias)
        expected = flat.mT.unflatten(0, (2, 3))
    else:
        image = nn.functional.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias)
        expected = image.permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)
    published = nn.BatchNorm2d(7)
    torch.testing.assert_close(
        norm(expected), published(expected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    )
    torch.testing.assert_close(norm.running_var, published.running_var)


# A backbone of one's own


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CROSSMOST_RAY_BACKBONES", "a:b,my_backbone:DeepSet")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def documented_backbone() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    return code


def test_the_documented_example_works_as_it_stands(folder: Path) -> None:
    (folder / "my_backbone.py").write_text(documented_backbone())
    assert "point_backbone: my_backbone:DeepSet" in DOCS.read_text()
    tower = PointTower("my_backbone:DeepSet", 16)
    seen = tower.tokenize(clouds(3, 20))
    mask = tower.draw_mask(seen, (0.3, 0.4), torch.Generator().manual_seed(0))
    out = tower(seen, mask)
    assert out.embed.shape == (3, 16)
    assert out.local_embed is None
    out.embed.square().mul(torch.arange(16)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in tower.parameters())
    assert {tower.layer_of(name) for name, _ in tower.named_parameters()} == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("width, depth, min_points = 256, 1, 1", "width, depth = 256, 1"), "lacks min_points"),
        (("= 256, 1, 1", "= 255, 1, 1"), r"pooled of shape \(2, 256\) .* expected \(2, 255\)"),
        (("= 256, 1, 1", "= 256, 1, -1"), "has min_points -1, expected a whole number"),
        (("= 256, 1, 1\n", "= 256, 1, 1\n    token_width = 8\n"), r"tokens of shape None"),
        (("= 256, 1, 1\n", "= 256, 1, 1\n    token_width = 'a'\n"), "has token_width 'a'"),
        (("return 0 if", "return 7 if"), r"puts lift\.0\.weight into layer 7, expected 0 to 2"),
        (("(WholeCloudBackbone)", ""), "gives DeepSet, expected an nn.Module"),
        (("(WholeCloudBackbone)", "(nn.Module)"), "lacks token_width, tokenize, frozen_modules"),
        (("__init__(self)", "__init__(self, size)"), "called without arguments .*'size'"),
    ],
)
def test_a_backbone_that_is_none_is_refused(
    folder: Path, change: tuple[str, str], message: str
) -> None:
    code = documented_backbone()
    assert change[0] in code
    code = code.replace(*change)
    if message.startswith("gives"):
        code = code.replace("super().__init__()", "return").replace("nn.Sequential", "list")
    (folder / "my_backbone.py").write_text(code)
    with pytest.raises(ConfigError, match=message) as refused:
        build_point_backbone("my_backbone:DeepSet")
    assert "'my_backbone:DeepSet'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.at_all:build", "can't be imported .*no_such_package"),
        (":build", "can't be imported"),
        ("math:build", "the module 'math' has no 'build'"),
        ("math:", "the module 'math' has no ''"),
        ("math:pi", "'math:pi' is float, not callable"),
        ("builtins:dict", "'builtins:dict' can't be called without arguments"),
        ("fractions:Fraction", "gives Fraction, expected an nn.Module"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("CROSSMOST_RAY_BACKBONES", name)
    with pytest.raises(ConfigError, match=message):
        build_point_backbone(name)


def test_code_that_nobody_trusts_is_not_even_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "hostile.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="CROSSMOST_RAY_BACKBONES=hostile:build"):
        build_point_backbone("hostile:build")
    assert not (folder / "ran").exists()


def test_trying_a_backbone_out_leaves_it_as_it_was(folder: Path) -> None:
    code = documented_backbone().replace("nn.LayerNorm(128)", "PointwiseNorm(128)")
    code = f"from {MODULE}.layers import PointwiseNorm\n" + code.partition('"""\n')[2]
    (folder / "my_backbone.py").write_text(code)
    backbone: Any = build_point_backbone("my_backbone:DeepSet")
    assert backbone.training
    assert backbone.mix[1].num_batches_tracked == 0
