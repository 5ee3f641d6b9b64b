"""All panels, in the order of the page: chosen runs in, a chart, a table or text out."""

from __future__ import annotations

from crossmost_ray.dashboard.panels import accuracy, health, overview, settings, system, training
from crossmost_ray.dashboard.panels.panel import Content, Group, Panel
from crossmost_ray.dashboard.table import Table, Text

__all__ = ["GROUPS", "PANELS", "Content", "Group", "Panel", "Table", "Text"]

GROUPS: dict[Group, str] = {
    "overview": "Overview",
    "settings": "Settings",
    "training": "Training",
    "health": "Pseudo-labels",
    "accuracy": "Accuracy",
    "system": "System",
}
"""Titles of the parts of the page, in their order."""

NO_VOTES = "No epoch has left votes yet; they appear with the first finished epoch."
NOT_MEASURED = "Nothing was measured on labelled objects yet, or none are labelled."
TOO_FEW = "This needs at least two runs with a label-free score and a setting in which they differ."

PANELS: tuple[Panel, ...] = (
    Panel(
        key="leaderboard",
        title="Leaderboard",
        question="Which run is best, judged without a label?",
        group="overview",
        empty="There is no run yet.",
        figure=overview.leaderboard,
    ),
    Panel(
        key="parallel",
        title="Settings side by side",
        question="Which settings go together in good runs? Drag along an axis to pick a range.",
        group="settings",
        empty=TOO_FEW,
        figure=settings.parallel,
    ),
    Panel(
        key="importance",
        title="Importance of settings",
        question="Which setting, by itself, makes the score differ?",
        group="settings",
        empty="This needs at least three runs with a label-free score and a setting that differs.",
        figure=settings.importance,
    ),
    Panel(
        key="slices",
        title="Score against each setting",
        question="Where along a setting do the good runs lie?",
        group="settings",
        empty=TOO_FEW,
        figure=settings.slices,
    ),
    Panel(
        key="scores",
        title="Label-free scores",
        question="Does the model get better, as far as can be told without labels?",
        group="training",
        empty="No epoch has left a label-free score yet.",
        figure=training.scores,
    ),
    Panel(
        key="losses",
        title="Learning curves",
        question="Does each term of the loss fall?",
        group="training",
        empty="No epoch is finished yet.",
        figure=training.losses,
    ),
    Panel(
        key="student-teacher",
        title="Student and teacher",
        question="Do student and teacher, and the teacher's two towers, come to one mind?",
        group="training",
        empty="No epoch has compared student and teacher yet.",
        figure=training.student_and_teacher,
    ),
    Panel(
        key="health",
        title="Health of the pseudo-labels",
        question="Are there enough confident labels, over all classes, and do they settle?",
        group="health",
        empty="No epoch has reported on its pseudo-labels yet.",
        figure=health.health,
    ),
    Panel(
        key="class-histogram",
        title="Classes in use",
        question="Do pseudo-labels spread over the classes, or do a few swallow the rest?",
        group="health",
        empty=NO_VOTES,
        figure=health.class_histogram,
    ),
    Panel(
        key="confident-classes",
        title="Confidence by class",
        question="For which classes is the teacher sure enough for labels to count?",
        group="health",
        empty=NO_VOTES,
        figure=health.confident_by_class,
    ),
    Panel(
        key="never-confident",
        title="Classes without confident labels",
        question="Which classes does the student hear nothing about?",
        group="health",
        empty=NO_VOTES,
        figure=health.never_confident,
    ),
    Panel(
        key="votes",
        title="Accuracy of the votes",
        question="Were the pseudo-labels right? Oracle: read from labels, for the report only.",
        group="accuracy",
        empty="The objects have no labels, or their shards are not within reach from here.",
        figure=accuracy.votes,
    ),
    Panel(
        key="confusion",
        title="Confusion before and after",
        question="Which classes are taken for which, and what did adaptation change?",
        group="accuracy",
        empty=NOT_MEASURED,
        figure=accuracy.confusion,
    ),
    Panel(
        key="per-class",
        title="Gain by class",
        question="Which classes gain from adaptation, and which pay for it?",
        group="accuracy",
        empty=NOT_MEASURED,
        figure=accuracy.per_class,
    ),
    Panel(
        key="reliability",
        title="Reliability",
        question="Is the model as right as it is sure? Larger marks stand for more objects.",
        group="accuracy",
        empty=NOT_MEASURED,
        figure=accuracy.reliability,
    ),
    Panel(
        key="speed",
        title="Speed and memory",
        question="How fast does it train, and does it wait for data?",
        group="system",
        empty="No epoch is finished yet.",
        figure=system.speed,
    ),
    Panel(
        key="timeline",
        title="What happened",
        question="When did it start, what was lost, and what did the guard do?",
        group="system",
        empty="Nothing has happened yet.",
        figure=system.timeline,
    ),
    Panel(
        key="reproduce",
        title="Do it again",
        question="With which command, config and versions was it made?",
        group="system",
        empty="There is no run yet.",
        figure=system.reproduce,
    ),
)
