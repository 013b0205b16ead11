"""Channels: who subscribes to a stream, and the fan-out of what is published there."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from relay.model.metrics import Histogram, MetricValue
from relay.model.payload import Change, Payload
from relay.streams.transport import HEARTBEAT, LAST_CHUNK, PING_CHUNK, StreamTransport, encode_chunk

ClientT = TypeVar("ClientT")
"""What a channel has to know of each client, such as the context that it evaluates for."""


FAN_OUT_SLICE = 128
"""Subscriptions written to in one turn of the loop: polls in between wait some 6 ms, and the last
subscriber of many gets its message no later than without slices."""


MAX_PENDING = 256 * 1024
"""Bytes of changes that are kept for a client whose buffer is full; beyond, it gets a fresh put."""


class StreamFormat(Protocol):
    """Turns payloads and changes into the bytes of one kind of stream. Pure."""

    def opening(self, payload: Payload) -> bytes:
        """Return the message that gives a new subscriber everything."""

    def update(self, change: Change) -> bytes:
        """Return the messages that bring a subscriber up to date; empty if they concern it not."""


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
