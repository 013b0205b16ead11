"""Cache of complete responses, keyed by the raw request head.

A response is assembled when the data change, and once a second for its date.
"""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Struct

from relay.environment import Environment
from relay.model.metrics import MetricValue
from relay.model.payload import Payload
from relay.web.fastpath.heads import MAX_HEAD, HeadTemplate, normalise_head
from relay.web.fastpath.streams import StreamRequest

MAX_HEADS = 4096
"""Maximum number of request heads with a cached response, some MB; far more than kinds of SDKs."""

MAX_EVALUATED = 32 * 1024 * 1024
"""Maximum bytes of cached evaluation responses."""

EVALUATED_OVERHEAD = 1024
"""Bytes that each of them takes in addition to its head and body."""

JOINED_BODY = 16 * 1024
"""Bodies up to this many bytes are joined with their head: one write for one copy."""

CLOSING = (b"connection", b"close")
CLOSE = b"%b: %b\r\n" % CLOSING
"""Header of a response after which the connection is closed."""


class CachedResponse:
    """Complete response to a request head, fresh until the environment's payload changes.

    Args:
        environment: provides the data.
        head: status line and headers, each with its CRLF; neither `Date` nor the blank line.
        pieces: parts of the body.
        count: counter of such requests.
        closes: True if the client wants the connection closed after the response.
    """

    __slots__ = (
        *("_assembled", "_date", "_head", "_pieces", "closes", "count"),
        *("environment", "line", "payload"),
    )

    def __init__(
        self,
        environment: Environment,
        head: bytes,
        pieces: tuple[bytes, ...],
        count: MetricValue,
        *,
        closes: bool = False,
    ) -> None:
        self.environment = environment
        self.payload: Payload | None = environment.payload
        self.count = count
        self.closes = closes
        self.line = ""
        """Line to log for each such request; empty for none."""
        self._head = head + CLOSE if closes else head
        self._pieces = pieces
        self._date = b""
        self._assembled: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        state = "fresh" if self.is_fresh else "stale"
        return f"<CachedResponse [{state}, {self.size} bytes]>"

    @property
    def is_fresh(self) -> bool:
        """True if the environment still has the same payload."""
        return self.payload is self.environment.payload

    @property
    def size(self) -> int:
        """Size of the body in bytes."""
        return sum(map(len, self._pieces))

    def to_wire(self, date: bytes) -> tuple[bytes, ...]:
        """Return the bytes to write; assembled once a second.

        Args:
            date: the `Date` header and the blank line that ends a head.
        """
        if self._date is not date:
            self._date = date
            self._assembled = assemble(self._head, date, self._pieces)
        return self._assembled


class EvaluationResponse(Struct, frozen=True):
    """Response with evaluated flags, ready to be written.

    Args:
        head: as for `CachedResponse`.
        pieces: parts of the body.
        environment: provides the flags.
        count: counter of such requests.
        closes: True if the client wants the connection closed after the response.
        cacheable: True if the same request is likely to come again.
    """

    head: bytes
    pieces: tuple[bytes, ...]
    environment: Environment
    count: MetricValue
    closes: bool
    cacheable: bool = False


def assemble(head: bytes, date: bytes, pieces: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return the bytes to write, in as few parts as is worthwhile."""
    parts = (head, date, *pieces)
    joined = sum(map(len, pieces)) <= JOINED_BODY
    return (b"".join(parts),) if joined else parts


class ResponseCache:
    """Cache of responses by request head.

    Responses for all clients with a key are kept by normalised head, those for one context by the
    head as it is.
    """

    def __init__(self) -> None:
        self._by_head: dict[bytes | HeadTemplate, CachedResponse | StreamRequest] = {}
        self._evaluated: OrderedDict[bytes, CachedResponse] = OrderedDict()
        """Oldest first."""
        self._evaluated_size = 0

    def __repr__(self) -> str:
        return (
            f"<ResponseCache [{len(self._by_head)} heads, "
            f"{len(self._evaluated)} evaluated in {self._evaluated_size} bytes]>"
        )

    def get(self, head: bytes) -> CachedResponse | StreamRequest | None:
        """Return the fresh response to a head that is the same after normalisation."""
        key: bytes | HeadTemplate = head
        response = self._by_head.get(key)
        if response is None:
            key, _ = normalise_head(head)
            response = self._by_head.get(key)
        if isinstance(response, CachedResponse) and not response.is_fresh:
            del self._by_head[key]
            return None
        return response

    def get_evaluated(self, head: bytes) -> CachedResponse | None:
        """Return the fresh evaluation response to the same head."""
        response = self._evaluated.get(head)
        if response is not None and not response.is_fresh:
            self._evaluated_size -= _entry_size(head, self._evaluated.pop(head))
            return None
        return response

    def put(self, head: bytes, response: CachedResponse | StreamRequest) -> None:
        """Keep a response for all requests with the same head after normalisation."""
        if len(head) > MAX_HEAD or (isinstance(response, CachedResponse) and _expires(response)):
            return
        if len(self._by_head) >= MAX_HEADS:
            self._by_head.clear()
        template, values = normalise_head(head)
        self._by_head[template if values else head] = response

    def put_evaluated(self, head: bytes, response: CachedResponse) -> None:
        """Keep an evaluation response for requests with the same head; evict the oldest ones."""
        if len(head) > MAX_HEAD or _expires(response) or head in self._evaluated:
            return
        self._evaluated[head] = response
        self._evaluated_size += _entry_size(head, response)
        while self._evaluated_size > MAX_EVALUATED:
            oldest_head, oldest = self._evaluated.popitem(last=False)
            self._evaluated_size -= _entry_size(oldest_head, oldest)


def _expires(response: CachedResponse) -> bool:
    """Return whether a response states its expiry, which is different each time."""
    return response.environment.spec.ttl > 0


def _entry_size(head: bytes, response: CachedResponse) -> int:
    return EVALUATED_OVERHEAD + len(head) + response.size
