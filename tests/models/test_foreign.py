"""Published checkpoints: every tensor finds its place, and nothing that a file asks for is run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import runpy
import shutil
import sys
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from crossmost_ray.config import ConfigError, read_list
from crossmost_ray.models import backbones
from crossmost_ray.models import clip as clip_table
from crossmost_ray.models.backbones.pointbert import PointBert
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.foreign import LAYOUTS, recognise
from crossmost_ray.models.foreign.clip_names import OPENAI_CLIPS
from crossmost_ray.models.foreign.convert import convert, fresh_model
from crossmost_ray.models.foreign.layout import Request, fit
from crossmost_ray.models.foreign.pointbert import TOKENIZER
from crossmost_ray.models.foreign.read import read_checkpoint
from crossmost_ray.models.foreign.tokenizer import convert_tokenizer
from crossmost_ray.models.point_tokenizer import load_tokenizer
from crossmost_ray.models.pretrained import ModelFolder, load_model, save_model
from tests.golden import clip as golden_clip
from tests.golden.clip import golden_images, golden_points, load_golden
from tests.models import foreign_files
from tests.models.foreign_files import (
    State,
    crossmost_content,
    full_shape,
    key_list,
    parallel,
    point_bert_content,
    ulip_content,
    write_archive,
)
from tests.models.test_point_tokenizer import random_groups, scores_by_loops

ROOT = Path(__file__).parents[2]
NAME = golden_clip.NAME
CLASSES = ["airplane", "bathtub", "bed", "night stand", "glass box", "tv stand"]
RELATIVE = 2e-5  # of the largest number of a tensor: float32 sums in another order


def tiny_backbone() -> PointBert:
    """The backbone of the golden model."""
    sizes = {"num_groups": golden_clip.NUM_GROUPS, "group_size": golden_clip.GROUP_SIZE}
    return PointBert(**sizes, width=384, depth=2, heads=6, group_width=256, drop_path=0.0)


@pytest.fixture(scope="module", autouse=True)
def names() -> Iterator[None]:
    """The golden model's variants under a name, and a SLIP that is small."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    slip = copy.deepcopy(clip_table.CUSTOM_CLIP["slip_vit_b16"])
    slip |= {"embed_dim": 64, "text_cfg": text}
    slip["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip_table.CUSTOM_CLIP, NAME, golden_clip.TINY_CLIP)
        patch.setitem(clip_table.CUSTOM_CLIP, "slip_vit_b16", slip)
        patch.setitem(backbones.POINT_BACKBONES, NAME, tiny_backbone)
        patch.setitem(backbones.POINT_BACKBONES, "pointbert_512", tiny_backbone)
        yield


@pytest.fixture(scope="module")
def golden() -> CrossModalModel:
    """The model whose numbers are golden. Shared: nobody changes it."""
    return golden_clip.tiny_model()


@pytest.fixture(scope="module")
def published(golden: CrossModalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's tensors, as CrossMoST's first stage saves them. Shared likewise."""
    path: Path = tmp_path_factory.mktemp("published") / "ulip-june11-checkpoint_best.pt"
    torch.save(ulip_content(foreign_files.first_stage(golden.state_dict())), path)
    return path


@pytest.fixture(scope="module")
def start(golden: CrossModalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as a model folder. Shared likewise."""
    path: Path = tmp_path_factory.mktemp("start") / "start"
    save_model(path, golden, card="")
    return path


def full_size(spec: ModelSpec) -> CrossModalModel:
    """A model without numbers."""
    with torch.device("meta"):
        return CrossModalModel(spec)


def write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_same(found: CrossModalModel, expected: CrossModalModel, *but: str) -> None:
    """Compares every tensor, except those whose names begin with one of `but`."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert [name for name in differ if not name.startswith(but)] == []


def assert_near(found: Tensor, expected: Any) -> None:
    atol = RELATIVE * np.abs(expected).max()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=atol)


# Full size, key by key


FULL = {
    "crossmost_first_stage": (472, "ViT-B-16-quickgelu", "pointbert"),
    "ulip_pointnet2_ssg": (379, "slip_vit_b16", "pointnet2_ssg"),
    "ulip_pointmlp": (546, "slip_vit_b16", "pointmlp"),
    "ulip_pointbert": (462, "slip_vit_b16", "pointbert_512"),
    "ulip_pointnext": (384, "slip_vit_b16", "pointnext_s"),
}
IMAGE_HEADS = {"image.mask_token"} | {
    f"image.{part}.{leaf}" for part in ("ln_patch", "decoder") for leaf in ("weight", "bias")
}
POINT_HEADS = {
    "point.local_projection",
    "point.backbone.mask_token",
    "point.backbone.lm_head.weight",
    "point.backbone.lm_head.bias",
}


@pytest.fixture
def real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own table again."""
    slip = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    config = {"embed_dim": 512, "vision_cfg": slip, "text_cfg": clip_table.CLIP_TEXT}
    monkeypatch.setitem(clip_table.CUSTOM_CLIP, "slip_vit_b16", config | {"quick_gelu": True})
    monkeypatch.setitem(backbones.POINT_BACKBONES, "pointbert_512", backbones.pointbert_512)


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_a_whole_model_has_a_place(real_sizes: None, name: str) -> None:
    number, clip, backbone = FULL[name]
    tensors = full_shape(name)
    assert len(tensors) == number
    layout = recognise(tensors, name)
    spec = layout.spec(tensors, Request())
    assert (spec.clip, spec.point_backbone) == (clip, backbone)
    assert spec.image_mean[0] == (0.485 if name.startswith("ulip") else 0.48145466)

    fitted = fit(layout, tensors, full_size(spec).state_dict(), name)
    assert fitted.ignored == {}
    assert {theirs for theirs, _ in fitted.mapped.values()} == tensors.keys()
    lacking = set() if name == "crossmost_first_stage" else set(IMAGE_HEADS)
    assert set(fitted.absent) == lacking | (POINT_HEADS if name == "ulip_pointbert" else set())


def test_every_tensor_of_an_adapted_model_has_a_place() -> None:
    tensors = full_shape("crossmost_adapted")
    assert len(tensors) == 324
    layout = recognise(tensors, "here")
    folder = ModelFolder(full_size(ModelSpec("ViT-B-16-quickgelu", "pointnext_s")), None, None)
    request = Request(start=folder, classes=read_list("classes", "modelnet40"))
    spec = layout.spec(tensors, request)
    assert spec == ModelSpec("ViT-B-16-quickgelu", "pointbert")
    expected = full_size(spec).state_dict() | {"class_embed": torch.empty(40, 512, device="meta")}
    fitted = fit(layout, tensors, expected, "here")
    assert fitted.ignored == {}
    assert {theirs for theirs, _ in fitted.mapped.values()} == tensors.keys()
    assert len(fitted.absent) == 149
    assert all(name.startswith("text.") for name in fitted.absent)


@pytest.mark.parametrize("prefix", ["", "transformer_q.", "base_model."])
def test_every_tensor_of_point_bert_has_a_place_or_a_reason(prefix: str) -> None:
    model = full_size(ModelSpec("vit_small_64", "pointbert"))
    start = Request(start=ModelFolder(model, None, None))
    tensors: State = full_shape("dvae")
    if prefix:
        tensors = foreign_files.point_bert(model.state_dict(), prefix)
    layout = recognise(tensors, "here")
    assert layout.spec(tensors, start) == model.spec
    fitted = fit(layout, tensors, model.state_dict(), "here")
    taken = {theirs for theirs, _ in fitted.mapped.values()}
    assert taken | fitted.ignored.keys() == tensors.keys()
    assert all(fitted.ignored.values())
    if prefix:
        assert len(taken) == 161  # CrossMoST's list has 164: less `proj` and the two of `lm_head`
        lacking = {name for name in fitted.absent if name.startswith("point.")}
        assert lacking == POINT_HEADS - {"point.backbone.mask_token"} | {"point.projection"}
    else:
        assert (len(tensors), len(taken)) == (75, 18)
        assert all(name.startswith("encoder.") for name in taken)


def visual_sizes(name: str) -> State:
    """The image tower of a CLIP without numbers, under OpenAI's names."""
    with torch.device("meta"):
        model = clip_table.build_clip(name)
    return model.state_dict() | {name: torch.tensor(1) for name in foreign_files.OPENAI_SIZES}


@pytest.mark.parametrize("name", OPENAI_CLIPS)
def test_openais_models_are_told_by_their_sizes(name: str) -> None:
    tensors = visual_sizes(name)
    layout = recognise(tensors, "here")
    assert layout.name == "CLIP of OpenAI"
    assert layout.spec(tensors, Request(backbone="pointmlp")) == ModelSpec(name, "pointmlp")


def test_a_model_of_other_sizes_or_another_activation_is_none_of_openais() -> None:
    tensors = visual_sizes("ViT-B-16-quickgelu")
    layout = recognise(tensors, "here")
    with pytest.raises(ConfigError, match=r"QuickGELU.*'ViT-B-16' .*GELU; .*ViT-B-16-quickgelu"):
        layout.spec(tensors, Request(clip="ViT-B-16"))
    with pytest.raises(
        ConfigError, match=r"width 768, layers 12, patch_size 16.* none of ViT-B-32"
    ):
        layout.spec(tensors, Request(clip="ViT-B-32-quickgelu"))
    tensors["visual.conv1.weight"] = torch.empty(3)
    with pytest.raises(ConfigError, match=r"no vision transformer of CLIP's: visual.conv1.weight"):
        layout.spec(tensors, Request())


def test_no_file_is_of_two_layouts() -> None:
    files: list[State] = [full_shape(name) for name in FULL]
    files += [full_shape(name) for name in ("crossmost_adapted", "dvae")]
    files += [visual_sizes("ViT-B-16-quickgelu")]
    for tensors in files:
        matching = [layout.name for layout in LAYOUTS if layout.matches(tensors)]
        # What open_clip's files have, OpenAI's have, too: the order of LAYOUTS decides.
        assert matching[0] == recognise(tensors, "here").name
        assert matching[1:] in ([], ["an image-text model of open_clip"])


# There and back: the tensors put in by hand, and those that were converted


def test_the_first_stage_gives_the_golden_logits(
    published: Path, golden: CrossModalModel, tmp_path: Path
) -> None:
    report = convert(published, tmp_path / "model", clip=NAME, backbone=NAME)
    assert (report.kept, report.fresh, report.ignored) == ((), (), {})
    assert len(report.mapped) == len(golden.state_dict())
    loaded = load_model(tmp_path / "model")
    assert_same(loaded.model, golden)
    numbers = load_golden()
    classifier = loaded.classifier(CLASSES, golden_clip.TEMPLATES, underscores="raw")
    classifier.class_embed.data = torch.from_numpy(numbers["classifier"]).t()
    with torch.no_grad():
        seen = classifier.predict(golden_images(), golden_points())
    assert_near(seen.image_logits, numbers["eval_zerostart/image_logits"])
    assert_near(seen.point_logits, numbers["eval_zerostart/pc_logits"])


@pytest.mark.parametrize("whose", [None, "student", "teacher"])
def test_an_adapted_model_gives_the_golden_logits(
    golden: CrossModalModel, start: Path, tmp_path: Path, whose: Any
) -> None:
    numbers = load_golden()
    # Longer than one, and scored as it is.
    classifier = 1.5 * torch.from_numpy(numbers["classifier"])
    right = foreign_files.adapted(golden.state_dict(), classifier)
    wrong = {name: value + 1 for name, value in right.items()}
    pair = (wrong, parallel(right)) if whose == "teacher" else (right, parallel(wrong))
    path = write(tmp_path / "checkpoint-best.pth", crossmost_content(*pair))
    report = convert(
        path, tmp_path / "model", start=start, classes=CLASSES, weights=whose, backbone=NAME
    )
    assert all(name.startswith("text.") for name in report.kept)
    assert (report.fresh, report.ignored) == ((), {})

    loaded = load_model(tmp_path / "model")
    assert loaded.classes == CLASSES
    assert not loaded.unit_classes
    assert_same(loaded.model, golden)
    with torch.no_grad():
        seen = loaded.classifier(CLASSES, ["{}"]).predict(golden_images(), golden_points())
    assert_near(seen.image_logits, 1.5 * numbers["eval_zerostart/image_logits"])
    assert_near(seen.point_logits, 1.5 * numbers["eval_zerostart/pc_logits"])


@pytest.mark.parametrize("form", ["archive", "state dict"])
def test_openais_clip_in_both_forms(golden: CrossModalModel, tmp_path: Path, form: str) -> None:
    state = foreign_files.openai(golden.state_dict())
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    half["transformer.resblocks.0.attn_mask"] = torch.zeros(1, dtype=torch.int64)
    path = tmp_path / "ViT-B-16.pt"
    if form == "archive":
        write_archive(path, half)
    else:
        write(path, half)
    report = convert(path, tmp_path / "model", clip=NAME, backbone="pointbert_small", seed=7)
    loaded = load_model(tmp_path / "model").model
    expected = copy.deepcopy(golden).half().float()
    for name, value in loaded.state_dict().items():
        if name in report.mapped:
            assert torch.equal(value, expected.state_dict()[name]), name
    assert report.ignored.keys() == {
        "transformer.resblocks.0.attn_mask",
        *foreign_files.OPENAI_SIZES,
    }
    fresh = {name for name in loaded.state_dict() if name.startswith("point.")} | IMAGE_HEADS
    assert set(report.fresh) == fresh
    seeded = fresh_model(loaded.spec, 7).state_dict()
    assert all(torch.equal(loaded.state_dict()[name], seeded[name]) for name in fresh)
    with torch.no_grad():
        embed = expected.image.embed(golden_images())
        assert torch.equal(loaded.image.embed(golden_images()), embed)
        text = expected.text.embed_classes(CLASSES, ["a {}."])
        torch.testing.assert_close(loaded.text.embed_classes(CLASSES, ["a {}."]), text)


@pytest.mark.parametrize("form", ["safetensors", "bin", "text below a name of its own"])
def test_open_clips_weights_need_the_models_name(
    golden: CrossModalModel, tmp_path: Path, form: str
) -> None:
    state = foreign_files.open_clip(golden.state_dict())
    path = tmp_path / "open_clip_model"
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif form == "bin":
        write(path, {"epoch": 32, "state_dict": parallel(state)})
    else:
        visual = {name: x for name, x in state.items() if name.startswith(("visual.", "logit_"))}
        text = {f"text.{name}": x for name, x in state.items() if name not in visual}
        write(path, visual | text | {"logit_bias": torch.tensor(-10.0)})
    with pytest.raises(ConfigError, match=r"open_clip_model: .*Name it: --clip ViT-B-16-quickgelu"):
        convert(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()

    report = convert(path, tmp_path / "model", clip=NAME, backbone="pointnet2_ssg")
    loaded = load_model(tmp_path / "model").model
    assert torch.equal(loaded.image.visual.proj, golden.image.visual.proj)
    for name, value in golden.text.state_dict().items():
        assert torch.equal(loaded.text.state_dict()[name], value)
    assert set(report.ignored) == ({"logit_bias"} if form.startswith("text") else set())
    assert {name.partition(".")[0] for name in report.fresh} == {"image", "point"}


ULIP_BACKBONES = ["pointnet2_ssg", "pointmlp", "pointbert_512", "pointnext_s"]


@pytest.mark.parametrize("backbone", ULIP_BACKBONES)
def test_ulips_checkpoints(tmp_path: Path, backbone: str) -> None:
    expected = fresh_model(ModelSpec("slip_vit_b16", backbone), 1)
    path = write(tmp_path / "file", ulip_content(foreign_files.ulip(expected.state_dict())))
    report = convert(path, tmp_path / "model")
    loaded = load_model(tmp_path / "model").model
    assert loaded.spec.point_backbone == backbone
    assert loaded.spec.image_mean == (0.485, 0.456, 0.406)
    assert loaded.spec.image_std == (0.229, 0.224, 0.225)
    fresh = IMAGE_HEADS | (POINT_HEADS if backbone == "pointbert_512" else set())
    assert set(report.fresh) == fresh
    assert report.ignored == {}
    assert_same(loaded, expected, *fresh)
    points, images = golden_points()[:1], torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded.point.embed(points), expected.point.embed(points))
        assert torch.equal(loaded.image.embed(images), expected.image.embed(images))
        prompts = (CLASSES[:2], ["a {}."])
        assert torch.equal(
            loaded.text.embed_classes(*prompts), expected.text.embed_classes(*prompts)
        )


@pytest.mark.parametrize("part", ["dvae", "transformer_q.", "base_model."])
def test_point_berts_weights_go_into_a_start_model(
    golden: CrossModalModel, start: Path, tmp_path: Path, part: str
) -> None:
    other = fresh_model(golden.spec, 3)
    state = (
        foreign_files.dvae(other.state_dict())
        if part == "dvae"
        else foreign_files.point_bert(other.state_dict(), part)
    )
    path = write(tmp_path / "file", point_bert_content(parallel(state)))
    with pytest.raises(ConfigError, match=r"no whole model: it needs --start"):
        convert(path, tmp_path / "model")
    report = convert(path, tmp_path / "model", start=start)
    loaded = load_model(tmp_path / "model").model
    encoder = tuple(name for name in loaded.state_dict() if ".backbone.encoder." in name)
    heads = (*POINT_HEADS - {"point.backbone.mask_token"}, "point.projection")
    if part == "dvae":
        assert set(report.mapped) == set(encoder)
        assert_same(loaded, golden, *encoder)
    else:
        backbone = {name for name in loaded.state_dict() if name.startswith("point.")}
        assert set(report.mapped) == backbone - set(heads)
        assert_same(loaded, golden, "point.")
    assert set(report.kept) == loaded.state_dict().keys() - report.mapped.keys()
    assert report.fresh == ()
    assert_same(loaded, other, *report.kept)


def test_what_is_fresh_depends_on_the_seed_alone(golden: CrossModalModel, tmp_path: Path) -> None:
    path = write(tmp_path / "file", foreign_files.openai(golden.state_dict()))
    embeds = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(noise)
        expected = torch.rand(1)
        torch.manual_seed(noise)
        convert(path, tmp_path / "model", clip=NAME, backbone="pointnet2_ssg", seed=seed)
        assert torch.equal(torch.rand(1), expected), "torch's own generator stays as it was"
        embeds.append(load_model(tmp_path / "model").model.point.projection)
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.equal(embeds[0], embeds[2])


# The dVAE as a tokenizer


@pytest.fixture(scope="module")
def dvae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly the published layout, names and shapes, with random numbers. Shared likewise."""
    path: Path = tmp_path_factory.mktemp("dvae") / "dVAE.pth"
    numbers = foreign_files.random_numbers(full_shape("dvae"))
    torch.save({"base_model": parallel(numbers), "epoch": 300}, path)
    return path


def test_the_dvae_becomes_a_tokenizer(
    dvae_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dvae-tokenizer"
    run_job(monkeypatch, dvae_file, "--output", folder, "--as-tokenizer")
    printed = capsys.readouterr().out
    assert "a tokenizer: one of 8192 ids for each group of 32 points\n" in printed
    assert printed.splitlines()[-1].endswith(f"mpm_target=token_ids point_tokenizer={folder}")
    card = (folder / "README.md").read_text()
    assert hashlib.sha256(dvae_file.read_bytes()).hexdigest() in card
    left = "codebook, dgcnn_2 (17), decoder (22) (makes groups of visual words"
    assert f"- not taken: {left}" in card

    tokenizer = load_tokenizer(folder)
    theirs = foreign_files.dvae_of_tokenizer(tokenizer.state_dict())
    numbers = read_checkpoint(dvae_file).tensors
    assert len(theirs) == 75 - 1 - 17 - 22 == 18 + 17
    assert all(torch.equal(value, numbers[name]) for name, value in theirs.items())
    groups, centers = random_groups(1, 6, 32)
    expected = scores_by_loops(numbers, groups, centers)
    np.testing.assert_allclose(tokenizer(groups, centers), expected, atol=1e-4, rtol=1e-4)
    ids = tokenizer.token_ids(groups, centers)
    np.testing.assert_array_equal(ids, expected.argmax(axis=-1))
    assert len(ids.unique()) > 1


def test_only_a_whole_dvae_becomes_a_tokenizer(
    golden: CrossModalModel, published: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tokenizer"
    with pytest.raises(
        ConfigError, match=r"best\.pt is not the dVAE of Point-BERT.*--as-tokenizer"
    ):
        convert_tokenizer(published, output)
    path = write(tmp_path / "dVAE.pth", {"base_model": foreign_files.dvae(golden.state_dict())})
    with pytest.raises(ConfigError) as refusal:
        convert_tokenizer(path, output)
    said = str(refusal.value)
    assert "\n  dgcnn_1.input_trans.weight is missing\n" in said
    assert said.endswith("\nfetch the file anew"), "no option would help"
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        convert_tokenizer(tmp_path / "none", output)
    assert not output.exists()


def test_a_tokenizers_numbers_are_checked(dvae_file: Path, tmp_path: Path) -> None:
    tensors = read_checkpoint(dvae_file).tensors
    broken = {"dgcnn_1.layer2.1.bias": torch.full((512,), torch.nan)}
    path = write(tmp_path / "dVAE.pth", tensors | broken)
    with pytest.raises(ConfigError, match=r"dgcnn_1\.layer2\.1\.bias holds NaN or infinite"):
        convert_tokenizer(path, tmp_path / "tokenizer")
    write(path, tensors | {"dgcnn_1.layer3.0.weight": torch.zeros(512, 512, 1, 1)})
    with pytest.raises(ConfigError, match=r"layer3\.0\.weight gives shape \(512, 512\), expected"):
        convert_tokenizer(path, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("more", [["--start", "x"], ["--clip", "y"], ["--classes", "[a, b]"], None])
def test_a_tokenizer_takes_no_other_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str] | None,
) -> None:
    arguments = ["--output", tmp_path / "t", "--as-tokenizer", *(["file", *more] if more else [])]
    with pytest.raises(SystemExit):
        run_job(monkeypatch, *arguments)
    said = "--as-tokenizer takes a file and --output alone"
    assert said + (f", not {more[0]}" if more else "\n") in capsys.readouterr().err


# What is written


def test_the_folder_says_what_came_from_where(
    golden: CrossModalModel, start: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "dVAE.pth", {"base_model": foreign_files.dvae(golden.state_dict())})
    report = convert(path, tmp_path / "model", start=start)
    card = (tmp_path / "model/README.md").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.sha256 == digest
    for said in (
        "from `dVAE.pth`: the dVAE of Point-BERT",
        f"SHA-256 of that file: `{digest}`",
        f"what this is: a model of {NAME} and {NAME}",
        report.table(),
        "not taken: codebook, dgcnn_2, decoder (makes groups of visual words",
        "not taken: dgcnn_1 (makes visual words of groups: take --as-tokenizer",
        "as in the start model: ",
        "text.clip (29), point.projection, point.local_projection, point.backbone (35)",
    ):
        assert said in card
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["training"]["converted_from"]["sha256"] == digest
    assert str(tmp_path) in report.next_command
    counts = [line.split("|")[1:5] for line in report.table().splitlines()[2:]]
    totals = np.array([[int(cell) for cell in cells[1:]] for cells in counts]).sum(axis=0)
    assert totals.tolist() == [len(report.mapped), len(report.kept), 0]


def test_only_a_model_folder_is_replaced(published: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"exists and is no model folder.*another --output"):
        convert(published, tmp_path, clip=NAME, backbone=NAME)
    assert (tmp_path / "notes.txt").read_text() == "years of work"
    for _ in range(2):
        convert(published, tmp_path / "model", clip=NAME, backbone=NAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.txt"]


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "jobs/convert.py"), run_name="__main__")


def test_the_job_converts_and_says_what_is_next(
    published: Path,
    start: Path,
    golden: CrossModalModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "model"
    run_job(monkeypatch, published, "--output", output, "--clip", NAME, "--backbone", NAME)
    printed = capsys.readouterr().out
    assert "CrossMoST after its first stage, with CLIP's towers" in printed
    assert "| logit_scale |         1 |          0 |     0 |" in printed
    assert printed.splitlines()[-1].startswith("next: python jobs/adapt.py configs/adapt/")

    classifier = torch.ones(512, 2)
    state = foreign_files.adapted(golden.state_dict(), classifier)
    path = write(tmp_path / "best", crossmost_content(state, state))
    arguments = ("--start", output, "--classes", "[bed, sofa]", "--weights", "teacher")
    run_job(monkeypatch, path, "--output", tmp_path / "adapted", *arguments, "--backbone", NAME)
    assert load_model(tmp_path / "adapted").classes == ["bed", "sofa"]
    for missing in ([], ["no/such/file"]):
        with pytest.raises(SystemExit, match=r"^error: "):
            run_job(monkeypatch, *missing, "--output", tmp_path / "none")
    with pytest.raises(SystemExit, match=r"^error: "):
        run_job(monkeypatch, path, "--output", tmp_path / "none", "--classes", "[bed")


def test_every_next_command_names_files_that_are_there() -> None:
    for layout in (*LAYOUTS, TOKENIZER):
        _, job, config, *overrides = layout.next_step.split()
        assert (ROOT / job).is_file()
        assert (ROOT / config).is_file()
        assert "{folder}" in "".join(overrides)


# What is refused


def refused(path: Path, *parts: str, **options: Any) -> str:
    """Asserts that converting is refused in one error that names the file, and writes nothing."""
    output = path.parent / "refused"
    with pytest.raises(ConfigError) as refusal:
        convert(path, output, **options)
    assert not output.exists()
    for part in (str(path), *parts):
        assert part in str(refusal.value)
    return str(refusal.value)


class Hostile:
    """Makes a mark when it is unpickled, as it could run anything else."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


HOSTILE: dict[str, Callable[[Path, Any], object]] = {
    "zip": lambda path, bad: torch.save({"state_dict": {"a": torch.ones(1), "b": bad}}, path),
    "legacy": lambda path, bad: torch.save(
        {"state_dict": bad}, path, _use_new_zipfile_serialization=False
    ),
    "settings": lambda path, bad: torch.save(
        {"state_dict": {"a": torch.ones(1)}, "args": foreign_files.argparse.Namespace(x=bad)}, path
    ),
    "numpy": lambda path, bad: torch.save({"a": np.array([bad], dtype=object)}, path),
    "bare": lambda path, bad: path.write_bytes(pickle.dumps(bad, protocol=2)),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, form: str) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "checkpoint.pt"
    HOSTILE[form](path, Hostile(mark))
    said = refused(path)
    assert not mark.exists()
    if form in ("zip", "legacy", "settings"):
        assert "asks for 'posix.system'" in said
        assert "nothing of it was run" in said
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "or else the test would prove nothing"


def archive_of(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Writes a TorchScript archive around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            "data.pkl": pickled,
            "constants.pkl": b".",
            **(records or {}),
        }.items():
            archive.writestr(f"archive/{name}", content)
    return path


SYSTEM = b"\x80\x02cposix\nsystem\n"
MODULE = b"\x80\x02c__torch__\nM\n)\x81}"
FLOATS = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def tensor_pickle(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    """A module with one tensor `a`, cut from four float32."""
    tensor = REBUILD + FLOATS + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return MODULE + b"X\x01\x00\x00\x00a" + tensor + b"sb."


ARCHIVES = {
    "a call": SYSTEM + b"X\x0c\x00\x00\x00touch MARKER\x85R.",
    "a call by its opcode for instances": b"(X\x0c\x00\x00\x00touch MARKERiposix\nsystem\n.",
    "a call inside a module": MODULE
    + b"X\x01\x00\x00\x00a"
    + SYSTEM[2:]
    + b"X\x0c\x00\x00\x00touch MARKER\x85Rsb.",
    "a new object": SYSTEM + b")\x81.",
    "a built function": SYSTEM + b"}b.",
    "a name from the stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
    "an array of another kind": MODULE + b"X\x01\x00\x00\x00a(X\x05\x00\x00\x00modeltQsb.",
    "numbers beyond the array": tensor_pickle(b"J\xff\xff\xff\x00", b"K\x04\x85", b"K\x01\x85"),
    "numbers before the array": tensor_pickle(b"J\xf0\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"),
    "more numbers than there are": tensor_pickle(b"K\x00", b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"),
    "a stride out of the array": tensor_pickle(b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\x7f\x85"),
    "no module": b"\x80\x02K\x01.",
    "a module that holds itself": b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "nothing": b"",
}


NAMED = ("a call", "a call inside a module", "a new object")
RUN_BY_PICKLE = ("a call", "a call by its opcode for instances", "a name from the stack")


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_hostile_archive_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code = b"def forward(self):\n  torch.save([], 'MARKER')\n"
    records = {"data/0": bytes(16), "code/__torch__.py": code}
    path = archive_of(tmp_path / "ViT-B-16.pt", ARCHIVES[form], records)
    said = refused(path)
    assert "no known layout" not in said, "it was read"
    assert ("asks for 'posix.system'" in said) == (form in NAMED)
    assert [file.name for file in tmp_path.iterdir()] == ["ViT-B-16.pt"]
    if form in RUN_BY_PICKLE:
        pickle.loads(ARCHIVES[form])
        assert (tmp_path / "MARKER").exists(), "or else the test would prove nothing"


def test_the_archives_of_this_test_can_be_read_when_they_are_sound(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    sound = tensor_pickle(b"K\x01", b"K\x03\x85", b"K\x01\x85")
    path = archive_of(tmp_path / "file", sound, {"data/0": values.tobytes()})
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.tensor([1.0, 2.0, 3.0]))


class Inner(nn.Module):
    """Parameters, buffers and plain values, as TorchScript keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).half())
        self.view = nn.Parameter(torch.randn(5, 6)[1:3].t())
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("none", torch.zeros(0, 3))
        self.sizes = [1, 2]
        self.names = {"a": 1.5}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sizes[0] + self.names["a"]


def test_an_archive_reads_as_torch_reads_it(tmp_path: Path) -> None:
    module = nn.Sequential(Inner(), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
    path = tmp_path / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
        expected = torch.jit.load(str(path)).state_dict()
    found = read_checkpoint(path).tensors
    assert found.keys() == expected.keys()
    assert len(found) == 4 + 2 + 5
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert (found[name].dtype, found[name].stride()) == (value.dtype, value.stride())


@pytest.fixture(scope="module")
def small_archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The records of a TorchScript archive."""
    path = tmp_path_factory.mktemp("archive") / "a.pt"
    write_archive(path, {"a.weight": torch.ones(2, 3), "b.c.count": torch.tensor(3)})
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_a_damaged_archive_is_read_or_refused(
    small_archive: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[int, int]],
) -> None:
    pickled = bytearray(small_archive["data.pkl"])
    for place, value in places:
        pickled[place % len(pickled)] = value
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    archive_of(path, bytes(pickled), {k: v for k, v in small_archive.items() if k != "data.pkl"})
    try:
        found = read_checkpoint(path).tensors
    except ConfigError:
        return
    assert all(isinstance(value, Tensor) for value in found.values())


def legacy(path: Path) -> None:
    content = {"state_dict": {"a": torch.ones(9), "b": torch.ones(3, 3)}}
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path], object]] = {
    "zip": lambda path: torch.save({"a": torch.ones(9), "b": torch.ones(3, 3)}, path),
    "legacy": legacy,
    "archive": lambda path: write_archive(path, {"a": torch.ones(9), "b.c": torch.ones(3, 3)}),
    "safetensors": lambda path: save_file({"a": torch.ones(9), "b": torch.ones(3, 3)}, path),
}


@pytest.mark.parametrize("form", WRITERS)
def test_a_file_cut_short_is_refused(tmp_path: Path, form: str) -> None:
    path = tmp_path / "whole.pt"
    WRITERS[form](path)
    whole = path.read_bytes()
    assert {*read_checkpoint(path).tensors} <= {"a", "b", "b.c"}
    short = tmp_path / "short.pt"
    for keep in [
        *range(40),
        *range(40, len(whole) - 1, max(len(whole) // 40, 1)),
        len(whole) - 1,
    ]:
        short.write_bytes(whole[:keep])
        with pytest.raises(ConfigError, match=r"short\.pt .*[dD]amaged"):
            read_checkpoint(short)


@pytest.mark.parametrize("form", ["zip", "archive"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, form: str) -> None:
    path = tmp_path / "file.pt"
    WRITERS[form](path)
    content = bytearray(path.read_bytes())
    place = content.index(np.ones(9, np.float32).tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    refused(path, "damaged", "checksum")


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    refused(path, "there is no checkpoint", "docs/checkpoints.md")
    path.write_bytes(b"<!DOCTYPE html><html>quota exceeded</html>")
    refused(path, "is a web page")
    path.write_text("not a checkpoint at all, but a long enough text")
    refused(path, "no checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", bytes(100))
    refused(path, "no checkpoint")
    refused(write(path, [torch.ones(1)]), "holds no tensors by name")
    refused(write(path, {"epoch": 3, "state_dict": {}}), "no tensors by name (its keys: epoch, ")
    refused(write(path, {"state_dict": {"a": 1, "b": "x"}}), "holds no tensors by name")
    with pytest.raises(ConfigError, match="name the file to convert, or --clip and --pretrained"):
        convert(None, tmp_path / "model")


def test_parts_of_names_that_wrappers_add_are_dropped(tmp_path: Path) -> None:
    names = ("module.a.weight", "b.module.c", "module.d.module.e", "modules.f", "g.submodule.h")
    path = write(tmp_path / "file", {name: torch.ones(1) for name in names})
    dropped = {"a.weight", "b.c", "d.e", "modules.f", "g.submodule.h"}
    assert read_checkpoint(path).tensors.keys() == dropped
    write(path, {"module.a": torch.ones(1), "a": torch.ones(1)})
    refused(path, "holds a twice", "'module.'")


def test_a_checkpoint_of_an_unknown_layout_is_named(tmp_path: Path) -> None:
    resnet = {"conv1.weight": torch.ones(1), "layer1.0.bn1.weight": torch.ones(1)}
    said = refused(write(tmp_path / "file", resnet), "2 tensors of no known layout")
    assert "  conv1.weight\n  layer1.0.bn1.weight\n" in said
    assert all(layout.name in said for layout in LAYOUTS)


@pytest.fixture
def first_stage(golden: CrossModalModel) -> State:
    return foreign_files.first_stage(golden.state_dict())


def test_tensors_that_do_not_fit_are_named(first_stage: State, tmp_path: Path) -> None:
    options = {"clip": NAME, "backbone": NAME}
    first_stage["pc_projection"] = torch.zeros(256, 512)
    first_stage["visual.decoder.0.weight"] = torch.zeros(3)
    first_stage["point_encoder.norm.bias"] = torch.zeros(384, dtype=torch.int64)
    first_stage["point_encoder.norm.weight"] = torch.zeros(384, dtype=torch.complex64)
    del first_stage["visual.ln_pre.weight"]
    del first_stage["point_encoder.encoder.first_conv.0.bias"]
    first_stage["point_encoder.more"] = torch.zeros(1)
    first_stage["surplus"] = torch.zeros(1)
    said = refused(write(tmp_path / "file", first_stage), **options).splitlines()
    assert said[0].endswith(
        "was taken for CrossMoST after its first stage, with CLIP's towers, "
        "but does not fit its model:"
    )
    assert said[1:-2] == [
        "  point_encoder.more has no place in the model, which has no point.backbone.more",
        "  surplus is unknown",
        "  visual.ln_pre.weight is missing",
        "  point_encoder.encoder.first_conv.0.bias is missing",
        "  visual.decoder.0.weight gives shape (3,), expected (768, 128)",
    ]
    assert said[-2] == "  ... and 3 more"
    assert "--clip, --backbone, --start" in said[-1]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("point_encoder.norm.bias", torch.zeros(384, dtype=torch.int64), "holds torch.int64"),
        ("point_encoder.norm.bias", torch.zeros(384, dtype=torch.complex64), "torch.complex64"),
        ("visual.decoder.0.weight", torch.zeros(3), "gives shape (3,), expected (768, 128)"),
        ("visual.conv1.weight", torch.zeros(3), "no vision transformer of CLIP's"),
        ("point_encoder.proj", torch.zeros(384, 512).to_sparse(), "is sparse or quantised"),
    ],
)
def test_one_tensor_that_does_not_fit_is_enough(
    first_stage: State, tmp_path: Path, name: str, value: Tensor, problem: str
) -> None:
    path = write(tmp_path / "file", first_stage | {name: value})
    refused(path, name, problem, clip=NAME, backbone=NAME)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(
    first_stage: State, tmp_path: Path, value: float
) -> None:
    broken = {name: first_stage[name].clone() for name in ("logit_scale", "pc_projection")}
    for tensor in broken.values():
        tensor.view(-1)[-1] = value
    path = write(tmp_path / "file", first_stage | broken)
    said = refused(path, clip=NAME, backbone=NAME)
    assert "\n  logit_scale holds NaN or infinite numbers\n" in said
    assert "\n  pc_projection holds NaN or infinite numbers\n" in said
    assert said.count("NaN") == 2


def test_a_part_that_may_be_lacking_lacks_as_a_whole(
    golden: CrossModalModel, tmp_path: Path
) -> None:
    state = foreign_files.openai(golden.state_dict())
    del state["visual.ln_post.bias"]
    refused(write(tmp_path / "file", state), "  visual.ln_post.bias is missing", clip=NAME)
    half = foreign_files.dvae(golden.state_dict())
    del half["encoder.second_conv.3.bias"]
    folder = tmp_path / "start"
    save_model(folder, golden, card="")
    refused(write(tmp_path / "file", half), "  encoder.second_conv.3.bias is missing", start=folder)


def test_half_of_a_part_that_may_be_lacking_is_not_mixed_with_the_start_models(
    golden: CrossModalModel, start: Path, tmp_path: Path
) -> None:
    state = foreign_files.point_bert(golden.state_dict())
    encoder = [name for name in state if name.startswith("transformer_q.encoder.")]
    whole = {name: value for name, value in state.items() if name not in encoder}
    report = convert(write(tmp_path / "file", whole), tmp_path / "model", start=start)
    assert len([name for name in report.kept if ".backbone.encoder." in name]) == len(encoder) == 18
    half = whole | {name: state[name] for name in encoder[:9]}
    said = refused(write(tmp_path / "file", half), start=start)
    assert f"  {encoder[9]} is missing" in said


def test_point_berts_weights_do_not_fit_other_backbones(tmp_path: Path, start: Path) -> None:
    golden = load_model(start).model
    path = write(tmp_path / "file", foreign_files.dvae(golden.state_dict()))
    for backbone, said in (
        ("pointnet2_ssg", "has no place in the model, which has no point.backbone.encoder."),
        ("pointbert_small", "gives shape (128, 3, 1), expected (32, 3, 1)"),
    ):
        folder = tmp_path / backbone
        save_model(folder, fresh_model(ModelSpec("vit_small_64", backbone), 0), card="")
        refused(path, said, start=folder)


def adapted_file(golden: CrossModalModel, path: Path, *, num_classes: int = 6) -> Path:
    state = foreign_files.adapted(golden.state_dict(), torch.ones(512, num_classes))
    return write(path, crossmost_content(state, None))


def test_an_adapted_model_needs_its_start_and_its_classes(
    golden: CrossModalModel, start: Path, tmp_path: Path
) -> None:
    path = adapted_file(golden, tmp_path / "file")
    whole = {"start": start, "classes": CLASSES, "backbone": NAME}
    refused(path, "it needs --start and --classes (")
    refused(path, "it needs --start (", classes=CLASSES)
    refused(path, "it needs --classes (", start=start)
    refused(path, "shape (512, 6)", "--classes lists 40", **{**whole, "classes": "modelnet40"})
    refused(path, "holds no teacher; take --weights student", **whole, weights="teacher")
    with pytest.raises(ConfigError, match=r"--classes: .*no list and no file 'modelnet4'.*mean"):
        convert(path, tmp_path / "model", **{**whole, "classes": "modelnet4"})
    with pytest.raises(ConfigError, match=r"--classes: .* bed more than once"):
        convert(path, tmp_path / "model", **{**whole, "classes": ["bed", "bed"]})
    with pytest.raises(ConfigError, match=r"--classes: .* must hold names"):
        convert(path, tmp_path / "model", **{**whole, "classes": ["bed", False]})
    with pytest.raises(ConfigError, match="no model folder 'no/such'"):
        convert(path, tmp_path / "model", **{**whole, "start": "no/such"})


def test_a_start_model_of_other_towers_or_adapted_itself_is_refused(
    golden: CrossModalModel, start: Path, tmp_path: Path
) -> None:
    path = adapted_file(golden, tmp_path / "file")
    small = tmp_path / "small"
    save_model(small, fresh_model(ModelSpec("vit_small_64", "pointbert_small"), 0), card="")
    refused(
        path, "width 128", "none of vit_small_64", "another --start", start=small, classes=CLASSES
    )
    again = tmp_path / "again"
    convert(path, again, start=start, classes=CLASSES, backbone=NAME)
    with pytest.raises(ConfigError, match=r"again' is adapted to 6 classes; take the model"):
        convert(path, tmp_path / "model", start=again, classes=CLASSES, backbone=NAME)


@pytest.mark.parametrize(
    "options", [{"start": "x"}, {"weights": "student"}, {"classes": ["a", "b"]}]
)
def test_options_that_a_file_has_no_use_for_are_refused(
    published: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    copied = Path(shutil.copy(published, tmp_path / "file"))
    refused(copied, f"--{next(iter(options))} is not for it", clip=NAME, backbone=NAME, **options)


def test_unknown_variants_are_named(published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no image-text model 'ViT-B-61'"):
        convert(published, tmp_path / "model", clip="ViT-B-61")
    with pytest.raises(ConfigError, match="no point backbone 'pointbird'"):
        convert(published, tmp_path / "model", clip=NAME, backbone="pointbird")
    assert not (tmp_path / "model").exists()


# open_clip's tags


@pytest.fixture
def no_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """What open_clip fetches weights by has nothing to fetch them from."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_a_tag_that_cannot_be_fetched_is_explained(no_net: None, tmp_path: Path) -> None:
    said = r"'laion2b_s34b_b88k' of 'ViT-B-16' can't be fetched .*takes a net.*--clip ViT-B-16"
    with pytest.raises(ConfigError, match=said):
        convert(None, tmp_path / "model", clip="ViT-B-16", pretrained="laion2b_s34b_b88k")
    with pytest.raises(ConfigError, match=r"no weights 'laion2b_s34b_b88' .* laion2b_s34b_b88k"):
        convert(None, tmp_path / "model", clip="ViT-B-16", pretrained="laion2b_s34b_b88")
    with pytest.raises(ConfigError, match="trained with QuickGELU: take --clip ViT-B-16-quickgelu"):
        convert(None, tmp_path / "model", clip="ViT-B-16", pretrained="openai")
    for path, clip in (("a file", "ViT-B-16"), (None, None)):
        with pytest.raises(ConfigError, match="--pretrained takes the place of a file"):
            convert(path, tmp_path / "model", clip=clip, pretrained="openai")
    assert [*tmp_path.iterdir()] == []


def test_what_a_tag_fetches_is_converted_with_its_normalisation(
    golden: CrossModalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "fetched", foreign_files.open_clip(golden.state_dict()))
    tag = {"quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, NAME, {"mine": {**tag, "file": str(path)}}
    )
    convert(None, tmp_path / "model", clip=NAME, pretrained="mine", backbone=NAME)
    loaded = load_model(tmp_path / "model").model
    assert (loaded.spec.image_mean, loaded.spec.image_std) == (tag["mean"], tag["std"])
    assert torch.equal(loaded.image.visual.proj, golden.image.visual.proj)


# The script beside this test


def test_full_shapes_can_be_written_and_read(tmp_path: Path, real_sizes: None) -> None:
    for path in foreign_files.write_full_shapes(tmp_path):
        assert path.stat().st_size < 1e6
        tensors = read_checkpoint(path).tensors
        assert recognise(tensors, "here") in LAYOUTS
    assert key_list("dvae")["codebook"] == (8192, 256)
    assert tensors["visual.pos_embed"].shape == (1, 197, 768)
