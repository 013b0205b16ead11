"""Posts of events at the front door: the plain ones, which are nearly all, without the application.

A post that turns out to be odd is given to the application with all that has come of it, so what is
refused is refused there, and in its words.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.model.count import Count
from relay.model.event import Endpoint
from relay.relay import Relay
from relay.web.answers import Answer, environment_headers
from relay.web.auth import by_plain_key
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
from relay.web.events import ACCEPTED, Events
from relay.web.traffic import Series, Traffic

PLAIN_SIZE = 256 * 1024
"""Bytes of a body, as it is sent, that are collected here; larger ones take turns with others in
the application. Posts of SDKs have some KB."""

MAX_KNOWN = 4096
"""Counts that are at hand: of each kind of client at each route of each environment."""

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

    def begin(self, url: bytes, headers: Mapping[bytes, bytes]) -> Receiving | None:
        """Return what receives a post whose head has come; None if it is the application's."""
        prefix, slash, last = url.rpartition(b"/")
        route = ROUTES.get(url) or ROUTES.get(prefix + slash)
        if route is None:
            return None
        environment: Environment | None = None
        if route.access is BROWSER:
            if _ID.fullmatch(last):
                environment = self._relay.by_environment_id.get(last.decode())
        else:
            known = self._relay.by_mobile_key if route.access is MOBILE else self._relay.by_sdk_key
            environment = by_plain_key(known, headers)
        if environment is None or not self._events.on or not _has_plain_body(headers):
            return None
        return Receiving(environment, route, headers, self._events.room)

    def accept(self, post: Receiving) -> asyncio.Future[object] | None:
        """Accept a post whose body has come; None if it is the application's."""
        body = post.content()
        if not body:
            return None
        events, environment, headers = self._events, post.environment, post.headers
        try:
            kept = events.accept_plain(environment, post.route.endpoint, headers, body)
        except Exception as e:  # noqa: BLE001 - the client is answered all the same
            failed: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            failed.set_exception(e)
            return failed
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
        answer = NO_ROOM if error else ACCEPTED
        spec, access = post.environment.spec, post.route.access
        more = environment_headers(spec)
        if access is BROWSER:
            more += cors_lines(spec, post.headers.get(b"origin", b""), BROWSERS, access.exposed)
        return answer.with_headers(*more)

    def _count(self, post: Receiving) -> Count:
        own = post.headers.get(b"x-launchdarkly-user-agent", b"")
        general = post.headers.get(b"user-agent", b"")
        route, name = post.route, post.environment.spec.name
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


def _has_plain_body(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length")
    if length is None:
        return headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    return b"transfer-encoding" not in headers and length.isdigit() and int(length) <= PLAIN_SIZE


_NOBODY_WAITS = asyncio.Event()


class Receiving:
    """A post that is being received or kept. To uvicorn it looks like a request to the application.

    Args:
        environment: whose events come.
        route: to which endpoint.
        headers: of the request, each once.
        room: for the body.
    """

    __slots__ = (
        *("_held", "_room", "environment", "headers", "parts", "route"),
        *("disconnected", "keep_alive", "response_complete"),
    )

    message_event = _NOBODY_WAITS

    def __init__(
        self, environment: Environment, route: Route, headers: Mapping[bytes, bytes], room: Room
    ) -> None:
        self.environment = environment
        self.route = route
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
        if b"gzip" in self.headers.get(b"content-encoding", b"").lower():
            body = self._inflated(body)
        return body

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

    def _inflated(self, body: bytes) -> bytes:
        gunzip = Gunzip()
        found = b""
        try:
            for part in gunzip.parts(body):
                if found or len(part) == INFLATED_AT_ONCE or not self._hold(len(part)):
                    return b""
                found = part
        except CORRUPT:
            return b""
        return found if gunzip.complete else b""
