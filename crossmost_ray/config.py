"""Every knob, in the order the data meets them; reads a YAML file into a checked config."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

Mode = Literal["crossmost", "baseline", "image_only", "points_only"]
Tower = Literal["image", "point"]
PseudoLabelRule = Literal[
    "confidence", "coin", "agreement", "separate", "image_to_points", "points_to_image"
]
Tracker = Literal["mlflow", "wandb"]
TOWERS: tuple[Tower, ...] = ("image", "point")

ASSETS = "assets:"


class ConfigError(ValueError):
    """What a user can cure by changing the config or the files it names."""


def resolve_path(path: str) -> Path:
    """Turns a path of a config into a path on disk.

    Args:
        path: A path, absolute or relative to the working directory; `~` is the home folder, and
            `assets:` the data and weights that come with the package.
    """
    if path.startswith(ASSETS):
        return Path(str(resources.files("crossmost_ray"))) / "assets" / path.removeprefix(ASSETS)
    return Path(os.path.expanduser(path)).absolute()


def read_list(kind: Literal["classes", "templates"], value: Any) -> Any:
    """Reads a list that a config gives by name or by file; anything else passes as it is.

    The config then holds the list and not its name, and so does the `config.yaml` beside a run: it
    says what was used, even after the file, or the package's list of that name, has changed.

    Args:
        kind: Which of the package's collections a name is looked up in.
        value: A name in that collection, or the path of a file: YAML that holds a list, or text of
            one entry a line, where blank lines and those that begin with # don't count.

    Raises:
        ValueError: If neither a list nor a file is called so, or the file holds no list.
    """
    if not isinstance(value, str):
        return value
    known = yaml.safe_load(resolve_path(f"{ASSETS}text/{kind}.yaml").read_text(encoding="utf-8"))
    if value in known:
        return known[value]
    try:
        text = resolve_path(value).read_text(encoding="utf-8")
        if not value.endswith((".yaml", ".yml")):
            lines = (line.strip() for line in text.splitlines())
            return [line for line in lines if line and not line.startswith("#")]
        listed = yaml.safe_load(text)
    except FileNotFoundError:
        near = difflib.get_close_matches(value, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"there is no list and no file '{value}'{hint} "
            f"(the lists are {', '.join(known)}; one of your own goes into brackets)"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as broken:
        raise ValueError(f"'{value}' can't be read as a list: {broken}") from None
    if not isinstance(listed, list):
        raise ValueError(f"'{value}' must hold a list, such as [chair, table]")
    return listed


Classes = Annotated[list[str], BeforeValidator(partial(read_list, "classes"))]
Templates = Annotated[list[str], BeforeValidator(partial(read_list, "templates"))]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where the shards lie and how they are cut into batches."""

    shards: str
    """Folder of Parquet shards to learn from. Their labels are never read."""

    test_shards: str | None = None
    """Folder of Parquet shards that learning never sees; reported as `test`."""

    open_set_shards: str | None = None
    """Objects of none of the classes: the report says how many the model is confident about."""

    classes: Classes | None = None
    """Class names to tell apart, or the name of a list such as modelnet40, or a file of one name a
    line. None takes the list in the shards' manifest."""

    templates: Templates = dataclasses.field(default_factory=lambda: ["a 3D model of a {}."])
    """Prompts, or the name of a set such as modelnet40_64, or a file of one prompt a line; `{}`
    stands for the class name. Their embeddings are averaged."""

    batch_size: Count = 32
    """Pairs in a step over all workers together."""

    num_views: Count = 12
    """Views of each object that are used, evenly spaced over its ring; an epoch visits each."""

    shuffle_buffer: Count = 4096
    """Pairs that a worker keeps in memory to draw its batches from."""

    decode_threads: Count | None = None
    """Views that a worker decodes at a time, while it trains. None takes the worker's CPUs."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that can't be used: stop and name it, or leave it out and count it."""

    check: Literal["quick", "full"] = "quick"
    """How rows are looked at before training starts. The quick way reads every point, and of every
    view whether all of it is there; the full way decodes every view, which takes as long as an
    epoch's decoding. What only decoding shows, flipped bits among a picture's pixels, stops the run
    when the row's turn comes, by name; then the full way finds all rows of that kind."""

    teacher_views: Count = 2
    """Views, and samples of points, that the teacher's opinion of a pair is averaged over."""

    num_points: Count = 1024
    """Points of a cloud that the point tower sees, drawn anew for every pair."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_classes(self.classes, "data.classes")
        check_templates(self.templates)


def check_templates(templates: Sequence[str]) -> None:
    """Refuses prompts that can't make a classifier.

    Raises:
        ValueError: If there are none, or one does not hold {} once.
    """
    if not templates:
        raise ValueError("templates is empty: give at least one prompt, such as 'a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} must hold {{}} once, for the class name")


def check_classes(classes: Sequence[str], source: str) -> None:
    """Refuses a class list that can't make a classifier.

    Raises:
        ValueError: If it is empty, holds a blank name or a name twice; `source` says whose it is.
    """
    if not classes:
        raise ValueError(f"{source} is empty: name at least two classes")
    if any(not name.strip() for name in classes):
        raise ValueError(f"{source} holds a blank name")
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated:
        raise ValueError(f"{source} names {', '.join(repeated)} more than once")
    if len(classes) < 2:
        raise ValueError(f"{source} holds one class only: there is nothing to tell apart")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImageAugmentConfig:
    """How one view becomes a weak and a strong image."""

    weak_scale: Probability = 0.85
    """Least share of the view's area in the weak crop."""

    strong_scale: Probability = 0.3
    """Least share of the view's area in the strong crop."""

    flip: Probability = 0.5
    """Chance of a left-right flip of the strong image."""

    rand_ops: Natural = 2
    """RandAugment: operations drawn for each strong image."""

    rand_magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = 9.0
    """RandAugment: mean strength of an operation, of 10."""

    rand_chance: Probability = 0.5
    """RandAugment: chance that a drawn operation is applied."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PointAugmentConfig:
    """How one cloud becomes a weak and a strong cloud (the order is that of the fields)."""

    weak_scale: NonNegative = 0.1
    """The weak cloud is scaled by a factor of 1 - this to 1 + this."""

    weak_angle: NonNegative = 0.06
    """Deviation of the weak cloud's three small rotations, in radians, cut at three times it."""

    scale_low: Positive = 0.5
    scale_high: Positive = 2.0
    """The strong cloud is scaled by a factor between these two."""

    turn: Probability = 1.0
    """Share of a full turn about the up axis that the strong cloud may be rotated by."""

    shift: NonNegative = 0.5
    """The strong cloud moves by up to this share of its extent, along each axis."""

    jitter: NonNegative = 0.01
    """Deviation of the noise on each strong point, in radii, cut at five times it."""

    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.875
    """Largest share of strong points replaced by copies of one of them."""

    def __post_init__(self) -> None:
        if self.scale_low > self.scale_high:
            raise ValueError(f"scale_low {self.scale_low} is above scale_high {self.scale_high}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskConfig:
    """What is hidden from the student."""

    image_ratio: Probability = 0.3
    """Share of the image's cells that are hidden."""

    image_cell: Count = 2
    """Side of a cell, in patches: cells are hidden whole."""

    point_ratio_low: Probability = 0.3
    point_ratio_high: Probability = 0.4
    """Share of the cloud's groups that are hidden, drawn per object between these two."""

    def __post_init__(self) -> None:
        if self.point_ratio_low > self.point_ratio_high:
            raise ValueError(
                f"point_ratio_low {self.point_ratio_low} is above "
                f"point_ratio_high {self.point_ratio_high}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PseudoLabelConfig:
    """How the teacher's two opinions become targets for the student."""

    rule: PseudoLabelRule | None = None
    """confidence: the surer tower's class, for both. coin: the class of a tower drawn by a coin.
    agreement: only where both towers name one class. separate: each tower its own.
    image_to_points, points_to_image: separate, but one tower is taught by the other's labels.
    None takes confidence in mode crossmost, and separate in the others."""

    threshold: Probability = 0.84
    """Least confidence of a joint label for an object to count (mode crossmost)."""

    threshold_image: Probability = 0.80
    threshold_point: Probability = 0.82
    """The same for each tower's own labels (modes baseline, image_only, points_only)."""

    threshold_agreement: Probability = 0.2
    """Least confidence of the less sure tower where both agree (rule agreement)."""

    point_weight: Positive = 0.9
    """Factor on the point tower's confidence before the towers are compared.

    At 1 the towers are equals; above 1 the points are trusted more, as they should be where the
    image tower is the weaker one: an overconfident tower would win most comparisons.
    """

    def __post_init__(self) -> None:
        if self.point_weight < self.threshold:
            raise ValueError(
                f"point_weight {self.point_weight} is below threshold {self.threshold}: "
                "no point prediction could ever be selected"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossWeights:
    """Factor of each term of the objective; a mode uses those of its towers."""

    self_training_image: NonNegative = 1.0
    self_training_point: NonNegative = 1.0
    fairness_image: NonNegative = 1.0
    fairness_point: NonNegative = 1.0
    masked_image: NonNegative = 1.0
    masked_point: NonNegative = 1.0
    global_local_image: NonNegative = 0.2
    global_local_point: NonNegative = 0.2
    alignment: NonNegative = 1.0
    """Image-point contrast, both directions added; mode crossmost only."""

    entropy_image: NonNegative = 0.0
    entropy_point: NonNegative = 0.0
    """The student's own uncertainty: above 0, it is taught to decide. Not among the published
    terms, whose form has no gradient."""

    agreement: NonNegative = 0.0
    """How far the student's two towers disagree, as a divergence with a gradient."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompatConfig:
    """Where the published research code departs from the method. The first choice of each switch
    is its default, and corrected; the other reproduces that code. `compat: reference` in a config
    takes the old behaviour everywhere."""

    mim_norm: Literal["channels", "tokens197"] = "channels"
    """Masked image modelling: mean over channels, or their sum over the number of tokens."""

    mpm_target: Literal["tokens_detached", "mask_token", "chamfer", "token_ids"] = "tokens_detached"
    """What masked point modelling predicts: the hidden groups' tokens, the mask token itself
    (which says nothing of the cloud), the hidden groups' points, or the ids that the discrete
    autoencoder in `point_tokenizer` gives them."""

    mpm_norm: Literal["mean", "upstream"] = "mean"
    """Masked point modelling: mean over hidden elements, or the channels' sum over the batch.
    Points and ids are always averaged."""

    tie: Literal["image", "point", "sum"] = "image"
    """Whose class a joint label takes where both towers are equally sure; sum adds the indices."""

    align_temperature: Literal["learned", "none"] = "learned"
    """Whether the image-point contrast multiplies its cosines by the learned scale."""

    align_negatives: Literal["global", "local"] = "global"
    """Negatives of the contrast: of all workers (and never of the same object), or of the own."""

    frozen_encoder_bn: Literal["eval", "train"] = "eval"
    """Whether the frozen small PointNet normalises by its statistics, or by the strong batch's."""

    clamp_logit_scale: bool = True
    """Whether the scale of the logits is held at 100 or below."""

    class_embed: Literal["unit", "free"] = "unit"
    """Whether class embeddings are brought to unit length in every forward pass."""

    decay_on: Literal["matrices", "all_but_vectors"] = "matrices"
    """What weight decay acts on; all_but_vectors takes the scale and the mask tokens, too."""

    classname_underscores: Literal["space", "raw"] = "space"
    """How `night_stand` goes into a prompt."""

    point_layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | Literal["none"] = "none"
    """Factor on the learning rate from one block of the point tower to the block below it."""

    warmup: Literal["from_first_step", "from_zero"] = "from_first_step"
    """Whether the first step already moves, or has a learning rate of 0."""

    strong_upsample: Literal["auto", "always"] = "auto"
    """Whether a strong cloud of fewer than 8,192 points is filled up by averages of neighbours."""

    fps_start: Literal["zero", "random"] = "zero"
    """Where PointBERT's farthest point sampling begins; the other backbones always begin at the
    first point."""

    ema_restore: bool = True
    """Whether a resumed run takes its teacher back, or starts it over from the zero-shot model."""

    test_view: Literal["mean", "random"] = "mean"
    """Whether the image tower's answer is the mean over an object's views, or one view's that the
    lot picks. `evaluation.num_views: 1` fixes one."""

    select_on: Literal["score", "last", "oracle_test_points"] = "score"
    """Which checkpoint becomes the result: the best by the label-free score, the last, or the one
    whose student names most test objects rightly by their points. The latter reads the test split's
    labels: its accuracy says little."""


REFERENCE_COMPAT: dict[str, Any] = {
    "mim_norm": "tokens197",
    "mpm_target": "mask_token",
    "mpm_norm": "upstream",
    "tie": "sum",
    "align_temperature": "none",
    "align_negatives": "local",
    "frozen_encoder_bn": "train",
    "clamp_logit_scale": False,
    "class_embed": "free",
    "decay_on": "all_but_vectors",
    "classname_underscores": "raw",
    "point_layer_decay": "none",
    "warmup": "from_zero",
    "strong_upsample": "always",
    "fps_start": "random",
    "ema_restore": False,
    "test_view": "random",
    "select_on": "oracle_test_points",
}
"""What `compat: reference` stands for."""


def _compat(value: Any) -> Any:
    """Takes the preset's name alone, or as `preset` beside keys that win over it."""
    if isinstance(value, CompatConfig):
        return value
    keys = dict(value) if isinstance(value, dict) else {"preset": value}
    preset = keys.pop("preset", None)
    if preset is None:
        return value
    if preset != "reference":
        raise ValueError(f"there is no preset {preset!r}, only 'reference'; or list switches")
    return REFERENCE_COMPAT | keys


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EmaConfig:
    """How slowly the teacher follows the student."""

    start: Probability = 0.99
    end: Probability = 0.9998
    ramp_steps: Count = 400
    """Steps over which the decay goes from `start` to `end`."""

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"start {self.start} is above end {self.end}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """What a run does about its own health; it watches and reports it in any case."""

    collapse: Literal["report", "stop", "rollback"] = "report"
    """Where the labels run into few classes: stop, or go back to the last healthy teacher, from
    which the student starts again at half the learning rate."""

    starvation: Literal["report", "lower"] = "report"
    """Where a class has had no confident label for long: lower its threshold."""

    starved_epochs: Count = 3
    """Epochs without a confident label after which a class counts as starved."""

    lower_by: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Factor on the threshold of a starved class, each epoch until it has a confident label."""

    lowest: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of its threshold below which that of a starved class is never brought."""

    patience: Count | None = None
    """Epochs without a better label-free score after which the run stops; None: it does not."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """AdamW, with the learning rate falling along a cosine."""

    epochs: Count = 200
    lr: Positive = 2e-5
    """Peak learning rate, as it is: not scaled by the batch."""

    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 1.0
    weight_decay: NonNegative = 0.05
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """How slowly AdamW forgets the squares of gradients; 0.98 in ULIP's pre-training."""

    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65
    """Factor on the learning rate from one block of a tower to the block below it."""

    point_lr_scale: Positive = 1.0
    """Factor on the learning rate of the point tower: below 1 where it is the better tower, which
    has less to learn from the joint labels than to lose."""

    accumulate: Count = 1
    """Parts that a worker's share of a batch is cut into, one after the other, where it does not
    fit into memory. Terms that look at a batch as a whole (fairness, the contrast, means over what
    was chosen) then look at a part."""

    clip_norm: Positive = 10.0
    """Gradients longer than this are shortened to it."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClusterConfig:
    """What the run asks of the cluster, and how it meets losses."""

    num_workers: Count | tuple[Count, Count] = 1
    """Workers, or [fewest, most]: the run goes on with those that there are, and grows again."""

    use_gpu: bool = False
    """Whether each worker takes a GPU."""

    cpus_per_worker: Positive = 1.0
    """CPUs that the cluster sets aside for a worker; their number is bookkeeping, not a limit."""

    threads_per_worker: Count = 1
    """Threads that torch may use in one worker."""

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables of the workers and actors, such as GLOO_SOCKET_IFNAME or keys of a
    store. They are written into `config.yaml`: what is secret belongs into the cluster's own."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the device computes in it, else float32."""

    compile: Literal["auto", "always", "never"] = "auto"
    """Whether the transformers' blocks are compiled: auto does on a GPU (not measured there); on
    a CPU it gains nothing. A run that can't compile says so and goes on."""

    recompute: bool = False
    """Whether the student's blocks are computed again on the way back, in place of being kept: a
    batch takes a fraction of the memory, and a third more time."""

    max_failures: Natural = 3
    """How often lost workers are replaced before the run gives up. Workers that a preempted node
    takes along don't count."""

    checkpoint_steps: Count | None = None
    """Steps between checkpoints within an epoch; None: at the end of each epoch only."""

    def __post_init__(self) -> None:
        if self.fewest_workers > self.most_workers:
            raise ValueError(
                f"num_workers [{self.fewest_workers}, {self.most_workers}] must name the fewest "
                "first"
            )

    @property
    def fewest_workers(self) -> int:
        """Workers without which the run waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Workers that the run takes if it can have them."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


Corruption = Annotated[str, Field(pattern=r"^(noise|dropout|occlusion|rotation|density)(-[1-5])?$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """How a model is measured: deterministic, averaged over views and point resamples."""

    num_views: Count = 12
    random_view: bool = False
    """Takes one view of each object by lot in place of them all, as `compat.test_view` asks."""

    point_samples: Count = 4
    """How many samples of `data.num_points` points of an object are averaged."""

    corruptions: list[Corruption] = dataclasses.field(default_factory=list)
    """Also measures every split with its objects made worse: `noise-3` for one severity of 1 to 5,
    `noise` for all five. The kinds are noise, dropout, occlusion, rotation and density."""

    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that can't be used: stop and name it, or leave it out and count it.
    A run that skips them in `data.bad_rows` skips them here, too."""

    top_k: Annotated[int, Field(ge=5)] = 5
    """Classes that a row of predictions ranks; top-5 needs five."""

    store: list[Literal["logits", "embeddings"]] = dataclasses.field(default_factory=list)
    """What a row of predictions holds besides, for each tower: C or D numbers, uncompressible."""

    batch_size: Count = 32
    """Objects in a batch."""

    num_actors: Count = 1
    """Processes that hold all models and take one shard after the other."""

    threads_per_actor: Count = 1
    """Threads that torch may use in one actor, on a CPU."""

    confident: Probability = 0.84
    """A confidence above this counts as confident in the label-free report."""


def _check_parts(data: DataConfig, optim: OptimConfig, cluster: ClusterConfig) -> None:
    """Refuses to cut a worker's share of a batch into more parts than it has pairs.

    Raises:
        ValueError: If it would be.
    """
    share = data.batch_size // cluster.most_workers
    if optim.accumulate > max(share, 1):
        raise ValueError(
            f"optim.accumulate {optim.accumulate} cuts a worker's {share} pairs of data.batch_size "
            f"{data.batch_size} into more parts than there are; take at most {share}"
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptConfig:
    """One run of label-free adaptation."""

    name: Name
    """Name of the run, and of its folder below `output`."""

    model: str
    """Model folder to start from."""

    point_tokenizer: str | None = None
    """Tokenizer folder whose ids masked point modelling predicts, for compat.mpm_target token_ids;
    `jobs/convert.py --as-tokenizer` writes one."""

    mode: Mode = "crossmost"
    """crossmost: joint labels and alignment. baseline: each tower on its own labels."""

    seed: Natural = 0
    output: str = "runs"
    """Folder of runs: a path that all nodes share, or an address such as `s3://bucket/runs`."""

    keep_checkpoints: Count = 2
    """Checkpoints that are kept: those of the best label-free score, and always the last."""

    trackers: list[Tracker] = dataclasses.field(default_factory=list)
    """Where the metrics go besides the run's own files and its TensorBoard log."""

    data: DataConfig
    image_augment: ImageAugmentConfig = ImageAugmentConfig()
    point_augment: PointAugmentConfig = PointAugmentConfig()
    mask: MaskConfig = MaskConfig()
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    weights: LossWeights = LossWeights()
    compat: Annotated[CompatConfig, BeforeValidator(_compat)] = CompatConfig()
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()
    optim: OptimConfig = OptimConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        _check_parts(self.data, self.optim, self.cluster)
        by_ids = self.compat.mpm_target == "token_ids"
        if by_ids and self.point_tokenizer is None:
            raise ValueError(
                "compat.mpm_target token_ids predicts what a tokenizer calls the hidden groups, "
                "but point_tokenizer is not set; name the folder that `python jobs/convert.py "
                "dVAE.pth --as-tokenizer --output FOLDER` writes"
            )
        if self.point_tokenizer is not None and not by_ids:
            raise ValueError(
                f"point_tokenizer is '{self.point_tokenizer}', but compat.mpm_target is "
                f"{self.compat.mpm_target}, which needs none; set compat.mpm_target=token_ids, or "
                "leave point_tokenizer out"
            )
        if self.compat.select_on == "oracle_test_points":
            advice = "or set compat.select_on=score"
            if self.data.test_shards is None:
                raise ValueError(
                    "compat.select_on oracle_test_points chooses by the labels of "
                    f"data.test_shards, which is not set; set it, {advice}"
                )
            if self.keep_checkpoints < self.optim.epochs:
                raise ValueError(
                    "compat.select_on oracle_test_points chooses among all epochs' checkpoints: "
                    f"set keep_checkpoints={self.optim.epochs}, {advice}"
                )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SplitConfig:
    """One folder of shards that models are measured on."""

    shards: str
    """The folder: a path that all nodes share, or an address such as `s3://bucket/modelnet40`."""

    classes: Classes | None = None
    """As `data.classes`; None takes those of the measurement."""

    templates: Templates | None = None
    """As `data.templates`; None takes those of the measurement."""

    num_points: Count | None = None
    """As `data.num_points`; None takes that of the measurement."""

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_classes(self.classes, "classes")
        if self.templates is not None:
            check_templates(self.templates)


def _split(value: Any) -> Any:
    """Takes the folder alone, or keys."""
    return {"shards": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """One measurement of model folders on shards, labelled or not; nothing is trained."""

    name: Name
    """Name of the measurement, and of its folder below `output`."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Model folders by the name that the report gives them, in the order of its rows. `{split}` in
    a path stands for the name of the split: a model for each data set, under one name."""

    splits: Annotated[
        dict[Name, Annotated[SplitConfig, BeforeValidator(_split)]], Field(min_length=1)
    ]
    """Folders of shards by the name that the report gives them; keys instead of a folder where one
    has classes or prompts of its own."""

    classes: Classes | None = None
    """As `data.classes`, for splits that name none; None takes those of each one's manifest."""

    templates: Templates = dataclasses.field(default_factory=lambda: ["a 3D model of a {}."])
    """As `data.templates`."""

    num_points: Count = 1024
    """As `data.num_points`, for splits that name none."""

    output: str = "runs"
    """As a run's: a path that all nodes share, or an address such as `s3://bucket/results`."""

    overwrite: bool = False
    """Whether another measurement of this name is replaced."""

    use_gpu: bool = False
    """Whether each actor takes a GPU."""

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """As `cluster.env`: environment variables of the actors."""

    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_classes(self.classes, "classes")
        check_templates(self.templates)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainWeights:
    """Factor of each term of pre-training."""

    point_text: NonNegative = 1.0
    point_image: NonNegative = 1.0
    image_text: NonNegative = 1.0
    masked_image: NonNegative = 0.5
    masked_point: NonNegative = 0.5
    global_local_image: NonNegative = 0.1
    global_local_point: NonNegative = 0.1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Which variants a fresh model is made of."""

    clip: str = "vit_small_64"
    """Name of our small image-text model, or of one of open_clip's."""

    point_backbone: str = "pointbert_small"

    start: str | None = None
    """Model folder whose image and text towers and scale are taken, in place of `clip`; its point
    tower, too, if it has the same backbone and `fresh_point` is false."""

    fresh_point: bool = True
    """Whether the point tower starts from nothing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig:
    """One run of pre-training on captioned objects."""

    name: Name
    model: ModelConfig = ModelConfig()
    freeze: list[Literal["image", "text"]] = dataclasses.field(default_factory=list)
    """Towers that stay as they are: both, where the point tower learns the space of a given CLIP.
    Terms that nothing trainable could lower are left out."""

    freeze_scale: bool = False
    """Whether the scale of the cosines stays as it is."""

    seed: Natural = 0
    output: str = "runs"
    keep_checkpoints: Count = 1
    trackers: list[Tracker] = dataclasses.field(default_factory=list)
    data: DataConfig
    image_augment: ImageAugmentConfig = ImageAugmentConfig()
    point_augment: PointAugmentConfig = PointAugmentConfig()
    mask: MaskConfig = MaskConfig()
    weights: PretrainWeights = PretrainWeights()
    optim: OptimConfig = OptimConfig()
    cluster: ClusterConfig = ClusterConfig()
    report: dict[str, str] = dataclasses.field(default_factory=dict)
    """Folders of labelled shards by name, for the card's zero-shot accuracies; nothing is chosen
    by them."""

    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        _check_parts(self.data, self.optim, self.cluster)
        if self.freeze and self.model.start is None:
            raise ValueError(
                f"freeze names {', '.join(self.freeze)}, but model.start names no folder to take "
                "trained towers from: frozen fresh weights would teach nothing"
            )


ConfigT = TypeVar("ConfigT")


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file into a config.

    Args:
        cls: The config class, such as AdaptConfig.
        path: YAML file that holds what differs from the defaults.
        overrides: `dotted.key=value`, the value in YAML; they win over the file.

    Raises:
        ConfigError: If the file is missing or not YAML, or with one line per bad key.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no config file '{path}'")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{path} is not a YAML file: {broken}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, such as 'name: first-try'")
    for override in overrides:
        _apply(values, override)
    return parse_config(cls, values, str(path))


def parse_config(cls: type[ConfigT], values: dict[str, Any], source: str) -> ConfigT:
    """Builds `cls` from a parsed YAML mapping, or reports every error of it at once.

    Raises:
        ConfigError: One line per bad key; a key unknown to `cls` comes with the nearest one.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as invalid:
        lines = []
        for error in invalid.errors():
            key = ".".join(str(part) for part in error["loc"]) or "(whole file)"
            problem = error["msg"].removeprefix("Value error, ")
            if error["type"] == "unexpected_keyword_argument":
                near = difflib.get_close_matches(key, list(keys_of(cls)), n=1)
                problem = f"no such key; did you mean {near[0]}?" if near else "no such key"
            elif error["type"] == "missing_argument" or error["type"] == "missing":
                problem = "is needed and missing"
            elif error["type"] != "value_error":
                problem = f"{problem}, got {error['input']!r}"
            lines.append(f"  {key}: {problem}")
        raise ConfigError("\n".join([f"{source} cannot be run:", *lines])) from None


def keys_of(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of a config class, sections included."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        yield key
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], f"{key}.")


def config_dict(config: Any) -> dict[str, Any]:
    """Spells a config out, defaults included, as plain values that YAML and JSON can hold."""
    return dataclasses.asdict(config)


def _apply(values: dict[str, Any], override: str) -> None:
    """Writes one `dotted.key=value` into the parsed YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is no override; write dotted.key=value, such as seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as broken:
        raise ConfigError(f"'{override}': the value is not YAML: {broken}") from None
    *sections, last = key.split(".")
    below: Any = values
    for section in sections:
        if isinstance(below, list):
            below = below[_place(below, section, override)]
        else:
            below = below.setdefault(section, {})
        if not isinstance(below, dict | list):
            raise ConfigError(f"'{override}': {section} holds a value, not keys")
    if isinstance(below, list):
        below[_place(below, last, override)] = value
    else:
        below[last] = value


def _place(listed: list[Any], index: str, override: str) -> int:
    """Reads the place in a list that an override names: `sources.0.path=...`."""
    if not index.isdecimal() or int(index) >= len(listed):
        raise ConfigError(f"'{override}': there is no entry {index}, only 0 to {len(listed) - 1}")
    return int(index)
