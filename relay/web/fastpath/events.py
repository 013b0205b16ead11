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
from typing import NamedTuple

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.event import EventsEndpoint, Partition
from relay.model.metrics import MetricValue
from relay.protocol.gzip import CORRUPT
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics, Series
from relay.web.access import plain_key
from relay.web.bodies import (
    BODIES_OVERLOADED,
    INFLATED_AT_ONCE,
    Gunzip,
    MemoryBudget,
    RequestRejected,
)
from relay.web.cors import cors_lines
from relay.web.endpoints.events import ACCEPTED, EventsHandler
from relay.web.fastpath.heads import (
    LENGTH,
    MAX_HEAD,
    PAYLOAD_ID,
    HeadTemplate,
    normalise_head,
    variable_names,
)
from relay.web.responses import PreparedResponse, environment_headers
from relay.web.routing import BROWSER, MOBILE, SERVER, RouteAuth

PLAIN_SIZE = 256 * 1024
"""Maximum bytes of a body, as sent, that is received here; larger ones are left to the application,
which processes them in slices. Payloads of SDKs have some KB."""

MAX_KNOWN = 4096
"""Maximum number of counters at hand: by environment, route and kind of client."""

CHUNKED = -1
"""Stands for the length of a body that comes in chunks."""

MAX_HEADS = 1024
"""Maximum number of known heads: by environment and kind of client, a few KB each."""

_ID = re.compile(rb"[0-9A-Za-z_-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,5})\r\n")
_MAX_CHUNK_SIZE_LINE = 7
"""Bytes of the longest one that `_CHUNK_SIZE` matches."""
_LAST_CHUNK = b"\r\n0\r\n\r\n"

_log = logging.getLogger("relay.web")


class EventsRoute(NamedTuple):
    """Route of event payloads."""

    template: str
    endpoint: EventsEndpoint
    auth: RouteAuth


ROUTES: Mapping[bytes, EventsRoute] = {
    route.template.removesuffix("{envId}").encode(): route
    for route in (
        EventsRoute("/bulk", EventsEndpoint.BULK, SERVER),
        EventsRoute("/diagnostic", EventsEndpoint.BULK_DIAGNOSTIC, SERVER),
        EventsRoute("/mobile", EventsEndpoint.MOBILE, MOBILE),
        EventsRoute("/mobile/events", EventsEndpoint.MOBILE, MOBILE),
        EventsRoute("/mobile/events/bulk", EventsEndpoint.MOBILE, MOBILE),
        EventsRoute("/mobile/events/diagnostic", EventsEndpoint.MOBILE_DIAGNOSTIC, MOBILE),
        EventsRoute("/events/bulk/{envId}", EventsEndpoint.CLIENT_SIDE, BROWSER),
        EventsRoute("/events/diagnostic/{envId}", EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC, BROWSER),
    )
}
"""Routes by path without the environment ID; used by the application, too."""

BROWSERS = ("POST", "OPTIONS")
"""Methods of browsers' routes, for CORS."""


class EventTarget(NamedTuple):
    """Route and environment of an upload, and the credential that it came with."""

    route: EventsRoute
    credential: str
    environment: Environment


class EventsFastPath:
    """Handler of event payloads on the fast path.

    Args:
        relay: provides the environments.
        events: accepts the payloads; shared with the application.
        traffic: request metrics, shared with the application.
    """

    def __init__(self, relay: Relay, events: EventsHandler, traffic: RequestMetrics) -> None:
        self._relay = relay
        self._events = events
        self._traffic = traffic
        self._counts: dict[tuple[EventsRoute, str, bytes, bytes], MetricValue] = {}
        self._heads: dict[HeadTemplate, KnownHead] = {}

    def begin(self, url: bytes, headers: Mapping[bytes, bytes]) -> EventUpload | None:
        """Return an upload for a parsed head; None to leave it to the application."""
        prefix, slash, last = url.rpartition(b"/")
        route = ROUTES.get(url) or ROUTES.get(prefix + slash)
        if route is None:
            return None
        credential = plain_key(headers)
        if route.auth is BROWSER:
            credential = last.decode() if _ID.fullmatch(last) else ""
        environment = self._environments(route).get(credential)
        if environment is None or not self._events.enabled or not _has_plain_body(headers):
            return None
        target = EventTarget(route, credential, environment)
        upload = EventUpload(target, headers, self._events.budget)
        upload.missing = int(headers.get(b"content-length", CHUNKED))
        return upload

    def _environments(self, route: EventsRoute) -> Mapping[str, Environment]:
        """Return all environments by the kind of credential that a route needs."""
        relay = self._relay
        if route.auth is SERVER:
            return relay.by_sdk_key
        return relay.by_mobile_key if route.auth is MOBILE else relay.by_environment_id

    def accept(self, upload: EventUpload) -> asyncio.Future[bool] | None:
        """Accept a complete upload; None to leave it to the application.

        The future is done when the payload is stored.
        """
        body = upload.content()
        if not body:
            return None
        route, _, environment = upload.target
        head, events = upload.head, self._events
        try:
            if head is not None:
                stored = events.accept_in_partition(head.partition, upload.payload_id, body)
            else:
                stored = events.accept_plain(environment, route.endpoint, upload.headers, body)
        except Exception as e:  # noqa: BLE001 - `answer` reports it
            return _failed_future(e)
        if stored is None:
            return None
        count = head.count if head is not None else self._count(upload)
        count.value += 1
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
        try:
            stored = self._events.accept_in_partition(head.partition, payload_id, body)
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
        spec, auth = upload.target.environment.spec, upload.target.route.auth
        headers = environment_headers(spec)
        if auth is BROWSER:
            headers += cors_lines(
                spec, upload.headers.get(b"origin", b""), BROWSERS, auth.exposed_headers
            )
        return response.with_headers(*headers)

    def remember(self, head: bytes, upload: EventUpload) -> None:
        """Remember the head of an accepted upload for later ones with the same template.

        Args:
            head: as it was received.
            upload: begun with this head.
        """
        if len(head) > MAX_HEAD:
            return
        template, _ = normalise_head(head)
        known = self._heads.get(template)
        if known is None or not self._is_valid(known):
            if len(self._heads) >= MAX_HEADS:
                self._heads.clear()
            self._heads[template] = self._known_head(template, upload)

    def _known_head(self, template: HeadTemplate, upload: EventUpload) -> KnownHead:
        endpoint, environment = upload.target.route.endpoint, upload.target.environment
        partition = self._events.partition(environment, endpoint, upload.headers)
        accepted_head = self._completed(ACCEPTED, upload).head
        return KnownHead(template, upload, partition, self._count(upload), accepted_head)

    def _is_valid(self, head: KnownHead) -> bool:
        """Return whether the credential of a known head still opens the same environment."""
        route, credential, environment = head.target
        return (
            self._environments(route).get(credential) is environment
            and environment.spec is head.spec
        )

    def find_head(self, head: bytes) -> tuple[KnownHead, str, int] | None:
        """Return a known head with the payload id and the length of the body, as `KnownHead.read`.

        None if the head has to be parsed.
        """
        template, values = normalise_head(head)
        known = self._heads.get(template)
        if known is None or not self._is_valid(known):
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
        upload = EventUpload(known.target, known.headers, self._events.budget, known)
        upload.keep_alive, upload.start, upload.payload_id = known.keep_alive, head, payload_id
        return upload

    def _count(self, upload: EventUpload) -> MetricValue:
        sdk_agent = upload.headers.get(b"x-launchdarkly-user-agent", b"")
        plain_agent = upload.headers.get(b"user-agent", b"")
        route, name = upload.target.route, upload.target.environment.spec.name
        key = (route, name, sdk_agent, plain_agent)
        count = self._counts.get(key)
        if count is None:
            user_agent = self._traffic.user_agent(sdk_agent, plain_agent)
            series = Series(name, route.template, "POST", route.auth.platform, user_agent)
            count = self._traffic.requests[series]
            if len(self._counts) >= MAX_KNOWN:
                self._counts.clear()
            self._counts[key] = count
        return count


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


class KnownHead:
    """Everything derived from a request head, shared by all requests with the same template.

    Args:
        template: of the head.
        upload: an upload with this head.
        partition: partition of the payloads.
        count: counter of such requests.
        accepted_head: status line and headers of a 202.
    """

    __slots__ = (
        *("_accepted", "_date", "_id_at", "_length_at", "accepted_head", "keep_alive"),
        *("chunked", "compressed", "count", "headers", "partition", "target", "spec"),
    )

    def __init__(
        self,
        template: HeadTemplate,
        upload: EventUpload,
        partition: Partition,
        count: MetricValue,
        accepted_head: bytes,
    ) -> None:
        self.target = upload.target
        self.spec = upload.target.environment.spec
        self.headers = {b"origin": upload.headers.get(b"origin", b"")}
        self.compressed = upload.compressed
        self.keep_alive = upload.keep_alive
        self.partition = partition
        self.count = count
        self.accepted_head = accepted_head
        variables = variable_names(template)
        self._length_at = variables.index(LENGTH) if LENGTH in variables else None
        self.chunked = self._length_at is None
        self._id_at = variables.index(PAYLOAD_ID) if PAYLOAD_ID in variables else None
        self._date = b""
        self._accepted = b""

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
        target: route, credential and environment.
        headers: headers of the request, without repetitions.
        budget: memory budget of bodies.
        head: the known head, if it is one.
    """

    __slots__ = (
        "_budget",
        "_reserved",
        "head",
        "headers",
        "keep_alive",
        "missing",
        "parts",
        "payload_id",
        "start",
        "target",
    )

    def __init__(
        self,
        target: EventTarget,
        headers: Mapping[bytes, bytes],
        budget: MemoryBudget,
        head: KnownHead | None = None,
    ) -> None:
        self.target = target
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
        return f"<EventUpload {self.target.route.template} [{self._reserved} bytes reserved]>"

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
