"""Responses of the fast path, and their cache by the raw request head."""

from __future__ import annotations

from relay.environment import Environment
from relay.model.metrics import MetricValue
from relay.registry import Registry
from relay.web.cache import CacheEntry, ResponseCache
from relay.web.fastpath.heads import MAX_HEAD, normalise_head
from relay.web.fastpath.streams import StreamRequest

MAX_CACHED = 16 * 1024 * 1024
"""Bytes of cached responses and stream requests: those of 4000 kinds of SDKs, and far more."""

ENTRY_OVERHEAD = 1024
"""Bytes that an entry takes besides its head and body."""

JOINED_BODY = 16 * 1024
"""Bodies up to this many bytes are joined with their head: one write for one copy."""

CLOSING = (b"connection", b"close")
CLOSE = b"%b: %b\r\n" % CLOSING
"""Header of a response after which the connection is closed."""


class WireResponse(CacheEntry, eq=False):
    """Complete response to a request head.

    Args:
        environment: provides the data.
        payload: its data of which the response was made.
        head: status line and headers, each with its CRLF; neither `Date` nor the blank line.
        pieces: parts of the body.
        count: counter of such requests.
        closes: True if the client wants the connection closed after the response.
        line: to log for each such request; empty for none.
    """

    head: bytes
    pieces: tuple[bytes, ...]
    count: MetricValue
    closes: bool = False
    line: str = ""
    _date: bytes = b""
    _assembled: tuple[bytes, ...] = ()

    @property
    def body_size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.pieces))

    def to_wire(self, date: bytes) -> tuple[bytes, ...]:
        """Return the bytes to write, in as few parts as is worthwhile; assembled once a second.

        Args:
            date: the `Date` header and the blank line that ends a head.
        """
        if self._date is not date:
            self._date = date
            head = self.head + CLOSE if self.closes else self.head
            parts = (head, date, *self.pieces)
            self._assembled = (b"".join(parts),) if self.body_size <= JOINED_BODY else parts
        return self._assembled


class HeadCache:
    """Cache of responses and stream requests by normalised request head.

    Args:
        registry: see `ResponseCache`.
    """

    def __init__(self, registry: Registry[Environment]) -> None:
        self._cache: ResponseCache[WireResponse | StreamRequest] = ResponseCache(
            registry, MAX_CACHED
        )

    def __repr__(self) -> str:
        return repr(self._cache)

    def get(self, head: bytes) -> WireResponse | StreamRequest | None:
        """Return the fresh response to a head that is the same after normalisation."""
        return self._cache.get(head) or self._cache.get(normalise_head(head)[0])

    def put(self, head: bytes, response: WireResponse | StreamRequest) -> None:
        """Keep a response for all requests with the same head after normalisation."""
        if len(head) > MAX_HEAD:
            return
        size = ENTRY_OVERHEAD + len(head)
        if isinstance(response, WireResponse) and response.body_size <= JOINED_BODY:
            size += response.body_size  # which is a copy; other bodies are those of the resource
        template, values = normalise_head(head)
        self._cache.put(template if values else head, response, size)
