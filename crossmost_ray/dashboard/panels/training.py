"""Rows of epochs in, learning curves out."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from crossmost_ray.dashboard.chart import drawn, plain, small_multiples
from crossmost_ray.dashboard.runs import LABEL_FREE_SCORE, Results, Run

SCORES = {
    LABEL_FREE_SCORE: "score: the one that chooses",
    "selection/agreement": "agreement of the towers",
    "selection/information": "information",
    "selection/neighbourhood": "neighbourhood density",
    "selection/stability": "stability under augmentation",
    "selection/persistence": "persistence over epochs",
    "selection/student": "agreement with the student",
}

STUDENT_AND_TEACHER = {
    "selection/student": "student agrees with teacher",
    "teacher/agreement": "teacher's towers agree, on batches",
    "selection/agreement": "teacher's towers agree, on all objects",
}


def losses(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws the loss and each of its terms over the epochs."""
    lines, _ = drawn(runs)
    keys = {key for run in lines for row in run.rows for key in row}
    terms = sorted(key for key in keys if key.startswith("loss/"))
    titles = {"loss": "loss: the weighted sum"} | {key: _term(key) for key in terms}
    return small_multiples(runs, titles, what="Loss and its terms")


def scores(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws the label-free scores over the epochs."""
    return small_multiples(runs, SCORES, what="Label-free scores")


def student_and_teacher(results: Results, runs: Sequence[Run]) -> go.Figure | None:
    """Draws how far student and teacher, and the teacher's towers, are of one mind."""
    return small_multiples(
        runs,
        STUDENT_AND_TEACHER,
        what="Student and teacher",
        percent=tuple(STUDENT_AND_TEACHER),
    )


def _term(key: str) -> str:
    """Writes `loss/self_training_image` as `self training, image`."""
    words = key.removeprefix("loss/").split("_")
    if words[-1] in ("image", "point") and len(words) > 1:
        return plain(f"{' '.join(words[:-1])}, {words[-1]}")
    return plain(" ".join(words))
