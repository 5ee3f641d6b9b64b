"""A folder of results in, a live page over it out: read-only, without a database."""

from __future__ import annotations

import errno
import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dash
import flask
from dash import MATCH, ClientsideFunction, Dash, Input, Output, State, html, no_update
from waitress.server import create_server

from crossmost_ray.config import ConfigError
from crossmost_ray.dashboard import browse, page, parts
from crossmost_ray.dashboard.address import parse_address
from crossmost_ray.dashboard.chart import summary_of
from crossmost_ray.dashboard.files import digest
from crossmost_ray.dashboard.objects import (
    load_objects,
    write_csv,
)
from crossmost_ray.dashboard.panels import PANELS
from crossmost_ray.dashboard.runs import FINISHED, Results, Run, load_results
from crossmost_ray.dashboard.table import Table, Text
from crossmost_ray.storage import Store

MIN_AGE_S = 2.0
"""However many pages are open, results are read no more often than this."""

BUSY_MS, IDLE_MS = 3_000, 15_000
"""How often a page asks what is new: while something runs, and while nothing does."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""The browser loads nothing from elsewhere, whatever a file says. Plotly writes styles, and its 3D
scenes compile small functions."""

PAGE = Path(__file__).with_name("assets")

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    {%metas%}
    <title>{%title%}</title>
    {%favicon%}
    {%css%}
    <script>
      (() => {
        const theme = window.localStorage.getItem("theme");
        if (theme) document.documentElement.dataset.theme = theme;
      })();
    </script>
  </head>
  <body>
    {%app_entry%}
    {%config%}
    {%scripts%}
    {%renderer%}
  </body>
</html>
"""
"""The theme is set before anything is drawn, so that a dark page never flashes white."""


class Shelf:
    """The results of a folder, read again when a page asks and they are old enough."""

    def __init__(self, root: Store) -> None:
        self.root = root
        self.lock = threading.Lock()
        self.known: Results | None = None
        self.read_at = 0.0

    def results(self) -> Results:
        """Gives what is known; whoever comes while another reads gets what was known before."""
        known = self.known
        if known is not None and time.monotonic() - self.read_at < MIN_AGE_S:
            return known
        if not self.lock.acquire(blocking=known is None):
            assert known is not None, "who waits for the lock gets it"
            return known
        try:
            if self.known is None or time.monotonic() - self.read_at >= MIN_AGE_S:
                self.known = load_results(self.root, self.known)
                self.read_at = time.monotonic()
            return self.known
        finally:
            self.lock.release()


def make_app(root: Store) -> Dash:
    """Builds the page over a folder of results.

    Args:
        root: Folder of runs, a run, or a sweep; may be empty, and fill while the page is open.
    """
    shelf = Shelf(root)
    app = Dash(
        "crossmost_ray.dashboard",
        assets_folder=str(PAGE),
        index_string=INDEX,
        title=f"{root} · results",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,
        add_log_handler=False,
        enable_mcp=False,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )
    # Not asked of anybody elsewhere whether there is a newer Dash.
    app.enable_dev_tools(debug=False, dev_tools_disable_version_check=True)
    app.layout = page.shell(str(root), BUSY_MS)
    server: flask.Flask = app.server
    server.after_request(_guard)
    server.add_url_rule("/review.csv", "review", lambda: _review(shelf))
    _follow(app, shelf)
    _fill_cards(app, shelf)
    _fill_objects(app, shelf)
    app.clientside_callback(
        ClientsideFunction("live", "theme"),
        Output("dark", "data"),
        Input("theme", "n_clicks"),
    )
    return app


def serve(root: Store, *, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Args:
        root: Folder of results.
        host: Address to listen at.
        port: 0 takes one that is free.

    Raises:
        ConfigError: If nobody can listen there.
    """
    if importlib.util.find_spec("pandas"):
        # Before there are threads: Arrow imports it when it first needs to know its types, and
        # Plotly, in another thread, would take the half that is imported for the whole.
        importlib.import_module("pandas")
    app = make_app(root)
    try:
        server = create_server(app.server, host=host, port=port, threads=4, ident=None)
    except OSError as refused:
        if refused.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use, maybe by another dashboard; choose another one "
                f"with --port {port + 1}, or any that is free with --port 0"
            ) from None
        if refused.errno == errno.EACCES:
            raise ConfigError(
                f"port {port} is not for everybody to listen at; choose one above 1023 with --port"
            ) from None
        if isinstance(refused, socket.gaierror) or refused.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"--host {host} is no address of this machine; 127.0.0.1 is for this machine "
                "alone, 0.0.0.0 for all that reach it"
            ) from None
        raise
    if host not in LOOPBACK:
        sys.stderr.write(
            f"warning: the page has no password; whoever can reach port {port} of this machine "
            "reads the results. Behind ssh it is safe: leave --host out, and on your machine type "
            f"`ssh -L {port}:127.0.0.1:{port} THIS-MACHINE`\n"
        )
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(
        f"{root} is shown at http://{shown}:{server.effective_port}/ until you press Ctrl-C\n"
    )
    sys.stdout.flush()
    # Returns at Ctrl-C.
    server.run()


def _guard(response: flask.Response) -> flask.Response:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def _follow(app: Dash, shelf: Shelf) -> None:
    """What tells how things stand: it follows the files and the address."""

    @app.callback(
        Output("version", "data"),
        Output("tick", "interval"),
        Output("status", "children"),
        Output("problems", "children"),
        Input("tick", "n_intervals"),
        State("version", "data"),
    )
    def refresh(ticks: int | None, version: str | None) -> tuple[Any, ...]:
        results = shelf.results()
        if results.version == version:
            raise dash.exceptions.PreventUpdate
        busy = any(run.status not in FINISHED for run in results.runs)
        return (
            results.version,
            BUSY_MS if busy or not results.runs else IDLE_MS,
            page.status_chips(results),
            page.problems(results),
        )

    @app.callback(
        Output("notices", "children"),
        Output("choice", "children"),
        Output("tabs", "children"),
        Output("content", "hidden"),
        Input("version", "data"),
        Input("address", "search"),
    )
    def stand(version: str | None, search: str | None) -> tuple[Any, ...]:
        if version is None:
            raise dash.exceptions.PreventUpdate
        results, address = shelf.results(), parse_address(search)
        return (
            page.notices(results, address),
            page.choice(results, address),
            page.tabs(address),
            not results.runs,
        )

    @app.callback(
        Output("content", "children"),
        Output("shown", "data"),
        Input("address", "search"),
        State("shown", "data"),
    )
    def build(search: str | None, shown: str | None) -> tuple[Any, ...]:
        # Cards stay while their tab does: their contents follow, and a zoom survives.
        address = parse_address(search)
        tab = address.tab
        if tab == shown:
            raise dash.exceptions.PreventUpdate
        if tab == "objects":
            return browse.frame(address), tab
        return [page.card(panel, address) for panel in PANELS if panel.group == tab], tab


def _fill_cards(app: Dash, shelf: Shelf) -> None:
    @app.callback(
        Output({"kind": "graph", "panel": MATCH}, "figure"),
        Output({"kind": "graph", "panel": MATCH}, "style"),
        Output({"kind": "frame", "panel": MATCH}, "hidden"),
        Output({"kind": "rest", "panel": MATCH}, "children"),
        Output({"kind": "seen", "panel": MATCH}, "data"),
        Input("version", "data"),
        Input("address", "search"),
        Input("dark", "data"),
        State({"kind": "seen", "panel": MATCH}, "data"),
        State({"kind": "seen", "panel": MATCH}, "id"),
    )
    def fill(
        version: str | None, search: str | None, dark: bool | None, seen: str | None, card: Any
    ) -> tuple[Any, ...]:
        if version is None or dark is None:
            raise dash.exceptions.PreventUpdate
        results, address = shelf.results(), parse_address(search)
        panel = next(panel for panel in PANELS if panel.key == card["panel"])
        whole = panel.key == page.LEADERBOARD
        runs = page.scope_runs(results, address) if whole else page.chosen_runs(results, address)
        view = [address.of, address.run]
        listed = [address.sort, address.down, address.page, address.find] if whole else []
        now = _mark([panel.key, dark, *view, *listed, *(_looks(run) for run in runs)])
        if now == seen:
            raise dash.exceptions.PreventUpdate
        drawn = panel.figure(results, runs)
        if drawn is None:
            return no_update, no_update, True, parts.empty(panel.empty), now
        if isinstance(drawn, Table):
            return no_update, no_update, True, page.table(drawn, address, choosing=whole), now
        if isinstance(drawn, Text):
            return no_update, no_update, True, page.blocks(drawn), now
        parts.dress(drawn, dark=dark, state=_mark([panel.key, *view]))
        summary = html.P(summary_of(drawn), className="visually-hidden")
        return drawn, {"height": drawn.layout.height}, False, summary, now


def _fill_objects(app: Dash, shelf: Shelf) -> None:
    # Matched ids, for a callback whose output is on no page must not run.
    @app.callback(
        Output({"kind": "list", "panel": MATCH}, "children"),
        Output({"kind": "listed", "panel": MATCH}, "data"),
        Input("version", "data"),
        Input("address", "search"),
        State({"kind": "listed", "panel": MATCH}, "data"),
    )
    def fill_list(version: str | None, search: str | None, listed: str | None) -> tuple[Any, ...]:
        if version is None:
            raise dash.exceptions.PreventUpdate
        results, address = shelf.results(), parse_address(search)
        run = browse.shown_run(page.chosen_runs(results, address))
        now = _mark([search, run and _looks(run)])
        if now == listed:
            raise dash.exceptions.PreventUpdate
        return browse.listing(page.chosen_runs(results, address), run, address), now

    @app.callback(
        Output({"kind": "detail", "panel": MATCH}, "children"),
        Output({"kind": "detailed", "panel": MATCH}, "data"),
        Input("version", "data"),
        Input("address", "search"),
        Input("dark", "data"),
        State({"kind": "detailed", "panel": MATCH}, "data"),
    )
    def fill_detail(
        version: str | None, search: str | None, dark: bool | None, detailed: str | None
    ) -> tuple[Any, ...]:
        if version is None or dark is None:
            raise dash.exceptions.PreventUpdate
        results, address = shelf.results(), parse_address(search)
        run = browse.shown_run(page.chosen_runs(results, address))
        shown = browse.object_id(run, address)
        now = _mark([shown, dark, run and _looks(run)])
        if now == detailed:
            raise dash.exceptions.PreventUpdate
        return browse.detail(run, shown, dark=dark), now


def _review(shelf: Shelf) -> flask.Response:
    """The list that a page shows, whole, as a file."""
    address = parse_address(flask.request.query_string.decode())
    run = browse.shown_run(page.chosen_runs(shelf.results(), address))
    objects = None if run is None else load_objects(run)
    if run is None or objects is None:
        return flask.Response("no run of these has votes\n", 404, mimetype="text/plain")
    places = browse.listed(run, objects, address)
    return flask.Response(
        write_csv(objects, places),
        mimetype="text/csv",
        headers={
            "Content-Disposition": f"attachment; filename=review-{run.title}-{address.filter}.csv"
        },
    )


def _looks(run: Run) -> list[Any]:
    """What of a run the panels show. How far its epoch is changes often, and no panel shows it."""
    if run.status in FINISHED:
        return [run.name, run.version]
    said = [run.name, run.status, run.epochs, run.score, run.seconds, run.error]
    return said if run.status == "pending" else [*said, len(run.rows), len(run.events)]


def _mark(parts: Sequence[Any]) -> str:
    """Gives a short text that differs where the parts do."""
    return digest(json.dumps(parts, default=str).encode())
