"""Fast path of client-side evaluation (`GET /sdk/evalx/…`, `/msdk/evalx/…`, `/sdk/poll/eval/…`)."""

from __future__ import annotations

import re

from msgspec import Struct, field

from relay.environment import Environment
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.sdkkind import SDKKind
from relay.model.metrics import MetricValue
from relay.registry import Registry
from relay.telemetry.traffic import RequestMetrics
from relay.web.cache import ANY_PAYLOAD, CacheEntry, ResponseCache
from relay.web.compression import compressed, etag_of, to_compress
from relay.web.cors import cors_lines
from relay.web.endpoints.evaluation import (
    EvaluationHandler,
    EvaluationResult,
    PendingEvaluation,
    resource_for,
    with_expiry,
)
from relay.web.fastpath.cache import ENTRY_SIZE, WireResponse
from relay.web.fastpath.heads import MAX_HEAD, RequestHead
from relay.web.requests import parameter_in
from relay.web.resources import MAX_COMPRESSED_AT_ONCE, MIN_COMPRESSED, accepts_gzip
from relay.web.responses import Headers, PreparedResponse

MAX_PROFILES = 4 * 1024 * 1024
"""Bytes of client profiles: far more than environments, each with a few origins and kinds of
clients."""

PROFILE_SIZE = 2 * 1024
"""Bytes that a client profile takes besides its key."""

_LINE_END = b" HTTP/1.1\r\n"
_BASE64_PUNCTUATION = b"-_=+"
"""Characters of base64 in both alphabets that `isalnum` refuses, except the slash."""
_PLAIN_QUERY = re.compile(rb"[0-9A-Za-z=&_.~():-]*")


_Selection = tuple[str, str]
"""Payload filter and credential in a query; each is empty without one."""

_SELECTS_NOTHING: _Selection = "", ""


class ClientProfile(CacheEntry, eq=False):
    """Everything that requests have in common if they differ in their contexts only.

    Args:
        environment: provides the flags.
        payload: `ANY_PAYLOAD`.
        sdk_kind: kind of the clients.
        fdv2: True if they speak FDv2.
        count: counter of the requests.
        cors: CORS headers of responses to browsers.
        if_none_match: value of the header; empty if there is none.
        accept_encoding: value of the header; empty if there is none.
        closes: True if the client wants the connection closed after the response.
    """

    sdk_kind: SDKKind
    fdv2: bool
    count: MetricValue
    cors: Headers
    if_none_match: bytes
    accept_encoding: bytes
    closes: bool
    is_usual: bool = False
    """True if the heads of all responses differ only in ETag and length."""
    takes_gzip: bool = False
    head_parts: dict[tuple[bool, bool], tuple[bytes, bytes]] = field(default_factory=dict)
    """Head of the response up to the ETag, and from there to the length; by whether a body is large
    enough to be compressed, and whether it is compressed."""

    def __post_init__(self) -> None:
        self.is_usual = not (self.if_none_match or self.environment.spec.ttl)
        self.takes_gzip = accepts_gzip(self.accept_encoding)

    def respond(self, response: PreparedResponse) -> WireResponse:
        """Return a prepared response with this profile's headers."""
        response = response.with_headers(*self.cors)
        environment, count = self.environment, self.count
        pieces = (response.body,)
        return WireResponse(
            environment, environment.payload, response.head, pieces, count, self.closes
        )

    def respond_usual(self, result: EvaluationResult) -> WireResponse | None:
        """Return the same as `respond` for the plain or compressed variant, at less cost.

        None if it has to be compressed in a thread.
        """
        body = result.body
        pieces, size = body.pieces, body.size
        compressible = size >= MIN_COMPRESSED
        compress = compressible and self.takes_gzip
        if compress:
            if to_compress(body) > MAX_COMPRESSED_AT_ONCE:
                return None
            pieces = (compressed(body),)
            size = len(pieces[0])
        parts = self.head_parts.get((compressible, compress))
        if parts is None:
            parts = self.head_parts[compressible, compress] = self._split_head(
                body, compress=compress
            )
        head = b"%b%b%b%d\r\n" % (parts[0], etag_of(body), parts[1], size)
        environment, count = self.environment, self.count
        return WireResponse(environment, environment.payload, head, pieces, count, self.closes)

    def _split_head(self, body: EvalBody, *, compress: bool) -> tuple[bytes, bytes]:
        resource = resource_for(body, self.environment)
        variant = resource.compress() if compress else resource.plain
        start, _, rest = variant.with_headers(*self.cors).head.partition(resource.etag)
        end, name, _ = rest.rpartition(b"content-length: ")
        return start, end + name


class PendingResponse(Struct, frozen=True, eq=False):
    """Response that waits for memberships in big segments."""

    profile: ClientProfile
    evaluation: PendingEvaluation


class EvaluationFastPath:
    """Handler of evaluation requests on the fast path.

    Args:
        registry: of the environments.
        evaluation: evaluates the flags; shared with the application.
        traffic: request metrics, shared with the application.
    """

    def __init__(
        self,
        registry: Registry[Environment],
        evaluation: EvaluationHandler,
        traffic: RequestMetrics,
    ) -> None:
        self._evaluation = evaluation
        self._traffic = traffic
        self.profiles: ResponseCache[ClientProfile] = ResponseCache(registry, MAX_PROFILES)
        """By the bytes before the context in a request, the bytes after the request line, and what
        the query selects."""

    def answer_known(self, head: bytes) -> WireResponse | PendingResponse | None:
        """Return the response to a request that differs from an earlier one in its context only.

        None if there was no such request, or if this one has to be parsed. If memberships have to
        be read first, the response is pending; see `finish`.

        Args:
            head: the whole request.
        """
        line, _, rest = head.partition(_LINE_END)
        start, _, target = line.rpartition(b"/")
        segment, _, query = target.partition(b"?")
        # Anything else has to be judged by the parser.
        selection = _plain_selection(query)
        if selection is None or not segment.translate(None, _BASE64_PUNCTUATION).isalnum():
            return None
        profile = self.profiles.get((start, rest, selection))
        if profile is None:
            return None
        return self._respond(profile, segment, query)

    def answer(self, head: RequestHead) -> WireResponse | PendingResponse | None:
        """Return the response to a GET, or a pending one; None to leave it to the application."""
        profile = self._profile(head)
        response = self._respond(profile, head.segment, head.query)
        selection = _plain_selection(head.query)
        if response is not None and not profile.if_none_match and selection is not None:
            self._remember(head.raw, selection, profile)
        return response

    def _remember(self, head: bytes, selection: _Selection, profile: ClientProfile) -> None:
        line, _, rest = head.partition(_LINE_END)
        if rest and len(rest) <= MAX_HEAD:
            start = line.partition(b"?")[0].rpartition(b"/")[0]
            size = len(start) + len(rest) + sum(map(len, selection))
            profile.size = PROFILE_SIZE + size
            self.profiles.put((start, rest, selection), profile)

    def _respond(
        self, profile: ClientProfile, segment: bytes, query: bytes
    ) -> WireResponse | PendingResponse | None:
        result = self._evaluation.evaluate(
            profile.environment, profile.sdk_kind, segment, query, fdv2=profile.fdv2
        )
        if isinstance(result, PendingEvaluation):
            return PendingResponse(profile, result)
        return self._response(profile, result)

    def finish(self, pending: PendingResponse) -> WireResponse | None:
        """Return a response whose memberships have been read; None to leave it to the application.

        They are not read again if that is not enough: the application does so.
        """
        result = self._evaluation.finish(pending.evaluation)
        known = None if isinstance(result, PendingEvaluation) else result
        return self._response(pending.profile, known)

    def _response(
        self, profile: ClientProfile, result: EvaluationResult | PreparedResponse | None
    ) -> WireResponse | None:
        environment, sdk_kind = profile.environment, profile.sdk_kind
        if result is None:
            return None
        if isinstance(result, PreparedResponse):
            return profile.respond(result)
        if profile.is_usual and result.body.digest:
            response = profile.respond_usual(result)
            counter = result.answer
        else:
            resource = resource_for(result.body, environment)
            variant = resource.variant(profile.if_none_match, profile.accept_encoding)
            if variant is None:
                return None
            response = profile.respond(with_expiry(variant, environment, sdk_kind))
            counter = result.counter(variant)
        if response is not None:
            response.answer = counter
        # A response that states its expiry is different each time.
        if response and result.size and environment.spec.ttl <= 0:
            response.size = ENTRY_SIZE + response.body_size
            response.memberships = result.memberships
        return response

    def _profile(self, head: RequestHead) -> ClientProfile:
        access, headers = head.access, head.headers
        spec, route = access.environment.spec, access.route
        origin = headers.get(b"origin", b"")
        return ClientProfile(
            access.environment,
            ANY_PAYLOAD,
            access.sdk_kind,
            route.evaluates_fdv2,
            self._traffic.requests[access.labels(self._traffic, "GET", headers)],
            cors_lines(spec, origin, route) if route.for_browsers else (),
            headers.get(b"if-none-match", b""),
            headers.get(b"accept-encoding", b""),
            head.closes,
        )


def _plain_selection(query: bytes) -> _Selection | None:
    """Return what a query selects; None if it needs decoding."""
    if not query:
        return _SELECTS_NOTHING
    if _PLAIN_QUERY.fullmatch(query) is None:
        return None
    if b"filter" not in query and b"auth" not in query:
        return _SELECTS_NOTHING
    return parameter_in(query, "filter"), parameter_in(query, "auth")
