"""Prometheus' own library parses the pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from relay.model.metrics import Histogram
from relay.protocol.prometheus import COUNTER, GAUGE, HISTOGRAM, Metric, page

HOSTILE = 'a"b\\c\nd{e="f"} 1'


def read(*metrics):
    """Return the samples of a page as parsed by that library."""
    families = text_string_to_metric_families(page(metrics).decode())
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


@given(values=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2))
def test_any_text_is_a_label(values):
    """Any client-supplied label is preserved and cannot forge a line."""
    metric = Metric("relay_x", GAUGE, ("a", "b"), HOSTILE)
    assert read((metric, [(tuple(values), 1.5)])) == [
        ("relay_x", {"a": values[0], "b": values[1]}, 1.5)
    ]


@pytest.mark.parametrize("number", [0, 7, 2**60, 0.25, 1e-9, 1795595457.99, float("inf")])
def test_numbers(number):
    """Numbers are exact."""
    assert read((Metric("relay_x_total", COUNTER, (), "x"), [((), number)])) == [
        ("relay_x_total", {}, number)
    ]


@pytest.mark.parametrize("labels", [(), ("environment",)])
def test_a_histogram(labels):
    """Buckets cumulate; sum and count follow."""
    histogram = Histogram()
    for seconds in (0.002, 0.5, 60):
        histogram.add(seconds)
    values = tuple("main" for _ in labels)
    samples = read((Metric("relay_x_seconds", HISTOGRAM, labels, "x"), [(values, histogram)]))
    known = dict(zip(labels, values, strict=True))
    buckets = {
        labels.pop("le"): value for name, labels, value in samples if name.endswith("_bucket")
    }
    assert (buckets["0.001"], buckets["0.003"], buckets["1.0"], buckets["+Inf"]) == (0, 1, 2, 3)
    assert samples[-2:] == [
        ("relay_x_seconds_sum", known, 60.502),
        ("relay_x_seconds_count", known, 3),
    ]


def test_the_type_is_the_name_s_own():
    """A counter keeps its name, with or without `_total`."""
    text = page([(Metric("relay_requests", COUNTER, (), "Two\nlines"), [])]).decode()
    assert text == "# HELP relay_requests Two\\nlines\n# TYPE relay_requests counter\n"


def test_invalid_text_does_not_break_the_page():
    """Undecodable bytes, possible in environment variables, become question marks."""
    name = b"\xff".decode(errors="surrogateescape")
    assert b'{a="?"} 1\n' in page([(Metric("relay_x", GAUGE, ("a",), "x"), [((name,), 1)])])
