"""Streams whose clients name the state of their data, and get what they miss (fdv2 13.8)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from itertools import islice

from relay import clock
from relay.model.answers import AnswerCounter
from relay.model.journal import MISSING, TOO_OLD, UNRELIABLE, Full, Journal
from relay.model.payload import Change, Payload
from relay.protocol import fdv2
from relay.streams.channel import FAN_OUT_SLICE, BroadcastChannel, Subscription
from relay.streams.transport import encode_chunk

STREAM = "sdk/stream"
"""Name of the channel: the path of its route."""

MAX_OPENINGS = 64
"""Openings kept until the next change. After an outage most clients name one of a few states; if
they name more, all are made anew, of bytes that are shared for the most part."""

MAX_WAIT = 3.0
"""Seconds for which a client waits that seems to be ahead of this relay: SDKs wait for longer, and
replicas are seldom further behind."""


_GIVEN_UP = "-"
"""Instead of the state of a client that has waited in vain; no state is like that."""


class FDv2Format:
    """Format of the stream `/sdk/stream`.

    Args:
        journal: of the environment.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def opening(self, payload: Payload) -> bytes:
        """Return all data, for clients that have to start over."""
        return fdv2.stream(fdv2.full(self._journal, payload, TOO_OLD))

    def update(self, change: Change) -> bytes:
        """Return the items of the last step; empty if no client can notice them."""
        latest = self._journal.latest
        if isinstance(latest, Full) or not (change.visible or change.replace):
            return b""
        return fdv2.stream(fdv2.changes(self._journal, latest.items))


class _CatchUp:
    """Fan-out to clients that wait, each of which gets what it misses.

    Args:
        channel: of the clients.
        receivers: the subscriptions that wait at creation.
    """

    since = None

    def __init__(self, channel: DeltaChannel, receivers: Iterable[Subscription]) -> None:
        self._channel = channel
        self._receivers = iter(list(receivers))

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        count = 0
        for subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            self._channel.catch_up(subscription)
        return count < FAN_OUT_SLICE


class DeltaChannel(BroadcastChannel[str]):
    """Channel whose clients each have a basis: the state that they name, empty for none.

    A client waits for its first message while there are no data, and while these data seem to be
    behind those of its state, as on a replica that lags.

    Args:
        journal: of the environment; knows a change before it is published.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__(FDv2Format(journal))
        self._journal = journal
        self._step = 0
        self._openings: dict[str, tuple[bytes, AnswerCounter]] = {}
        """By the state that clients name."""
        self._revision = 0
        """Revision of the journal that the openings are of."""
        self._waiting: dict[Subscription, float] = {}
        """Clients without a message so far, and the monotonic time until which they wait."""
        self._timer: asyncio.TimerHandle | None = None

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Encode a change, once for all subscribers; nothing if the journal has not recorded it."""
        if self._step == self._journal.step:
            return
        self._step = self._journal.step
        super().publish(payload, change, since)
        if self._waiting:
            self._start(_CatchUp(self, self._waiting))

    def catch_up(self, subscription: Subscription) -> None:
        """Let a client that waits begin, if it has what it waits for, or has waited long enough."""
        until = self._waiting.get(subscription)
        if until is None or self._payload is None:
            return
        if clock.monotonic() >= until:
            self.subscriptions[subscription] = _GIVEN_UP
        elif self._journal.is_behind(self.subscriptions[subscription]):
            if until == math.inf:  # until now it has waited for data
                self._wait(subscription)
            return
        self.resync(subscription)

    def forget(self, subscription: Subscription) -> None:
        """Remove a subscription whose connection is lost, or which begins."""
        super().forget(subscription)
        self._waiting.pop(subscription, None)

    def mark_ended(self, subscription: Subscription) -> None:
        """Remove a subscription whose stream has ended."""
        super().mark_ended(subscription)
        self._waiting.pop(subscription, None)

    def _restarts(self, change: Change) -> bool:
        del change
        return isinstance(self._journal.latest, Full)

    def _receivers(self) -> Iterable[Subscription]:
        if not self._waiting:
            return self.subscriptions
        return [each for each in self.subscriptions if each not in self._waiting]

    def _opening_for(self, subscription: Subscription) -> bytes:
        encoded = self._answer(subscription)
        if encoded is None:
            self._wait(subscription)
            return b""
        # After its first message the client has taken more than its basis says.
        self.subscriptions[subscription] = UNRELIABLE
        opening, counter = encoded
        counter.add()
        return opening

    def _opening_size(self, subscription: Subscription) -> int:
        encoded = self._answer(subscription)
        return 0 if encoded is None else len(encoded[0])

    def _answer(self, subscription: Subscription) -> tuple[bytes, AnswerCounter] | None:
        """Return the opening of a client, and its counter; None if it has to wait for one."""
        if self._revision != self._journal.revision:
            self._revision, self._opening = self._journal.revision, None
            self._openings.clear()
        basis = self.subscriptions[subscription]
        encoded = self._openings.get(basis)
        if encoded is None and self._payload is not None and not self._journal.is_behind(basis):
            encoded = self._encode(self._payload, basis)
        return encoded

    def _encode(self, payload: Payload, basis: str) -> tuple[bytes, AnswerCounter]:
        """Return the opening for those who name a state, and its counter."""
        journal = self._journal
        answer = journal.answer(basis)
        if isinstance(answer, Full) and answer is not MISSING:
            opening = self._encoded_opening()
        else:
            opening = encode_chunk(fdv2.stream(fdv2.respond(journal, payload, answer)))
        if len(self._openings) >= MAX_OPENINGS:
            self._openings.clear()
        encoded = self._openings[basis] = opening, journal.counter(answer)
        return encoded

    def _wait(self, subscription: Subscription) -> None:
        """Let a client wait for data, or for the change that its state has already."""
        now = clock.monotonic()
        self._waiting[subscription] = math.inf if self._payload is None else now + MAX_WAIT
        if self._payload is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT, self._end_waiting)

    def _end_waiting(self) -> None:
        """Let those begin who have waited for long enough; look again when the next one has."""
        self._timer = None
        now = clock.monotonic()
        if overdue := [each for each, until in self._waiting.items() if until <= now]:
            self._start(_CatchUp(self, overdue))
        if later := [until for until in self._waiting.values() if now < until < math.inf]:
            delay = min(later) - now
            self._timer = asyncio.get_running_loop().call_later(delay, self._end_waiting)
