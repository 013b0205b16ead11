"""What the front door has given before, and gives again to whoever asks in the same words.

Answers are put together once: when the data change, and once a second for their date. The request
that asks for one is looked up by its bytes.
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
"""Request heads that are remembered: far more than there are kinds of SDKs, some MB."""

MAX_EVALUATED = 32 * 1024 * 1024
"""Bytes of evaluated answers that are remembered by the head of their request."""

EVALUATED_OVERHEAD = 1024
"""Bytes that remembering one costs beside its head and body."""

JOINED_BODY = 16 * 1024
"""Bodies up to this many bytes are joined with their head: one write, one copy."""

CLOSING = (b"connection", b"close")
CLOSE = b"%b: %b\r\n" % CLOSING
"""The header of an answer with which the connection ends."""


class CachedResponse:
    """The answer to a request head, good as long as the environment's payload is the same.

    Args:
        environment: whose data are in it.
        head: status line and headers, each with its CRLF; neither `Date` nor the blank line.
        pieces: of the body.
        count: of such requests.
        closes: whether the client wants the connection to end with it.
    """

    __slots__ = (
        *("_date", "_head", "_pieces", "_written", "closes", "count"),
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
        """What is logged of each such request; empty for nothing."""
        self._head = head + CLOSE if closes else head
        self._pieces = pieces
        self._date = b""
        self._written: tuple[bytes, ...] = ()

    @property
    def is_fresh(self) -> bool:
        """Whether the data are the same still."""
        return self.payload is self.environment.payload

    @property
    def size(self) -> int:
        """The bytes of the body."""
        return sum(map(len, self._pieces))

    def to_wire(self, date: bytes) -> tuple[bytes, ...]:
        """Return what goes over the wire; put together once a second.

        Args:
            date: the header and the blank line that ends a head.
        """
        if self._date is not date:
            self._date = date
            self._written = assemble(self._head, date, self._pieces)
        return self._written


class EvaluationResponse(Struct, frozen=True):
    """An evaluated answer in the form in which it is written.

    Args:
        head: as `CachedResponse`'s.
        pieces: of the body.
        environment: whose flags it has.
        counter: what counts it.
        closes: whether the client wants the connection to end with it.
        cacheable: whether the same request may well come again.
    """

    head: bytes
    pieces: tuple[bytes, ...]
    environment: Environment
    counter: MetricValue
    closes: bool
    cacheable: bool = False


def assemble(head: bytes, date: bytes, pieces: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return what goes over the wire, in as few pieces as is worthwhile."""
    written = (head, date, *pieces)
    joined = sum(map(len, pieces)) <= JOINED_BODY
    return (b"".join(written),) if joined else written


class ResponseCache:
    """What was given, by the heads of the requests."""

    def __init__(self) -> None:
        self._by_head: dict[bytes | HeadTemplate, CachedResponse | StreamRequest] = {}
        self._evaluated: OrderedDict[bytes, CachedResponse] = OrderedDict()
        """The oldest comes first."""
        self._evaluated_size = 0

    def get(self, head: bytes) -> CachedResponse | StreamRequest | None:
        """Return what was given for the same head before, of whichever instance, if it holds."""
        key: bytes | HeadTemplate = head
        given = self._by_head.get(key)
        if given is None:
            key, _ = normalise_head(head)
            given = self._by_head.get(key)
        if isinstance(given, CachedResponse) and not given.is_fresh:
            del self._by_head[key]
            return None
        return given

    def get_evaluated(self, head: bytes) -> CachedResponse | None:
        """Return what was evaluated for the context in the same head before, if it holds."""
        told = self._evaluated.get(head)
        if told is not None and not told.is_fresh:
            self._evaluated_size -= _evaluated_size(head, self._evaluated.pop(head))
            return None
        return told

    def put(self, head: bytes, given: CachedResponse | StreamRequest) -> None:
        """Keep what was given for the next request with the same head, of whichever instance."""
        if len(head) > MAX_HEAD or (isinstance(given, CachedResponse) and _expires(given)):
            return
        if len(self._by_head) >= MAX_HEADS:
            self._by_head.clear()
        outline, values = normalise_head(head)
        self._by_head[outline if values else head] = given

    def put_evaluated(self, head: bytes, told: CachedResponse) -> None:
        """Keep what was evaluated for a context for the next request with the same head."""
        if len(head) > MAX_HEAD or _expires(told) or head in self._evaluated:
            return
        self._evaluated[head] = told
        self._evaluated_size += _evaluated_size(head, told)
        while self._evaluated_size > MAX_EVALUATED:
            oldest, its = self._evaluated.popitem(last=False)
            self._evaluated_size -= _evaluated_size(oldest, its)


def _expires(prepared: CachedResponse) -> bool:
    """Whether an answer says when it expires, so that the next one says something else."""
    return prepared.environment.spec.ttl > 0


def _evaluated_size(head: bytes, told: CachedResponse) -> int:
    return EVALUATED_OVERHEAD + len(head) + told.size
