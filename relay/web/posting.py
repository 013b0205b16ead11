"""Posts of events at the front door: the plain ones, which are nearly all, without the application.

A post that turns out to be odd is given to the application with all that has come of it, so what is
refused is refused there, and in its words. SDKs send the same head again and again, but for the
length and the id of the post: what a head means is found out once.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.count import Count
from relay.model.event import Endpoint, Lane
from relay.relay import Relay
from relay.web.answers import Answer, environment_headers
from relay.web.auth import plain_key
from relay.web.body import (
    CORRUPT,
    INFLATED_AT_ONCE,
    NO_ROOM,
    Gunzip,
    Refused,
    Room,
)
from relay.web.cors import cors_lines
from relay.web.endpoint import BROWSER, MOBILE, SERVER, Access
from relay.web.events import ACCEPTED, Events, is_payload_id
from relay.web.traffic import Series, Traffic

PLAIN_SIZE = 256 * 1024
"""Bytes of a body, as it is sent, that are collected here; larger ones take turns with others in
the application. Posts of SDKs have some KB."""

MAX_KNOWN = 4096
"""Counts that are at hand: of each kind of client at each route of each environment."""

MAX_HEADS = 1024
"""Heads whose meaning is known: of each kind of client in each environment; a few KB each."""

MAX_HEAD = 4096
"""Bytes of a head whose meaning is remembered; SDKs send a few hundred."""

MAX_VALUE = 101
"""Bytes up to the end of the value of a variable header."""

_LENGTH = b"content-length"
_VARIABLE = (_LENGTH, b"x-launchdarkly-payload-id")
"""The headers that are different in each post of a client."""

_END = b"\r\n\r\n"

_ID = re.compile(rb"[0-9A-Za-z_-]+")

_log = logging.getLogger("relay.web")


class Route(NamedTuple):
    """Where events are posted."""

    template: str
    endpoint: Endpoint
    access: Access


ROUTES: Mapping[bytes, Route] = {
    route.template.removesuffix("{envId}").encode(): route
    for route in (
        Route("/bulk", Endpoint.BULK, SERVER),
        Route("/diagnostic", Endpoint.BULK_DIAGNOSTIC, SERVER),
        Route("/mobile", Endpoint.MOBILE, MOBILE),
        Route("/mobile/events", Endpoint.MOBILE, MOBILE),
        Route("/mobile/events/bulk", Endpoint.MOBILE, MOBILE),
        Route("/mobile/events/diagnostic", Endpoint.MOBILE_DIAGNOSTIC, MOBILE),
        Route("/events/bulk/{envId}", Endpoint.CLIENT_SIDE, BROWSER),
        Route("/events/diagnostic/{envId}", Endpoint.CLIENT_SIDE_DIAGNOSTIC, BROWSER),
    )
}
"""By the path, without the environment's ID. The application has the same, from here."""

BROWSERS = ("POST", "OPTIONS")
"""The methods of routes that browsers use, as they are told."""


class Opened(NamedTuple):
    """Where a post goes, and whose it is."""

    route: Route
    credential: str
    environment: Environment


class Posts:
    """What takes posts from connections.

    Args:
        relay: whose environments are served.
        events: accepts them; the application has the same.
        traffic: counts requests; the application has the same.
    """

    def __init__(self, relay: Relay, events: Events, traffic: Traffic) -> None:
        self._relay = relay
        self._events = events
        self._traffic = traffic
        self._counts: dict[tuple[Route, str, bytes, bytes], Count] = {}
        self._heads: dict[tuple[bytes, ...], Head] = {}

    def begin(self, url: bytes, headers: Mapping[bytes, bytes]) -> Receiving | None:
        """Return what receives a post whose head has come; None if it is the application's."""
        prefix, slash, last = url.rpartition(b"/")
        route = ROUTES.get(url) or ROUTES.get(prefix + slash)
        if route is None:
            return None
        credential = plain_key(headers)
        if route.access is BROWSER:
            credential = last.decode() if _ID.fullmatch(last) else ""
        environment = self._environments(route).get(credential)
        if environment is None or not self._events.on or not _has_plain_body(headers):
            return None
        opened = Opened(route, credential, environment)
        return Receiving(opened, url, headers, self._events.room)

    def _environments(self, route: Route) -> Mapping[str, Environment]:
        """Return all environments by the credentials that open a route."""
        relay = self._relay
        if route.access is SERVER:
            return relay.by_sdk_key
        return relay.by_mobile_key if route.access is MOBILE else relay.by_environment_id

    def accept(self, post: Receiving) -> asyncio.Future[object] | None:
        """Accept a post whose body has come; None if it is the application's."""
        body = post.content()
        if not body:
            return None
        route, _, environment = post.opened
        try:
            kept = self._events.accept_plain(environment, route.endpoint, post.headers, body)
        except Exception as e:  # noqa: BLE001 - the client is answered all the same
            return _failed(e)
        if kept is None:
            return None
        self._count(post).value += 1
        return asyncio.ensure_future(kept)

    def answer(self, post: Receiving, kept: asyncio.Future[object]) -> Answer:
        """Return what is said about a post that is safe now, or cannot be kept."""
        error = asyncio.CancelledError() if kept.cancelled() else kept.exception()
        if error is not None and not isinstance(error, StoreUnavailable):
            text = "A request could not be answered because of a defect of ours"
            _log.error(text, exc_info=error)
            return Answer(500)
        return self._completed(NO_ROOM if error else ACCEPTED, post)

    def _completed(self, answer: Answer, post: Receiving) -> Answer:
        """Return an answer with what is said to SDKs of this kind and this environment."""
        spec, access = post.opened.environment.spec, post.opened.route.access
        more = environment_headers(spec)
        if access is BROWSER:
            more += cors_lines(spec, post.headers.get(b"origin", b""), BROWSERS, access.exposed)
        return answer.with_headers(*more)

    def learn(self, data: bytes, post: Receiving) -> Head | None:
        """Return what the head of an accepted post means, for those that follow; None if odd.

        Args:
            data: the request, and maybe what follows it.
            post: what has come of it.
        """
        found = _texts(data, post.url, post.headers)
        if found is None:
            return None
        head = self._heads.get(found[0])
        if head is None or not self._holds(head):
            if len(self._heads) >= MAX_HEADS:
                self._heads.clear()
            head = self._heads[found[0]] = self._meaning(*found, post)
        return head

    def _meaning(self, texts: tuple[bytes, ...], length_at: int, post: Receiving) -> Head:
        endpoint, environment = post.opened.route.endpoint, post.opened.environment
        lane = self._events.lane(environment, endpoint, post.headers)
        answer = self._completed(ACCEPTED, post).head
        return Head(texts, length_at, post, lane, self._count(post), answer)

    def _holds(self, head: Head) -> bool:
        """Whether a head means what it meant: its credential opens the same environment."""
        route, credential, environment = head.opened
        return (
            self._environments(route).get(credential) is environment
            and environment.spec is head.spec
        )

    def accept_known(self, head: Head, data: bytes) -> asyncio.Future[object] | None:
        """Accept a whole request with a known head; None if it has another one, or is odd."""
        found = head.read(data)
        if found is None or not self._holds(head):
            return None
        payload_id, body = found
        events = self._events
        if head.compressed:
            body = _inflated(body, lambda size: size <= events.room.max_size)
        if len(body) > events.room.max_size:
            return None
        try:
            kept = events.accept_in(head.lane, payload_id, body)
        except Exception as e:  # noqa: BLE001 - the client is answered all the same
            return _failed(e)
        if kept is None:
            return None
        head.count.value += 1
        return asyncio.ensure_future(kept)

    def waiting(self, head: Head) -> Receiving:
        """Return what stands for a post with a known head until it is safe."""
        return Receiving(head.opened, b"", head.headers, self._events.room, head)

    def _count(self, post: Receiving) -> Count:
        own = post.headers.get(b"x-launchdarkly-user-agent", b"")
        general = post.headers.get(b"user-agent", b"")
        route, name = post.opened.route, post.opened.environment.spec.name
        key = (route, name, own, general)
        count = self._counts.get(key)
        if count is None:
            agent = self._traffic.user_agent(own, general)
            series = Series(name, route.template, "POST", route.access.platform, agent)
            count = self._traffic.requests[series]
            if len(self._counts) >= MAX_KNOWN:
                self._counts.clear()
            self._counts[key] = count
        return count


def _failed(error: Exception) -> asyncio.Future[object]:
    failed: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    failed.set_exception(error)
    return failed


def _texts(
    data: bytes, url: bytes, headers: Mapping[bytes, bytes]
) -> tuple[tuple[bytes, ...], int] | None:
    """Cut the values of the variable headers out of a head.

    Args:
        data: begins with the head.
        url: its target, as it was parsed.
        headers: the same, each once.

    Returns:
        What is before, between and after the values, and which of them is the length; None if the
        head is not written plainly, or has no length.
    """
    if _LENGTH not in headers:
        return None
    end = data.find(_END, 0, MAX_HEAD)
    line, *lines = data[: max(end, 0)].split(b"\r\n")
    if line != b"POST %b HTTP/1.1" % url or len(lines) != len(headers):
        return None
    texts, names = [line], []
    for each in lines:
        name, _, value = each.partition(b":")
        name = name.lower()
        if headers.get(name) != value.strip(b" \t"):
            return None
        texts[-1] += b"\r\n" + each
        if name in _VARIABLE:
            names.append(name)
            texts[-1] = texts[-1].removesuffix(headers[name])
            texts.append(b"")
    texts[-1] += _END
    return tuple(texts), names.index(_LENGTH)


def _has_plain_body(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    return b"transfer-encoding" not in headers and length.isdigit() and int(length) <= PLAIN_SIZE


_NOBODY_WAITS = asyncio.Event()


class Head:
    """What the head of a post means, and all heads that are the same but for length and id.

    Args:
        texts: what is before, between and after the values of these headers.
        length_at: which of the values is the length.
        post: one with this head.
        lane: how they travel.
        count: of such requests.
        answer: status line and headers of a 202.
    """

    __slots__ = (
        *("_after", "_before", "_date", "_length_at", "_written", "answer"),
        *("compressed", "count", "headers", "lane", "opened", "spec"),
    )

    def __init__(  # noqa: PLR0917 - all that a head tells
        self,
        texts: tuple[bytes, ...],
        length_at: int,
        post: Receiving,
        lane: Lane,
        count: Count,
        answer: bytes,
    ) -> None:
        self.opened = post.opened
        self.spec = post.opened.environment.spec
        self.headers = {b"origin": post.headers.get(b"origin", b"")}
        self.compressed = post.compressed
        self.lane = lane
        self.count = count
        self.answer = answer
        self._before, *self._after = texts
        self._length_at = length_at
        self._date = b""
        self._written = b""

    def read(self, data: bytes) -> tuple[str, bytes] | None:
        """Return id and body of a whole request with this head; None of any other."""
        if not data.startswith(self._before):
            return None
        at = len(self._before)
        values = [b"", b""]
        for place, text in enumerate(self._after):
            end = data.find(b"\r", at, at + MAX_VALUE)
            if end < 0 or not data.startswith(text, end):
                return None
            values[place] = data[at:end]
            at = end + len(text)
        length, payload_id = values[self._length_at], values[1 - self._length_at]
        if not length.isdigit() or int(length) != len(data) - at or len(data) > PLAIN_SIZE:
            return None
        if len(self._after) > 1 and not is_payload_id(payload_id):
            return None
        return payload_id.decode(), data[at:]

    def written(self, date: bytes) -> bytes:
        """Return the 202; put together once a second."""
        if self._date is not date:
            self._date, self._written = date, self.answer + date
        return self._written


class Receiving:
    """A post that is being received or kept. To uvicorn it looks like a request to the application.

    Args:
        opened: where it goes, and whose it is.
        url: the target of the request.
        headers: of the request, each once.
        room: for the body.
        head: if what its head means was known.
    """

    __slots__ = (
        *("_held", "_room", "head", "headers", "opened", "parts", "url"),
        *("disconnected", "keep_alive", "response_complete"),
    )

    message_event = _NOBODY_WAITS

    def __init__(
        self,
        opened: Opened,
        url: bytes,
        headers: Mapping[bytes, bytes],
        room: Room,
        head: Head | None = None,
    ) -> None:
        self.opened = opened
        self.url = url
        self.head = head
        self.headers = headers
        self.parts: list[bytes] = []
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False
        self._room = room
        self._held = 0

    def take(self, part: bytes) -> bool:
        """Take a further part; return whether the post is plain still."""
        self.parts.append(part)
        return self._hold(len(part))

    def content(self) -> bytes:
        """Return the body, decompressed; empty if there is none, or it is not plain."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        return _inflated(body, self._hold) if self.compressed else body

    @property
    def compressed(self) -> bool:
        """Whether the body is."""
        return b"gzip" in self.headers.get(b"content-encoding", b"").lower()

    def release(self) -> None:
        """Let others have the room."""
        self._room.give_back(self._held)
        self._held = 0
        self.parts.clear()

    def _hold(self, size: int) -> bool:
        if self._held + size > min(self._room.max_size, 2 * PLAIN_SIZE):
            return False
        try:
            self._room.take(size)
        except Refused:
            return False
        self._held += size
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
