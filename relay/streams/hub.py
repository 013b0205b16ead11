"""The fan-out of one environment: each change is encoded once per stream and written to everybody.

The hub knows bytes and subscriptions; what the bytes mean is the business of the stream formats.
Everybody on a shared channel gets the same bytes objects, already framed as chunks of an HTTP/1.1
body, so a client that does not read costs references, not copies. Streams of pings are in here,
too; those whose bytes depend on the client are in `relay.evalstreams`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from relay.model.metrics import Histogram, MetricValue
from relay.model.payload import Change, Payload
from relay.streams.channel import (
    BroadcastChannel,
    Channel,
    StreamFormat,
    Subscription,
)
from relay.streams.transport import StreamTransport

MAX_SWEEP_INTERVAL = 5.0
"""Seconds between two looks at stalled clients, at most: to wake up costs more than to look."""

MAX_OVERTIME = 1.0
"""Seconds by which a maximum connection time may be exceeded."""

CONNECTION_TIME_JITTER = 0.1
"""A maximum connection time is shortened by up to this share, so that clients that came together
do not leave together."""


ENDINGS_PER_SECOND = 500
"""At most this many streams are ended each second at shutdown, if the time allows: their clients
connect elsewhere at once."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How long streams and their silences last. All in seconds.

    Args:
        heartbeat_interval: between two comments to everybody; 0 or less for none (streams 2.3).
        max_connection_time: after which a stream is ended; 0 or less for never.
        stall_timeout: for which a client whose buffer is full may take no byte at all. A minute
            outlasts any loss of packets that TCP survives in practice.
    """

    heartbeat_interval: float = 180.0
    max_connection_time: float = 0.0
    stall_timeout: float = 60.0

    @property
    def sweep_interval(self) -> float:
        """Seconds between two looks at all clients: fine enough for the times they are held to."""
        times = [MAX_SWEEP_INTERVAL]
        if self.stall_timeout > 0:
            times.append(self.stall_timeout / 10)
        if self.max_connection_time > 0:
            times += [MAX_OVERTIME, self.max_connection_time / 10]
        return min(times)


class Hub:
    """Everybody who listens to one environment.

    Args:
        formats: stream name, such as `all`, to the format of a shared channel.
        limits: how long streams and their silences last.
        channels: other streams by name.
    """

    def __init__(
        self,
        formats: Mapping[str, StreamFormat],
        limits: StreamLimits | None = None,
        channels: Mapping[str, Channel[Any]] | None = None,
    ) -> None:
        self.delays = Histogram()
        """From when a change came until it was written to the last stream that takes it at once."""
        shared = {name: BroadcastChannel(format_) for name, format_ in formats.items()}
        self._channels: Mapping[str, Channel[Any]] = {**shared, **(channels or {})}
        for channel in self._channels.values():
            channel.delays = self.delays
        self._limits = limits or StreamLimits()
        self._sweep_interval = self._limits.sweep_interval
        self._ticker: asyncio.TimerHandle | None = None
        self._next_heartbeat = 0.0
        self._closing = False

    def __len__(self) -> int:
        """Return the number of open streams."""
        return sum(len(channel.subscriptions) for channel in self._channels.values())

    @property
    def streams(self) -> Mapping[str, int]:
        """The number of open streams of each name."""
        return {name: len(channel.subscriptions) for name, channel in self._channels.items()}

    def publish(self, payload: Payload | None, change: Change, since: float | None = None) -> None:
        """Tell subscribers of a change; returns at once.

        Args:
            payload: what the environment serves now; None while it has no data of its own.
            change: what became different.
            since: the monotonic clock when the change came; None for now.
        """
        since = time.monotonic() if since is None else since
        for channel in self._channels.values():
            channel.publish(payload, change, since)

    def subscribe(
        self,
        stream: str,
        transport: StreamTransport,
        head: bytes = b"",
        count: MetricValue | None = None,
        client: object = None,
    ) -> Subscription:
        """Send everything that there is now, and from now on each change.

        The wire belongs to the subscription from now on.

        Args:
            stream: the name of the format or channel.
            transport: where to write, in chunks of HTTP/1.1.
            head: bytes to write before, such as the head of the response.
            count: of open streams; this one is in it until its connection is lost.
            client: what the channel has to know of the client; None for shared ones.
        """
        self._keep_ticking()
        count = count or MetricValue()
        count.value += 1
        ends_at = self._end_of_a_new_stream()
        subscription = self._channels[stream].subscribe(transport, head, ends_at, count, client)
        if self._closing:
            subscription.end()
        return subscription

    async def close(self, within: float) -> None:
        """End all streams properly, a few at a time, and return when they are gone.

        Clients that have not taken the end of their stream after `within` seconds are cut off.
        """
        self._closing = True
        try:
            async with asyncio.timeout(within):
                await self._end_slowly(min(within / 2, len(self) / ENDINGS_PER_SECOND))
                for channel in self._channels.values():
                    await _wait_drained(channel)
        except TimeoutError:
            for channel in self._channels.values():
                channel.abort_all()

    async def _end_slowly(self, seconds: float) -> None:
        """End all streams within about the given time."""
        open_now = [s for channel in self._channels.values() for s in channel.subscriptions]
        steps = max(1, round(seconds / 0.02))
        size = -(-len(open_now) // steps)
        for begin in range(0, len(open_now), size or 1):
            _end(open_now[begin : begin + size])
            await asyncio.sleep(seconds / steps)
        for channel in self._channels.values():
            _end(list(channel.subscriptions))  # those that started over meanwhile

    def _end_of_a_new_stream(self) -> float:
        longest = self._limits.max_connection_time
        if longest <= 0:
            return 0.0
        jitter = random.random() * CONNECTION_TIME_JITTER  # noqa: S311 - no secret
        return asyncio.get_running_loop().time() + longest * (1 - jitter)

    def _keep_ticking(self) -> None:
        if self._ticker is None:
            now = asyncio.get_running_loop().time()
            interval = self._limits.heartbeat_interval
            self._next_heartbeat = now + interval if interval > 0 else math.inf
            self._tick_soon(now)

    def _tick_soon(self, now: float) -> None:
        delay = min(self._sweep_interval, self._next_heartbeat - now)
        self._ticker = asyncio.get_running_loop().call_later(delay, self._tick)

    def _tick(self) -> None:
        """Do what is due by time; the ticker rests when nobody is connected."""
        self._ticker = None
        now = asyncio.get_running_loop().time()
        heartbeat = self._heartbeat_is_due(now)
        for channel in self._channels.values():
            channel.drop_stalled(now, self._limits.stall_timeout)
            if self._limits.max_connection_time > 0:
                channel.end_expired(now)
            if heartbeat:
                channel.heartbeat()
        if any(channel.has_clients for channel in self._channels.values()):
            self._tick_soon(now)

    def _heartbeat_is_due(self, now: float) -> bool:
        if now < self._next_heartbeat:
            return False
        interval = self._limits.heartbeat_interval
        self._next_heartbeat += interval * ((now - self._next_heartbeat) // interval + 1)
        return True


def _end(subscriptions: Iterable[Subscription]) -> None:
    for subscription in subscriptions:
        subscription.end()


async def _wait_drained(channel: Channel[Any]) -> None:
    channel.drained.clear()
    if channel.has_clients:
        await channel.drained.wait()
