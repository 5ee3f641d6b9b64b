"""Debian's Chromium without a screen, and the dashboard as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
NEEDED = "CROSSMOST_NEEDS_BROWSER"
REPOSITORY = Path(__file__).parents[2]
STARTED_S = 180.0

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"),
    # 3D scenes are drawn without a graphics card; the automatic fallback is on its way out.
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--window-size=1400,1043", "--hide-scrollbars", "--disable-background-networking"),
)


def open_browser():
    """Starts the browser; where there is none, the test is skipped, or fails if one is needed."""
    missing = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    if missing:
        say = f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver"
        if os.environ.get(NEEDED) == "1":
            pytest.fail(say)
        pytest.skip(say)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_page_load_timeout(60)
    return driver


@pytest.fixture(scope="module")
def browser():
    driver = open_browser()
    yield driver
    driver.quit()


@contextlib.contextmanager
def dashboard(results: Path, *options: str) -> Iterator[str]:
    """Runs jobs/dashboard.py over a folder, at a free port; gives the page's address.

    Once the page has been used, the process must have had nothing to say but where it is.
    """
    # Not a pipe, which nobody would read.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "jobs/dashboard.py", str(results), "--port", "0", *options],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def said() -> str:
            output.seek(0)
            return output.read()

        try:
            deadline = time.monotonic() + STARTED_S
            while not (found := re.search(r"http://\S+/", said())):
                assert process.poll() is None, f"the dashboard did not start:\n{said()}"
                assert time.monotonic() < deadline, f"the dashboard is not up:\n{said()}"
                time.sleep(0.1)
            yield found[0]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert "Traceback" not in said(), said()
        assert process.returncode == 0, said()


def console_errors(driver) -> list[str]:
    """What the browser complained about since it was last asked."""
    return [
        f"{entry['source']}: {entry['message']}"
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE"
    ]


def until(check, seconds: float = 90.0):
    """Asks until the answer is true, and gives it; a page may draw anew in between."""
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException

    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
            if answer := check():
                return answer
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
