"""The state of the page and its address: what is written is what is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crossmost_ray.dashboard.address import TABS, Address, parse_address

names = st.text(min_size=1, max_size=12)
addresses = st.builds(
    Address,
    tab=st.sampled_from(TABS),
    of=st.text(max_size=12),
    run=st.lists(names, unique=True, max_size=3).map(tuple),
    sort=st.text(max_size=8),
    down=st.booleans(),
    page=st.integers(1, 10**6),
    find=st.text(max_size=12),
    filter=names,
    object=st.text(max_size=20),
)


@given(addresses)
def test_what_is_written_is_read(address):
    assert parse_address(address.link()) == address


def test_the_first_view_has_the_shortest_address():
    assert Address().link() == "?"
    assert parse_address(None) == parse_address("") == parse_address("?") == Address()


def test_nonsense_counts_as_absent():
    assert parse_address("?tab=kitchen&page=-3&down=maybe&who=me") == Address()
    assert parse_address("?page=" + "9" * 5000) == Address()


def test_another_tab_keeps_the_runs_and_forgets_the_place():
    here = Address(tab="objects", of="sweep", run=("a",), page=7, find="chair", object="x")
    there = here.go(tab="health")
    assert there == Address(tab="health", of="sweep", run=("a",))
    assert here.go(tab="objects") == here
