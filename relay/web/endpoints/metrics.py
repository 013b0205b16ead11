"""Metrics pages for Prometheus.

`/metrics` has the relay's own metrics; the port of `[Prometheus]` also has ld-relay's (status 8.2).
Requests are counted as they come; all other metrics are collected when a page is requested.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.config.schema import Prometheus
from relay.metrics.catalogue import OWN, Collector, MetricsView, ld_relay_metrics
from relay.protocol.prometheus import CONTENT_TYPE, Metric
from relay.protocol.prometheus import page as render
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.responses import PreparedResponse


def page(relay: Relay, traffic: RequestMetrics) -> PreparedResponse:
    """Return `/metrics`."""
    return _response(OWN, MetricsView(relay, traffic))


def exporter_page(relay: Relay, traffic: RequestMetrics, prefix: str) -> PreparedResponse:
    """Return `/metrics` on the port of `[Prometheus]`.

    Args:
        relay: to collect metrics from.
        traffic: request counts.
        prefix: of the names of ld-relay's metrics; empty for the default.
    """
    prefix = prefix or Prometheus().prefix
    return _response({**ld_relay_metrics(prefix), **OWN}, MetricsView(relay, traffic))


def _response(metrics: Mapping[Metric, Collector], view: MetricsView) -> PreparedResponse:
    body = render((metric, collect(view)) for metric, collect in metrics.items())
    return PreparedResponse(200, ((b"content-type", CONTENT_TYPE.encode()),), body)
