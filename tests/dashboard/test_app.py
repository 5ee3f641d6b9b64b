"""The live page: its answers without a browser, then what people see in one."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from crossmost_ray.dashboard import app as live
from crossmost_ray.dashboard.app import Shelf, make_app
from crossmost_ray.dashboard.runs import load_results
from crossmost_ray.storage import Store
from tests.dashboard.browser import (  # noqa: F401  # `browser` is a fixture
    REPOSITORY,
    browser,
    console_errors,
    dashboard,
    until,
)
from tests.dashboard.results import trial_entry, write_ledger, write_run, write_sweep

FURNITURE = REPOSITORY / "crossmost_ray/assets/furniture/target_a"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run on the embedded furniture, a failed one, and a sweep that is going on."""
    folder = tmp_path_factory.mktemp("results")
    classes = json.loads((FURNITURE / "manifest.json").read_text())["classes"]
    write_run(folder / "furniture", epochs=4, shards=FURNITURE, classes=classes)
    write_run(folder / "broken", state="failed", labels=False)
    write_sweep(folder / "threshold", trials=12, state="running", detailed=2)
    # The tests may take longer than a driver may be silent.
    path = folder / "threshold/status.json"
    said = json.loads(path.read_text()) | {"heartbeat": "2999-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(said))
    return folder


def votes_of(root: Path, epoch: int) -> dict[str, np.ndarray]:
    table = pq.read_table(root / f"furniture/votes/epoch-{epoch:04}.parquet")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


# Without a browser


def test_the_page_and_what_it_loads_come_from_here(root):
    client = make_app(Store(str(root))).server.test_client()
    answer = client.get("/")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self' ")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert any("live.js" in place for place in loaded)
    assert any("style.css" in place for place in loaded)
    for place in loaded:
        assert place.startswith("/"), place
        assert client.get(place).status_code == 200, place
    # Dash would ask its makers for a newer version.
    config = json.loads(re.search(r'id="_dash-config"[^>]*>(.*?)</script>', answer.text)[1])
    assert config["disable_version_check"] is True


def test_nothing_can_be_written_through_the_page(root):
    application = make_app(Store(str(root)))
    rules = {rule.rule: rule.methods for rule in application.server.url_map.iter_rules()}
    writing = {
        rule for rule, methods in rules.items() if methods & {"POST", "PUT", "PATCH", "DELETE"}
    }
    # Dash asks by POST; its callbacks read.
    assert writing <= {"/_dash-update-component"}, rules


def test_the_list_to_review_is_what_the_votes_say(root):
    client = make_app(Store(str(root))).server.test_client()
    answer = client.get("/review.csv?run=furniture&filter=disagree")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    last = votes_of(root, 3)
    differ = last["image_class"] != last["point_class"]
    order = np.argsort(last["label_confidence"][differ], kind="stable")
    assert [row["object_id"] for row in rows] == last["object_id"][differ][order].tolist()
    assert answer.headers["Content-Disposition"].endswith("review-furniture-disagree.csv")
    assert client.get("/review.csv?run=broken&of=threshold").status_code in (200, 404)


def test_many_pages_cost_one_reading(root, monkeypatch):
    read = []

    def counted(store, known=None):
        read.append(store)
        return load_results(store, known)

    monkeypatch.setattr(live, "load_results", counted)
    shelf = Shelf(Store(str(root)))
    pages = [threading.Thread(target=shelf.results) for _ in range(16)]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    assert len(read) == 1
    monkeypatch.setattr(live, "MIN_AGE_S", 0.0)
    shelf.results()
    assert len(read) == 2


def run_job(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "jobs/dashboard.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_missing_folder_ends_with_one_line(tmp_path):
    ended = run_job(str(tmp_path / "gone"))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: there is no folder {tmp_path / 'gone'}; give ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_port_in_use_ends_with_one_line(root):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_job(str(root), "--port", str(port))
    assert ended.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_missing_package_is_named_with_its_cure(root, tmp_path):
    # A package of that name that can't be imported, found before the real one.
    (tmp_path / "dash.py").write_text("raise ModuleNotFoundError(name='dash')")
    ended = run_job(str(root), PYTHONPATH=f"{tmp_path}:{REPOSITORY}")
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the dashboard needs dash: pip install 'crossmost_ray[dashboard]'\n"
    )


# In a browser


@pytest.fixture(scope="module")
def site(root):
    with dashboard(root) as address:
        yield address


def open_page(driver, address: str, ready: str):
    """Opens a page and waits for what matches a selector; earlier complaints are forgotten."""
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get(address)
    return until(lambda: driver.find_elements("css selector", ready))


def texts(driver, selector: str) -> list[str]:
    return [one.text for one in driver.find_elements("css selector", selector)]


def rows_of(driver) -> dict[str, list[str]]:
    """Cells of the leaderboard by the name in its first column."""
    script = """return [...document.querySelectorAll('.card-leaderboard tbody tr')]
        .map(row => [...row.children].map(cell => cell.innerText.trim()))"""
    rows = driver.execute_script(script)
    return {re.sub(r"^[☐☑]\s*", "", row[0]): row[1:] for row in rows}


def heads_of(driver) -> list[str]:
    return [head.rstrip(" ↑↓") for head in texts(driver, ".card-leaderboard thead th")][1:]


LEADERBOARD = ".card-leaderboard tbody tr"


def test_the_leaderboard_says_what_the_ledger_says(browser, site, root):  # noqa: F811
    open_page(browser, f"{site}?of=threshold", LEADERBOARD)
    ledger = json.loads((root / "threshold/trials.json").read_text())["trials"]
    rows, heads = rows_of(browser), heads_of(browser)
    assert set(rows) == {entry["trial"] for entry in ledger}
    for entry in ledger:
        cells = dict(zip(heads, rows[entry["trial"]], strict=True))
        assert cells["status"] == entry["status"]
        assert cells["epochs"] == str(entry["epochs"])
        score = entry["score"]
        assert cells["score"] == ("–" if score is None else f"{score:.4f}")
        threshold = entry["settings"]["pseudo_labels.threshold"]
        assert float(cells["pseudo_labels.threshold"]) == threshold
    assert console_errors(browser) == []


def test_accuracies_on_the_page_are_those_of_the_metrics(browser, site, root):  # noqa: F811
    open_page(browser, site, LEADERBOARD)
    metrics = json.loads((root / "furniture/metrics.json").read_text())
    teacher = metrics["splits"]["test"]["teacher"]
    cells = dict(zip(heads_of(browser), rows_of(browser)["furniture"], strict=True))
    for opinion in ("fused", "image", "point"):
        shown = cells[f"top-1 {opinion}, %"]
        assert float(re.match(r"[\d.]+", shown)[0]) == round(teacher[opinion]["top1"], 1)
    gain = teacher["gain"]["fused"]
    assert cells["gain fused"].split() == (
        f"{gain['difference']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]".split()
    )


def test_heads_sort_and_words_narrow_the_leaderboard(browser, site, root):  # noqa: F811
    open_page(browser, f"{site}?of=threshold", LEADERBOARD)
    browser.find_element("link text", "score").click()
    until(lambda: texts(browser, "th[aria-sort='descending']"))
    ledger = json.loads((root / "threshold/trials.json").read_text())["trials"]
    scored = [entry for entry in ledger if entry["score"] is not None]
    expected = [entry["trial"] for entry in sorted(scored, key=lambda one: -one["score"])]
    assert list(rows_of(browser))[: len(expected)] == expected
    browser.find_element("css selector", "input[type=search]").send_keys("trial-00011")
    until(lambda: list(rows_of(browser)) == ["trial-00011"])
    assert "find=trial-00011" in browser.current_url


@pytest.mark.parametrize("tab", ["settings", "training", "health", "accuracy", "system"])
def test_every_tab_draws_without_a_complaint(browser, site, tab):  # noqa: F811
    cards = open_page(browser, f"{site}?tab={tab}", ".card.panel, .card")
    filled = """return [...document.querySelectorAll('#content .card')].every(card =>
        card.querySelector('[id*="frame"]:not([hidden]) .main-svg, table, pre, .empty'))"""
    until(lambda: browser.execute_script(filled))
    assert cards
    assert console_errors(browser) == []


def test_filters_shrink_the_list_to_what_numpy_counts(browser, site, root):  # noqa: F811
    open_page(browser, f"{site}?tab=objects&run=furniture", ".objects tbody tr")
    epochs = [votes_of(root, epoch) for epoch in range(4)]
    last, before = epochs[3], epochs[2]
    truth = {}
    for file in FURNITURE.glob("*.parquet"):
        table = pq.read_table(file, columns=["object_id", "label"])
        truth |= zip(table["object_id"].to_pylist(), table["label"].to_pylist(), strict=True)
    classes = json.loads((root / "furniture/classes.json").read_text())
    named = np.array(classes)[last["image_label"]]
    counts = {
        "Towers disagree": (last["image_class"] != last["point_class"]).sum(),
        "Changed last epoch": (last["image_label"] != before["image_label"]).sum(),
        "Never confident": (~np.any([one["image_selected"] for one in epochs], axis=0)).sum(),
        "Wrong (needs labels)": sum(
            truth[one] != label for one, label in zip(last["object_id"], named, strict=True)
        ),
    }
    for title, count in counts.items():
        browser.find_element("partial link text", title).click()
        noun = "object" if count == 1 else "objects"
        wanted = f"{count} {noun}" if count <= 50 else f"1 to 50 of {count} {noun}"
        until(lambda wanted=wanted: wanted in texts(browser, ".below .count"))
        assert len(texts(browser, ".objects .scroll[aria-label=Objects] tbody tr")) == min(
            count, 50
        )
    assert console_errors(browser) == []


def test_a_click_shows_an_object_whole(browser, site, root):  # noqa: F811
    rows = ".objects .scroll[aria-label=Objects] tbody tr"
    open_page(browser, f"{site}?tab=objects&run=furniture", rows)
    link = browser.find_elements("css selector", f"{rows} th a")[3]
    name = link.get_attribute("title")
    link.click()
    until(lambda: texts(browser, ".object-id") == [name])
    seen = """return [...document.querySelectorAll('.views img')].map(one => one.naturalWidth)"""
    until(lambda: browser.execute_script(seen) and min(browser.execute_script(seen)) > 0)
    stored = [
        row
        for file in FURNITURE.glob("*.parquet")
        for row in pq.read_table(file, columns=["object_id", "views", "label"]).to_pylist()
    ]
    (mine,) = (row for row in stored if row["object_id"] == name)
    assert len(browser.execute_script(seen)) == len(mine["views"])
    assert f"true label: {mine['label']}" in browser.find_element("css selector", ".closeup").text
    # One 3D scene on the page, drawn and in its place.
    scenes = until(lambda: browser.find_elements("css selector", "#cloud .gl-container canvas"))
    assert scenes
    assert scenes[0].size["height"] > 100
    # The teacher's vote of the last epoch, as the file has it.
    last = votes_of(root, 3)
    place = last["object_id"].tolist().index(name)
    classes = json.loads((root / "furniture/classes.json").read_text())
    votes = texts(browser, ".closeup table")[0]
    assert f"{last['image_confidence'][place]:.2f}" in votes
    assert classes[last["image_class"][place]] in votes
    assert console_errors(browser) == []


def test_light_and_dark(browser, site):  # noqa: F811
    open_page(
        browser, f"{site}?tab=training&run=furniture", "[id*=frame]:not([hidden]) .xtick text"
    )
    colours = """return [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('.xtick text')).fill]"""
    light = browser.execute_script(colours)
    browser.find_element("id", "theme").click()
    until(lambda: all(a != b for a, b in zip(light, browser.execute_script(colours), strict=True)))
    dark = browser.execute_script(colours)
    assert browser.find_element("id", "theme").get_attribute("aria-pressed") == "true"
    # It is remembered.
    open_page(
        browser, f"{site}?tab=training&run=furniture", "[id*=frame]:not([hidden]) .xtick text"
    )
    until(lambda: browser.execute_script(colours) == dark)
    browser.find_element("id", "theme").click()
    until(lambda: browser.execute_script(colours) == light)


def test_by_keyboard_alone(browser, site):  # noqa: F811
    from selenium.webdriver import ActionChains, Keys

    open_page(browser, f"{site}?of=threshold", LEADERBOARD)

    def focused() -> str:
        script = "return (document.activeElement.dataset.key || document.activeElement.innerText)"
        return browser.execute_script(script)

    def press(key) -> None:
        ActionChains(browser).send_keys(key).perform()

    browser.find_element("css selector", "body").click()
    press(Keys.TAB)
    if focused() != "Skip to the results":
        browser.execute_script("document.querySelector('.skip-link').focus()")
    first = f"box-threshold/trials/{next(iter(rows_of(browser)))}"
    for _ in range(60):
        press(Keys.TAB)
        if focused() == first:
            break
    assert focused() == first
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) != "none"
    press(Keys.ENTER)
    until(lambda: texts(browser, "[aria-checked=true]") == ["☑"])
    # The table was drawn anew; the focus is where it was.
    until(lambda: focused() == first)
    press(Keys.SPACE)
    until(lambda: not texts(browser, "[aria-checked=true]"))
    assert browser.find_element("id", "status").get_attribute("aria-live") == "polite"


def test_a_growing_sweep_appears_by_itself(browser, root, tmp_path):  # noqa: F811
    folder = tmp_path / "results"
    folder.mkdir()
    with dashboard(folder) as address:
        open_page(browser, address, ".nothing")
        shutil.copytree(root / "threshold", folder / "threshold")
        until(lambda: len(rows_of(browser)) == 12)
        assert not browser.find_elements("css selector", ".nothing")
        entries = json.loads((folder / "threshold/trials.json").read_text())["trials"]
        fresh = trial_entry(12, np.random.default_rng(12)) | {"status": "done", "score": 0.987654}
        write_ledger(folder / "threshold", [*entries, fresh])
        until(lambda: "trial-00012" in rows_of(browser))
        cells = dict(zip(heads_of(browser), rows_of(browser)["trial-00012"], strict=True))
        assert cells["score"] == "0.9877"
        assert console_errors(browser) == []


def test_the_report_opens_from_disk(browser, root, tmp_path):  # noqa: F811
    ended = run_job(str(root / "furniture"), "--report", str(tmp_path / "report.html"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"done: the report is at {tmp_path / 'report.html'}\n"
    open_page(browser, f"file://{tmp_path / 'report.html'}", ".js-plotly-plot .main-svg")
    assert console_errors(browser) == []
