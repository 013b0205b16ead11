"""Data source for LaunchDarkly's server-side stream, FDv1 (streams 2.4 to 2.6)."""

from __future__ import annotations

from relay.model.credential import SDKKey
from relay.model.payload import ChangeSet
from relay.protocol import fdv1
from relay.protocol.sse import Event
from relay.protocol.urls import data_url
from relay.sources.event_stream import EventStream
from relay.sources.timings import SourceTimings
from relay.steps import Steps
from relay.telemetry.log import Log
from relay.upstream import Upstream

_EVENTS = frozenset({"put", "patch", "delete"})

MAX_UNKNOWN = 20
"""Number of unknown event names that are logged; a stream of random names stays quiet."""


class StreamingSource(EventStream[ChangeSet]):
    """Data source that streams one environment.

    Args:
        upstream: the HTTP session.
        stream_uri: base URI, such as `https://stream.launchdarkly.com`.
        key: the environment's SDK key.
        log: a logger that names the environment.
        timings: delays and timeouts.
        payload_filter: key of the payload filter whose part of the data is wanted; empty for all.
    """

    protocol = "fdv1"

    def __init__(
        self,
        upstream: Upstream,
        stream_uri: str,
        key: SDKKey,
        log: Log,
        timings: SourceTimings = SourceTimings(),
        *,
        payload_filter: str = "",
    ) -> None:
        url = data_url(stream_uri, "/all", payload_filter)
        super().__init__(upstream, url, key, self._interpret_event, timings)
        self._log = log
        self._unknown_events: set[str] = set()

    def _interpret_event(self, event: Event) -> Steps[ChangeSet | None]:
        if event.name not in _EVENTS:
            self._log_unknown(event.name)
            return None
        return (yield from fdv1.in_steps(event.name, event.data))

    def _log_unknown(self, name: str) -> None:
        if name not in self._unknown_events and len(self._unknown_events) < MAX_UNKNOWN:
            self._unknown_events.add(name)
            self._log.info("Unexpected event found in stream: %.50r", name)
