"""One object of a run in, all that is known of it out: its cloud, its views, and its votes."""

from __future__ import annotations

import base64
import functools
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard import chart
from crossmost_ray.dashboard.accuracy import OPINIONS, TEACHER
from crossmost_ray.dashboard.configs import lookup
from crossmost_ray.dashboard.files import problem
from crossmost_ray.dashboard.runs import Run
from crossmost_ray.dashboard.votes import TOWERS, read_votes, vote_epochs
from crossmost_ray.data.decode import decode_points
from crossmost_ray.data.shards import list_shards, open_shard, read_manifest

MAX_POINTS = 4096
"""Points of a cloud that are drawn: more are slow to turn, and look the same."""

COLUMNS = ("points", "colors", "views", "label", "captions")

SPLIT = "transductive"
"""What an evaluation calls the objects that were adapted to."""

SIGNATURES = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))

AXES = {"x": (1.0, 0.0, 0.0), "y": (0.0, 1.0, 0.0), "z": (0.0, 0.0, 1.0)}

Points = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Stored:
    """What the shards hold of an object."""

    points: Points
    """(N, 3), in the unit sphere."""
    colors: npt.NDArray[np.uint8] | None
    """(N, 3) sRGB; None where the source has no colour."""
    views: tuple[bytes, ...]
    """Encoded images."""
    up_axis: str
    """Such as `+y`."""
    label: str | None
    """The true class, if there is one; for reports only."""
    captions: tuple[str, ...]
    shard: str
    """Name of the file that holds it."""


@dataclass(frozen=True)
class Moment:
    """What was said of an object in one epoch."""

    epoch: int
    votes: Mapping[str, tuple[str, float]]
    """The teacher's class and its confidence, by tower that votes."""
    labels: Mapping[str, tuple[str, bool]]
    """Class that the student's tower learned from and whether it counted, by tower."""
    student: Mapping[str, str]
    """The student's class, by tower."""
    confidence: float
    """Of the label; NaN where there is none."""

    @property
    def label(self) -> str:
        """The label; both towers' where they differ."""
        return " / ".join(dict.fromkeys(name for name, _ in self.labels.values()))

    @property
    def selected(self) -> bool:
        """Whether any tower learned from it."""
        return any(selected for _, selected in self.labels.values())


@dataclass(frozen=True, eq=False)
class _Index:
    """Where every object of a folder of shards lies."""

    ids: pa.ChunkedArray
    groups: tuple[tuple[str, int], ...]
    """File and row group, in the order of the ids."""
    starts: npt.NDArray[np.int64]
    """Place among the ids of each group's first object."""


def shards_of(run: Run) -> str | None:
    """Names the folder of shards that a run learns from; None where its config names none."""
    named = lookup(run.config, "data.shards")
    return named if isinstance(named, str) else None


def read_stored(shards: str, object_id: str) -> Stored | None:
    """Reads one object out of a folder of shards; None if it is not in there.

    Args:
        shards: The folder. All its ids are read the first time, and one group of rows each time.
        object_id: The object's.

    Raises:
        ConfigError: If the shards can't be read.
    """
    index = _index(shards)
    place = pc.index(index.ids, pa.scalar(object_id, pa.string())).as_py()
    if place < 0:
        return None
    group = int(np.searchsorted(index.starts, place, side="right")) - 1
    name, number = index.groups[group]
    with open_shard(shards, name) as shard:
        stored = [column for column in COLUMNS if column in shard.schema_arrow.names]
        try:
            rows = shard.read_row_group(number, columns=stored)
        except (pa.ArrowException, OSError) as broken:
            raise ConfigError(
                f"{name} of the shards '{shards}' can't be read ({broken}); "
                "write it anew with `python jobs/prepare.py`"
            ) from None
    row = rows.slice(place - int(index.starts[group]), 1)

    def value(column: str) -> Any:
        return row[column][0].as_py() if column in stored else None

    colored = "colors" in stored and row["colors"][0].is_valid
    return Stored(
        points=decode_points(row["points"])[0],
        colors=decode_points(row["colors"])[0].astype(np.uint8) if colored else None,
        views=tuple(view for view in value("views") or () if view),
        up_axis=str(read_manifest(shards).get("up_axis", "+y")),
        label=value("label"),
        captions=tuple(value("captions") or ()),
        shard=name,
    )


@functools.lru_cache(maxsize=4)
def _index(shards: str) -> _Index:
    parts: list[pa.Array] = []
    groups: list[tuple[str, int]] = []
    sizes: list[int] = []
    for name in list_shards(shards, ["object_id", "points", "views"]):
        with open_shard(shards, name) as shard:
            parts += shard.read(columns=["object_id"])["object_id"].cast(pa.string()).chunks
            for number in range(shard.metadata.num_row_groups):
                groups.append((name, number))
                sizes.append(shard.metadata.row_group(number).num_rows)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1]
    return _Index(pa.chunked_array(parts, pa.string()), tuple(groups), starts)


def view_address(encoded: bytes) -> str:
    """Turns an encoded image into an address by which a browser shows it, as it is."""
    kind = next((kind for start, kind in SIGNATURES if encoded.startswith(start)), "image/webp")
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def best_classes(run: Run, object_id: str, shard: str) -> dict[str, list[str]]:
    """Looks up the teacher's best classes of an object, where an evaluation holds them.

    Args:
        run: Whose evaluation.
        object_id: The object's.
        shard: File that holds the object; the predictions of its objects have the same name.

    Returns:
        By opinion, the best first; empty where nothing was predicted. A file that can't be read is
        named in the run's `problems`.
    """
    path = posixpath.join(run.folder, "predictions", SPLIT, shard)
    try:
        if not run.root.has_file(path):
            return {}
        with pq.ParquetFile(run.root.open_input(path)) as file:
            ranked = {opinion: f"ranked_{opinion}" for opinion in OPINIONS}
            table = file.read(columns=["object_id", "model", *ranked.values()])
            mine = table.filter(
                (pc.field("object_id") == object_id) & (pc.field("model") == TEACHER)
            )
            return {
                opinion: mine[column][0].as_py()
                for opinion, column in ranked.items()
                if mine.num_rows
            }
    except (ConfigError, pa.ArrowException, OSError, KeyError) as broken:
        run.problems.append(problem(path, broken))
        return {}


def follow(run: Run, object_id: str) -> list[Moment]:
    """Follows an object over the epochs; those that have no votes on it are left out.

    Files that can't be read are named in the run's `problems`.
    """
    moments = []
    for epoch in sorted(vote_epochs(run)):
        try:
            votes = read_votes(run, epoch)
        except ConfigError as unreadable:
            run.problems.append(str(unreadable))
            continue
        place = pc.index(votes["object_id"], pa.scalar(object_id, pa.string())).as_py()
        if place >= 0:
            moments.append(_moment(run.classes, epoch, votes.slice(place, 1)))
    return moments


def _moment(classes: Sequence[str], epoch: int, row: pa.Table) -> Moment:
    said = {name: row[name][0].as_py() for name in row.column_names}

    def named(column: str) -> str:
        place = said[column]
        return classes[place] if 0 <= place < len(classes) else f"class {place}"

    def towers(column: str) -> list[str]:
        return [tower for tower in TOWERS if said.get(column.format(tower)) is not None]

    confidence = said["label_confidence"]
    return Moment(
        epoch=epoch,
        votes={
            tower: (named(f"{tower}_class"), float(said[f"{tower}_confidence"]))
            for tower in towers("{}_class")
        },
        labels={
            tower: (named(f"{tower}_label"), bool(said[f"{tower}_selected"]))
            for tower in towers("{}_label")
        },
        student={tower: named(f"student_{tower}_class") for tower in towers("student_{}_class")},
        confidence=float("nan") if confidence is None else float(confidence),
    )


def cloud_figure(stored: Stored) -> go.Figure:
    """Draws a cloud to turn: in its colours, or shaded by height where it has none."""
    # Clouds are in random order: any even choice is a fair one.
    keep = np.linspace(0, len(stored.points) - 1, min(MAX_POINTS, len(stored.points))).astype(int)
    points = stored.points[keep]
    up = np.array(AXES.get(stored.up_axis[-1:], AXES["y"]))
    up = -up if stored.up_axis.startswith("-") else up
    if stored.colors is None:
        paint: dict[str, Any] = {"color": points @ up, "colorscale": "Viridis"}
    else:
        paint = {"color": [f"rgb({r},{g},{b})" for r, g, b in stored.colors[keep].tolist()]}
    # From the front, the right and above, whichever axis is up.
    side = np.roll(np.abs(up), 1)
    eye = 1.6 * side + 1.1 * np.roll(side, 1) + 0.95 * up
    figure = go.Figure(
        go.Scatter3d(
            **dict(zip("xyz", points.T, strict=True)),
            mode="markers",
            marker={"size": 2.4, "opacity": 1.0, **paint},
            hoverinfo="skip",
        )
    )
    figure.update_layout(
        scene={
            "aspectmode": "data",
            "dragmode": "orbit",
            "camera": {
                "up": dict(zip("xyz", up.tolist(), strict=True)),
                "eye": dict(zip("xyz", eye.tolist(), strict=True)),
            },
            **{f"{axis}axis": {"visible": False} for axis in "xyz"},
        },
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
    )
    drawn = f"{len(points):,} of its {len(stored.points):,} points"
    return chart.finish(figure, summary=f"The object's cloud, {drawn}.", height=380)


def history_figure(moments: Sequence[Moment]) -> go.Figure:
    """Draws confidences over the epochs; a class is written where it first stands or changes.

    A filled mark of the label: the student learned from the object in that epoch.
    """
    figure = go.Figure()
    for tower in TOWERS:
        line = [(one.epoch, *one.votes[tower]) for one in moments if tower in one.votes]
        if line:
            figure.add_trace(_line(f"{tower} tower", chart.TOWER_COLORS[tower], line, "circle"))
    labels = [(one.epoch, one.label, one.confidence) for one in moments if one.labels]
    if labels:
        marks = ["diamond" if one.selected else "diamond-open" for one in moments if one.labels]
        figure.add_trace(_line("label", chart.TOWER_COLORS["fused"], labels, marks))
    figure.update_yaxes(title_text="confidence", range=[-0.03, 1.13], tickformat=".1f", nticks=6)
    figure.update_xaxes(title_text="epoch")
    chart.epochs_axis(figure, max((one.epoch for one in moments), default=0))
    figure.update_layout(margin={"t": 40}, hovermode="x unified")
    last = moments[-1].label if moments else ""
    return chart.finish(
        figure,
        summary=f"Confidence of each tower and of the label over {len(moments)} epochs; "
        f"the label is now {last or 'none'}.",
        height=280,
    )


def _line(
    name: str, color: str, line: Sequence[tuple[int, str, float]], symbol: str | list[str]
) -> go.Scatter:
    classes = [said for _, said, _ in line]
    words = [
        chart.plain(said) if place == 0 or said != classes[place - 1] else ""
        for place, said in enumerate(classes)
    ]
    return go.Scatter(
        x=[epoch for epoch, _, _ in line],
        y=[confidence for _, _, confidence in line],
        name=name,
        mode="lines+markers+text",
        text=words,
        textposition="top center",
        textfont={"color": color, "size": 11},
        customdata=[chart.plain(said) for said in classes],
        hovertemplate="%{customdata}, %{y:.2f}",
        line={"color": color, "width": 2, "dash": "dot" if name == "label" else "solid"},
        marker={"color": color, "symbol": symbol, "size": 8},
    )
