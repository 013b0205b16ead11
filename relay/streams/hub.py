"""Fan-out of one environment: each change is encoded once per stream and written to all clients.

The hub handles bytes and subscriptions; the stream formats give the bytes their meaning. All
clients of a broadcast channel get the same bytes objects, already framed as chunks of an HTTP/1.1
body, so a client that does not read costs references, not copies. Ping streams are in
`relay.streams.ping`, and streams whose bytes depend on the client in `relay.streams.evaluated`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from relay import clock, randomness
from relay.model.metrics import Histogram, MetricValue
from relay.model.payload import Change, Payload
from relay.registry import Grant
from relay.streams.admission import Admission
from relay.streams.channel import (
    BroadcastChannel,
    Channel,
    StreamFormat,
    Subscription,
)
from relay.streams.transport import StreamTransport

MAX_SWEEP_INTERVAL = 5.0
"""Maximum seconds between two sweeps for stalled clients: waking up costs more than the sweep."""

MAX_OVERTIME = 1.0
"""Seconds by which a stream may exceed its maximum connection time."""

CONNECTION_TIME_JITTER = 0.1
"""Maximum share by which a connection time is shortened at random, so that clients that connected
together do not all reconnect together."""


ENDINGS_PER_SECOND = 500
"""Maximum rate at which a shutdown ends streams, if the time allows: their clients reconnect
elsewhere at once."""


class StreamLimits(Struct, frozen=True):
    """Time limits of streams. All in seconds.

    Args:
        heartbeat_interval: between two comments; 0 or less for none (streams 2.3).
        max_connection_time: after this a stream is ended; 0 or less for never.
        stall_timeout: for this long a client with a full buffer may take no byte at all. A minute
            outlasts any loss of packets that TCP survives in practice.
    """

    heartbeat_interval: float = 180.0
    max_connection_time: float = 0.0
    stall_timeout: float = 60.0

    @property
    def sweep_interval(self) -> float:
        """Seconds between two sweeps over all clients, short enough to enforce the limits."""
        intervals = [MAX_SWEEP_INTERVAL]
        if self.stall_timeout > 0:
            intervals.append(self.stall_timeout / 10)
        if self.max_connection_time > 0:
            intervals += [MAX_OVERTIME, self.max_connection_time / 10]
        return min(intervals)


class Hub:
    """All streams of one environment.

    Args:
        formats: the formats of broadcast channels by stream name, such as `all`.
        limits: time limits of streams.
        channels: other channels by stream name.
        admission: of the process; one for this hub alone if omitted.
    """

    def __init__(
        self,
        formats: Mapping[str, StreamFormat],
        limits: StreamLimits | None = None,
        channels: Mapping[str, Channel[Any]] | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.delays = Histogram()
        """Seconds from receiving a change to writing it to the last stream that is not slow."""
        broadcast = {name: BroadcastChannel[None](format_) for name, format_ in formats.items()}
        self._channels: Mapping[str, Channel[Any]] = {**broadcast, **(channels or {})}
        admission = admission or Admission()
        for channel in self._channels.values():
            channel.delays, channel.admission = self.delays, admission
        self._limits = limits or StreamLimits()
        self._sweep_interval = self._limits.sweep_interval
        self._ticker: asyncio.TimerHandle | None = None
        self._next_heartbeat = 0.0
        self._closing = False

    def __repr__(self) -> str:
        streams = ", ".join(f"{name}: {count}" for name, count in self.streams.items())
        return f"<Hub [{streams}]>"

    def __len__(self) -> int:
        """Return the number of open streams."""
        return sum(len(channel.subscriptions) for channel in self._channels.values())

    @property
    def streams(self) -> Mapping[str, int]:
        """The number of open streams by name."""
        return {name: len(channel.subscriptions) for name, channel in self._channels.items()}

    def publish(self, payload: Payload | None, change: Change, since: float | None = None) -> None:
        """Schedule a change for delivery to all subscribers; returns at once.

        Args:
            payload: the data that the environment serves now; None while it has none of its own.
            change: the difference to the previous payload.
            since: monotonic time at which the change was received; None for now.
        """
        since = clock.monotonic() if since is None else since
        for channel in self._channels.values():
            channel.publish(payload, change, since)

    def confirm(self, payload: Payload) -> None:
        """Note that upstream has confirmed the data, which is nothing to streams."""

    def interrupt(self, *, refused: bool) -> None:
        """Note that upstream is lost, or refuses the key, which is nothing to streams, too."""

    def publish_memberships(self, hashes: frozenset[str] | None) -> None:
        """Let clients know that memberships in big segments have changed; returns at once.

        Args:
            hashes: of the context keys; None if they are unknown.
        """
        since = clock.monotonic()
        for channel in self._channels.values():
            channel.publish_memberships(hashes, since)

    def subscribe(
        self,
        stream: str,
        transport: StreamTransport,
        head: bytes = b"",
        count: MetricValue | None = None,
        client: object = None,
        *,
        grant: Grant[Any] | None = None,
    ) -> Subscription:
        """Send the current data, then each change.

        The subscription takes over the transport.

        Args:
            stream: the name of the format or channel.
            transport: written to in chunks of HTTP/1.1.
            head: bytes to write first, such as the head of the response.
            count: the number of open streams; includes this one until its connection is lost.
            client: the channel's own data about the client; None for broadcast channels.
            grant: opened the environment; the stream ends with it. None if it lasts for ever.
        """
        if self._ticker is None:
            self._start_ticking()
        count = count or MetricValue()
        count.value += 1
        ends_at = self._new_end_time() if self._limits.max_connection_time > 0 else 0.0
        channel = self._channels[stream]
        subscription = channel.subscribe(transport, head, ends_at, count, client, grant=grant)
        if self._closing or (grant is not None and grant.revoked):
            subscription.end()
        return subscription

    async def close(self, within: float) -> None:
        """End all streams properly, a few at a time, and wait until they are closed.

        Clients that have not taken the end of their stream after `within` seconds are aborted.
        """
        self._closing = True
        try:
            async with asyncio.timeout(within):
                await self._end_slowly(within / 2)
                for channel in self._channels.values():
                    await channel.wait_drained()
        except TimeoutError:
            for channel in self._channels.values():
                channel.abort()

    async def end_streams(self, grant: Grant[Any], within: float) -> None:
        """End the streams that were opened with a grant, as `close` does; no others notice."""
        if not self._subscriptions(grant):
            return
        await self._end_slowly(within / 2, grant)
        await asyncio.sleep(within / 2)
        for channel in self._channels.values():
            channel.abort(grant)

    async def _end_slowly(self, within: float, grant: Grant[Any] | None = None) -> None:
        """End all streams, or those that were opened with a grant, a few at a time."""
        subscriptions = self._subscriptions(grant)
        seconds = min(within, len(subscriptions) / ENDINGS_PER_SECOND)
        steps = max(1, round(seconds / 0.02))
        size = -(-len(subscriptions) // steps)
        for start in range(0, len(subscriptions), size or 1):
            _end_all(subscriptions[start : start + size])
            await asyncio.sleep(seconds / steps)
        _end_all(self._subscriptions(grant))  # those that were resynced meanwhile

    def _subscriptions(self, grant: Grant[Any] | None) -> list[Subscription]:
        channels = self._channels.values()
        return [s for c in channels for s in c.subscriptions if grant is None or s.grant is grant]

    def _new_end_time(self) -> float:
        jitter = randomness.fraction() * CONNECTION_TIME_JITTER
        return clock.monotonic() + self._limits.max_connection_time * (1 - jitter)

    def _start_ticking(self) -> None:
        now = clock.monotonic()
        interval = self._limits.heartbeat_interval
        self._next_heartbeat = now + interval if interval > 0 else math.inf
        self._schedule_tick(now)

    def _schedule_tick(self, now: float) -> None:
        delay = min(self._sweep_interval, self._next_heartbeat - now)
        self._ticker = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        """Sweep all channels and send due heartbeats; stop ticking when no client is connected."""
        self._ticker = None
        now = clock.monotonic()
        heartbeat = self._take_due_heartbeat(now)
        for channel in self._channels.values():
            channel.drop_stalled(now, self._limits.stall_timeout)
            if self._limits.max_connection_time > 0:
                channel.end_expired(now)
            if heartbeat:
                channel.heartbeat()
        if any(channel.has_clients for channel in self._channels.values()):
            self._schedule_tick(now)

    def _take_due_heartbeat(self, now: float) -> bool:
        if now < self._next_heartbeat:
            return False
        interval = self._limits.heartbeat_interval
        self._next_heartbeat += interval * ((now - self._next_heartbeat) // interval + 1)
        return True


def _end_all(subscriptions: Iterable[Subscription]) -> None:
    for subscription in subscriptions:
        subscription.end()
