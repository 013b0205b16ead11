"""Admission: how many streams get large data at a time.

Thousands of clients may want all data at once: when they connect after an outage, or when all data
are new. Unread bytes of each of them take memory, of the kernel above all; and whoever writes to
all of them in one go answers nobody else meanwhile. So a stream whose next message is large waits
until others have taken theirs, in order of arrival, and then gets the data of that moment. Small
messages are not concerned.

`AdmissionQueue` decides, without a clock or I/O. `Admission` is the one of a process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from relay import clock
from relay.streams.transport import Unread

StreamT = TypeVar("StreamT")

LARGE = 64 * 1024
"""Bytes of a message from which on it has to be admitted. Smaller ones fit into what any connection
may have under way."""

MAX_UNREAD = 256 * 1024 * 1024
"""Bytes of large messages that may be unread at a time: of some 1500 clients of which none reads,
and far more of those that do."""

SHARE = 576 * 1024
"""Bytes that a message counts for until its stream is asked: what the kernel takes of it at once,
and a piece. More of it is shared by all clients that get it, or not yet encrypted."""

SMALL_SHARE = 192 * 1024
"""The same for a stream that saves memory."""

SAVE_FROM = 4
"""Divisor: with 4, streams save memory from a quarter of the limit on. Each of them wakes the relay
more often then; but so many can begin that few clients which do not read delay nobody."""

SETTLED = 16 * 1024
"""Unread bytes at which a large message counts as read. Also the bytes that a client has to take
within `PATIENCE`, while others wait."""

PATIENCE = 3.0
"""Seconds within which a client that others wait for has to take a part of its message. Clients
that read take some each round trip; those that do not would stop all others."""

TURN = 1024 * 1024
"""Bytes of large messages written in one turn of the event loop, which takes about a millisecond:
polls in between wait no longer."""

LOOK, SHORT_LOOK = 256, 8
"""Streams that are asked for their unread bytes in one turn, at some microseconds each, and each
time that one more is admitted."""

INTERVAL = 0.005
"""Seconds between two such turns, while streams wait."""

NOTABLE = 1.0
"""Seconds that a stream waits before the log says so."""

_log = logging.getLogger("relay.streams")


class _Unread:
    """Bytes of a stream that its client has not read."""

    __slots__ = ("counted", "mark", "since")

    def __init__(self, counted: int, mark: int, now: float) -> None:
        self.counted = counted
        self.mark = mark
        """Bytes unread at `since`."""
        self.since = now


class AdmissionQueue(Generic[StreamT]):
    """Streams that wait, in order of arrival, and those that have been admitted. Pure.

    Args:
        limit: bytes that may be unread at a time. The last one that is admitted may exceed it by
            its share.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[StreamT, float] = OrderedDict()
        """With the monotonic time of arrival."""
        self._admitted: OrderedDict[StreamT, _Unread] = OrderedDict()
        self.unread = 0
        """Bytes that count for all admitted streams."""

    def __repr__(self) -> str:
        return f"<AdmissionQueue [{len(self._waiting)} wait, {self.unread} bytes unread]>"

    @property
    def waiting(self) -> int:
        """The number of streams that wait."""
        return len(self._waiting)

    @property
    def admitted(self) -> int:
        """The number of admitted streams whose clients have not read everything."""
        return len(self._admitted)

    @property
    def is_full(self) -> bool:
        """True if nobody can be admitted before others have read."""
        return self.unread >= self._limit

    @property
    def waits_since(self) -> float | None:
        """Monotonic time of the arrival of who waits for longest; None if nobody waits."""
        return next(iter(self._waiting.values()), None)

    def wait(self, stream: StreamT, now: float) -> None:
        """Let a stream wait; one that does already keeps its place."""
        self._waiting.setdefault(stream, now)

    def next(self) -> tuple[StreamT, float] | None:
        """Remove and return who waits for longest, with the time of its arrival.

        None if nobody waits, or nobody can be admitted now.
        """
        if self.is_full or not self._waiting:
            return None
        return self._waiting.popitem(last=False)

    @property
    def is_filling(self) -> bool:
        """True if streams had better save memory."""
        return self.unread >= self._limit // SAVE_FROM

    def admit(self, stream: StreamT, size: int, share: int, now: float) -> None:
        """Count a message that is written to a stream.

        Args:
            stream: may have been admitted before.
            size: bytes of the message.
            share: maximum bytes that it takes in memory.
            now: monotonic time.
        """
        self._waiting.pop(stream, None)
        known = self._admitted.pop(stream, None)
        if known is not None:
            self.unread -= known.counted
            size += known.mark
        counted = min(size, share)
        self._admitted[stream] = _Unread(counted, size, now)
        self.unread += counted

    def note(self, stream: StreamT, unread: int, held: int, now: float, patience: float) -> bool:
        """Note how many bytes an admitted stream has not read.

        Args:
            stream: that has been admitted.
            unread: bytes that its client has not taken.
            held: those that take memory.
            now: monotonic time.
            patience: seconds within which a client has to take some of them.

        Returns:
            True if its client has taken less than `SETTLED` bytes for longer than `patience`.
        """
        known = self._admitted[stream]
        self.unread -= known.counted
        if unread <= SETTLED:
            del self._admitted[stream]
            return False
        known.counted = held
        self.unread += known.counted
        if known.mark - unread >= SETTLED:
            known.mark, known.since = unread, now
        elif unread > known.mark:  # more has been written
            known.mark = unread
        return now - known.since > patience

    def leave(self, stream: StreamT) -> None:
        """Forget a stream, whether it waits, has been admitted or neither."""
        self._waiting.pop(stream, None)
        known = self._admitted.pop(stream, None)
        if known is not None:
            self.unread -= known.counted

    def oldest(self, number: int) -> list[StreamT]:
        """Return admitted streams, at most so many: those that were returned longest ago."""
        found: list[StreamT] = []
        for _ in range(min(number, len(self._admitted))):
            stream, unread = self._admitted.popitem(last=False)
            self._admitted[stream] = unread
            found.append(stream)
        return found


class AdmittedStream(Protocol):
    """Contract of a stream that gets large messages."""

    def begin(self) -> None:
        """Write the large message, of the newest data; the stream is admitted."""

    def unread(self) -> Unread:
        """Return the bytes written that its client has not taken."""

    def save_memory(self) -> None:
        """Let less of what is written from now on wait in the kernel."""

    def cut(self) -> None:
        """Close the connection at once: the client does not read."""


class Admission:
    """Admits the streams of one process to large messages.

    Args:
        limit: bytes that may be unread at a time.
        patience: see `PATIENCE`.
    """

    def __init__(self, limit: int = MAX_UNREAD, patience: float = PATIENCE) -> None:
        self._queue: AdmissionQueue[AdmittedStream] = AdmissionQueue(limit)
        self._patience = patience
        self._left = TURN
        """Bytes that may still be written in this turn."""
        self._scheduled: asyncio.Handle | None = None
        self._is_busy = False
        """True from when a stream has waited for long until none waits."""
        self._waited = 0
        """Streams that have waited since then."""
        self._longest = 0.0
        """Seconds that one of them has waited at most."""
        self._cut_before = 0
        self.cut = 0
        """Streams whose clients did not read while others waited, since the start."""

    def __repr__(self) -> str:
        return f"<Admission [{self._queue.waiting} wait, {self._queue.unread} bytes unread]>"

    @property
    def waiting(self) -> int:
        """The number of streams that wait."""
        return self._queue.waiting

    @property
    def unread(self) -> int:
        """Bytes of large messages that clients have not read."""
        self._look(self._queue.admitted)
        return self._queue.unread

    @property
    def has_room(self) -> bool:
        """True if a large message can be written without overtaking a stream that waits."""
        if self._queue.waiting:
            return False
        if self._queue.is_full:
            self._look()
        return not self._queue.is_full

    @property
    def admits(self) -> bool:
        """True if a large message can be written in this turn of the event loop, too."""
        return self._left > 0 and self.has_room

    def admit(self, stream: AdmittedStream, size: int) -> None:
        """Count a large message that is written to a stream now."""
        share = SHARE
        if self._queue.is_filling:
            self._look(SHORT_LOOK)
            if self._queue.is_filling:
                share = SMALL_SHARE
                stream.save_memory()
        self._left -= min(size, share)
        self._queue.admit(stream, size, share, clock.monotonic())
        self._schedule_turn()

    def wait(self, stream: AdmittedStream) -> None:
        """Call `begin` of a stream when its turn has come."""
        self._queue.wait(stream, clock.monotonic())
        self._schedule_turn()

    def leave(self, stream: AdmittedStream) -> None:
        """Forget a stream, which is gone or has got another message."""
        self._queue.leave(stream)

    def _schedule_turn(self) -> None:
        if self._scheduled is None:
            self._scheduled = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Admit whoever can be admitted in this turn of the event loop."""
        self._scheduled, self._left = None, TURN
        now = clock.monotonic()
        if self._queue.is_full:
            self._look()
        try:
            while self._left > 0 and (entry := self._queue.next()) is not None:
                stream, arrived = entry
                self._waited += 1
                self._longest = max(self._longest, now - arrived)
                stream.begin()
        finally:  # an error for one client must not stop the others
            self._go_on()

    def _go_on(self) -> None:
        """Schedule the next turn, if anybody waits."""
        queue = self._queue
        if not queue.waiting:
            self._note_calm()
            return
        self._note_busy()
        if not queue.is_full:
            self._schedule_turn()
        else:
            if self._scheduled is not None:
                self._scheduled.cancel()
            self._scheduled = asyncio.get_running_loop().call_later(INTERVAL, self._turn)

    def _look(self, number: int = LOOK) -> None:
        """Ask admitted streams how much their clients have read."""
        now = clock.monotonic()
        waited_for = self._queue.waiting > 0
        for stream in self._queue.oldest(number):
            stalls = self._queue.note(stream, *stream.unread(), now, self._patience)
            if stalls and waited_for:
                self.cut += 1
                self._queue.leave(stream)
                stream.cut()

    def _note_busy(self) -> None:
        since = self._queue.waits_since
        if not self._is_busy and since is not None and clock.monotonic() - since > NOTABLE:
            self._is_busy = True
            text = "Clients have not read %d MB of all data yet; %d further streams wait for theirs"
            _log.warning(text, self._queue.unread // 1_000_000, self._queue.waiting)

    def _note_calm(self) -> None:
        if self._is_busy:
            self._is_busy = False
            text = (
                "All streams that waited have got their data: %d, after %.1f seconds at most;"
                " %d others were closed because their clients did not read"
            )
            _log.info(text, self._waited, self._longest, self.cut - self._cut_before)
        self._waited, self._longest, self._cut_before = 0, 0.0, self.cut
