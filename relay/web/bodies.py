"""Request bodies: received within limits, and decompressed while they arrive (endpoints 1.8).

A compressed body is never inflated beyond its limit, however much it could expand.
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
from relay.web.requests import header
from relay.web.responses import PreparedResponse, json_error

MAX_SIZE = 32 * 1024 * 1024
"""Bytes of a decompressed body unless configured otherwise: far more than any SDK sends."""

MAX_BUFFERED = 128 * 1024 * 1024
"""Bytes of all bodies in memory at a time; a body that would exceed them is refused."""

MAX_DISCARDED = 256 * 1024
"""Bytes of a refused body that are still read, so that its client sees the response; as in
ld-relay."""

DISCARD_TIME = 5.0
"""Seconds to read them."""

GZIP_OVERHEAD = 64 * 1024
"""Bytes by which a compressed body may exceed the limit of its decompressed content."""

INFLATED_AT_ONCE = 256 * 1024
"""Bytes that are decompressed before the event loop gets a turn: less than a millisecond."""

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
    """A request is refused because of its body or its context.

    Args:
        response: to send to the client.
    """

    def __init__(self, response: PreparedResponse) -> None:
        super().__init__(response.body.decode())
        self.response = response


class MemoryBudget:
    """Memory limits shared by request bodies, in bytes.

    Args:
        max_size: of one body, decompressed; 0 for `MAX_SIZE`.
        capacity: of all bodies together.
        too_large: response to a body that exceeds `max_size`.
        full: response to a body that exceeds the remaining capacity.
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

    def __repr__(self) -> str:
        return f"<MemoryBudget [{self._left} bytes left]>"

    def fits(self, size: int) -> bool:
        """Return whether a body of this size would be within both limits."""
        return size <= self.max_size and size <= self._left

    def acquire(self, size: int) -> None:
        """Take bytes out of the budget.

        Raises:
            RequestRejected: not enough of it is left.
        """
        if size > self._left:
            raise RequestRejected(self._full)
        self._left -= size

    def release(self, size: int) -> None:
        """Return bytes to the budget."""
        self._left += size


class RequestBody:
    """Body of one request: call `begin`, then `read`, and `release` in any case.

    Args:
        request: to read it from.
        budget: to take its memory from.
        raw: whether to leave it compressed if it is.
    """

    def __init__(self, request: Request, budget: MemoryBudget, *, raw: bool = False) -> None:
        self._receive: Receive = request.receive
        self._compressed = not raw and b"gzip" in header(request, "content-encoding").lower()
        self._budget = budget
        self._reserved = 0
        self._prefix = b""
        self._received = 0
        """Bytes as they arrived, before decompression."""
        self._ended = False

    def __repr__(self) -> str:
        state = "complete" if self._ended else "incomplete"
        return f"<RequestBody [{self._received} bytes received, {state}]>"

    async def begin(self) -> None:
        """Check the gzip header of a compressed body.

        Raises:
            RequestRejected: it is not a gzip header.
        """
        if not self._compressed:
            return
        while len(self._prefix) < _GZIP_HEADER and not self._ended:
            self._prefix += await self._chunk()
        if not self._prefix:
            raise RequestRejected(NO_HEADER)
        if len(self._prefix) < _GZIP_HEADER:
            raise RequestRejected(CUT_HEADER)
        if not self._prefix.startswith(_GZIP_MAGIC):
            raise RequestRejected(NOT_GZIP)

    async def read(self) -> bytes:
        """Return the body, decompressed.

        Raises:
            RequestRejected: it is too large, incomplete or corrupt.
        """
        parts = [part async for part in (self._inflated() if self._compressed else self._plain())]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Return the memory of the body to the budget."""
        self._budget.release(self._reserved)
        self._reserved = 0

    async def reject(self, response: PreparedResponse) -> PreparedResponse:
        """Return the response to an unwanted body.

        Up to `MAX_DISCARDED` bytes of the body are read first, so that the client gets to see the
        response. If more is left, the connection is closed after the response.
        """
        with suppress(TimeoutError, RequestRejected):
            async with asyncio.timeout(DISCARD_TIME):
                limit = min(self._received, self._budget.max_size) + MAX_DISCARDED
                while not self._ended and self._received <= limit:
                    await self._chunk()
        return response if self._ended else response.with_headers((b"connection", b"close"))

    async def _chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            self._ended = True
            raise RequestRejected(UNREADABLE)  # never sent: the client is gone
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
        data = self._prefix
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
    """Decompressor of concatenated gzip streams; anything else after the last is ignored."""

    def __init__(self) -> None:
        self.complete = False
        """True once a whole stream has been read and no other has begun."""
        self._inflater = isal_zlib.decompressobj(GZIP)
        self._pending = b""
        self._ended = False
        """True once a stream was followed by something other than gzip."""

    def parts(self, data: bytes) -> Iterator[bytes]:
        """Yield the content of further bytes, in parts of `INFLATED_AT_ONCE` at most.

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
            # The inflater may withhold output that did not fit, although it has consumed all input.
            if not self.complete and len(part) < INFLATED_AT_ONCE:
                break

    def _in_stream(self) -> bool:
        """Return whether there are bytes to decompress; begin the next stream if there is one."""
        if self._ended:
            self._pending = b""
        elif not self.complete:
            return True
        elif self._pending.startswith(_GZIP_MAGIC):
            self._inflater = isal_zlib.decompressobj(GZIP)
            self.complete = False
            return True
        else:
            self._ended = not _GZIP_MAGIC.startswith(self._pending)
        return False
