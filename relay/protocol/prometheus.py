"""Prometheus text format, version 0.0.4.

See https://prometheus.io/docs/instrumenting/exposition_formats/. Prometheus' own library is not
used because a page with many environments must not block the event loop, and because ld-relay's
counters lack the `_total` suffix on which the library insists. The tests parse pages with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from msgspec import Struct

from relay.model.metrics import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"


class Metric(Struct, frozen=True):
    """Description of one metric.

    Args:
        name: letters, digits and `_`.
        kind: `COUNTER`, `GAUGE` or `HISTOGRAM`.
        labels: names of the labels.
        help: description in one line.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


Row = tuple[tuple[str, ...], float | Histogram]
"""Label values, and a number or histogram."""


def page(metrics: Iterable[tuple[Metric, Iterable[Row]]]) -> bytes:
    """Return a page with metrics and their rows."""
    blocks = (_block(metric, rows) for metric, rows in metrics)
    # A name from an environment variable may contain bytes that are not valid text.
    return "".join(line for block in blocks for line in block).encode(errors="replace")


def _block(metric: Metric, rows: Iterable[Row]) -> Iterator[str]:
    name = metric.name
    yield f"# HELP {name} {_escape(metric.help)}\n# TYPE {name} {metric.kind}\n"
    for values, number in rows:
        labels = ",".join(
            f'{label}="{_quote(value)}"' for label, value in zip(metric.labels, values, strict=True)
        )
        if isinstance(number, Histogram):
            yield from _histogram(name, labels, number)
        else:
            yield f"{name}{{{labels}}} {number}\n" if labels else f"{name} {number}\n"


def _histogram(name: str, labels: str, histogram: Histogram) -> Iterator[str]:
    comma = "," if labels else ""
    for bound, number in histogram.cumulated():
        le = "+Inf" if bound == float("inf") else bound
        yield f'{name}_bucket{{{labels}{comma}le="{le}"}} {number}\n'
    braces = f"{{{labels}}}" if labels else ""
    yield f"{name}_sum{braces} {histogram.total}\n{name}_count{braces} {len(histogram)}\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quote(text: str) -> str:
    return _escape(text).replace('"', r"\"")
