"""Results in, one HTML file out: it holds all that it needs and opens from the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from crossmost_ray import __version__
from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard import html
from crossmost_ray.dashboard.accuracy import (
    OPINIONS,
    TEACHER,
    ZERO_SHOT,
    accuracy,
    gain,
    report_split,
)
from crossmost_ray.dashboard.chart import by_score, summary_of, template
from crossmost_ray.dashboard.panels import GROUPS, PANELS, Panel, Table, Text
from crossmost_ray.dashboard.runs import Results, Run

MOST_ROWS = 200
"""Rows of a table in a report; of more, those at the top are kept, and it says so."""

MOST_PROBLEMS = 50

Shown: TypeAlias = go.Figure | Table | Text

# Charts are drawn when they come into sight, and all of them before printing. The templates for
# light and dark are in the page once, not once a chart.
SCRIPT = """
"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const templates = read("templates");
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const charts = [...document.querySelectorAll(".chart")];
const config = {responsive: true, displaylogo: false, showSendToCloud: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
const mode = () => root.dataset.theme || (system.matches ? "dark" : "light");
function draw(chart) {
  if (chart.dataset.drawn === mode()) return;
  const figure = read(chart.dataset.figure);
  figure.layout.template = templates[mode()];
  chart.dataset.drawn = mode();
  Plotly.react(chart, figure.data, figure.layout, config);
}
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, {rootMargin: "400px"});
charts.forEach((chart) => seen.observe(chart));
function show() {
  charts.filter((chart) => chart.dataset.drawn).forEach(draw);
  button.setAttribute("aria-pressed", String(mode() === "dark"));
}
const button = document.getElementById("theme");
button.addEventListener("click", () => {
  root.dataset.theme = mode() === "dark" ? "light" : "dark";
  show();
});
system.addEventListener("change", show);
addEventListener("beforeprint", () => { root.dataset.theme = "light"; charts.forEach(draw); });
show();
"""


def write_report(
    results: Results, path: str | Path, *, title: str, runs: Sequence[Run] | None = None
) -> Path:
    """Writes a report of a run, a sweep, or all that lies in a folder.

    Args:
        results: All there is.
        path: The file; its folder is made if it is missing.
        title: Of the page.
        runs: Those it is about; None takes all.

    Returns:
        The file.

    Raises:
        ConfigError: If it can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_report(results, title=title, runs=runs), encoding="utf-8")
    except OSError as refused:
        raise ConfigError(
            f"the report can't be written to '{path}' ({refused.strerror}); name another file"
        ) from None
    return path


def render_report(results: Results, *, title: str, runs: Sequence[Run] | None = None) -> str:
    """Gives the report as text; see `write_report`."""
    chosen = results.runs if runs is None else tuple(runs)
    figures: dict[str, go.Figure] = {}
    groups = []
    for group, heading in GROUPS.items():
        shown = [(panel, panel.figure(results, chosen)) for panel in PANELS if panel.group == group]
        cards = [_card(panel, one, figures) for panel, one in shown if one is not None]
        # What is empty takes a line, not a card: it will not fill any more.
        cards += [
            html.empty(f"{panel.title}: {panel.empty}") for panel, one in shown if one is None
        ]
        groups.append(
            f'<section aria-labelledby="{group}-group"><h2 id="{group}-group">{heading}</h2>'
            f'<div class="grid">{"".join(cards)}</div></section>'
        )
    links = " · ".join(f'<a href="#{group}-group">{name}</a>' for group, name in GROUPS.items())
    templates = {
        name: template(dark).to_plotly_json() for name, dark in (("light", False), ("dark", True))
    }
    data = "".join(html.json_script(f"{key}-data", _json(one)) for key, one in figures.items())
    heading = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title>"
        # Without it a browser asks for /favicon.ico.
        '<link rel="icon" href="data:,">'
        f"<style>{html.style()}</style></head>\n<body>"
        '<a class="skip-link" href="#content">Skip to the results</a><div class="page">'
        f'<header class="header"><h1>{heading}</h1>'
        f'<span class="where">{html.escape(str(results.root))}</span>'
        '<button class="button no-print" id="theme" type="button" aria-pressed="false">Dark'
        "</button></header>"
        f'<nav class="links muted no-print" aria-label="Parts of the report">{links}</nav>'
        f'<main id="content">{summary(results, chosen)}{_problems(results)}{"".join(groups)}</main>'
        f'<footer class="footer">Written by crossmost_ray {html.escape(__version__)}. Runs are '
        "ranked without labels; accuracies are for the report only.</footer></div>\n"
        f"{html.json_script('templates', templates)}{data}\n"
        f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script></body></html>\n"
    )


def summary(results: Results, runs: Sequence[Run]) -> str:
    """Writes the strip at the top: how the best run, judged without labels, compares to zero-shot.

    Returns:
        HTML; it says so where there is no run.
    """
    if not runs:
        return html.empty("There is no run yet.")
    finished = [run for run in runs if run.status == "done"]
    best = by_score(finished or runs)[0]
    stats = []
    if len(runs) == 1:
        note = html.escape(best.error or best.stage or "") if best.status != "done" else ""
        stats.append(html.stat(best.title, html.chip(best.status), note))
    else:
        counted = _count_statuses(runs)
        said = ", ".join(f"{count:,} {status}" for status, count in counted.items())
        stats.append(html.stat("runs", f"{len(runs):,}", html.escape(said)))
        if best.score is not None:
            said = f"score {best.score:.4f}"
            stats.append(html.stat("best, judged without labels", html.escape(best.title), said))
    if len(runs) == 1 and best.score is not None:
        after = f"after {best.epochs} epoch" + ("s" if best.epochs != 1 else "")
        stats.append(html.stat("label-free score", f"{best.score:.4f}", after))
    split = report_split(best.metrics)
    for opinion in OPINIONS:
        after_it = accuracy(best.metrics, split, TEACHER, opinion)
        before = accuracy(best.metrics, split, ZERO_SHOT, opinion)
        gained = gain(best.metrics, split, TEACHER, opinion)
        if after_it is None or before is None:
            continue
        stats.append(
            html.stat(
                f"top-1 {opinion}, {split} ({after_it.objects:,})",
                f'<span class="before">{before.top1:.1f} →</span> {after_it.top1:.1f} %',
                "" if gained is None else html.change(gained),
            )
        )
    return html.strip(stats)


def _count_statuses(runs: Sequence[Run]) -> Mapping[str, int]:
    counted: dict[str, int] = {}
    for run in runs:
        counted[run.status] = counted.get(run.status, 0) + 1
    return counted


def _problems(results: Results) -> str:
    problems = list(results.problems)
    if not problems:
        return ""
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    title = f"{len(problems)} file(s) could not be read; the rest is shown"
    return html.note(title, problems[:MOST_PROBLEMS] + more, "warn")


def _card(panel: Panel, content: Shown, figures: dict[str, go.Figure]) -> str:
    if isinstance(content, Table):
        inside = html.table(_shortened(content))
    elif isinstance(content, Text):
        inside = html.text(content)
    else:
        figures[panel.key] = content
        inside = (
            f'<div class="chart" role="img" data-figure="{panel.key}-data" '
            f'aria-label="{html.escape(summary_of(content))}" '
            f'style="height:{content.layout.height}px"></div>'
        )
    return html.card(panel.key, panel.title, panel.question, inside)


def _shortened(table: Table) -> Table:
    if len(table.rows) <= MOST_ROWS:
        return table
    caption = f"{table.caption} The first {MOST_ROWS} of {len(table.rows):,}."
    return Table(caption, table.columns, table.rows[:MOST_ROWS], table.keys[:MOST_ROWS])


def _json(figure: go.Figure) -> str:
    """Writes a figure without its template, which the page has for all."""
    bare = go.Figure(figure)
    bare.layout.template = None
    text: str = bare.to_json()
    return text
