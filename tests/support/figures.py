"""Figures of a page, as Prometheus' own library reads them."""

from __future__ import annotations

import re

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples(page: bytes) -> list[Sample]:
    """Every sample, under the name that it has on the page.

    The library adds `_total` to the names of counters; the reference's have none.
    """
    text = page.decode()
    names = set(re.findall(r"(?m)^(\w+)", text))
    families: list[Metric] = list(text_string_to_metric_families(text))
    return [
        each if each.name in names else each._replace(name=each.name.removesuffix("_total"))
        for family in families
        for each in family.samples
    ]
