"""From a config to a task, and from a checkpoint to model folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from crossmost_ray.config import AdaptConfig, ConfigError
from crossmost_ray.data.decode import view_size
from crossmost_ray.models.classifier import CrossModalModel
from crossmost_ray.models.pretrained import load_model, save_model
from crossmost_ray.storage import Store
from crossmost_ray.training.adapt import AdaptTask
from crossmost_ray.training.build import build_task
from crossmost_ray.training.checkpoint import load_state, save_state
from crossmost_ray.training.export import export_adapted, export_pretrained
from crossmost_ray.training.pretrain import PretrainTask
from tests.synthetic import CLASSES, adapt_config, pretrain_config

HISTORY = [{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.23456789}]


@pytest.fixture(scope="module")
def config(model: CrossModalModel, tmp_path_factory: pytest.TempPathFactory) -> AdaptConfig:
    folder: Path = tmp_path_factory.mktemp("start") / "model"
    save_model(folder, model, card="")
    return adapt_config(model=str(folder))


@pytest.fixture(scope="module")
def checkpoint(config: AdaptConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a student that has moved, and a teacher that has moved less."""
    task = build_task(config, CLASSES)
    assert isinstance(task, AdaptTask)
    with torch.no_grad():
        for module, shift in ((task.bare_student, 0.03), (task.teacher.module, 0.01)):
            for parameter in module.parameters():
                parameter.add_(shift)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_state(folder, {"task": task.state_dict(), "optimizer": {}, "history": HISTORY})
    return folder


def test_the_config_tells_which_objective_is_meant(config: AdaptConfig) -> None:
    task = build_task(config, CLASSES)
    assert isinstance(task, AdaptTask)
    assert task.bare_student.class_embed.shape == (4, 128)
    assert isinstance(build_task(pretrain_config(), ()), PretrainTask)
    with pytest.raises(ConfigError, match="no model folder"):
        build_task(adapt_config(), CLASSES)


def test_the_wrapper_gets_the_student_and_the_teacher_stays_bare(config: AdaptConfig) -> None:
    wrapped = []

    def wrap(module: torch.nn.Module) -> torch.nn.Module:
        wrapped.append(module)
        return torch.nn.Sequential(module)

    task = build_task(config, CLASSES, wrap)
    assert isinstance(task, AdaptTask)
    assert wrapped == [task.bare_student]
    assert isinstance(task.student, torch.nn.Sequential)
    assert not any(name.startswith("0.") for name in task.state_dict()["student"])
    assert type(task.teacher.module) is type(task.bare_student)


def test_views_are_half_as_large_again() -> None:
    assert view_size(64) == 96


def test_teacher_and_student_are_exported_each_with_its_weights(
    config: AdaptConfig, checkpoint: Path, tmp_path: Path
) -> None:
    written = export_adapted(config, Store(str(checkpoint)), Store(str(tmp_path / "out")))
    assert written == {name: Store(str(tmp_path / "out" / name)) for name in ("teacher", "student")}
    state = load_state(Store(str(checkpoint)))["task"]
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    points = torch.rand(2, 90, 3, generator=torch.Generator().manual_seed(0))
    task = build_task(config, CLASSES)
    assert isinstance(task, AdaptTask)
    for name, folder in written.items():
        loaded = load_model(folder)
        assert loaded.classes == list(CLASSES)
        classifier = loaded.classifier(CLASSES, ["another {}"])
        torch.testing.assert_close(classifier.class_embed.norm(dim=-1), torch.ones(4))
        task.bare_student.load_state_dict(state[name])
        with torch.no_grad():
            ours = classifier.predict(images, points)
            expected = task.bare_student.eval().predict(images, points)
        for left, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
        stored = json.loads(folder.read("config.json"))
        assert stored["training"]["name"] == "test"
        assert stored["training"]["optim"]["lr"] == 2e-5
        assert "output" not in stored["training"], "where its files went is no part of a model"
        card = folder.read("README.md").decode()
        assert card.startswith(f"# test: {name}\n")
        assert "1.2346" in card
        assert "mode crossmost, seed 0" in card
    teacher, student = (load_model(folder).model for folder in written.values())
    assert not torch.equal(teacher.point.projection, student.point.projection)


def test_an_adapted_model_can_still_be_asked_for_other_classes(
    config: AdaptConfig, checkpoint: Path, tmp_path: Path, model: CrossModalModel
) -> None:
    folder = export_adapted(config, Store(str(checkpoint)), Store(str(tmp_path)))["teacher"]
    other = load_model(folder).classifier(["chair", "sofa"], ["a {}"])
    torch.testing.assert_close(
        other.class_embed, model.text.embed_classes(["chair", "sofa"], ["a {}"])
    )


def test_a_checkpoint_of_other_classes_is_refused(
    config: AdaptConfig, checkpoint: Path, tmp_path: Path
) -> None:
    three = adapt_config(model=config.model, data={"classes": ["ball", "box", "cone"]})
    with pytest.raises(ConfigError, match=r"class_embed has shape \(4, 128\), expected \(3, 128\)"):
        export_adapted(three, Store(str(checkpoint)), Store(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_other_objective_is_refused(
    config: AdaptConfig, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"'{checkpoint}' holds no model; it is another task's"):
        export_pretrained(pretrain_config(), Store(str(checkpoint)), Store(str(tmp_path / "out")))
    save_state(tmp_path, {"task": {"model": {}}, "history": HISTORY})
    with pytest.raises(ConfigError, match="holds no teacher; it is another task's"):
        export_adapted(config, Store(str(tmp_path)), Store(str(tmp_path / "out")))


def test_a_missing_checkpoint_is_named(config: AdaptConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks its state\.pt"):
        export_adapted(config, Store(str(tmp_path)), Store(str(tmp_path / "out")))


def test_a_pretrained_model_is_exported_in_half_precision(
    model: CrossModalModel, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_state(checkpoint, {"task": {"model": model.state_dict()}, "history": HISTORY})
    folder = export_pretrained(
        pretrain_config(), Store(str(checkpoint)), Store(str(tmp_path / "out"))
    )
    assert folder == Store(str(tmp_path / "out"))
    loaded = load_model(folder)
    assert loaded.classes is None
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-3, rtol=1e-3)
    size = len(folder.read("model.safetensors"))
    assert size < 2.1 * sum(p.numel() for p in model.parameters())
