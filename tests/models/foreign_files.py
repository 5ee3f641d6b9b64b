"""Files laid out as the published checkpoints are, with other numbers.

As a script, it writes them in full shape. Each tensor is a single zero there that is read as many,
so that a file of 600 MB takes less than one; they can be converted like the real ones:

    python -m tests.models.foreign_files /tmp/published
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.clip import published_name

KEYS = Path(__file__).parents[1] / "golden/keys"
OPENAI_SIZES = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}

MASKED_MODELLING = ("visual.mask_token_embedding", "visual.ln_patch.", "visual.decoder.")

State = dict[str, Tensor]


def key_list(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint: a file of `tests/golden/keys`."""
    lines = (KEYS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines)
    return {
        key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in pairs
    }


def full_shape(name: str) -> State:
    """The tensors of such a list, on the meta device: shapes and dtypes without numbers."""
    return {
        key: torch.empty(
            shape,
            dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32,
            device="meta",
        )
        for key, shape in key_list(name).items()
    }


# From our model to their names. Written out by hand: a slip in the rules must not be made twice.


def first_stage(state: Mapping[str, Tensor]) -> State:
    """CrossMoST's tensors after its first stage."""
    theirs = {published_name(name): value for name, value in state.items()}
    theirs["visual.mask_token_embedding"] = theirs["visual.mask_token_embedding"][None, None]
    weight = theirs["visual.decoder.0.weight"]
    theirs["visual.decoder.0.weight"] = weight[..., None, None]
    return theirs


def adapted(state: Mapping[str, Tensor], classifier: Tensor) -> State:
    """CrossMoST's tensors after its second stage, with a (D, C) classifier."""
    ours = {name: value for name, value in state.items() if not name.startswith("text.")}
    return first_stage(ours) | {"classifier": classifier}


def openai(state: Mapping[str, Tensor]) -> State:
    """OpenAI's tensors, its three sizes among them."""
    theirs = {
        name.removeprefix("image.").removeprefix("text.clip."): value
        for name, value in state.items()
        if name.startswith(("image.visual.", "text.clip.", "logit_scale"))
    }
    return theirs | {name: torch.tensor(size) for name, size in OPENAI_SIZES.items()}


def open_clip(state: Mapping[str, Tensor]) -> State:
    """The tensors of one of open_clip's models of the same kind."""
    return {name: value for name, value in openai(state).items() if name not in OPENAI_SIZES}


def ulip(state: Mapping[str, Tensor]) -> State:
    """ULIP's tensors: nothing for masked modelling, and SLIP's image tower under timm's names."""
    beginnings = {
        "image.visual.trunk.": "visual.",
        "text.clip.": "",
        "point.backbone.": "point_encoder.",
        "logit_scale": "logit_scale",
    }
    theirs = {
        "image_projection": state["image.visual.head.proj.weight"].t(),
        "pc_projection": state["point.projection"],
    }
    for name, value in state.items():
        beginning = next((part for part in beginnings if name.startswith(part)), None)
        if beginning is not None and ".mask_token" not in name and ".lm_head." not in name:
            theirs[beginnings[beginning] + name.removeprefix(beginning)] = value
    return theirs


def dvae(state: Mapping[str, Tensor]) -> State:
    """The dVAE's tensors: the group encoder's, and others that only have to be there."""
    encoder = "point.backbone.encoder."
    theirs = {
        f"encoder.{name.removeprefix(encoder)}": value
        for name, value in state.items()
        if name.startswith(encoder)
    }
    rest = ("codebook", "dgcnn_1.layer1.0.weight", "dgcnn_2.layer1.0.weight", "decoder.mlp.0.bias")
    return theirs | {name: torch.ones(2) for name in rest}


def dvae_of_tokenizer(state: Mapping[str, Tensor]) -> State:
    """The dVAE's tensors that a tokenizer is made of, convolutions again."""
    theirs = {name: value for name, value in state.items() if name.startswith("encoder.")}
    theirs["dgcnn_1.input_trans.weight"] = state["input.weight"][..., None]
    theirs["dgcnn_1.input_trans.bias"] = state["input.bias"]
    for k in range(4):
        theirs[f"dgcnn_1.layer{k + 1}.0.weight"] = state[f"edges.{k}.linear.weight"][
            ..., None, None
        ]
        theirs[f"dgcnn_1.layer{k + 1}.1.weight"] = state[f"edges.{k}.norm.weight"]
        theirs[f"dgcnn_1.layer{k + 1}.1.bias"] = state[f"edges.{k}.norm.bias"]
    theirs["dgcnn_1.layer5.0.weight"] = state["output.weight"][..., None]
    theirs["dgcnn_1.layer5.1.weight"] = state["output_norm.weight"]
    theirs["dgcnn_1.layer5.1.bias"] = state["output_norm.bias"]
    return theirs


def random_numbers(shapes: Mapping[str, Tensor], seed: int = 0) -> State:
    """Numbers for tensors of such names and shapes, by which a network keeps its scale."""
    rng = torch.Generator().manual_seed(seed)
    numbers = {}
    for name, tensor in shapes.items():
        shape = tuple(tensor.shape)
        if not tensor.is_floating_point():
            numbers[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            numbers[name] = 0.5 + torch.rand(shape, generator=rng)
        else:
            # Biases are small: larger than what they are added to, they alone would decide.
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
            scale = 0.1 if name.endswith(("bias", "running_mean")) else fan_in**-0.5
            numbers[name] = scale * torch.randn(shape, generator=rng)
    return numbers


def point_bert(state: Mapping[str, Tensor], prefix: str = "transformer_q.") -> State:
    """Point-BERT's tensors: the transformer, heads of another size, and what made its targets."""
    trunk = "point.backbone."
    theirs = {
        f"{prefix}{name.removeprefix(trunk)}": value
        for name, value in state.items()
        if name.startswith(trunk) and ".lm_head." not in name
    }
    heads = {f"{prefix}{name}": torch.ones(2) for name in ("lm_head.weight", "cls_head.0.bias")}
    if prefix == "base_model.":
        return theirs | heads
    rest = ("transformer_k.cls_token", "dvae.codebook", "queue", "queue_ptr")
    return theirs | heads | {name: torch.ones(2) for name in rest}


# Containers


def parallel(state: Mapping[str, Tensor]) -> State:
    """Names as they are saved from a model that was spread over several devices."""
    return {f"module.{name}": value for name, value in state.items()}


def settings() -> argparse.Namespace:
    """The settings of a run, as they are stored beside its weights."""
    return argparse.Namespace(model="ULIP", lr=3e-3, betas=(0.9, 0.98), output_dir=None)


def ulip_content(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ULIP, and CrossMoST's first stage, save."""
    return {
        "epoch": 3,
        "state_dict": parallel(state),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-3}]},
        "scaler": {"scale": 65536.0},
        "best_acc1": 60.3,
        "args": settings(),
    }


def crossmost_content(student: State, teacher: State | None) -> dict[str, Any]:
    """What CrossMoST's second stage saves."""
    content = {"model": student, "optimizer": {}, "epoch": "best", "args": settings()}
    return content if teacher is None else content | {"model_ema": teacher}


def point_bert_content(state: State) -> dict[str, Any]:
    """What Point-BERT saves: its accuracies are NumPy's numbers."""
    import numpy as np

    metrics = {"acc": np.float64(92.9)}
    return {"base_model": state, "optimizer": {}, "epoch": 3, "metrics": metrics}


class Node(nn.Module):
    """A module with tensors of any names, which a dotted name reaches."""

    def forward(self) -> int:
        """Gives something, so that it can be scripted."""
        return 0


def write_archive(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Writes a TorchScript archive of tensors with dotted names."""
    root = Node()
    for name, value in state.items():
        *parts, leaf = name.split(".")
        module: nn.Module = root
        for part in parts:
            if part not in module._modules:
                module.add_module(part, Node())
            module = module._modules[part]  # type: ignore[assignment]
        if value.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(value.detach()))
        else:
            module.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have something newer scripted
        torch.jit.script(root).save(str(path))
    return path


def write_full_shapes(folder: Path) -> list[Path]:
    """Writes the published files in full shape and a small size."""

    def zeros(name: str) -> State:
        shapes = full_shape(name)
        return {key: torch.zeros((), dtype=x.dtype).expand(x.shape) for key, x in shapes.items()}

    folder.mkdir(parents=True, exist_ok=True)
    whole, half = zeros("crossmost_first_stage"), zeros("crossmost_adapted")
    clip = {
        "visual.proj" if name == "image_projection" else name: value
        for name, value in whole.items()
        if not name.startswith(("point_encoder.", "pc_projection", *MASKED_MODELLING))
    }
    clip |= {name: torch.tensor(size) for name, size in OPENAI_SIZES.items()}
    contents: dict[str, Callable[[], Any]] = {
        "ViT-B-16-state-dict.pt": lambda: clip,
        "ulip-june11-checkpoint_best.pt": lambda: ulip_content(whole),
        "checkpoint-best.pth": lambda: crossmost_content(half, dict(half)),
        "dVAE.pth": lambda: {"base_model": zeros("dvae"), "epoch": 300},
        **{
            f"checkpoint_{name}.pt": lambda name=name: ulip_content(zeros(f"ulip_{name}"))
            for name in ("pointnet2_ssg", "pointmlp", "pointbert", "pointnext")
        },
    }
    for name, content in contents.items():
        torch.save(content(), folder / name)
    return [folder / name for name in contents]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for written in write_full_shapes(parser.parse_args().folder):
        print(f"{written} {written.stat().st_size / 1e6:.1f} MB")  # noqa: T201
