"""Responses of the fast path, and their cache by the raw request head."""

from __future__ import annotations

from relay.environment import Environment
from relay.model.answers import AnswerCounter
from relay.model.metrics import MetricValue
from relay.registry import Registry
from relay.web.cache import CacheEntry, ResponseCache
from relay.web.fastpath.heads import EVALUATION_STARTS, MAX_HEAD, HeadTemplate, normalise_head
from relay.web.fastpath.streams import StreamRequest

MAX_CACHED = 48 * 1024 * 1024
"""Bytes of cached responses: far more than those of thousands of kinds of SDKs and contexts."""

ENTRY_SIZE = 1024
"""Bytes that a cached response takes besides its head and body."""

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
        answer: counts the answer to a client that names its state, each time.
        size: see `CacheEntry`; 0 if it is not worth caching.
    """

    head: bytes
    pieces: tuple[bytes, ...]
    count: MetricValue
    closes: bool = False
    line: str = ""
    answer: AnswerCounter | None = None
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


class HeadCache(ResponseCache[WireResponse | StreamRequest]):
    """Cache of responses and stream requests by raw request head.

    Args:
        registry: see `ResponseCache`.
    """

    def __init__(self, registry: Registry[Environment]) -> None:
        super().__init__(registry, MAX_CACHED)

    def get_similar(self, head: bytes) -> WireResponse | StreamRequest | None:
        """Return the response to a head that is the same after normalisation."""
        return self.get(normalise_head(head)[0])

    def keep(self, head: bytes, response: WireResponse | StreamRequest) -> None:
        """Keep a response for later requests, if it is worth it.

        Args:
            head: of the request. Heads that are the same after normalisation share a response,
                except for evaluations, of which hardly two instances have the same context.
            response: to the request; one without a size is not kept.
        """
        if not response.size or len(head) > MAX_HEAD:
            return
        response.size += len(head)
        key: bytes | HeadTemplate = head
        if not head.startswith(EVALUATION_STARTS):
            template, values = normalise_head(head)
            key = template if values else head
        self.put(key, response)
