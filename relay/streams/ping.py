"""Streams that tell clients to poll."""

from __future__ import annotations

import asyncio
from collections import deque

from relay import randomness
from relay.model.payload import Change, Payload
from relay.streams.channel import Channel, SharedFanOut, Subscription
from relay.streams.transport import PING_CHUNK

PING_SLOTS = 64
"""Time slots over which delayed pings are spread, each client in a random one: fine enough for
an even load of polls, coarse enough to cost nothing."""


class PingChannel(Channel[None]):
    """Stream that only announces changes; its clients then poll (streams 2.2).

    Pings within one turn of the event loop are merged. With a jitter, each client's ping has a
    random delay, so that the polls do not all come at once; changes during the delay add no ping.

    Args:
        jitter: maximum delay of a ping in seconds.
    """

    def __init__(self, jitter: float = 0.0) -> None:
        super().__init__()
        self._jitter = max(0.0, jitter)
        self._has_data = False
        self._pending_since: float | None = None
        self._slots: deque[list[Subscription]] = deque()
        """Receivers of delayed pings by time slot; the first slot is due next."""
        self._scheduled: set[Subscription] = set()
        """All subscriptions that are in a slot."""

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Ping all clients, at once or spread over the jitter; only if there are data to poll."""
        self._has_data = payload is not None
        if change.visible or change.replace:
            self._ping(since)

    def publish_memberships(self, hashes: frozenset[str] | None, since: float) -> None:
        """Ping all clients, as `publish` does: nothing is known about their contexts."""
        del hashes
        self._ping(since)

    def _ping(self, since: float) -> None:
        if not (self._has_data and self.subscriptions):
            return
        if self._jitter:
            self._delay_pings()
        elif self._pending_since is None:
            self._pending_since = since
            self._schedule_slice()

    def _opening_for(self, subscription: Subscription) -> bytes:
        del subscription
        return PING_CHUNK if self._has_data else b""

    @property
    def _is_pending(self) -> bool:
        return self._pending_since is not None

    def _start_pending(self) -> None:
        if self._pending_since is not None:
            self._fan_outs.append(SharedFanOut(PING_CHUNK, self.subscriptions, self._pending_since))
            self._pending_since = None

    def _delay_pings(self) -> None:
        if not self._slots:
            asyncio.get_running_loop().call_later(self._jitter / PING_SLOTS, self._ping_slot)
        while len(self._slots) < PING_SLOTS:
            self._slots.append([])
        for subscription in self.subscriptions:
            if subscription not in self._scheduled:
                self._scheduled.add(subscription)
                randomness.choice(self._slots).append(subscription)

    def _ping_slot(self) -> None:
        due = self._slots.popleft()
        if due:
            self._scheduled.difference_update(due)
            self._start(SharedFanOut(PING_CHUNK, due))
        if not self._scheduled:
            self._slots.clear()
        if self._slots:
            asyncio.get_running_loop().call_later(self._jitter / PING_SLOTS, self._ping_slot)
