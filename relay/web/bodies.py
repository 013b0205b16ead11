"""Request bodies: received within limits, decompressed as they come (endpoints 1.8).

A compressed body is never inflated further than its limit, however much it could become.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from isal import isal_zlib
from starlette.requests import Request
from starlette.types import Receive

from relay.errors import RelayError
from relay.protocol.gzip import CORRUPT, GZIP
from relay.web.responses import PreparedResponse, json_error
from relay.web.routing import header

MAX_SIZE = 32 * 1024 * 1024
"""Bytes of a decompressed body where the configuration sets no limit: far beyond any SDK's."""

MAX_BUFFERED = 128 * 1024 * 1024
"""Bytes of all bodies that are received at a time; what would go beyond is refused."""

MAX_DISCARDED = 256 * 1024
"""Bytes of a refused body that are still read, so that its client sees the answer. The reference's
number."""

DISCARD_TIME = 5.0
"""Seconds for that."""

GZIP_OVERHEAD = 64 * 1024
"""Bytes by which a compressed body may exceed the limit for what is in it."""

INFLATED_AT_ONCE = 256 * 1024
"""Bytes after whose decompression others have their turn: less than a millisecond."""

_GZIP_MAGIC = b"\x1f\x8b\x08"
_GZIP_HEADER = 10

UNREADABLE = json_error(400, "unable to read request body")
BODIES_OVERLOADED = json_error(503, "Events cannot be accepted at the moment")


def _bad_start(message: str) -> PreparedResponse:
    text = (b"content-type", b"text/plain; charset=utf-8")
    return PreparedResponse(
        400, (text, (b"x-content-type-options", b"nosniff")), message.encode() + b"\n"
    )


NOT_GZIP = _bad_start("gzip: invalid header")
CUT_HEADER = _bad_start("unexpected EOF")
NO_HEADER = _bad_start("EOF")


class RequestRejected(RelayError):
    """A body cannot be taken.

    Args:
        answer: what the client is told.
    """

    def __init__(self, answer: PreparedResponse) -> None:
        super().__init__(answer.body.decode())
        self.answer = answer


class MemoryBudget:
    """The limits that bodies share.

    Args:
        max_size: of one body, decompressed; 0 for `MAX_SIZE`.
        capacity: of all together.
        too_large: what the sender of a larger one is told.
        full: what the sender is told of one for which there is no room.
    """

    def __init__(
        self,
        max_size: int = 0,
        capacity: int = MAX_BUFFERED,
        *,
        too_large: PreparedResponse = UNREADABLE,
        full: PreparedResponse = BODIES_OVERLOADED,
    ) -> None:
        self.max_size = max_size or MAX_SIZE
        self.too_large = too_large
        self._full = full
        self._left = capacity

    def acquire(self, size: int) -> None:
        """Note that so many bytes more are held.

        Raises:
            Refused: there is no room for them.
        """
        if size > self._left:
            raise RequestRejected(self._full)
        self._left -= size

    def release(self, size: int) -> None:
        """Note that they are held no longer."""
        self._left += size


class RequestBody:
    """The body of one request: `begin`, then `read`, then in any case `release`.

    Args:
        request: its own.
        budget: for it.
        raw: read it as it is on the wire, compressed or not.
    """

    def __init__(self, request: Request, budget: MemoryBudget, *, raw: bool = False) -> None:
        self._receive: Receive = request.receive
        self._compressed = not raw and b"gzip" in header(request, "content-encoding").lower()
        self._budget = budget
        self._reserved = 0
        self._start = b""
        self._received = 0
        """Bytes that came, compressed or not."""
        self._ended = False

    async def begin(self) -> None:
        """See that a compressed body begins like one.

        Raises:
            Refused: it does not.
        """
        if not self._compressed:
            return
        while len(self._start) < _GZIP_HEADER and not self._ended:
            self._start += await self._chunk()
        if not self._start:
            raise RequestRejected(NO_HEADER)
        if len(self._start) < _GZIP_HEADER:
            raise RequestRejected(CUT_HEADER)
        if not self._start.startswith(_GZIP_MAGIC):
            raise RequestRejected(NOT_GZIP)

    async def read(self) -> bytes:
        """Return the body, decompressed.

        Raises:
            Refused: it is too large, incomplete or corrupt.
        """
        parts = [part async for part in (self._inflated() if self._compressed else self._plain())]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Let others have the room."""
        self._budget.release(self._reserved)
        self._reserved = 0

    async def reject(self, answer: PreparedResponse) -> PreparedResponse:
        """Return the answer to a client whose body is not wanted, once it may be listening."""
        with suppress(TimeoutError, RequestRejected):
            async with asyncio.timeout(DISCARD_TIME):
                most = min(self._received, self._budget.max_size) + MAX_DISCARDED
                while not self._ended and self._received <= most:
                    await self._chunk()
        return answer if self._ended else answer.with_headers((b"connection", b"close"))

    async def _chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            self._ended = True
            raise RequestRejected(UNREADABLE)  # the client is gone, and will not read it
        self._ended = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        self._received += len(chunk)
        return chunk

    def _reserve(self, part: bytes) -> bytes:
        if self._reserved + len(part) > self._budget.max_size:
            raise RequestRejected(self._budget.too_large)
        self._budget.acquire(len(part))
        self._reserved += len(part)
        return part

    async def _plain(self) -> AsyncIterator[bytes]:
        while not self._ended:
            yield self._reserve(await self._chunk())

    async def _inflated(self) -> AsyncIterator[bytes]:
        gunzip = Gunzip()
        data = self._start
        try:
            while True:
                for part in gunzip.parts(data):
                    yield self._reserve(part)
                    if len(part) == INFLATED_AT_ONCE:
                        await asyncio.sleep(0)
                if self._ended:
                    break
                data = await self._chunk()
                if self._received > self._budget.max_size + GZIP_OVERHEAD:
                    raise RequestRejected(self._budget.too_large)
        except CORRUPT as e:
            raise RequestRejected(UNREADABLE) from e
        if not gunzip.complete:
            raise RequestRejected(UNREADABLE)


class Gunzip:
    """Decompresses gzip streams that follow each other; what follows the last does not matter."""

    def __init__(self) -> None:
        self.complete = False
        """Whether a whole stream has come, and no further one has begun."""
        self._inflater = isal_zlib.decompressobj(GZIP)
        self._pending = b""
        self._over = False
        """Whether something else has come after a stream."""

    def parts(self, data: bytes) -> Iterator[bytes]:
        """Yield what further bytes contain, in parts of `INFLATED_AT_ONCE` at most.

        Raises:
            CORRUPT: they are not gzip.
        """
        self._pending += data
        while self._in_stream():
            part = self._inflater.decompress(self._pending, INFLATED_AT_ONCE)
            self._pending = self._inflater.unconsumed_tail
            if self._inflater.eof:
                self._pending = self._inflater.unused_data
                self.complete = True
            if part:
                yield part
            # It may keep back what did not fit, although it has taken all input.
            if not self.complete and len(part) < INFLATED_AT_ONCE:
                break

    def _in_stream(self) -> bool:
        """Return whether there is something to decompress; begin the next stream if it comes."""
        if self._over:
            self._pending = b""
        elif not self.complete:
            return True
        elif self._pending.startswith(_GZIP_MAGIC):
            self._inflater = isal_zlib.decompressobj(GZIP)
            self.complete = False
            return True
        else:
            self._over = not _GZIP_MAGIC.startswith(self._pending)
        return False
