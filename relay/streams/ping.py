"""Streams that tell clients to poll."""

from __future__ import annotations

import asyncio
import random
from collections import deque

from relay.model.payload import Change, Payload
from relay.streams.channel import Channel, SharedFanOut, Subscription
from relay.streams.transport import PING_CHUNK

PING_SLOTS = 64
"""A delayed ping goes out in one of so many slots of time, chosen for each client by chance: so
fine that the clients' polls come evenly, so coarse that the slots cost nothing."""


class PingChannel(Channel[None]):
    """A stream that only says that something changed; its clients then poll (streams 2.2).

    Pings of one turn of the loop are one. With a jitter, each client has a delay of its own, so
    that the polls do not all come at once; what changes during the delay adds no further ping.

    Args:
        jitter: seconds up to which a ping is delayed.
    """

    def __init__(self, jitter: float = 0.0) -> None:
        super().__init__()
        self._jitter = max(0.0, jitter)
        self._has_data = False
        self._pending_since: float | None = None
        self._slots: deque[list[Subscription]] = deque()
        """Who gets a delayed ping, by when: the first slot is due next."""
        self._waiting: set[Subscription] = set()
        """All who are in a slot."""

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Ping everybody, at once or by and by; without data there is nothing to poll."""
        self._has_data = payload is not None
        if not (self._has_data and self.subscriptions and (change.visible or change.replace)):
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
            asyncio.get_running_loop().call_later(self._jitter / PING_SLOTS, self._ping_a_slot)
        while len(self._slots) < PING_SLOTS:
            self._slots.append([])
        for subscription in self.subscriptions:
            if subscription not in self._waiting:
                self._waiting.add(subscription)
                random.choice(self._slots).append(subscription)  # noqa: S311 - no secret

    def _ping_a_slot(self) -> None:
        due = self._slots.popleft()
        if due:
            self._waiting.difference_update(due)
            self._start(SharedFanOut(PING_CHUNK, due))
        if not self._waiting:
            self._slots.clear()
        if self._slots:
            asyncio.get_running_loop().call_later(self._jitter / PING_SLOTS, self._ping_a_slot)
