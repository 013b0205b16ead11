"""Contexts that ask for their flags at the front door: plain GETs, without the application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.audience import Audience
from relay.model.count import Count
from relay.relay import Relay
from relay.web.answers import Answer, Headers
from relay.web.auth import by_plain_key
from relay.web.cors import cors_lines
from relay.web.endpoint import BROWSER, MOBILE, SERVER, Access
from relay.web.evaluation import Evaluation, Found, timed
from relay.web.polling import Resource, accepts_gzip
from relay.web.traffic import Series, Traffic, client

METHODS = ("GET", "OPTIONS")
"""Of the routes of browsers, as they are told."""

MAX_KNOWN = 1024
"""Kinds of requests that are at hand: far more than there are environments, each with some sites
and kinds of clients. Each takes some kB."""

_BROWSERS = re.compile(rb"/sdk/evalx/([0-9A-Za-z_-]+)/(contexts|users)")
_ASKED_WITH = (b"authorization", b"origin", b"x-launchdarkly-user-agent", b"user-agent")
"""Headers that matter, beside those that choose the variant."""


class Route(NamedTuple):
    """Where a kind of client asks."""

    template: str
    audience: Audience
    access: Access


_BY_KEY: Mapping[bytes, Route] = {
    b"/%b/evalx/%b" % (root, name): Route(
        f"/{root.decode()}/evalx/{name.decode()}/{{context}}", audience, access
    )
    for root, audience, access in (
        (b"sdk", Audience.SERVER, SERVER),
        (b"msdk", Audience.MOBILE, MOBILE),
    )
    for name in (b"contexts", b"users")
}
_BY_ID: Mapping[bytes, Route] = {
    name: Route(f"/sdk/evalx/{{envId}}/{name.decode()}/{{context}}", Audience.BROWSER, BROWSER)
    for name in (b"contexts", b"users")
}


class Told(NamedTuple):
    """An answer in the form in which it is written.

    Args:
        head: as `Answer.head`.
        pieces: of the body.
        environment: whose flags it has.
        counter: what counts it.
        again: whether the same request may well come again.
    """

    head: bytes
    pieces: tuple[bytes, ...]
    environment: Environment
    counter: Count
    again: bool = False


@dataclass(frozen=True, slots=True)
class _Asker:
    """What requests have in common that differ in their contexts only."""

    environment: Environment
    route: Route
    count: Count
    cors: Headers
    frames: dict[bool, tuple[bytes, bytes]] = field(default_factory=dict)
    """By whether a body is worth compressing: the head of its plain answer, up to the ETag and
    from there to its length."""

    def tell(self, answer: Answer, *, again: bool = False) -> Told:
        answer = answer.with_headers(*self.cors)
        return Told(answer.head, (answer.body,), self.environment, self.count, again)

    def tell_plainly(self, found: Found) -> Told:
        """Return what `tell` returns of the plain variant, without doing all again."""
        resource = found.resource
        frame = self.frames.get(resource.compressible)
        if frame is None:
            frame = self.frames[resource.compressible] = self._frame(resource)
        head = b"%b%b%b%d\r\n" % (frame[0], resource.etag, frame[1], resource.size)
        return Told(head, resource.pieces, self.environment, self.count, found.again)

    def _frame(self, resource: Resource) -> tuple[bytes, bytes]:
        head = resource.plain.with_headers(*self.cors).head
        start, _, rest = head.partition(resource.etag)
        end, name, _ = rest.rpartition(b"content-length: ")
        return start, end + name


class Questions:
    """What answers them.

    Args:
        relay: whose environments are served.
        evaluation: evaluates; the application has the same.
        traffic: counts requests; the application has the same.
    """

    def __init__(self, relay: Relay, evaluation: Evaluation, traffic: Traffic) -> None:
        self._relay = relay
        self._evaluation = evaluation
        self._traffic = traffic
        self._askers: dict[tuple[bytes | None, ...], _Asker] = {}

    def answer(self, url: bytes, headers: Mapping[bytes, bytes]) -> Told | None:
        """Return the answer to a GET; None if it is the application's.

        Args:
            url: as on the wire.
            headers: of the request, each once.
        """
        path, _, query = url.partition(b"?")
        prefix, _, segment = path.rpartition(b"/")
        asker = self._asker(prefix, headers)
        if asker is None:
            return None
        environment, audience = asker.environment, asker.route.audience
        found = self._evaluation.find(environment, audience, segment, query)
        if found is None:
            return None
        if isinstance(found, Answer):
            return asker.tell(found)
        if_none_match = headers.get(b"if-none-match", b"")
        accept_encoding = headers.get(b"accept-encoding", b"")
        compressed = found.resource.compressible and accepts_gzip(accept_encoding)
        if not (if_none_match or compressed or environment.spec.ttl):
            return asker.tell_plainly(found)
        variant = found.resource.variant(if_none_match, accept_encoding)
        answer = timed(variant, environment, audience)
        return None if answer is None else asker.tell(answer, again=found.again)

    def _asker(self, prefix: bytes, headers: Mapping[bytes, bytes]) -> _Asker | None:
        key = (prefix, *map(headers.get, _ASKED_WITH))
        asker = self._askers.get(key)
        if asker is None:
            asker = self._new_asker(prefix, headers)
            if asker is not None:
                if len(self._askers) >= MAX_KNOWN:
                    self._askers.clear()
                self._askers[key] = asker
        return asker

    def _new_asker(self, prefix: bytes, headers: Mapping[bytes, bytes]) -> _Asker | None:
        route, environment = self._found(prefix, headers)
        if route is None or environment is None:
            return None
        spec, access = environment.spec, route.access
        agent = client(self._traffic, headers)
        series = Series(spec.name, route.template, "GET", access.platform, agent)
        origin = headers.get(b"origin", b"")
        told = access is BROWSER
        cors = cors_lines(spec, origin, METHODS, access.exposed) if told else ()
        return _Asker(environment, route, self._traffic.requests[series], cors)

    def _found(
        self, prefix: bytes, headers: Mapping[bytes, bytes]
    ) -> tuple[Route | None, Environment | None]:
        route = _BY_KEY.get(prefix)
        if route is not None:
            mobile = route.access is MOBILE
            known = self._relay.by_mobile_key if mobile else self._relay.by_sdk_key
            return route, by_plain_key(known, headers)
        match = _BROWSERS.fullmatch(prefix)
        if match is None:
            return None, None
        return _BY_ID[match[2]], self._relay.by_environment_id.get(match[1].decode())
