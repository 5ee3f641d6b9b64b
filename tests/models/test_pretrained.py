"""Model folders: what is saved comes back, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossmost_ray.config import ConfigError
from crossmost_ray.models import pretrained
from crossmost_ray.models.classifier import CrossModalModel
from crossmost_ray.models.pretrained import check_tensors, load_model, save_model
from tests.synthetic import fresh_model

CLASSES = ["chair", "sofa"]


@pytest.fixture(scope="module")
def folder(model: CrossModalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Shared: a test that damages it copies it first."""
    path: Path = tmp_path_factory.mktemp("models") / "model"
    save_model(path, model, card="# A model\n", training={"seed": 3})
    return path


@pytest.fixture
def copy_of(folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def outputs(model: CrossModalModel) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    images, points = torch.randn(2, 3, 64, 64, generator=rng), torch.rand(2, 80, 3, generator=rng)
    with torch.no_grad():
        return [
            model.image.embed(images),
            model.point.embed(points),
            model.text.embed_classes(CLASSES, ["a {}"]),
            model.image(images).reconstruction,
            model.logit_scale,
        ]


def test_what_is_saved_comes_back(model: CrossModalModel, folder: Path) -> None:
    loaded = load_model(folder)
    assert (loaded.classes, loaded.class_embed) == (None, None)
    assert loaded.model.spec == model.spec
    assert not any(module.training for module in loaded.model.modules())
    for ours, theirs in zip(outputs(loaded.model), outputs(model), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (folder / "README.md").read_text() == "# A model\n"
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1
    assert config["training"] == {"seed": 3}


def test_half_precision_halves_the_file_and_loads_as_float32(
    model: CrossModalModel, folder: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "half", model, card="", dtype=torch.float16)
    size, whole = (
        (path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)
    )
    assert size < 0.51 * whole
    loaded = load_model(tmp_path / "half").model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for ours, theirs in zip(outputs(loaded), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)
    assert next(model.parameters()).dtype == torch.float32, "the model itself stays as it was"


def test_loading_leaves_the_global_generator_to_chance_but_not_the_weights(folder: Path) -> None:
    torch.manual_seed(1)
    first = load_model(folder).model.state_dict()
    torch.manual_seed(2)
    second = load_model(folder).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saving_again_replaces_the_folder_whole(model: CrossModalModel, copy_of: Path) -> None:
    (copy_of / "left-over.txt").write_text("of the old one")
    save_model(copy_of, model, card="new\n")
    assert sorted(file.name for file in copy_of.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (copy_of / "README.md").read_text() == "new\n"
    assert [path.name for path in copy_of.parent.iterdir()] == ["copy"]


def test_a_save_that_fails_leaves_the_old_folder(
    model: CrossModalModel, copy_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in copy_of.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pretrained.Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        save_model(copy_of, model, card="new\n")
    assert {file.name: file.read_bytes() for file in copy_of.iterdir()} == before
    assert [path.name for path in copy_of.parent.iterdir()] == ["copy"]


def test_others_can_read_a_saved_folder(folder: Path) -> None:
    assert folder.stat().st_mode & 0o055 == 0o055


def test_adapted_embeddings_serve_the_adapted_classes_only(
    model: CrossModalModel, tmp_path: Path
) -> None:
    embeds = torch.nn.functional.normalize(torch.randn(2, 128), dim=-1)
    save_model(tmp_path / "m", model, card="", classes=CLASSES, class_embed=embeds)
    loaded = load_model(tmp_path / "m")
    assert loaded.classes == CLASSES
    assert torch.equal(loaded.classifier(CLASSES, ["a {}"]).class_embed, embeds)
    assert torch.equal(loaded.classifier(tuple(CLASSES), ["a {}"]).class_embed, embeds)
    for other in (["sofa", "chair"], ["chair", "sofa", "lamp"], ["chair", "lamp"]):
        zero_shot = model.text.embed_classes(other, ["a {}"])
        torch.testing.assert_close(loaded.classifier(other, ["a {}"]).class_embed, zero_shot)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model folder 'no/such'.*jobs/pretrain.py.*`model`"):
        load_model("no/such")
    with pytest.raises(ConfigError, match="no model folder"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy_of: Path, name: str) -> None:
    (copy_of / name).unlink()
    with pytest.raises(ConfigError, match=rf"lacks its {name}; copy it whole"):
        load_model(copy_of)


def test_a_model_needs_no_card(copy_of: Path) -> None:
    (copy_of / "README.md").unlink()
    assert load_model(copy_of).classes is None


@pytest.mark.parametrize("keep", [0, 4, 500, 100_000, -1])
def test_weights_cut_short_are_named(copy_of: Path, keep: int) -> None:
    file = copy_of / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut short.*copy it"):
        load_model(copy_of)


def test_a_pickle_in_place_of_weights_is_not_run(copy_of: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    torch.save({"weight": Hostile()}, copy_of / "model.safetensors")
    with pytest.raises(ConfigError, match="damaged"):
        load_model(copy_of)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        "{}",
        '{"spec": {}, "classes": null}',
        '{"spec": [1], "classes": null}',
        '{"spec": {"clip": "vit_small_64", "point_backbone": "pointbert_small"}}',
        '{"spec": {"clip": "a", "point_backbone": "b", "more": 1}, "classes": null}',
    ],
)
def test_a_config_that_is_none_is_named(copy_of: Path, content: str) -> None:
    (copy_of / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is not a model's config.*copy the folder"):
        load_model(copy_of)


def test_an_unknown_variant_is_named(copy_of: Path) -> None:
    config = json.loads((copy_of / "config.json").read_text())
    config["spec"]["point_backbone"] = "pointnxt"
    (copy_of / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no point backbone 'pointnxt'"):
        load_model(copy_of)


def test_weights_of_another_model_are_named_tensor_by_tensor(copy_of: Path) -> None:
    tensors = load_file(copy_of / "model.safetensors")
    tensors["logit_scale"] = torch.zeros(2)
    tensors["surplus"] = torch.zeros(1)
    del tensors["point.projection"]
    save_file(tensors, copy_of / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        load_model(copy_of)
    assert str(refused.value).splitlines() == [
        f"{copy_of / 'model.safetensors'} does not fit the model that is to be loaded:",
        "  point.projection is missing",
        "  surplus is unknown",
        "  logit_scale has shape (2,), expected ()",
        "use the folder's own config.json, or a checkpoint of the same variants",
    ]


@pytest.mark.parametrize(("number", "more"), [(5, None), (6, 1), (9, 4)])
def test_five_tensors_are_named_and_the_rest_is_counted(number: int, more: int | None) -> None:
    expected = {f"t{k}": torch.zeros(1) for k in range(number)}
    with pytest.raises(ConfigError) as refused:
        check_tensors({}, expected, "here")
    lines = str(refused.value).splitlines()
    assert lines[1:6] == [f"  t{k} is missing" for k in range(5)]
    assert lines[6:-1] == ([f"  ... and {more} more"] if more else [])


def test_tensors_that_fit_pass() -> None:
    check_tensors({"a": torch.zeros(2)}, {"a": torch.ones(2)}, "here")


def test_a_fresh_model_is_the_same_for_a_seed_and_spares_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = fresh_model(1), fresh_model(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.point.projection, again.point.projection)
    assert torch.equal(
        first.text.clip.token_embedding.weight, again.text.clip.token_embedding.weight
    )
