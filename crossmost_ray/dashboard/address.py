"""What the page shows, as the part of its address after `?`, and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode

TABS = ("overview", "settings", "training", "health", "accuracy", "objects", "system")

PLACE_KEYS = ("sort", "down", "page", "find", "filter", "object")
"""Mean something on one tab only: a link to another tab leaves them out."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """State of the page. All of it can be bookmarked and sent to somebody."""

    tab: str = "overview"
    of: str = ""
    """Name of the sweep that is shown; empty for all runs."""

    run: tuple[str, ...] = ()
    """Names of the chosen runs; none stands for all of them."""

    sort: str = ""
    """Column that a table is sorted by; empty for its own order."""

    down: bool = False
    """Whether the largest comes first."""

    page: int = 1
    find: str = ""
    filter: str = "all"
    object: str = ""
    """Id of the object that is shown whole."""

    def go(self, **changes: Any) -> Address:
        """Gives the address of another view; on another tab, its tables begin anew."""
        if "tab" in changes and changes["tab"] != self.tab:
            changes = {key: DEFAULTS[key] for key in PLACE_KEYS} | changes
        return dataclasses.replace(self, **changes)

    def link(self, **changes: Any) -> str:
        """Writes the address of another view, such as `?tab=health&run=furniture`."""
        there = vars(self.go(**changes))
        kept = {key: value for key, value in there.items() if value != DEFAULTS[key]}
        return "?" + urlencode({k: int(v) if k == "down" else v for k, v in kept.items()}, True)


DEFAULTS: dict[str, Any] = vars(Address())


def parse_address(search: str | None) -> Address:
    """Reads what stands after the path of an address; what makes no sense there counts as absent.

    Args:
        search: Such as `?tab=health&run=furniture`; None or empty for the first view.
    """
    given = parse_qs((search or "").removeprefix("?"))
    first = {key: values[0] for key, values in given.items()}
    page = first.get("page", "")
    return Address(
        tab=first["tab"] if first.get("tab") in TABS else DEFAULTS["tab"],
        of=first.get("of", ""),
        run=tuple(dict.fromkeys(given.get("run", []))),
        sort=first.get("sort", ""),
        down=first.get("down") == "1",
        page=max(1, int(page)) if page.isdecimal() and len(page) < 10 else 1,
        find=first.get("find", ""),
        filter=first.get("filter", DEFAULTS["filter"]),
        object=first.get("object", ""),
    )
