"""The relay's figures for Prometheus: each of them once, with its meaning and where it comes from.

`/metrics` has our own; the port of `[Prometheus]` has the reference's besides (status 8.2). Figures
of requests are those that both doors count anyway; everything else is looked at when it is asked.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.config.schema import Prometheus
from relay.metrics.catalogue import OWN, Collector, MetricsView, reference
from relay.protocol.prometheus import CONTENT_TYPE, Metric
from relay.protocol.prometheus import page as text
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.responses import PreparedResponse


def page(relay: Relay, traffic: RequestMetrics) -> PreparedResponse:
    """Return `/metrics`."""
    return _answer(OWN, MetricsView(relay, traffic))


def exporter_page(relay: Relay, traffic: RequestMetrics, prefix: str) -> PreparedResponse:
    """Return `/metrics` on the port of `[Prometheus]`.

    Args:
        relay: what is told of.
        traffic: what both doors have counted.
        prefix: beginning of the names of the reference's figures; empty for its default.
    """
    prefix = prefix or Prometheus().prefix
    return _answer({**reference(prefix), **OWN}, MetricsView(relay, traffic))


def _answer(figures: Mapping[Metric, Collector], sight: MetricsView) -> PreparedResponse:
    body = text((figure, look(sight)) for figure, look in figures.items())
    return PreparedResponse(200, ((b"content-type", CONTENT_TYPE.encode()),), body)
