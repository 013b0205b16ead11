"""The text format in which Prometheus reads figures, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/ — Written here because a page of many
environments must not hold up the event loop, and because the reference's counters lack the `_total`
that the library of Prometheus insists on. That library reads our pages in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from relay.model.metrics import Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """What is told under one name.

    Args:
        name: letters, digits and `_`.
        kind: `COUNTER`, `GAUGE` or `HISTOGRAM`.
        labels: names of what it is told apart by.
        help: what it means, in one line.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


Row = tuple[tuple[str, ...], float | Histogram]
"""The values of the labels, and the number; of a histogram the durations."""


def page(metrics: Iterable[tuple[Metric, Iterable[Row]]]) -> bytes:
    """Return the text of figures with their rows."""
    blocks = (_block(figure, rows) for figure, rows in metrics)
    # A name from an environment variable may hold bytes that are no text.
    return "".join(line for block in blocks for line in block).encode(errors="replace")


def _block(metric: Metric, rows: Iterable[Row]) -> Iterator[str]:
    name = metric.name
    yield f"# HELP {name} {_escaped(metric.help)}\n# TYPE {name} {metric.kind}\n"
    for values, number in rows:
        labels = ",".join(
            f'{label}="{_quoted(value)}"'
            for label, value in zip(metric.labels, values, strict=True)
        )
        if isinstance(number, Histogram):
            yield from _durations(name, labels, number)
        else:
            yield f"{name}{{{labels}}} {number}\n" if labels else f"{name} {number}\n"


def _durations(name: str, labels: str, durations: Histogram) -> Iterator[str]:
    comma = "," if labels else ""
    for bound, number in durations.cumulated():
        limit = "+Inf" if bound == float("inf") else bound
        yield f'{name}_bucket{{{labels}{comma}le="{limit}"}} {number}\n'
    braces = f"{{{labels}}}" if labels else ""
    yield f"{name}_sum{braces} {durations.total}\n{name}_count{braces} {len(durations)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
