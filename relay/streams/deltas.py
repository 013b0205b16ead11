"""Streams whose clients name the state of their data, and get what they miss (fdv2 13.8)."""

from __future__ import annotations

from relay.lru import LRUMap
from relay.model.journal import CANNOT_CATCH_UP, Full, Journal
from relay.model.payload import Change, Payload
from relay.protocol import fdv2
from relay.streams.channel import BroadcastChannel, Subscription
from relay.streams.transport import encode_chunk

STREAM = "sdk/stream"
"""Name of the channel: the path of its route."""

MAX_OPENINGS = 64
"""Openings kept until the next change. After an outage most clients name one of a few states."""


class FDv2Format:
    """Format of the stream `/sdk/stream`.

    Args:
        journal: of the environment.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def opening(self, payload: Payload) -> bytes:
        """Return all data, for clients that have to start over."""
        return fdv2.stream(fdv2.full(self._journal, payload, CANNOT_CATCH_UP))

    def update(self, change: Change) -> bytes:
        """Return the items of the last step; empty if no client can notice them."""
        latest = self._journal.latest
        if isinstance(latest, Full) or not (change.visible or change.replace):
            return b""
        return fdv2.stream(fdv2.changes(self._journal, latest.items))


class DeltaChannel(BroadcastChannel[str]):
    """Channel whose clients each have a basis: the state that they name, empty for none.

    Args:
        journal: of the environment; knows a change before it is published.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__(FDv2Format(journal))
        self._journal = journal
        self._openings: LRUMap[int | str, bytes] = LRUMap(MAX_OPENINGS)

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Encode a change, once for all subscribers."""
        self._openings.clear()
        super().publish(payload, change, since)

    def resync(self, subscription: Subscription) -> None:
        """Start a slow client over: its basis says nothing about what it has taken since."""
        self.subscriptions[subscription] = ""
        super().resync(subscription)

    def _restarts(self, change: Change) -> bool:
        del change
        return isinstance(self._journal.latest, Full)

    def _opening_for(self, subscription: Subscription) -> bytes:
        payload = self._payload
        if payload is None:
            return b""
        answer = self._journal.answer(self.subscriptions[subscription])
        if answer is CANNOT_CATCH_UP:
            return self._encoded_opening()
        opening = self._openings.get(answer.key)
        if opening is None:
            events = fdv2.respond(self._journal, payload, answer)
            opening = encode_chunk(fdv2.stream(events))
            self._openings.put(answer.key, opening)
        return opening
