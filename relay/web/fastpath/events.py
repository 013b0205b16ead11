"""Posts of events at the front door: the plain ones, which are nearly all, without the application.

A post that turns out to be odd is given to the application with all that has come of it, so what is
refused is refused there, and in its words. What a head means is found out once for all that have
the same outline: their bodies are received without the parser.
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
"""Bytes of a body, as it is sent, that are collected here; larger ones take turns with others in
the application. Posts of SDKs have some KB."""

MAX_KNOWN = 4096
"""Counts that are at hand: of each kind of client at each route of each environment."""

CHUNKED = -1
"""In place of the length of a body that comes in chunks."""

MAX_HEADS = 1024
"""Heads whose meaning is known: of each kind of client in each environment; a few KB each."""

_ID = re.compile(rb"[0-9A-Za-z_-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,5})\r\n")
_LAST_CHUNK = b"\r\n0\r\n\r\n"

_log = logging.getLogger("relay.web")


class EventsRoute(NamedTuple):
    """Where events are posted."""

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
"""By the path, without the environment's ID. The application has the same, from here."""

BROWSERS = ("POST", "OPTIONS")
"""The methods of routes that browsers use, as they are told."""


class EventTarget(NamedTuple):
    """Where a post goes, and whose it is."""

    route: EventsRoute
    credential: str
    environment: Environment


class EventsFastPath:
    """What takes posts from connections.

    Args:
        relay: whose environments are served.
        events: accepts them; the application has the same.
        traffic: counts requests; the application has the same.
    """

    def __init__(self, relay: Relay, events: EventsHandler, traffic: RequestMetrics) -> None:
        self._relay = relay
        self._events = events
        self._traffic = traffic
        self._counts: dict[tuple[EventsRoute, str, bytes, bytes], MetricValue] = {}
        self._heads: dict[HeadTemplate, KnownHead] = {}

    def begin(self, url: bytes, headers: Mapping[bytes, bytes]) -> EventUpload | None:
        """Return what receives a post whose head has come; None if it is the application's."""
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
        opened = EventTarget(route, credential, environment)
        return EventUpload(opened, url, headers, self._events.budget)

    def _environments(self, route: EventsRoute) -> Mapping[str, Environment]:
        """Return all environments by the credentials that open a route."""
        relay = self._relay
        if route.auth is SERVER:
            return relay.by_sdk_key
        return relay.by_mobile_key if route.auth is MOBILE else relay.by_environment_id

    def accept(self, post: EventUpload) -> asyncio.Future[object] | None:
        """Accept a post whose body has come; None if it is the application's."""
        body = post.content()
        if not body:
            return None
        route, _, environment = post.target
        head, events = post.head, self._events
        try:
            if head is not None:
                kept = events.accept_in_partition(head.partition, post.payload_id, body)
            else:
                kept = events.accept_plain(environment, route.endpoint, post.headers, body)
        except Exception as e:  # noqa: BLE001 - the client is answered all the same
            return _failed(e)
        if kept is None:
            return None
        count = head.count if head is not None else self._count(post)
        count.value += 1
        return asyncio.ensure_future(kept)

    def answer(self, post: EventUpload, kept: asyncio.Future[object]) -> PreparedResponse:
        """Return what is said about a post that is safe now, or cannot be kept."""
        error = asyncio.CancelledError() if kept.cancelled() else kept.exception()
        if error is not None and not isinstance(error, StoreUnavailable):
            text = "A request could not be answered because of a defect of ours"
            _log.error(text, exc_info=error)
            return PreparedResponse(500)
        return self._completed(BODIES_OVERLOADED if error else ACCEPTED, post)

    def _completed(self, answer: PreparedResponse, post: EventUpload) -> PreparedResponse:
        """Return an answer with what is said to SDKs of this kind and this environment."""
        spec, access = post.target.environment.spec, post.target.route.auth
        more = environment_headers(spec)
        if access is BROWSER:
            more += cors_lines(
                spec, post.headers.get(b"origin", b""), BROWSERS, access.exposed_headers
            )
        return answer.with_headers(*more)

    def remember(self, head: bytes, post: EventUpload) -> None:
        """Remember what the head of an accepted post means, for those that follow.

        Args:
            head: as on the wire.
            post: what has come of it.
        """
        if len(head) > MAX_HEAD:
            return
        outline, _ = normalise_head(head)
        known = self._heads.get(outline)
        if known is None or not self._is_valid(known):
            if len(self._heads) >= MAX_HEADS:
                self._heads.clear()
            self._heads[outline] = self._meaning(outline, post)

    def _meaning(self, outline: HeadTemplate, post: EventUpload) -> KnownHead:
        endpoint, environment = post.target.route.endpoint, post.target.environment
        lane = self._events.partition(environment, endpoint, post.headers)
        answer = self._completed(ACCEPTED, post).head
        return KnownHead(outline, post, lane, self._count(post), answer)

    def _is_valid(self, head: KnownHead) -> bool:
        """Whether a head means what it meant: its credential opens the same environment."""
        route, credential, environment = head.target
        return (
            self._environments(route).get(credential) is environment
            and environment.spec is head.spec
        )

    def known(self, head: bytes) -> EventUpload | None:
        """Return what receives a post with this head; None if the parser has to look at it."""
        outline, values = normalise_head(head)
        known = self._heads.get(outline)
        if known is None or not self._is_valid(known):
            return None
        payload_id, missing = known.read(values)
        if missing is None:
            return None
        post = EventUpload(known.target, b"", known.headers, self._events.budget, known)
        post.keep_alive, post.start = known.keep_alive, head
        post.payload_id, post.missing = payload_id, missing
        return post

    def _count(self, post: EventUpload) -> MetricValue:
        own = post.headers.get(b"x-launchdarkly-user-agent", b"")
        general = post.headers.get(b"user-agent", b"")
        route, name = post.target.route, post.target.environment.spec.name
        key = (route, name, own, general)
        count = self._counts.get(key)
        if count is None:
            agent = self._traffic.user_agent(own, general)
            series = Series(name, route.template, "POST", route.auth.platform, agent)
            count = self._traffic.requests[series]
            if len(self._counts) >= MAX_KNOWN:
                self._counts.clear()
            self._counts[key] = count
        return count


def _failed(error: Exception) -> asyncio.Future[object]:
    failed: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    failed.set_exception(error)
    return failed


def _has_plain_body(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    return b"transfer-encoding" not in headers and _is_plain_length(length)


def _is_plain_length(length: bytes) -> bool:
    return length.isdigit() and int(length) <= PLAIN_SIZE


_NOBODY_WAITS = asyncio.Event()


class KnownHead:
    """What the head of a post means, and all heads with the same outline.

    Args:
        outline: of the head.
        post: one with this head.
        partition: how they travel.
        count: of such requests.
        answer: status line and headers of a 202.
    """

    __slots__ = (
        *("_date", "_id_at", "_length_at", "_written", "answer", "keep_alive"),
        *("compressed", "count", "headers", "partition", "target", "spec"),
    )

    def __init__(
        self,
        outline: HeadTemplate,
        post: EventUpload,
        partition: Partition,
        count: MetricValue,
        answer: bytes,
    ) -> None:
        self.target = post.target
        self.spec = post.target.environment.spec
        self.headers = {b"origin": post.headers.get(b"origin", b"")}
        self.compressed = post.compressed
        self.keep_alive = post.keep_alive
        self.partition = partition
        self.count = count
        self.answer = answer
        variable = variable_names(outline)
        self._length_at = variable.index(LENGTH) if LENGTH in variable else None
        self._id_at = variable.index(PAYLOAD_ID) if PAYLOAD_ID in variable else None
        self._date = b""
        self._written = b""

    def read(self, values: Sequence[bytes]) -> tuple[str, int | None]:
        """Return what a post with this head has of its own.

        Args:
            values: of the headers that the outline leaves out.

        Returns:
            Its payload id, empty for none, and the bytes of its body; `CHUNKED` if they come in
            chunks, None if the parser has to look at it.
        """
        missing: int | None = CHUNKED
        if self._length_at is not None:
            length = values[self._length_at]
            missing = int(length) if _is_plain_length(length) else None
        return "" if self._id_at is None else values[self._id_at].decode(), missing

    def to_wire(self, date: bytes) -> bytes:
        """Return the 202; put together once a second."""
        if self._date is not date:
            self._date, self._written = date, self.answer + date
        return self._written


def only_chunk(body: bytes) -> bytes | None:
    """Return what is in a body of one chunk, as SDKs send them; None of any other."""
    match = _CHUNK_SIZE.match(body)
    if match is None:
        return None
    size, start = int(match[1], 16), match.end()
    return body[start : start + size] if body[start + size :] == _LAST_CHUNK else None


class EventUpload:
    """A post that is being received or kept. To uvicorn it looks like a request to the application.

    Args:
        target: where it goes, and whose it is.
        url: the target of the request.
        headers: of the request, each once.
        budget: for the body.
        head: if what its head means was known.
    """

    __slots__ = (
        *("_reserved", "_budget", "head", "headers", "missing", "target", "parts", "payload_id"),
        *("start", "url", "disconnected", "keep_alive", "response_complete"),
    )

    message_event = _NOBODY_WAITS

    def __init__(
        self,
        target: EventTarget,
        url: bytes,
        headers: Mapping[bytes, bytes],
        budget: MemoryBudget,
        head: KnownHead | None = None,
    ) -> None:
        self.target = target
        self.url = url
        self.head = head
        self.headers = headers
        self.parts: list[bytes] = []
        self.start = b""
        """The head as it came, if it came at once."""
        self.payload_id = ""
        """Of a post whose head is known."""
        self.missing = 0
        """Bytes of the body that are still to come, if the head is known."""
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False
        self._budget = budget
        self._reserved = 0

    def receive(self, part: bytes) -> bool:
        """Take a further part; return whether the post is plain still."""
        self.parts.append(part)
        return self._reserve(len(part))

    def content(self) -> bytes:
        """Return the body, decompressed; empty if there is none, or it is not plain."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        return _inflated(body, self._reserve) if self.compressed else body

    @property
    def compressed(self) -> bool:
        """Whether the body is."""
        if self.head is not None:
            return self.head.compressed
        return b"gzip" in self.headers.get(b"content-encoding", b"").lower()

    def release(self) -> None:
        """Let others have the room."""
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


def _inflated(body: bytes, hold: Callable[[int], bool]) -> bytes:
    """Return what is in a compressed body; empty if it is not plain, or `hold` says no."""
    gunzip = Gunzip()
    found = b""
    try:
        for part in gunzip.parts(body):
            if found or len(part) == INFLATED_AT_ONCE or not hold(len(part)):
                return b""
            found = part
    except CORRUPT:
        return b""
    return found if gunzip.complete else b""
