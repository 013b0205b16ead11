"""Source of the list of environments: LaunchDarkly's automatic-configuration stream."""

from __future__ import annotations

from relay.errors import (
    ErrorKind,
    InvalidData,
    RelayError,
    UpstreamRefused,
    UpstreamUnavailable,
)
from relay.model.credential import AutoConfigKey
from relay.protocol import autoconfig
from relay.protocol.autoconfig import Ignored, Message
from relay.protocol.sse import Event
from relay.protocol.urls import join
from relay.sources import Interrupted
from relay.sources.event_stream import EventStream, Reconnect
from relay.sources.timings import SourceTimings
from relay.steps import Steps
from relay.telemetry.log import Log
from relay.telemetry.throttle import Throttle
from relay.upstream import Upstream

PATH = "/relay_auto_config?rpacProtocolVersion=2"

_EVENTS = frozenset({"put", "patch", "delete"})

_REFUSALS = frozenset({401, 403})
"""Statuses that refuse the key; ld-relay takes all others for outages, 404 among them."""

WARNINGS_WITHIN = 60.0
"""Seconds in which so many messages without effect are logged."""

MAX_WARNINGS = 20


class AutoConfigStream(EventStream[Message]):
    """Follows the list of the environments that a key may see.

    Args:
        upstream: the HTTP session.
        stream_uri: base URI, such as `https://stream.launchdarkly.com`.
        key: the automatic-configuration key.
        log: receives a line for each message without effect.
        timings: delays and timeouts.
    """

    def __init__(
        self,
        upstream: Upstream,
        stream_uri: str,
        key: AutoConfigKey,
        log: Log,
        timings: SourceTimings = SourceTimings(),
    ) -> None:
        super().__init__(upstream, join(stream_uri, PATH), key, self._interpret_event, timings)
        self._log = log
        self._warnings = Throttle(WARNINGS_WITHIN, MAX_WARNINGS)

    def _interpret_event(self, event: Event) -> Steps[Message | None]:
        if event.name == "reconnect":
            text = "Will restart auto-configuration stream to get new data due to a policy change"
            self._log.info("%s", text)
            raise Reconnect
        if event.name in _EVENTS:
            message = yield from autoconfig.read(event.name, event.data)
            if not isinstance(message, Ignored):
                return message
            self._warn("%s", message.reason)
        else:
            self._warn('Ignoring unrecognized stream event: "%.50s"', event.name)
        return None

    def _warn(self, text: str, argument: str) -> None:
        if self._warnings.count():
            self._log.warning(text, argument)

    def _refuses(self, error: RelayError) -> bool:
        return isinstance(error, UpstreamRefused) and error.status in _REFUSALS

    def _interruption(self, error: UpstreamUnavailable | InvalidData, delay: float) -> Interrupted:
        if isinstance(error, InvalidData):
            reason = f"Received malformed auto-configuration data ({error}); will restart stream"
            return Interrupted(ErrorKind.INVALID_DATA, reason)
        if self._refuses(error):
            reason = "Invalid auto-configuration key; cannot get environments"
            reason += f" (HTTP error {error.status}); next attempt in {delay:.0f} s"
            return Interrupted(error.kind, reason, error.status, refused=True)
        reason = f"Error in auto-configuration stream (will retry): {error.reason}"
        return Interrupted(error.kind, reason, error.status)
