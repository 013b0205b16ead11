"""Fast path of event payloads (`POST /bulk`, `/mobile`, `/events/bulk/…` and the like).

An upload that turns out to be unusual is passed on to the application with all that was received
of it, so that requests are refused in one place only. A request head is parsed once for all heads
with the same template; the bodies that follow these are received without the parser.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.event import Partition
from relay.model.metrics import MetricValue
from relay.protocol.gzip import CORRUPT
from relay.registry import Registry
from relay.telemetry.traffic import RequestMetrics
from relay.web.access import Access
from relay.web.bodies import (
    BODIES_OVERLOADED,
    INFLATED_AT_ONCE,
    Gunzip,
    MemoryBudget,
    RequestRejected,
)
from relay.web.cache import ANY_PAYLOAD, CacheEntry, ResponseCache
from relay.web.cors import cors_lines
from relay.web.endpoints.events import ACCEPTED, EventsHandler
from relay.web.fastpath.heads import (
    LENGTH,
    MAX_HEAD,
    PAYLOAD_ID,
    HeadTemplate,
    RequestHead,
    normalise_head,
    variable_names,
)
from relay.web.responses import PreparedResponse, environment_headers

PLAIN_SIZE = 256 * 1024
"""Maximum bytes of a body, as sent, that is received here; larger ones are left to the application,
which processes them in slices. Payloads of SDKs have some KB."""

CHUNKED = -1
"""Stands for the length of a body that comes in chunks."""

MAX_HEADS = 8 * 1024 * 1024
"""Bytes of known heads: one by environment and kind of client."""

HEAD_SIZE = 4 * 1024
"""Bytes that a known head takes besides its key."""

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,5})\r\n")
_MAX_CHUNK_SIZE_LINE = 7
"""Bytes of the longest one that `_CHUNK_SIZE` matches."""
_LAST_CHUNK = b"\r\n0\r\n\r\n"

_log = logging.getLogger("relay.web")


class EventsFastPath:
    """Handler of event payloads on the fast path.

    Args:
        registry: of the environments.
        events: accepts the payloads; shared with the application.
        traffic: request metrics, shared with the application.
    """

    def __init__(
        self, registry: Registry[Environment], events: EventsHandler, traffic: RequestMetrics
    ) -> None:
        self._registry = registry
        self._events = events
        self._intake = events.intake
        self._traffic = traffic
        self.heads: ResponseCache[KnownHead] = ResponseCache(registry, MAX_HEADS)
        """By template."""

    def begin(self, head: RequestHead) -> EventUpload | None:
        """Return an upload for a parsed head; None to leave it to the application."""
        if not self._intake.enabled or not _has_plain_body(head.headers):
            return None
        upload = EventUpload(head.access, head.headers, self._events.budget)
        upload.keep_alive, upload.start = not head.closes, head.raw
        upload.missing = int(head.headers.get(b"content-length", CHUNKED))
        return upload

    def accept(self, upload: EventUpload) -> asyncio.Future[bool] | None:
        """Accept a complete upload; None to leave it to the application.

        The future is done when the payload is stored.
        """
        body = upload.content()
        if not body:
            return None
        if upload.head is not None:
            return self._accept_known(upload.head, upload.payload_id, body)
        spec, endpoint = upload.access.environment.spec, upload.access.route.events_endpoint
        try:
            stored = self._intake.accept_plain(spec, endpoint, upload.headers, body)
        except Exception as e:  # noqa: BLE001 - `answer` reports it
            return _failed_future(e)
        if stored is not None:
            self._count(upload).value += 1
        return stored

    def accept_whole(
        self, head: KnownHead, payload_id: str, body: bytes
    ) -> asyncio.Future[bool] | None:
        """Accept a body that arrived together with its head, as most do: it needs no `EventUpload`.

        Returns:
            As `accept`.
        """
        if head.compressed or not self._events.budget.fits(len(body)):
            return None
        return self._accept_known(head, payload_id, body)

    def _accept_known(
        self, head: KnownHead, payload_id: str, body: bytes
    ) -> asyncio.Future[bool] | None:
        try:
            stored = self._intake.accept_in_partition(head.partition, payload_id, body)
        except Exception as e:  # noqa: BLE001 - `answer` reports it
            return _failed_future(e)
        if stored is not None:
            head.count.value += 1
        return stored

    def answer(self, upload: EventUpload, stored: asyncio.Future[bool]) -> PreparedResponse:
        """Return the response to an upload that was stored, or could not be."""
        error = asyncio.CancelledError() if stored.cancelled() else stored.exception()
        if error is not None and not isinstance(error, StoreUnavailable):
            message = "A request could not be answered because of an unexpected error"
            _log.error(message, exc_info=error)
            return PreparedResponse(500)
        return self._completed(BODIES_OVERLOADED if error else ACCEPTED, upload)

    def _completed(self, response: PreparedResponse, upload: EventUpload) -> PreparedResponse:
        """Return a response with the headers for this environment and kind of SDK."""
        spec, route = upload.access.environment.spec, upload.access.route
        headers = environment_headers(spec)
        if route.for_browsers:
            headers += cors_lines(spec, upload.headers.get(b"origin", b""), route)
        return response.with_headers(*headers)

    def remember(self, head: bytes, upload: EventUpload) -> None:
        """Remember the head of an accepted upload for later ones with the same template.

        Args:
            head: as it was received.
            upload: begun with this head.
        """
        grant, endpoint = upload.access.grant, upload.access.route.events_endpoint
        # It may have ended while the body was received.
        if len(head) > MAX_HEAD or not upload.access.is_valid(self._registry):
            return
        template, _ = normalise_head(head)
        if self.heads.get(template) is None:
            partition = self._intake.partition(grant.environment.spec, endpoint, upload.headers)
            accepted_head = self._completed(ACCEPTED, upload).head
            known = KnownHead.of(template, upload, partition, self._count(upload), accepted_head)
            known.size = HEAD_SIZE + len(head)
            self.heads.put(template, known)

    def find_head(self, head: bytes) -> tuple[KnownHead, str, int] | None:
        """Return a known head with the payload id and the length of the body, as `KnownHead.read`.

        None if the head has to be parsed.
        """
        template, values = normalise_head(head)
        known = self.heads.get(template)
        if known is None:
            return None
        payload_id, length = known.read(values)
        return None if length is None else (known, payload_id, length)

    def begin_known(self, known: KnownHead, head: bytes, payload_id: str) -> EventUpload:
        """Return an upload for a known head.

        Args:
            known: what is known of it.
            head: as it was received.
            payload_id: read from it.
        """
        upload = EventUpload(known.access, known.headers, self._events.budget, known)
        upload.keep_alive, upload.start, upload.payload_id = known.keep_alive, head, payload_id
        return upload

    def _count(self, upload: EventUpload) -> MetricValue:
        return self._traffic.requests[upload.access.labels(self._traffic, "POST", upload.headers)]


def _failed_future(error: Exception) -> asyncio.Future[bool]:
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def _has_plain_body(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    return b"transfer-encoding" not in headers and _is_plain_length(length)


def _is_plain_length(length: bytes) -> bool:
    return length.isdigit() and int(length) <= PLAIN_SIZE


class KnownHead(CacheEntry, eq=False):
    """Everything derived from a request head, shared by all requests with the same template.

    Args:
        environment: takes the events.
        payload: `ANY_PAYLOAD`.
        access: of the requests.
        headers: those that responses depend on.
        compressed: True if bodies are compressed.
        keep_alive: True if the connection stays open after the response.
        partition: partition of the payloads.
        count: counter of such requests.
        accepted_head: status line and headers of a 202.
    """

    access: Access
    headers: Mapping[bytes, bytes]
    compressed: bool
    keep_alive: bool
    partition: Partition
    count: MetricValue
    accepted_head: bytes
    _length_at: int | None
    """None if bodies come in chunks."""
    _id_at: int | None
    _date: bytes = b""
    _accepted: bytes = b""

    @classmethod
    def of(
        cls,
        template: HeadTemplate,
        upload: EventUpload,
        partition: Partition,
        count: MetricValue,
        accepted_head: bytes,
    ) -> KnownHead:
        """Return what is known of the head of an upload."""
        variables = variable_names(template)
        return cls(
            upload.access.environment,
            ANY_PAYLOAD,
            upload.access,
            {b"origin": upload.headers.get(b"origin", b"")},
            upload.compressed,
            upload.keep_alive,
            partition,
            count,
            accepted_head,
            variables.index(LENGTH) if LENGTH in variables else None,
            variables.index(PAYLOAD_ID) if PAYLOAD_ID in variables else None,
        )

    @property
    def chunked(self) -> bool:
        """True if bodies come in chunks."""
        return self._length_at is None

    def read(self, values: Sequence[bytes]) -> tuple[str, int | None]:
        """Return the variable parts of a head.

        Args:
            values: of the variable headers.

        Returns:
            The payload id, empty for none, and the length of the body; `CHUNKED` if it comes in
            chunks, None if it has to be parsed.
        """
        missing: int | None = CHUNKED
        if self._length_at is not None:
            length = values[self._length_at]
            missing = int(length) if _is_plain_length(length) else None
        return "" if self._id_at is None else values[self._id_at].decode(), missing

    def to_wire(self, date: bytes) -> bytes:
        """Return the bytes of the 202; assembled once a second."""
        if self._date is not date:
            self._date, self._accepted = date, self.accepted_head + date
        return self._accepted


def only_chunk(body: bytes) -> bytes | None:
    """Return the data of a body of one chunk, as SDKs send them; None for any other body."""
    size_line = _CHUNK_SIZE.match(body)
    if size_line is None:
        return None
    size, start = int(size_line[1], 16), size_line.end()
    return body[start : start + size] if body[start + size :] == _LAST_CHUNK else None


class EventUpload:
    """Event payload that is being received or stored.

    Args:
        access: route and environment.
        headers: headers of the request, without repetitions.
        budget: memory budget of bodies.
        head: the known head, if it is one.
    """

    __slots__ = (
        "_budget",
        "_reserved",
        "access",
        "head",
        "headers",
        "keep_alive",
        "missing",
        "parts",
        "payload_id",
        "start",
    )

    def __init__(
        self,
        access: Access,
        headers: Mapping[bytes, bytes],
        budget: MemoryBudget,
        head: KnownHead | None = None,
    ) -> None:
        self.access = access
        self.head = head
        self.headers = headers
        self.parts: list[bytes] = []
        """The body as it was received."""
        self.start = b""
        """The head as it was received."""
        self.payload_id = ""
        """The payload id, if the head is known."""
        self.missing = 0
        """Bytes of the body that are still missing; `CHUNKED` if unknown."""
        self.keep_alive = True
        self._budget = budget
        self._reserved = 0

    def __repr__(self) -> str:
        return f"<EventUpload {self.access.route.template} [{self._reserved} bytes reserved]>"

    def receive(self, part: bytes) -> bool:
        """Take a part of the body; return False if the application has to take over."""
        self.parts.append(part)
        if self.missing != CHUNKED:
            self.missing -= len(part)
        elif part and not self._read_chunk_size():
            return False
        return self._reserve(len(part))

    def _read_chunk_size(self) -> bool:
        """Find out how much of a body of one chunk is missing; return False if it is unusual."""
        body = b"".join(self.parts)
        size_line = _CHUNK_SIZE.match(body)
        if size_line is not None:
            whole = size_line.end() + int(size_line[1], 16) + len(_LAST_CHUNK)
            self.missing = max(0, whole - len(body))
        return size_line is not None or len(body) < _MAX_CHUNK_SIZE_LINE

    @property
    def is_complete(self) -> bool:
        """True if the whole body has been received."""
        return self.missing == 0

    def content(self) -> bytes:
        """Return the body, decompressed; empty if there is none, or it needs the application."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        if self.head.chunked if self.head else b"transfer-encoding" in self.headers:
            body = only_chunk(body) or b""
        return _inflated(body, self._reserve) if self.compressed else body

    @property
    def compressed(self) -> bool:
        """True if the body is compressed."""
        if self.head is not None:
            return self.head.compressed
        return b"gzip" in self.headers.get(b"content-encoding", b"").lower()

    def release(self) -> None:
        """Release the memory that is reserved for the body."""
        if self._reserved:
            self._budget.release(self._reserved)
            self._reserved = 0
        self.parts.clear()

    def _reserve(self, size: int) -> bool:
        if self._reserved + size > min(self._budget.max_size, 2 * PLAIN_SIZE):
            return False
        try:
            self._budget.acquire(size)
        except RequestRejected:
            return False
        self._reserved += size
        return True


def _inflated(body: bytes, reserve: Callable[[int], bool]) -> bytes:
    """Decompress a body; return empty bytes if it is corrupt or large, or `reserve` refuses."""
    gunzip = Gunzip()
    inflated = b""
    try:
        for part in gunzip.parts(body):
            if inflated or len(part) == INFLATED_AT_ONCE or not reserve(len(part)):
                return b""
            inflated = part
    except CORRUPT:
        return b""
    return inflated if gunzip.complete else b""
