"""Contexts that ask for their flags at the front door: plain GETs, without the application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.audience import Audience
from relay.evaluation.form import Body
from relay.model.count import Count
from relay.relay import Relay
from relay.web.answers import Answer, Headers
from relay.web.auth import by_plain_key
from relay.web.cors import cors_lines
from relay.web.deflating import compressed, etag_of, to_compress
from relay.web.endpoint import BROWSER, MOBILE, SERVER, Access
from relay.web.evaluation import Evaluation, Found, resource_of, timed
from relay.web.heads import MAX_HEAD
from relay.web.polling import MAX_COMPRESSED_AT_ONCE, MIN_COMPRESSED, accepts_gzip
from relay.web.prepared import Told
from relay.web.traffic import Series, Traffic, client

METHODS = ("GET", "OPTIONS")
"""Of the routes of browsers, as they are told."""

MAX_KNOWN = 1024
"""Kinds of requests that are at hand: far more than there are environments, each with some sites
and kinds of clients."""

_BROWSERS = re.compile(rb"/sdk/evalx/([0-9A-Za-z_-]+)/(contexts|users)")
_LINE_END = b" HTTP/1.1\r\n"
_NOT_ALPHANUMERIC = b"-_=+"
"""What base64 has beside, but for the slash."""
_PLAIN_QUERY = re.compile(rb"[0-9A-Za-z=&]*")


class Route(NamedTuple):
    """Where a kind of client asks."""

    template: str
    access: Access


_BY_KEY: Mapping[bytes, Route] = {
    b"/%b/evalx/%b" % (root, name): Route(
        f"/{root.decode()}/evalx/{name.decode()}/{{context}}", access
    )
    for root, access in ((b"sdk", SERVER), (b"msdk", MOBILE))
    for name in (b"contexts", b"users")
}
_BY_ID: Mapping[bytes, Route] = {
    name: Route(f"/sdk/evalx/{{envId}}/{name.decode()}/{{context}}", BROWSER)
    for name in (b"contexts", b"users")
}


@dataclass(frozen=True, slots=True)
class _Asker:
    """What requests have in common that differ in their contexts only.

    Args:
        environment: whose flags they ask for.
        audience: of these.
        count: what counts them.
        cors: what browsers are told.
        if_none_match: the header; empty if there is none.
        accept_encoding: the header; empty if there is none.
        closes: whether the connection shall end with the answer.
    """

    environment: Environment
    audience: Audience
    count: Count
    cors: Headers
    if_none_match: bytes
    accept_encoding: bytes
    closes: bool
    is_usual: bool = field(init=False)
    """Whether all answers to those who have no ETag have the same head, but for ETag and length."""
    takes_gzip: bool = field(init=False)
    frames: dict[tuple[bool, bool], tuple[bytes, bytes]] = field(default_factory=dict)
    """By whether a body is worth compressing, and is compressed: the head of the answer up to the
    ETag, and from there to the length."""

    def __post_init__(self) -> None:
        is_usual = not (self.if_none_match or self.environment.spec.ttl)
        object.__setattr__(self, "is_usual", is_usual)
        object.__setattr__(self, "takes_gzip", accepts_gzip(self.accept_encoding))

    def tell(self, answer: Answer, *, again: bool = False) -> Told:
        answer = answer.with_headers(*self.cors)
        return Told(answer.head, (answer.body,), self.environment, self.count, self.closes, again)

    def tell_usual(self, found: Found) -> Told | None:
        """Return what `tell` returns of the plain or compressed variant, without doing all again.

        None if it has to be compressed aside.
        """
        body = found.body
        pieces, size = body.pieces, body.size
        compressible = size >= MIN_COMPRESSED
        zipped = compressible and self.takes_gzip
        if zipped:
            if to_compress(body) > MAX_COMPRESSED_AT_ONCE:
                return None
            pieces = (compressed(body),)
            size = len(pieces[0])
        frame = self.frames.get((compressible, zipped))
        if frame is None:
            frame = self.frames[compressible, zipped] = self._frame(body, zipped=zipped)
        head = b"%b%b%b%d\r\n" % (frame[0], etag_of(body), frame[1], size)
        return Told(head, pieces, self.environment, self.count, self.closes, found.again)

    def _frame(self, body: Body, *, zipped: bool) -> tuple[bytes, bytes]:
        resource = resource_of(body, self.environment)
        answer = resource.compress() if zipped else resource.plain
        start, _, rest = answer.with_headers(*self.cors).head.partition(resource.etag)
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
        self._askers: dict[tuple[bytes, bytes], _Asker] = {}
        """By all that comes before the context in a request, and all that follows its line."""

    def known(self, head: bytes) -> Told | None:
        """Return the answer to a request that differs from an earlier one in its context only.

        None if there was none, or if this has to be looked at anew.

        Args:
            head: all of the request.
        """
        line, _, rest = head.partition(_LINE_END)
        start, _, last = line.rpartition(b"/")
        asker = self._askers.get((start, rest))
        if asker is None:
            return None
        segment, _, query = last.partition(b"?")
        # In any other case the parser has something to say.
        plain = segment.translate(None, _NOT_ALPHANUMERIC).isalnum()
        if not plain or (query and _PLAIN_QUERY.fullmatch(query) is None):
            return None
        return self._told(asker, segment, query)

    def answer(
        self, head: bytes, url: bytes, headers: Mapping[bytes, bytes], *, closes: bool
    ) -> Told | None:
        """Return the answer to a GET that is all of a request; None if it is the application's.

        Args:
            head: all of the request.
            url: of it.
            headers: of it, each once.
            closes: whether the client wants the connection to end with the answer.
        """
        path, _, query = url.partition(b"?")
        prefix, _, segment = path.rpartition(b"/")
        asker = self._asker(prefix, headers, closes=closes)
        if asker is None:
            return None
        told = self._told(asker, segment, query)
        if told is not None and not asker.if_none_match:
            self._remember(prefix, head, asker)
        return told

    def _remember(self, prefix: bytes, head: bytes, asker: _Asker) -> None:
        _, _, rest = head.partition(_LINE_END)
        if rest and len(rest) <= MAX_HEAD:
            if len(self._askers) >= MAX_KNOWN:
                self._askers.clear()
            self._askers[b"GET " + prefix, rest] = asker

    def _told(self, asker: _Asker, segment: bytes, query: bytes) -> Told | None:
        environment, audience = asker.environment, asker.audience
        found = self._evaluation.find(environment, audience, segment, query)
        if found is None:
            return None
        if isinstance(found, Answer):
            return asker.tell(found)
        if asker.is_usual:
            return asker.tell_usual(found)
        resource = resource_of(found.body, environment)
        variant = resource.variant(asker.if_none_match, asker.accept_encoding)
        answer = timed(variant, environment, audience)
        return None if answer is None else asker.tell(answer, again=found.again)

    def _asker(
        self, prefix: bytes, headers: Mapping[bytes, bytes], *, closes: bool
    ) -> _Asker | None:
        route, environment = self._found(prefix, headers)
        if route is None or environment is None:
            return None
        spec, access = environment.spec, route.access
        agent = client(self._traffic, headers)
        series = Series(spec.name, route.template, "GET", access.platform, agent)
        origin = headers.get(b"origin", b"")
        told = access is BROWSER
        cors = cors_lines(spec, origin, METHODS, access.exposed) if told else ()
        return _Asker(
            environment,
            access.audience,
            self._traffic.requests[series],
            cors,
            headers.get(b"if-none-match", b""),
            headers.get(b"accept-encoding", b""),
            closes,
        )

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
