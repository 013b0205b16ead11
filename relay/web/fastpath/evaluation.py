"""Contexts that ask for their flags at the front door: plain GETs, without the application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.environment import Environment
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.sdkkind import SDKKind
from relay.model.metrics import MetricValue
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics, Series, client_label
from relay.web.access import by_plain_key
from relay.web.compression import compressed, etag_of, to_compress
from relay.web.cors import cors_lines
from relay.web.endpoints.evaluation import (
    EvaluationHandler,
    EvaluationResult,
    resource_for,
    with_expiry,
)
from relay.web.fastpath.cache import EvaluationResponse
from relay.web.fastpath.heads import MAX_HEAD
from relay.web.resources import MAX_COMPRESSED_AT_ONCE, MIN_COMPRESSED, accepts_gzip
from relay.web.responses import Headers, PreparedResponse
from relay.web.routing import BROWSER, MOBILE, SERVER, RouteAuth

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


class EvaluationRoute(NamedTuple):
    """Where a kind of client asks."""

    template: str
    auth: RouteAuth


_BY_KEY: Mapping[bytes, EvaluationRoute] = {
    b"/%b/evalx/%b" % (root, name): EvaluationRoute(
        f"/{root.decode()}/evalx/{name.decode()}/{{context}}", access
    )
    for root, access in ((b"sdk", SERVER), (b"msdk", MOBILE))
    for name in (b"contexts", b"users")
}
_BY_ID: Mapping[bytes, EvaluationRoute] = {
    name: EvaluationRoute(f"/sdk/evalx/{{envId}}/{name.decode()}/{{context}}", BROWSER)
    for name in (b"contexts", b"users")
}


@dataclass(frozen=True, slots=True)
class _ClientProfile:
    """What requests have in common that differ in their contexts only.

    Args:
        environment: whose flags they ask for.
        sdk_kind: of these.
        count: what counts them.
        cors: what browsers are told.
        if_none_match: the header; empty if there is none.
        accept_encoding: the header; empty if there is none.
        closes: whether the connection shall end with the answer.
    """

    environment: Environment
    sdk_kind: SDKKind
    count: MetricValue
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

    def respond(self, answer: PreparedResponse, *, cacheable: bool = False) -> EvaluationResponse:
        answer = answer.with_headers(*self.cors)
        return EvaluationResponse(
            answer.head, (answer.body,), self.environment, self.count, self.closes, cacheable
        )

    def respond_usual(self, found: EvaluationResult) -> EvaluationResponse | None:
        """Return the same as `respond` for the plain or compressed variant, without its work.

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
        return EvaluationResponse(
            head, pieces, self.environment, self.count, self.closes, found.cacheable
        )

    def _frame(self, body: EvalBody, *, zipped: bool) -> tuple[bytes, bytes]:
        resource = resource_for(body, self.environment)
        answer = resource.compress() if zipped else resource.plain
        start, _, rest = answer.with_headers(*self.cors).head.partition(resource.etag)
        end, name, _ = rest.rpartition(b"content-length: ")
        return start, end + name


class EvaluationFastPath:
    """What answers them.

    Args:
        relay: whose environments are served.
        evaluation: evaluates; the application has the same.
        traffic: counts requests; the application has the same.
    """

    def __init__(
        self, relay: Relay, evaluation: EvaluationHandler, traffic: RequestMetrics
    ) -> None:
        self._relay = relay
        self._evaluation = evaluation
        self._traffic = traffic
        self._profiles: dict[tuple[bytes, bytes], _ClientProfile] = {}
        """By all that comes before the context in a request, and all that follows its line."""

    def answer_known(self, head: bytes) -> EvaluationResponse | None:
        """Return the answer to a request that differs from an earlier one in its context only.

        None if there was none, or if this has to be looked at anew.

        Args:
            head: all of the request.
        """
        line, _, rest = head.partition(_LINE_END)
        start, _, last = line.rpartition(b"/")
        asker = self._profiles.get((start, rest))
        if asker is None:
            return None
        segment, _, query = last.partition(b"?")
        # In any other case the parser has something to say.
        plain = segment.translate(None, _NOT_ALPHANUMERIC).isalnum()
        if not plain or (query and _PLAIN_QUERY.fullmatch(query) is None):
            return None
        return self._respond(asker, segment, query)

    def answer(
        self, head: bytes, url: bytes, headers: Mapping[bytes, bytes], *, closes: bool
    ) -> EvaluationResponse | None:
        """Return the answer to a GET that is all of a request; None if it is the application's.

        Args:
            head: all of the request.
            url: of it.
            headers: of it, each once.
            closes: whether the client wants the connection to end with the answer.
        """
        path, _, query = url.partition(b"?")
        prefix, _, segment = path.rpartition(b"/")
        asker = self._profile(prefix, headers, closes=closes)
        if asker is None:
            return None
        told = self._respond(asker, segment, query)
        if told is not None and not asker.if_none_match:
            self._remember(prefix, head, asker)
        return told

    def _remember(self, prefix: bytes, head: bytes, asker: _ClientProfile) -> None:
        _, _, rest = head.partition(_LINE_END)
        if rest and len(rest) <= MAX_HEAD:
            if len(self._profiles) >= MAX_KNOWN:
                self._profiles.clear()
            self._profiles[b"GET " + prefix, rest] = asker

    def _respond(
        self, asker: _ClientProfile, segment: bytes, query: bytes
    ) -> EvaluationResponse | None:
        environment, audience = asker.environment, asker.sdk_kind
        found = self._evaluation.find(environment, audience, segment, query)
        if found is None:
            return None
        if isinstance(found, PreparedResponse):
            return asker.respond(found)
        if asker.is_usual:
            return asker.respond_usual(found)
        resource = resource_for(found.body, environment)
        variant = resource.variant(asker.if_none_match, asker.accept_encoding)
        answer = with_expiry(variant, environment, audience)
        return None if answer is None else asker.respond(answer, cacheable=found.cacheable)

    def _profile(
        self, prefix: bytes, headers: Mapping[bytes, bytes], *, closes: bool
    ) -> _ClientProfile | None:
        route, environment = self._resolve(prefix, headers)
        if route is None or environment is None:
            return None
        spec, access = environment.spec, route.auth
        agent = client_label(self._traffic, headers)
        series = Series(spec.name, route.template, "GET", access.platform, agent)
        origin = headers.get(b"origin", b"")
        told = access is BROWSER
        cors = cors_lines(spec, origin, METHODS, access.exposed_headers) if told else ()
        return _ClientProfile(
            environment,
            access.sdk_kind,
            self._traffic.requests[series],
            cors,
            headers.get(b"if-none-match", b""),
            headers.get(b"accept-encoding", b""),
            closes,
        )

    def _resolve(
        self, prefix: bytes, headers: Mapping[bytes, bytes]
    ) -> tuple[EvaluationRoute | None, Environment | None]:
        route = _BY_KEY.get(prefix)
        if route is not None:
            mobile = route.auth is MOBILE
            known = self._relay.by_mobile_key if mobile else self._relay.by_sdk_key
            return route, by_plain_key(known, headers)
        match = _BROWSERS.fullmatch(prefix)
        if match is None:
            return None, None
        return _BY_ID[match[2]], self._relay.by_environment_id.get(match[1].decode())
