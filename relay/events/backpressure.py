"""Back-pressure while memory fills up: acknowledgements are delayed.

A client that sends faster than upstream accepts events is slowed down, instead of evicting the
events of other clients. A disk has space enough.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from relay import clock
from relay.events.memory import MemoryStore
from relay.events.reports import EventReports
from relay.events.store import PAYLOAD_OVERHEAD
from relay.model.event import EventPayload

MAX_ACK_DELAY = 1.0
"""Maximum delay in seconds of the acknowledgement of a payload while memory fills up."""


class _DelayedAck(NamedTuple):
    ack: asyncio.Future[bool]
    new: bool
    size: int
    until: float
    """Latest time of the acknowledgement, by `clock.monotonic`."""


class AckGate:
    """Acknowledges payloads in memory at once, or later while they fill over half of it.

    Args:
        memory: the store; None if payloads are on disk.
        reports: knows the environments with an outage. Their payloads delay no others.
    """

    def __init__(self, memory: MemoryStore | None, reports: EventReports) -> None:
        self.delaying = asyncio.Event()
        """Set while acknowledgements are delayed, or for good at shutdown."""
        self._memory = memory
        self._reports = reports
        self._delayed: deque[_DelayedAck] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._open = False
        """True if no acknowledgement is delayed any more, as the relay shuts down."""
        self._resolved: dict[bool, asyncio.Future[bool]] = {}
        """Shared acknowledgements without a delay, by whether the payload was new."""

    def __repr__(self) -> str:
        return f"<AckGate: {len(self._delayed)} acknowledgements delayed>"

    def __len__(self) -> int:
        """Return the number of delayed acknowledgements."""
        return len(self._delayed)

    def acknowledge(self, payload: EventPayload, new: bool) -> asyncio.Future[bool]:
        """Return the acknowledgement of a payload that is in memory now.

        Args:
            payload: the payload.
            new: result of the acknowledgement.
        """
        memory = self._memory
        if (
            memory is not None
            and 2 * memory.size > memory.capacity  # seldom
            and self._is_crowded(memory)
            and not self._reports.is_failing(payload.partition)
        ):
            return self._delay(new, len(payload.body))
        return self._resolved.get(new) or self._resolve(new)

    def release(self, *, everything: bool = False) -> None:
        """Resolve the acknowledgements for which there is space, and those that are due.

        Args:
            everything: resolve all.
        """
        if self._memory is None or not self._delayed:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        now, free = clock.monotonic(), self._memory.capacity // 2 - self._memory.size
        while self._delayed:
            ack, new, size, until = self._delayed[0]
            free -= size + PAYLOAD_OVERHEAD
            if free < 0 and until > now and not everything:
                self._timer = loop.call_later(until - now, self.release)
                return
            self._delayed.popleft()
            if not ack.done():
                ack.set_result(new)
        if not self._open:
            self.delaying.clear()

    def open(self) -> None:
        """Resolve all acknowledgements, and delay no further ones."""
        self._open = True
        self.release(everything=True)
        self.delaying.set()

    def _is_crowded(self, memory: MemoryStore) -> bool:
        """Return whether payloads that upstream will accept soon fill over half of the memory."""
        stuck = sum(memory.sizes[name] for name in self._reports.failing_environments)
        return 2 * (memory.size - stuck) > memory.capacity and not self._open

    def _delay(self, new: bool, size: int) -> asyncio.Future[bool]:
        """Return an acknowledgement that resolves when there is space, or after a time limit."""
        loop = asyncio.get_running_loop()
        ack: asyncio.Future[bool] = loop.create_future()
        until = clock.monotonic() + MAX_ACK_DELAY
        if not self._delayed:
            self.delaying.set()
            self._timer = loop.call_later(MAX_ACK_DELAY, self.release)
        self._delayed.append(_DelayedAck(ack, new, size, until))
        return ack

    def _resolve(self, new: bool) -> asyncio.Future[bool]:
        future = self._resolved[new] = asyncio.get_running_loop().create_future()
        future.set_result(new)
        return future
