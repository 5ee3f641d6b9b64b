"""Reports as files: complete, escaped, and in need of nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard import html
from crossmost_ray.dashboard import report as report_module
from crossmost_ray.dashboard.accuracy import Gain
from crossmost_ray.dashboard.panels import PANELS
from crossmost_ray.dashboard.report import write_report
from crossmost_ray.dashboard.runs import Results, load_results
from crossmost_ray.dashboard.table import Column, Table
from crossmost_ray.storage import Store
from tests.dashboard.results import write_run, write_sweep


class Outline(HTMLParser):
    """Collects what is checked of a page, and that its elements close in order."""

    VOID = ("meta", "link", "br", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            last = self.tags[-1]
            key = last[1].get("id") or self.open[-1]
            self.texts[key] = self.texts.get(key, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def parse(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


def load(folder: Path) -> Results:
    return load_results(Store(str(folder)))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    write_run(root / "runs" / "furniture", seed=2)
    return write_report(load(root / "runs" / "furniture"), root / "new" / "out.html", title="Mine")


def test_a_report_loads_nothing(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    outline = parse(report)
    for tag, attrs in outline.tags:
        for name in ("src", "href", "data", "action"):
            said = attrs.get(name)
            assert said is None or said.startswith(("#", "data:")), (tag, said)
    styles = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in styles
    assert "@import" not in styles
    # plotly.js comes with it, once.
    assert page.count("plotly.js v") == 1


def test_each_chart_has_its_data_and_a_sentence(report: Path) -> None:
    outline = parse(report)
    charts = [one for one in outline.all("div") if one.get("class") == "chart"]
    assert len(charts) >= 10
    data = {one["id"]: one for one in outline.all("script") if one.get("id")}
    assert "templates" in data
    for one in charts:
        assert one["role"] == "img"
        assert len(one["aria-label"] or "") > 20
        figure = json.loads(outline.texts[one["data-figure"] or ""])
        assert figure["data"]
        assert "template" not in figure["layout"]


def test_a_report_has_its_landmarks_and_tables(report: Path) -> None:
    outline = parse(report)
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(outline.all(landmark)) == 1, landmark
    tables = outline.all("table")
    assert len(outline.all("caption")) == len(tables) > 0
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in outline.tags:
        labelled = attrs.get("aria-labelledby")
        assert labelled is None or labelled in ids


def test_the_strip_holds_the_numbers_of_the_metrics(report: Path) -> None:
    metrics = json.loads((report.parents[1] / "runs" / "furniture" / "metrics.json").read_text())
    models = metrics["splits"]["test"]
    page = report.read_text(encoding="utf-8")
    for opinion in ("fused", "image", "point"):
        before, after = (models[model][opinion]["top1"] for model in ("zero-shot", "teacher"))
        assert f'<span class="before">{before:.1f} →</span> {after:.1f} %' in page
        assert f"{models['teacher']['gain'][opinion]['difference']:+.1f} points" in page


def test_the_report_of_a_sweep_names_the_best_of_the_ledger(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", trials=8, detailed=0, evaluated=False)
    page = write_report(load(folder), tmp_path / "out.html", title="s").read_text(encoding="utf-8")
    entries = json.loads((folder / "trials.json").read_text())["trials"]
    done = [entry for entry in entries if entry["status"] == "done"]
    best = max(done, key=lambda entry: entry["score"])
    assert f'<div class="stat-value">{best["trial"]}</div>' in page
    assert f"score {best['score']:.4f}" in page


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    path = write_report(load(tmp_path), tmp_path / "out.html", title="nothing")
    parse(path)
    page = path.read_text(encoding="utf-8")
    assert "There is no run yet." in page
    assert all(html.escape(panel.empty) in page for panel in PANELS)


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    write_run(tmp_path / "runs" / "<b>run", name="run", state="failed", objects=8, labels=False)
    status = {"status": "failed", "error": evil, "heartbeat": None, "stage": None}
    (tmp_path / "runs" / "<b>run" / "status.json").write_text(json.dumps(status))
    (tmp_path / "runs" / "<b>run" / "classes.json").write_text(json.dumps([evil] * 8))
    (tmp_path / "runs" / "<b>run" / "progress.json").write_text("broken <i>")
    path = write_report(load(tmp_path / "runs"), tmp_path / "out.html", title=evil)
    page = path.read_text(encoding="utf-8")
    parse(path)
    assert "<b>run" not in page
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "1 file(s) could not be read" in page


def test_data_can_end_no_element() -> None:
    written = html.json_script("x", {"a": "</script><!-- & ]]>"})
    inside = re.fullmatch(r'<script type="application/json" id="x">(.*)</script>', written)
    assert inside is not None
    assert "<" not in inside[1]
    assert json.loads(inside[1]) == {"a": "</script><!-- & ]]>"}


def test_a_long_table_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MOST_ROWS", 3)
    folder = write_sweep(tmp_path / "sweep", trials=5, detailed=0, evaluated=False)
    page = write_report(load(folder), tmp_path / "out.html", title="s").read_text(encoding="utf-8")
    assert "The first 3 of 5." in page
    assert page.count('<th scope="row">trial-') == 3


def test_a_table_keeps_numbers_apart_from_words() -> None:
    columns = (Column("run"), Column("a.b", ".2f", "what it is", "number"), Column("gain"))
    written = html.table(Table("<c>", columns, (("one", 1.234, Gain(1.0, 0.5, 1.5)),)))
    assert "<caption>&lt;c&gt;</caption>" in written
    assert '<th scope="col" class="number" title="what it is">a.<wbr>b</th>' in written
    assert '<td class="number">1.23</td>' in written
    assert '+1.0 <span class="range">[+0.5, +1.5]</span>' in written


@pytest.mark.parametrize(
    ("gain", "expected"), [((1, 0.5, 2), "up"), ((-1, -2, -0.5), "down"), ((1, -1, 3), "")]
)
def test_a_gain_is_coloured_only_where_it_is_no_luck(
    gain: tuple[float, float, float], expected: str
) -> None:
    assert html.change(Gain(*gain)).startswith(f'<span class="{expected}">')


def test_a_report_that_can_t_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name another file"):
        write_report(Results(Store(str(tmp_path))), tmp_path / "file" / "out.html", title="x")
