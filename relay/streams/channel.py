"""Channels: the subscriptions to one stream, and the fan-out of its changes."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from relay import clock
from relay.model.metrics import Histogram, MetricValue
from relay.model.payload import Change, Payload
from relay.registry import Grant
from relay.streams.admission import LARGE, Admission
from relay.streams.transport import (
    HEARTBEAT,
    LAST_CHUNK,
    PIECE,
    PING_CHUNK,
    StreamTransport,
    Unread,
    encode_chunk,
    limit_unsent,
    reset,
    unread_of,
)

ClientT = TypeVar("ClientT")
"""A channel's own data about each client, such as the context that flags are evaluated for."""


FAN_OUT_SLICE = 128
"""Subscriptions written to in one turn of the event loop: polls in between wait about 6 ms, and the
last of many subscribers gets its message no later than without slices."""

BYTES_AT_ONCE = 1024 * 1024
"""Bytes written in one turn, if that makes fewer subscriptions."""


MAX_PENDING = 256 * 1024
"""Maximum bytes of changes kept for a client with a full buffer; beyond, it gets a fresh put."""


class StreamFormat(Protocol):
    """Encoder of payloads and changes for one kind of stream. Pure."""

    def opening(self, payload: Payload) -> bytes:
        """Return the message with all data, for a new subscriber."""

    def update(self, change: Change) -> bytes:
        """Return the messages for a change; empty if it does not affect this stream."""


class _PendingOutput:
    """Chunks kept for a client with a full buffer, and the time when it last took a byte."""

    __slots__ = ("backlog", "chunks", "last_progress", "size")

    def __init__(self, backlog: int, now: float) -> None:
        self.chunks: list[bytes] = []
        self.size = 0
        self.backlog = backlog
        self.last_progress = now

    def add(self, chunk: bytes) -> None:
        """Keep a chunk; beyond `MAX_PENDING`, drop all and only note the overflow."""
        if chunk is HEARTBEAT or (chunk is PING_CHUNK and chunk in self.chunks):
            return
        self.size += len(chunk)
        if self.overflowed:
            self.chunks.clear()
        else:
            self.chunks.append(chunk)

    @property
    def overflowed(self) -> bool:
        return self.size > MAX_PENDING

    def overflow(self) -> None:
        """Drop all: the client gets a fresh put."""
        self.chunks.clear()
        self.size = MAX_PENDING + 1

    def stalled_for(self, backlog: int, now: float) -> float:
        """Return the seconds since the client last took a byte."""
        if backlog < self.backlog:
            self.backlog, self.last_progress = backlog, now
        return now - self.last_progress


class _Delay(_PendingOutput):
    """Instead of pending output: the client gets everything when it is admitted.

    Only heartbeats are written meanwhile.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: StreamTransport) -> None:
        super().__init__(0, 0.0)
        self._transport = transport
        self.overflow()

    def add(self, chunk: bytes) -> None:
        """Write a heartbeat; drop what the client will get with all data."""
        if chunk is HEARTBEAT:
            self._transport.write(chunk)


class Subscription(asyncio.Protocol):
    """One client of one stream; the protocol of its transport."""

    __slots__ = ("_channel", "count", "ends_at", "grant", "pending", "transport")

    def __init__(
        self,
        channel: Channel[Any],
        transport: StreamTransport,
        ends_at: float,
        count: MetricValue,
        grant: Grant[Any] | None,
    ) -> None:
        self._channel = channel
        self.count = count
        self.transport = transport
        self.ends_at = ends_at
        self.grant = grant
        self.pending: _PendingOutput | None = None
        """None as long as the client keeps up; also set once the stream has ended or is gone."""

    def __repr__(self) -> str:
        if self not in self._channel.subscriptions:
            return "<Subscription [ended]>"
        state = "fast" if self.pending is None else f"slow, {self.pending.size} bytes pending"
        if self.is_delayed:
            state = "waits for its data"
        return f"<Subscription [{state}]>"

    def send(self, chunk: bytes) -> None:
        """Write a chunk, or keep it while the client's buffer is full."""
        if self.pending is not None:
            self.pending.add(chunk)
        elif len(chunk) <= LARGE:
            self.transport.write(chunk)
        else:
            self._channel.send_large(self, chunk)

    @property
    def is_delayed(self) -> bool:
        """True while the client waits for its data to be admitted."""
        return isinstance(self.pending, _Delay)

    @property
    def must_wait(self) -> bool:
        """True if the client keeps up, but cannot get a large chunk now."""
        return self.pending is None and not self._channel.admission.has_room

    def wait(self) -> None:
        """Let the client wait until it is admitted; it is started over then."""
        self._channel.delay(self)

    def begin(self) -> None:
        """Start the client over with the newest data, which are admitted now."""
        self._channel.begin(self)

    def unread(self) -> Unread:
        """Return the bytes written that the client has not taken."""
        return unread_of(self.transport)

    def save_memory(self) -> None:
        """Let no more than a piece of what comes wait in the kernel."""
        limit_unsent(self.transport, PIECE)

    def cut(self) -> None:
        """Close the connection of a client that does not read."""
        reset(self.transport)

    def data_received(self, data: bytes) -> None:
        """Ignore anything that a client sends after its request."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove this subscription from its channel."""
        del exc
        self.count.value -= 1
        self._channel.forget(self)

    def pause_writing(self) -> None:
        """Mark the client as slow: its buffer is full."""
        if self.pending is None:
            self._channel.mark_slow(self)

    def resume_writing(self) -> None:
        """Write the missed chunks, or resync if they were too many: the buffer has emptied."""
        pending = self.pending
        if pending is None or self.is_delayed or self not in self._channel.subscriptions:
            return
        if pending.overflowed:
            self._channel.resync(self)
            return
        self._channel.mark_fast(self)
        for chunk in pending.chunks:
            self.transport.write(chunk)

    def end(self) -> None:
        """End the stream properly, after flushing the buffer."""
        if self not in self._channel.subscriptions:
            return
        self._channel.mark_ended(self)
        self.transport.write(LAST_CHUNK)
        self.transport.close()


class _Delayed:
    """Subscriptions of a channel that wait for admission.

    Args:
        delays: durations of fan-outs.
    """

    __slots__ = ("_delays", "_since", "_subscriptions")

    def __init__(self, delays: Histogram) -> None:
        self._delays = delays
        self._subscriptions: set[Subscription] = set()
        self._since: float | None = None
        """Time of a change that some of them wait for."""

    def __len__(self) -> int:
        return len(self._subscriptions)

    def __contains__(self, subscription: Subscription) -> bool:
        return subscription in self._subscriptions

    def add(self, subscription: Subscription) -> None:
        self._subscriptions.add(subscription)

    def discard(self, subscription: Subscription) -> None:
        """Forget a subscription that waits no more; with the last one a change is delivered."""
        self._subscriptions.discard(subscription)
        if self._since is not None and not self._subscriptions:
            self._delays.add(clock.monotonic() - self._since)
            self._since = None

    def note(self, since: float) -> None:
        """Note that they wait for a change."""
        self._since = min(since, self._since or since)


class FanOut(Protocol):
    """A fan-out in progress.

    Its receivers are fixed at creation; later subscribers get the change in their opening.
    """

    @property
    def since(self) -> float | None:
        """Monotonic time of the first change in it; None for a heartbeat."""

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""


class SharedFanOut:
    """Fan-out of the same bytes to all receivers.

    Args:
        chunk: a chunk of HTTP/1.1, or several joined.
        receivers: the subscriptions at creation.
        since: monotonic time of the first change in it; None for a heartbeat.
    """

    __slots__ = ("_chunk", "_number", "_receivers", "since")

    def __init__(
        self, chunk: bytes, receivers: Iterable[Subscription], since: float | None = None
    ) -> None:
        self._chunk = chunk
        self._number = FAN_OUT_SLICE
        if len(chunk) > LARGE:
            self._number = max(1, min(FAN_OUT_SLICE, BYTES_AT_ONCE // len(chunk)))
        self._receivers = iter(list(receivers))
        self.since = since

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions; return whether these were the last."""
        chunk, count = self._chunk, 0
        for subscription in islice(self._receivers, self._number):
            count += 1
            if subscription.pending is None:
                subscription.transport.write(chunk)
            else:
                subscription.pending.add(chunk)
        return count < self._number


class RestartFanOut:
    """Start over of all receivers, each when it is admitted.

    Args:
        channel: of the receivers.
        receivers: the subscriptions at creation.
        since: monotonic time of the first change in it.
    """

    __slots__ = ("_channel", "_receivers", "since")

    def __init__(
        self, channel: Channel[Any], receivers: Iterable[Subscription], since: float | None
    ) -> None:
        self._channel = channel
        self._receivers = iter(list(receivers))
        self.since = since

    def write_slice(self) -> bool:
        """Write to the next slice of subscriptions, or let them wait for admission."""
        count = 0
        for subscription in islice(self._receivers, FAN_OUT_SLICE):
            count += 1
            if subscription.pending is not None:
                subscription.pending.overflow()
            else:
                self._channel.resync(subscription)
        return count < FAN_OUT_SLICE


class Channel(ABC, Generic[ClientT]):
    """Base class of channels: all subscriptions to one stream of an environment.

    Manages slow, stalled and ended clients, and runs fan-outs in slices. Subclasses decide about
    content and time of messages.
    """

    def __init__(self) -> None:
        self.delays = Histogram()
        """Durations of fan-outs; the hub sets one histogram for all its channels."""
        self.admission = Admission()
        """Of large messages; the hub sets one for all its channels."""
        self.subscriptions: dict[Subscription, ClientT] = {}
        self._delayed: _Delayed | None = None
        """Subscriptions that wait for admission; None before the first large message."""
        self._slow: set[Subscription] = set()
        """Subscriptions with pending output, and ended ones whose connection is still open."""
        self._drained: asyncio.Event | None = None
        """Set when no client is connected any more; None until somebody waits for that."""
        self._fan_outs: deque[FanOut] = deque()
        self._slice_scheduled = False

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} [{len(self.subscriptions)} streams, "
            f"{len(self._slow)} slow or ended, {len(self._delayed or ())} delayed, "
            f"{len(self._fan_outs)} fan-outs]>"
        )

    @abstractmethod
    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Schedule a change for delivery to the subscribers; returns at once."""

    def publish_memberships(self, hashes: frozenset[str] | None, since: float) -> None:
        """Schedule a notice that memberships in big segments have changed.

        Server-side SDKs read memberships themselves, so most streams say nothing.

        Args:
            hashes: of the context keys; None if they are unknown.
            since: monotonic time of the change.
        """

    @abstractmethod
    def _opening_for(self, subscription: Subscription) -> bytes:
        """Return the first chunk of a new subscription; empty if it has to wait for one."""

    def _opening_size(self, subscription: Subscription) -> int:
        """Return the bytes of that chunk, or about how many there are if that costs too much."""
        del subscription
        return 0

    @abstractmethod
    def _start_pending(self) -> None:
        """Start a fan-out of the pending changes to the present subscribers."""

    @property
    @abstractmethod
    def _is_pending(self) -> bool:
        """True if there are changes for `_start_pending`."""

    @property
    def has_clients(self) -> bool:
        """True if any client is connected, even if its stream has ended."""
        return bool(self.subscriptions or self._slow)

    def subscribe(
        self,
        transport: StreamTransport,
        head: bytes,
        ends_at: float,
        count: MetricValue,
        client: ClientT,
        *,
        grant: Grant[Any] | None,
    ) -> Subscription:
        """Register a client and write its opening."""
        # The opening includes the pending changes, so they go to the earlier subscribers only.
        # Without an await between the three steps no change is lost or sent twice.
        if self._is_pending:
            self._close_pending()
        subscription = Subscription(self, transport, ends_at, count, grant)
        self._register(subscription, client)
        transport.set_protocol(subscription)
        waits = self._delayed is not None and self._must_wait(subscription)
        opening = b"" if waits else self._opening_for(subscription)
        if len(opening) > LARGE:
            self._admit(subscription, opening)
        if head and opening:
            # In one call: each write is a packet, and may wake the client on its own.
            transport.writelines((head, opening))
        elif head or opening:
            transport.write(head or opening)
        if waits:
            self.delay(subscription)
        return subscription

    def _must_wait(self, subscription: Subscription) -> bool:
        """Return whether the opening is large and cannot be admitted now."""
        return self._opening_size(subscription) > LARGE and not self.admission.admits

    def _write_opening(self, subscription: Subscription) -> None:
        if opening := self._opening_for(subscription):
            if len(opening) > LARGE:
                self._admit(subscription, opening)
            subscription.transport.write(opening)

    def send_large(self, subscription: Subscription, chunk: bytes) -> None:
        """Write a large chunk to a client that keeps up, or start it over when it is admitted."""
        if self.admission.has_room:
            self._admit(subscription, chunk)
            subscription.transport.write(chunk)
        else:
            self.delay(subscription)

    def _admit(self, subscription: Subscription, message: bytes) -> None:
        if self._delayed is None:
            self._delayed = _Delayed(self.delays)
        self.admission.admit(subscription, len(message))

    def delay(self, subscription: Subscription) -> None:
        """Let a client that keeps up wait until it is admitted; it is started over then."""
        subscription.pending = _Delay(subscription.transport)
        if self._delayed is None:
            self._delayed = _Delayed(self.delays)
        self._delayed.add(subscription)
        self.admission.wait(subscription)

    def begin(self, subscription: Subscription) -> None:
        """Start a client over that has waited for admission."""
        self._write_opening(self._renew(subscription))

    def _renew(self, subscription: Subscription) -> Subscription:
        """Register a client anew, so that fan-outs in progress skip it; return that."""
        client = self.subscriptions[subscription]
        self.forget(subscription)
        if self._is_pending:
            self._close_pending()
        transport, grant = subscription.transport, subscription.grant
        new = Subscription(self, transport, subscription.ends_at, subscription.count, grant)
        self._register(new, client)
        transport.set_protocol(new)
        return new

    def _register(self, subscription: Subscription, client: ClientT) -> None:
        """Register a new subscription."""
        self.subscriptions[subscription] = client

    def heartbeat(self) -> None:
        """Write a comment to all clients."""
        self._close_pending()
        self._start(SharedFanOut(HEARTBEAT, self.subscriptions))

    def resync(self, subscription: Subscription) -> None:
        """Start a slow client over with all data; fan-outs in progress skip it."""
        new = self._renew(subscription)
        if self._delayed is not None and self._must_wait(new):
            self.delay(new)
        else:
            self._write_opening(new)

    def forget(self, subscription: Subscription) -> None:
        """Remove a subscription whose connection is lost."""
        self.subscriptions.pop(subscription, None)
        self._slow.discard(subscription)
        subscription.pending = _PendingOutput(0, 0.0)  # running fan-outs must not write to it
        if self._delayed is not None:
            self.admission.leave(subscription)
            self._delayed.discard(subscription)
        if self._drained is not None and not self.has_clients:
            self._drained.set()

    async def wait_drained(self) -> None:
        """Wait until no client is connected any more."""
        if self.has_clients:
            self._drained = self._drained or asyncio.Event()
            self._drained.clear()
            await self._drained.wait()

    def mark_slow(self, subscription: Subscription) -> None:
        """Keep further chunks for a client, as its buffer is full."""
        backlog = subscription.transport.get_write_buffer_size()
        subscription.pending = _PendingOutput(backlog, clock.monotonic())
        self._slow.add(subscription)

    def mark_fast(self, subscription: Subscription) -> None:
        """Write to a client directly again, as its buffer has emptied."""
        subscription.pending = None
        self._slow.discard(subscription)

    def mark_ended(self, subscription: Subscription) -> None:
        """Remove a subscription whose stream has ended, and watch it until its client is gone."""
        self.subscriptions.pop(subscription, None)
        if self._delayed is not None and subscription in self._delayed:
            self._delayed.discard(subscription)
            self.admission.leave(subscription)
        self.mark_slow(subscription)

    def drop_stalled(self, now: float, stall_timeout: float) -> None:
        """Abort the connections of clients that have taken no byte within the time-out."""
        for subscription in list(self._slow):
            pending, transport = subscription.pending, subscription.transport
            if (
                pending
                and pending.stalled_for(transport.get_write_buffer_size(), now) > stall_timeout
            ):
                reset(transport)

    def end_expired(self, now: float) -> None:
        """End streams that have reached their maximum connection time."""
        for subscription in list(self.subscriptions):
            # A slow client is ended once it has caught up, unless it stalls before.
            if now >= subscription.ends_at and subscription.pending is None:
                subscription.end()

    def abort(self, grant: Grant[Any] | None = None) -> None:
        """Abort all connections, or those of the streams that were opened with a grant."""
        for subscription in [*self.subscriptions, *self._slow]:
            if grant is None or subscription.grant is grant:
                subscription.transport.abort()

    def _close_pending(self) -> None:
        """Start the pending changes now, so that a new subscriber does not get them as well."""
        self._start_pending()

    def _start(self, fan_out: FanOut) -> None:
        self._fan_outs.append(fan_out)
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
                if since is not None and self._delayed:
                    self._delayed.note(since)
                elif since is not None:
                    self.delays.add(clock.monotonic() - since)
        finally:  # an error for one client must not stop the fan-out to the others
            if self._fan_outs or self._is_pending:
                self._schedule_slice()


class BroadcastChannel(Channel[ClientT]):
    """Channel on which all clients get the same changes, in the same bytes.

    Args:
        stream_format: encodes them.
    """

    def __init__(self, stream_format: StreamFormat) -> None:
        super().__init__()
        self._format = stream_format
        self._payload: Payload | None = None
        self._opening: bytes | None = None
        self._pending: list[bytes] = []
        self._pending_since: float | None = None
        self._restart_pending = False
        """True if the first of the pending messages has all data."""

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Encode a change, once for all subscribers."""
        self._payload, self._opening = payload, None
        if not self.subscriptions:
            return
        if self._restarts(change) and payload is not None:
            self._pending, self._restart_pending = [self._encoded_opening()], True
        elif update := self._format.update(change):
            self._pending.append(encode_chunk(update))
        if self._pending and self._pending_since is None:
            self._pending_since = since
        self._schedule_slice()

    def _restarts(self, change: Change) -> bool:
        """Return whether all clients need all data after a change."""
        return change.replace

    def _opening_for(self, subscription: Subscription) -> bytes:
        del subscription
        return self._encoded_opening()

    def _opening_size(self, subscription: Subscription) -> int:
        del subscription
        return len(self._encoded_opening())

    def _encoded_opening(self) -> bytes:
        if self._opening is None and self._payload is not None:
            self._opening = encode_chunk(self._format.opening(self._payload))
        return self._opening or b""

    @property
    def _is_pending(self) -> bool:
        return bool(self._pending)

    def _start_pending(self) -> None:
        if self._pending:
            chunks = self._pending
            receivers, since = self._receivers(), self._pending_since
            if self._restart_pending and len(chunks[0]) > LARGE:
                self._fan_outs.append(RestartFanOut(self, receivers, since))
            else:
                chunk = chunks[0] if len(chunks) == 1 else b"".join(chunks)
                self._fan_outs.append(SharedFanOut(chunk, receivers, since))
            self._pending, self._pending_since, self._restart_pending = [], None, False

    def _receivers(self) -> Iterable[Subscription]:
        """Return the clients that have had their opening."""
        return self.subscriptions
