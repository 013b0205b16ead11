"""LaunchDarkly's stream for server-side SDKs, first protocol (streams 2.4 to 2.6)."""

from __future__ import annotations

from relay.backoff import SourceTimings
from relay.model.credential import SDKKey
from relay.model.payload import ChangeSet
from relay.protocol import fdv1
from relay.protocol.sse import Event
from relay.protocol.urls import join
from relay.sources.event_stream import EventStream
from relay.telemetry.log import Log
from relay.upstream import Upstream

_KNOWN = frozenset({"put", "patch", "delete"})

MAX_UNKNOWN = 20
"""Unknown event names that are remembered and logged; a stream of random names stays quiet."""


class StreamingSource(EventStream):
    """One environment's data by streaming.

    Args:
        upstream: the session.
        stream_uri: the base, such as `https://stream.launchdarkly.com`.
        key: the environment's.
        log: a logger that names the environment.
        times: waiting times.
    """

    def __init__(
        self,
        upstream: Upstream,
        stream_uri: str,
        key: SDKKey,
        log: Log,
        times: SourceTimings = SourceTimings(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(upstream, join(stream_uri, "/all"), key, self._changes, times)
        self._log = log
        self._unknown: set[str] = set()

    def _changes(self, event: Event) -> fdv1.Steps[ChangeSet | None]:
        if event.name not in _KNOWN:
            self._note_unknown(event.name)
            return None
        return (yield from fdv1.in_steps(event.name, event.data))

    def _note_unknown(self, name: str) -> None:
        if name not in self._unknown and len(self._unknown) < MAX_UNKNOWN:
            self._unknown.add(name)
            self._log.info("Unexpected event found in stream: %.50r", name)
