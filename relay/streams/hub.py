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
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from relay.model.metrics import Histogram, MetricValue
from relay.model.payload import Change, Payload
from relay.protocol.clientside import PING

ClientT = TypeVar("ClientT")
"""What a channel has to know of each client, such as the context that it evaluates for."""

FAN_OUT_SLICE = 128
"""Subscriptions written to in one turn of the loop: polls in between wait some 6 ms, and the last
subscriber of many gets its message no later than without slices."""

MAX_PENDING = 256 * 1024
"""Bytes of changes that are kept for a client whose buffer is full; beyond, it gets a fresh put."""

MAX_SWEEP_INTERVAL = 5.0
"""Seconds between two looks at stalled clients, at most: to wake up costs more than to look."""

MAX_OVERTIME = 1.0
"""Seconds by which a maximum connection time may be exceeded."""

CONNECTION_TIME_JITTER = 0.1
"""A maximum connection time is shortened by up to this share, so that clients that came together
do not leave together."""

PING_SLOTS = 64
"""A delayed ping goes out in one of so many slots of time, chosen for each client by chance: so
fine that the clients' polls come evenly, so coarse that the slots cost nothing."""

ENDINGS_PER_SECOND = 500
"""At most this many streams are ended each second at shutdown, if the time allows: their clients
connect elsewhere at once."""


class StreamFormat(Protocol):
    """Turns payloads and changes into the bytes of one kind of stream. Pure."""

    def opening(self, payload: Payload) -> bytes:
        """Return the message that gives a new subscriber everything."""

    def update(self, change: Change) -> bytes:
        """Return the messages that bring a subscriber up to date; empty if they concern it not."""


class StreamTransport(Protocol):
    """What a subscription writes to: an asyncio transport, or what looks like one."""

    def write(self, data: bytes, /) -> None:
        """Take bytes to send; never blocks."""

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Take bytes to send together."""

    def close(self) -> None:
        """Close after everything has been sent."""

    def abort(self) -> None:
        """Close now."""

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes not yet sent."""

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Tell who wants to know about a full buffer and a lost connection."""


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


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of an HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def decode_chunks(chunks: bytes) -> Iterator[bytes]:
    """Yield the data of chunks that `encode_chunk` made, for a server that frames by itself."""
    at = 0
    while at < len(chunks):
        begin = chunks.index(b"\r\n", at) + 2
        end = begin + int(chunks[at : begin - 2], 16)
        yield chunks[begin:end]
        at = end + 2


HEARTBEAT = encode_chunk(b":\n")
PING_CHUNK = encode_chunk(PING)
LAST_CHUNK = b"0\r\n\r\n"


class _PendingOutput:
    """What a client with a full buffer has missed, and when it last took a byte."""

    __slots__ = ("backlog", "chunks", "size", "taken_at")

    def __init__(self, backlog: int, now: float) -> None:
        self.chunks: list[bytes] = []
        self.size = 0
        self.backlog = backlog
        self.taken_at = now

    def add(self, chunk: bytes) -> None:
        """Keep a chunk, or only the fact that there was one."""
        if chunk is HEARTBEAT or (chunk is PING_CHUNK and chunk in self.chunks):
            return
        self.size += len(chunk)
        if self.too_many:
            self.chunks.clear()
        else:
            self.chunks.append(chunk)

    @property
    def too_many(self) -> bool:
        return self.size > MAX_PENDING

    def stalled_for(self, backlog: int, now: float) -> float:
        """Return the seconds since the client last took a byte."""
        if backlog < self.backlog:
            self.backlog, self.taken_at = backlog, now
        return now - self.taken_at


class Subscription(asyncio.Protocol):
    """One client of one stream: the protocol of its transport, and all that is kept of it."""

    __slots__ = ("_channel", "count", "ends_at", "pending", "transport")

    def __init__(
        self, channel: Channel[Any], transport: StreamTransport, ends_at: float, count: MetricValue
    ) -> None:
        self._channel = channel
        self.count = count
        self.transport = transport
        self.ends_at = ends_at
        self.pending: _PendingOutput | None = None
        """None as long as the client takes what it is sent."""

    def send(self, chunk: bytes) -> None:
        """Write a chunk, or keep it until the client has taken what it was sent before."""
        if self.pending is None:
            self.transport.write(chunk)
        else:
            self.pending.add(chunk)

    def data_received(self, data: bytes) -> None:
        """Ignore what a client says after its request."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget this subscription."""
        del exc
        self.count.value -= 1
        self._channel.forget(self)

    def pause_writing(self) -> None:
        """The buffer is full: from now on the client is slow."""
        if self.pending is None:
            self._channel.mark_slow(self)

    def resume_writing(self) -> None:
        """The buffer has emptied: the client gets what it missed, or everything."""
        arrears = self.pending
        if arrears is None or self not in self._channel.subscriptions:
            return
        if arrears.too_many:
            self._channel.resync(self)
            return
        self._channel.mark_fast(self)
        for chunk in arrears.chunks:
            self.transport.write(chunk)

    def end(self) -> None:
        """End the stream properly; what is still in the buffer goes out first."""
        if self not in self._channel.subscriptions:
            return
        self._channel.mark_ended(self)
        self.transport.write(LAST_CHUNK)
        self.transport.close()


class FanOut(Protocol):
    """What is on its way to whom. Each has its own list: who comes later has an opening with it."""

    @property
    def since(self) -> float | None:
        """When the first change in it came; None for a heartbeat."""

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""


class SharedFanOut:
    """The same bytes for everybody.

    Args:
        chunk: framed.
        receivers: those who listened when it was made.
        since: when the first change in it came; None for a heartbeat.
    """

    __slots__ = ("_chunk", "_receivers", "since")

    def __init__(
        self, chunk: bytes, receivers: Iterable[Subscription], since: float | None = None
    ) -> None:
        self._chunk = chunk
        self._receivers = iter(list(receivers))
        self.since = since

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        chunk, count = self._chunk, 0
        for subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            if subscription.pending is None:
                subscription.transport.write(chunk)
            else:
                subscription.pending.add(chunk)
        return count < FAN_OUT_SLICE


class Channel(ABC, Generic[ClientT]):
    """All subscriptions to one stream of an environment: who is there, slow, or has to go.

    What they are sent, and when, is for the classes below it.
    """

    def __init__(self) -> None:
        self.delays = Histogram()
        """How long passes took; the hub gives all its channels the same."""
        self.subscriptions: dict[Subscription, ClientT] = {}
        self._slow: set[Subscription] = set()
        """Those with arrears, and those that have been ended and are not gone yet."""
        self.drained = asyncio.Event()
        self._fan_outs: deque[FanOut] = deque()
        self._slice_scheduled = False

    @abstractmethod
    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Tell subscribers of a change; returns at once."""

    @abstractmethod
    def _opening_for(self, subscription: Subscription) -> bytes:
        """Return what a subscription that has just come begins with; empty if it has to wait."""

    @abstractmethod
    def _start_pending(self) -> None:
        """Make what is pending a pass to those who listen now."""

    @property
    @abstractmethod
    def _is_pending(self) -> bool:
        """Whether there is something to seal."""

    @property
    def has_clients(self) -> bool:
        """Whether anybody is connected, ended streams that are not gone yet included."""
        return bool(self.subscriptions or self._slow)

    def subscribe(
        self,
        transport: StreamTransport,
        head: bytes,
        ends_at: float,
        count: MetricValue,
        client: ClientT,
    ) -> Subscription:
        """Take a client in and write its opening, in one step."""
        # Opening and registration are one step without an await, and what is pending is closed to
        # newcomers before: nothing is lost between the two, and nothing doubled.
        self._close_pending()
        subscription = Subscription(self, transport, ends_at, count)
        self.subscriptions[subscription] = client
        transport.set_protocol(subscription)
        # Together: each write is a packet, and may be all that wakes the client.
        if parts := [part for part in (head, self._opening_for(subscription)) if part]:
            transport.writelines(parts)
        return subscription

    def heartbeat(self) -> None:
        """Write a comment to everybody."""
        self._close_pending()
        self._start(SharedFanOut(HEARTBEAT, self.subscriptions))

    def resync(self, subscription: Subscription) -> None:
        """Give a slow client everything anew; passes still on their way do not concern it."""
        who = self.subscriptions[subscription]
        self.forget(subscription)
        self.subscribe(subscription.transport, b"", subscription.ends_at, subscription.count, who)

    def forget(self, subscription: Subscription) -> None:
        """Note that a client is gone."""
        self.subscriptions.pop(subscription, None)
        self._slow.discard(subscription)
        subscription.pending = _PendingOutput(0, 0.0)  # passes on their way must not write to it
        if not self.has_clients:
            self.drained.set()

    def mark_slow(self, subscription: Subscription) -> None:
        """Note that a client's buffer is full."""
        backlog = subscription.transport.get_write_buffer_size()
        subscription.pending = _PendingOutput(backlog, asyncio.get_running_loop().time())
        self._slow.add(subscription)

    def mark_fast(self, subscription: Subscription) -> None:
        """Note that a client's buffer has emptied."""
        subscription.pending = None
        self._slow.discard(subscription)

    def mark_ended(self, subscription: Subscription) -> None:
        """Note that a client has got the end of its stream."""
        self.subscriptions.pop(subscription, None)
        self.mark_slow(subscription)

    def drop_stalled(self, now: float, stall_timeout: float) -> None:
        """Cut off clients that have taken nothing for too long."""
        for subscription in list(self._slow):
            arrears, wire = subscription.pending, subscription.transport
            if arrears and arrears.stalled_for(wire.get_write_buffer_size(), now) > stall_timeout:
                wire.abort()

    def end_expired(self, now: float) -> None:
        """End streams whose time is over."""
        for subscription in list(self.subscriptions):
            # The time of a slow client is over when it has taken its message, or has stalled.
            if now >= subscription.ends_at and subscription.pending is None:
                subscription.end()

    def abort_all(self) -> None:
        """Cut everybody off."""
        for subscription in [*self.subscriptions, *self._slow]:
            subscription.transport.abort()

    def _close_pending(self) -> None:
        """See that what is pending is not for those who come now."""
        self._start_pending()

    def _start(self, new: FanOut) -> None:
        self._fan_outs.append(new)
        self._schedule_slice()

    def _schedule_slice(self) -> None:
        if not self._slice_scheduled:
            self._slice_scheduled = True
            asyncio.get_running_loop().call_soon(self._run_slice)

    def _run_slice(self) -> None:
        """Write to one slice of subscriptions."""
        self._slice_scheduled = False
        try:
            if not self._fan_outs:
                self._start_pending()
            if self._fan_outs and self._fan_outs[0].write_slice():
                since = self._fan_outs.popleft().since
                if since is not None:
                    self.delays.add(time.monotonic() - since)
        finally:  # what goes wrong for one client does not keep others waiting
            if self._fan_outs or self._is_pending:
                self._schedule_slice()


class BroadcastChannel(Channel[None]):
    """A stream of which everybody gets the same bytes.

    Args:
        stream_format: makes them.
    """

    def __init__(self, stream_format: StreamFormat) -> None:
        super().__init__()
        self._format = stream_format
        self._payload: Payload | None = None
        self._opening: bytes | None = None
        self._pending: list[bytes] = []
        self._pending_since: float | None = None

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Encode a change, once."""
        self._payload, self._opening = payload, None
        if not self.subscriptions:
            return
        if change.replace and payload is not None:
            self._pending = [self._current_opening()]
        elif update := self._format.update(change):
            self._pending.append(encode_chunk(update))
        if self._pending and self._pending_since is None:
            self._pending_since = since
        self._schedule_slice()

    def _opening_for(self, subscription: Subscription) -> bytes:
        del subscription
        return self._current_opening()

    def _current_opening(self) -> bytes:
        if self._opening is None and self._payload is not None:
            self._opening = encode_chunk(self._format.opening(self._payload))
        return self._opening or b""

    @property
    def _is_pending(self) -> bool:
        return bool(self._pending)

    def _start_pending(self) -> None:
        if self._pending:
            chunks = self._pending
            joined = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._fan_outs.append(SharedFanOut(joined, self.subscriptions, self._pending_since))
            self._pending, self._pending_since = [], None


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
