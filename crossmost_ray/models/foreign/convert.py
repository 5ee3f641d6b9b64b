"""A checkpoint of another project in, a model folder out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crossmost_ray.config import ConfigError, check_classes, read_list, resolve_path
from crossmost_ray.models.classifier import CrossModalModel, ModelSpec
from crossmost_ray.models.foreign import recognise
from crossmost_ray.models.foreign.layout import Fit, Layout, Option, Request, fit, refusal
from crossmost_ray.models.foreign.open_clip_weights import fetch
from crossmost_ray.models.foreign.read import Checkpoint, read_checkpoint
from crossmost_ray.models.pretrained import (
    CLASS_EMBED,
    CONFIG_NAME,
    WEIGHTS_NAME,
    ModelFolder,
    load_model,
    save_model,
)

Whose = Literal["student", "teacher"]

MAX_NAMES = 12


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of a file."""

    layout: str
    """What it was recognised as."""
    source: Path
    sha256: str
    """Of the file, in hexadecimal digits."""
    folder: Path
    """What was written."""
    made: str
    """What that is."""
    mapped: Mapping[str, str]
    """Names in the file of the tensors that came from it, by our names."""
    kept: tuple[str, ...]
    """Our names of the tensors that came from the start model."""
    fresh: tuple[str, ...]
    """Our names of the tensors that neither holds: drawn anew from the seed."""
    ignored: Mapping[str, str]
    """Why a tensor of the file was not taken, by its name there."""
    next_command: str

    def table(self) -> str:
        """Counts the tensors of each part of it by where they came from, in Markdown."""
        sources = (tuple(self.mapped), self.kept, self.fresh)
        counts = [Counter(name.partition(".")[0] for name in names) for names in sources]
        parts = dict.fromkeys(part for count in counts for part in count)
        rows = [
            f"| {part:<11} | {counts[0][part]:>9} | {counts[1][part]:>10} | {counts[2][part]:>5} |"
            for part in sorted(parts)
        ]
        head = (
            "| tensors     | from file | from start | fresh |",
            "|-------------|-----------|------------|-------|",
        )
        return "\n".join([*head, *rows])

    def remarks(self) -> list[str]:
        """Names what was not taken, what stayed as it was in the start model, and what is fresh."""
        lines = []
        for reason in dict.fromkeys(self.ignored.values()):
            names = [name for name, why in self.ignored.items() if why == reason]
            lines.append(f"not taken: {_summary(names, 1)} ({reason})")
        if self.kept:
            lines.append(f"as in the start model: {_summary(self.kept, 3)}")
        if self.fresh:
            lines.append(f"fresh, not trained yet: {_summary(self.fresh, 3)}")
        return lines


def _summary(names: Collection[str], depth: int) -> str:
    """Names tensors by the first `depth` parts of their names, or by fewer if they are many."""
    counts = Counter(".".join(name.split(".")[:depth]) for name in names)
    if len(counts) > MAX_NAMES and depth > 1:
        return _summary(names, depth - 1)
    return ", ".join(f"{part} ({n})" if n > 1 else part for part, n in counts.items())


def convert(
    path: str | Path | None,
    output: str | Path,
    *,
    clip: str | None = None,
    pretrained: str | None = None,
    backbone: str | None = None,
    start: str | Path | None = None,
    weights: Whose | None = None,
    classes: str | Sequence[str] | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Converts a published checkpoint into a model folder.

    Args:
        path: The file; None for weights that open_clip fetches.
        output: Folder to write; a model folder that is there already is replaced.
        clip: Image-text model that the file's towers are, where their tensors don't say it.
        pretrained: open_clip's tag of weights of `clip`, in place of a file.
        backbone: Point backbone, in place of the layout's own.
        start: Model folder that gives what the file lacks.
        weights: Whose of a file that holds two sets; the student's if None.
        classes: Those that the file was adapted to, in its order: their names, the name of the
            package's list, or a file.
        seed: Of what neither the file nor the start model holds.

    Raises:
        ConfigError: If the file is missing, damaged, dangerous, of no known layout, or does not
            fit the model that it is to fill; if an argument is missing, is not for such a file,
            or names nothing. Nothing is written then.

    Source:
        Layouts: CLIP (Radford et al., 2021), open_clip, ULIP (Xue et al., 2023), Point-BERT
        (Yu et al., 2022), CrossMoST (Dharmasiri et al., 2024), as published.
    """
    folder = output_folder(output)
    image_mean = image_std = None
    if pretrained is not None:
        if path is not None or clip is None:
            raise ConfigError(
                "--pretrained takes the place of a file, and --clip says of which model it is, "
                "such as --clip ViT-B-16 --pretrained laion2b_s34b_b88k"
            )
        path, image_mean, image_std = fetch(clip, pretrained)
    elif path is None:
        raise ConfigError("name the file to convert, or --clip and --pretrained")
    checkpoint = read_checkpoint(path)
    tensors = _weights(checkpoint, weights or "student")
    layout = recognise(tensors, str(checkpoint.path))
    given: dict[Option, object] = {
        "clip": clip,
        "backbone": backbone,
        "start": start,
        "weights": weights,
        "classes": classes,
    }
    _check_options(checkpoint.path, layout, given)
    request = Request(
        clip=clip,
        backbone=backbone,
        start=load_start(start) if start is not None else None,
        classes=_class_list(classes) if classes is not None else None,
        image_mean=image_mean,
        image_std=image_std,
    )
    try:
        spec = layout.spec(tensors, request)
    except ConfigError as unfit:
        raise ConfigError(f"{checkpoint.path}: {unfit}") from None

    model = fresh_model(spec, seed)
    expected = model.state_dict()
    if request.classes is not None:
        width = model.image.embed_dim
        expected[CLASS_EMBED] = torch.empty(len(request.classes), width, device="meta")
    fitted = fit(layout, tensors, expected, str(checkpoint.path))
    check_finite(fitted, checkpoint.path)

    kept = fitted.absent if request.start is not None else ()
    class_embed = fill(model, fitted, request.start)
    report = ConversionReport(
        layout=layout.name,
        source=checkpoint.path,
        sha256=checkpoint.sha256,
        folder=folder,
        made=f"a model of {model.spec.clip} and {model.spec.point_backbone}",
        mapped={ours: theirs for ours, (theirs, _) in fitted.mapped.items()},
        kept=kept,
        fresh=() if kept else fitted.absent,
        ignored=fitted.ignored,
        next_command=layout.next_step.format(folder=output, backbone=spec.point_backbone),
    )
    asked: dict[str, object] = {"seed": seed, "pretrained": pretrained}
    asked |= {name: str(given[name]) for name in ("clip", "backbone", "start") if given[name]}
    if "weights" in layout.takes:
        asked["weights"] = weights or "student"
    asked = {name: value for name, value in asked.items() if value is not None}
    file = {"file": report.source.name, "sha256": report.sha256, "layout": report.layout}
    save_model(
        folder,
        model,
        card=card_text(report, asked),
        classes=request.classes,
        class_embed=class_embed,
        # Published classifiers are not brought to unit length once they have been trained.
        unit_classes=class_embed is None,
        training={"converted_from": file | asked},
    )
    return report


def fresh_model(spec: ModelSpec, seed: int) -> CrossModalModel:
    """Builds a model whose weights depend on the seed alone; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CrossModalModel(spec).eval()


def fill(model: CrossModalModel, fitted: Fit, start: ModelFolder | None) -> Tensor | None:
    """Loads what a file holds into a model, and what it lacks from the start model if there is one.

    Returns:
        (C, D) float32 class embeddings, if the file holds any.
    """
    filled = model.state_dict()
    if start is not None:
        given = start.model.state_dict()
        filled |= {name: given[name] for name in fitted.absent}
    filled |= {ours: tensor for ours, (_, tensor) in fitted.mapped.items()}
    class_embed = filled.pop(CLASS_EMBED, None)
    model.load_state_dict(filled)
    return None if class_embed is None else class_embed.float()


def load_start(start: str | Path) -> ModelFolder:
    """Loads the model folder that gives what a file lacks.

    Raises:
        ConfigError: As `load_model` does, or if it is adapted to classes: the embeddings of its
            classes would not go with other towers.
    """
    folder = load_model(start)
    if folder.classes is not None:
        raise ConfigError(
            f"the start model '{start}' is adapted to {len(folder.classes)} classes; "
            "take the model that it was adapted from"
        )
    return folder


def output_folder(output: str | Path) -> Path:
    """Finds the folder to write.

    Raises:
        ConfigError: If something is there that is no folder of this package's: it is not replaced.
    """
    folder = resolve_path(str(output))
    ours = all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
    if folder.exists() and not ours:
        raise ConfigError(
            f"'{output}' exists and is no model folder, so that it is not replaced; "
            "name another --output"
        )
    return folder


def _check_options(file: Path, layout: Layout, given: Mapping[Option, object]) -> None:
    """Refuses options that such a file has no use for, and asks for those that it needs."""
    useless = [f"--{name}" for name, value in given.items() if value and name not in layout.takes]
    if useless:
        raise ConfigError(f"{file} is {layout.name}: {', '.join(useless)} is not for it")
    lacking = [f"--{name}" for name in given if name in layout.needs and not given[name]]
    if lacking:
        raise ConfigError(
            f"{file} is {layout.name}, which is no whole model: it needs {' and '.join(lacking)} "
            "(--start FOLDER gives what it lacks, from a converted CLIP or CrossMoST's first "
            "stage; --classes NAME says what its classifier tells apart, such as modelnet40)"
        )


def _class_list(classes: str | Sequence[str]) -> list[str]:
    try:
        names = [*read_list("classes", classes)]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{classes} must hold names, got {names}")
        check_classes(names, "--classes")
    except ValueError as wrong:
        raise ConfigError(f"--classes: {wrong}") from None
    return names


def _weights(checkpoint: Checkpoint, whose: Whose) -> Mapping[str, Tensor]:
    if whose == "student":
        return checkpoint.tensors
    if checkpoint.teacher is None:
        raise ConfigError(f"{checkpoint.path} holds no teacher; take --weights student")
    return checkpoint.teacher


def check_finite(fitted: Fit, path: Path) -> None:
    """Refuses weights that are no numbers.

    Raises:
        ConfigError: Naming the first tensors of the file `path` that hold NaN or infinity.
    """
    broken = [
        f"{theirs} holds NaN or infinite numbers"
        for theirs, tensor in fitted.mapped.values()
        if not tensor.isfinite().all()
    ]
    if broken:
        raise refusal(f"{path} can't be used", broken, "fetch the file anew, or take another one")


def card_text(report: ConversionReport, asked: Mapping[str, object]) -> str:
    """Writes the card of a folder, in Markdown: where everything in it came from."""
    said = ", ".join(f"{name} {value}" for name, value in asked.items())
    remarks = "\n".join(f"- {line}" for line in report.remarks())
    return (
        f"# {report.folder.name}\n\n"
        f"Converted by `python jobs/convert.py` from `{report.source.name}`: {report.layout}.\n\n"
        f"- SHA-256 of that file: `{report.sha256}`\n"
        f"- what this is: {report.made}\n"
        f"- asked for: {said or 'nothing else'}\n\n"
        f"{report.table()}\n\n{remarks}\n"
    )
