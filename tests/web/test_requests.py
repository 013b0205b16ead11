"""Queries are read as by any other server, and at a bounded cost."""

from __future__ import annotations

import time
from urllib.parse import parse_qsl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.model.journal import UNRELIABLE
from relay.web.requests import MAX_BASIS, basis_in, parameter_in

NAMES = st.sampled_from(["basis", "filter", "h", "withReasons", "%62asis", "basi%73", "b+asis", ""])
PAIRS = st.tuples(NAMES, st.sampled_from(["=", "", "=="]), st.text("ab%+&=2fF\xe9", max_size=6))
QUERIES = st.lists(PAIRS.map("".join), max_size=4).map("&".join)


@given(query=QUERIES, name=st.sampled_from(["basis", "filter", "h", "withReasons", "j"]))
@example(query="%6A=1&j=2", name="j")
@example(query="a=basis&basis", name="basis")
@example(query="basis=a%2", name="basis")
def test_the_first_value_of_a_parameter(query, name):
    """Wherever it stands, and however it is escaped."""
    values = [value for key, value in parse_qsl(query, keep_blank_values=True) if key == name]
    assert parameter_in(query.encode("latin-1"), name) == (values or [""])[0]


@pytest.mark.parametrize("value", ["x", "%78"])
def test_a_state_that_is_too_long_is_kept_nowhere(value):
    """Answers are remembered by it, and clients choose it."""
    for length in (MAX_BASIS, MAX_BASIS + 1, 60_000):
        query = b"basis=" + value.encode() * length
        expected = "x" * length if length == MAX_BASIS and value == "x" else UNRELIABLE
        assert basis_in(query) == expected


@pytest.mark.timing
@pytest.mark.parametrize(
    "query", ["a&" * 30_000, "a=%61&" * 10_000, "%" * 60_000, "basis=" + "%" * 60_000]
)
def test_a_large_query_costs_little(query):
    """The largest that a head can have, whatever it is made of."""
    started = time.perf_counter()
    for _ in range(10):
        parameter_in(query.encode(), "basis")
    assert (time.perf_counter() - started) / 10 < 0.005
