"""Point-BERT's discrete autoencoder in, a tokenizer folder out."""

from __future__ import annotations

from pathlib import Path

import torch

from crossmost_ray.config import ConfigError
from crossmost_ray.models.foreign.convert import (
    ConversionReport,
    card_text,
    check_finite,
    output_folder,
)
from crossmost_ray.models.foreign.layout import fit
from crossmost_ray.models.foreign.pointbert import TOKENIZER
from crossmost_ray.models.foreign.read import read_checkpoint
from crossmost_ray.models.point_tokenizer import PointTokenizer, TokenizerSpec, save_tokenizer


def convert_tokenizer(path: str | Path, output: str | Path) -> ConversionReport:
    """Converts `dVAE.pth` into a folder that `point_tokenizer` of a config can name.

    Args:
        path: The file.
        output: Folder to write; one of this package's that is there already is replaced.

    Raises:
        ConfigError: If the file is missing, damaged, dangerous, another one, or does not fit.
            Nothing is written then.

    Source:
        Point-BERT (Yu et al., 2022), as published.
    """
    folder = output_folder(output)
    checkpoint = read_checkpoint(path)
    if not TOKENIZER.matches(checkpoint.tensors):
        raise ConfigError(
            f"{checkpoint.path} is not {TOKENIZER.name}, which alone can become a tokenizer: "
            "name dVAE.pth, or leave --as-tokenizer out"
        )
    with torch.device("meta"):
        tokenizer = PointTokenizer(TokenizerSpec())
    fitted = fit(TOKENIZER, checkpoint.tensors, tokenizer.state_dict(), str(checkpoint.path))
    check_finite(fitted, checkpoint.path)
    tokenizer = tokenizer.to_empty(device="cpu")
    tokenizer.load_state_dict({ours: tensor for ours, (_, tensor) in fitted.mapped.items()})

    spec = tokenizer.spec
    report = ConversionReport(
        layout=TOKENIZER.name,
        source=checkpoint.path,
        sha256=checkpoint.sha256,
        folder=folder,
        made=(
            f"a tokenizer: one of {spec.vocabulary} ids for each group of {spec.group_size} points"
        ),
        mapped={ours: theirs for ours, (theirs, _) in fitted.mapped.items()},
        kept=(),
        fresh=(),
        ignored=fitted.ignored,
        next_command=TOKENIZER.next_step.format(folder=output),
    )
    save_tokenizer(
        folder,
        tokenizer,
        card=card_text(report, {}),
        origin={"file": report.source.name, "sha256": report.sha256, "layout": report.layout},
    )
    return report
