"""Posts of events at the front door: the plain ones, which are nearly all, without the application.

A post that turns out to be odd is given to the application with all that has come of it, so what is
refused is refused there, and in its words.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.count import Count
from relay.model.event import Endpoint
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
from relay.web.endpoint import BROWSER, MOBILE, SERVER
from relay.web.events import ACCEPTED, Events
from relay.web.heads import Head, Known, Opened, Route, cut, cut_like, length_at
from relay.web.traffic import Series, Traffic

PLAIN_SIZE = 256 * 1024
"""Bytes of a body, as it is sent, that are collected here; larger ones take turns with others in
the application. Posts of SDKs have some KB."""

MAX_KNOWN = 4096
"""Counts that are at hand: of each kind of client at each route of each environment."""

MAX_HEADS = 1024
"""Heads whose meaning is known: of each kind of client in each environment; a few KB each."""

_ID = re.compile(rb"[0-9A-Za-z_-]+")

_log = logging.getLogger("relay.web")


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

    def learn(self, post: Receiving) -> None:
        """Remember what the head of an accepted post means, unless it is odd."""
        head = cut(post.start)
        at = length_at(head, post.url, post.headers) if head else None
        if head is None or at is None:
            return
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        route, _, environment = post.opened
        self._heads[head.texts] = Head(
            head.texts,
            post.opened,
            at,
            self._events.lane(environment, route.endpoint, post.headers),
            compressed=post.compressed,
            origin=post.headers.get(b"origin", b""),
            count=self._count(post),
            answer=self._completed(ACCEPTED, post).head,
        )

    def known(self, data: bytes, last: Head | None = None) -> Known | None:
        """Return what is known of the post with which data begin; None if it is not known.

        Args:
            data: what has come.
            last: the head of the post before on the same connection; probably it is the same.
        """
        head, meaning = (cut_like(data, last.texts), last) if last else (None, None)
        if head is None:
            head = cut(data)
            meaning = self._heads.get(head.texts) if head else None
        known = meaning.read(head) if head and meaning else None
        return known if known and known.size <= PLAIN_SIZE else None

    def _holds(self, head: Head) -> bool:
        """Whether a head means what it meant: its credential opens the same environment."""
        route, credential, environment = head.opened
        return (
            self._environments(route).get(credential) is environment
            and environment.spec is head.spec
        )

    def accept_known(self, known: Known, data: bytes) -> asyncio.Future[object] | None:
        """Accept a whole post; None if it is odd, or its head means something else by now."""
        head, body = known.head, data[known.start :]
        if not self._holds(head):
            return None
        events, room = self._events, self._events.room
        if head.compressed:
            body = _inflated(body, room.has)
        if not room.has(len(body)):
            return None
        try:
            kept = events.accept_in(head.lane, known.payload_id, body)
        except Exception as e:  # noqa: BLE001 - the client is answered all the same
            return _failed(e)
        if kept is None:
            return None
        head.count.value += 1
        return asyncio.ensure_future(kept)

    def waiting(self, known: Known) -> Receiving:
        """Return what stands for a known post until it is complete, or safe."""
        headers = {b"origin": known.head.origin}
        return Receiving(known.head.opened, b"", headers, self._events.room, known)

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


def _has_plain_body(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    return b"transfer-encoding" not in headers and length.isdigit() and int(length) <= PLAIN_SIZE


_NOBODY_WAITS = asyncio.Event()


class Receiving:
    """A post that is being received or kept. To uvicorn it looks like a request to the application.

    Args:
        opened: where it goes, and whose it is.
        url: the target of the request.
        headers: of the request, each once.
        room: for the body.
        known: if its head was known.
    """

    __slots__ = (
        *("_held", "_room", "headers", "known", "opened", "parts", "start", "url"),
        *("disconnected", "keep_alive", "response_complete"),
    )

    message_event = _NOBODY_WAITS

    def __init__(
        self,
        opened: Opened,
        url: bytes,
        headers: Mapping[bytes, bytes],
        room: Room,
        known: Known | None = None,
    ) -> None:
        self.opened = opened
        self.url = url
        self.known = known
        self.start = b""
        """The first bytes of the request, where its head may be learnt."""
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
        return self.hold(len(part))

    def content(self) -> bytes:
        """Return the body, decompressed; empty if there is none, or it is not plain."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        return _inflated(body, self.hold) if self.compressed else body

    @property
    def compressed(self) -> bool:
        """Whether the body is."""
        return b"gzip" in self.headers.get(b"content-encoding", b"").lower()

    def release(self) -> None:
        """Let others have the room."""
        self._room.give_back(self._held)
        self._held = 0
        self.parts.clear()

    def hold(self, size: int) -> bool:
        """Take room for so many bytes, until the release; return whether there is any."""
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
