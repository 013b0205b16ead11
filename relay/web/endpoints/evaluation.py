"""What client-side SDKs ask for: all their flags, evaluated for one context (endpoints 1.5).

The same context asks again and again: its answer is looked up by the bytes of the request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from relay.environment import Environment
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.compiled.program import Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.web.bodies import RequestRejected
from relay.web.compression import EvaluationResource
from relay.web.contexts import (
    NO_KEY,
    check_secure_mode_hash,
    context_budget,
    context_in_body,
    context_in_path,
    read_context_body,
    secure_mode_hash_in,
    wants_reasons,
)
from relay.web.resources import with_ttl
from relay.web.responses import PreparedResponse, environment_headers, json_error
from relay.web.routing import Handler, header

MAX_CACHED = 64 * 1024 * 1024
"""Bytes of the answers that are kept for contexts that ask again: all environments together."""

ENTRY_SIZE = 2 * 1024
"""Bytes that keeping an answer costs beside its body."""

MAX_AT_ONCE = 8 * 1024
"""Bytes of a context that is evaluated on the event loop, a larger one in a thread: an array of
thousands of values is looked through for each condition."""

MAX_RECENT = 16 * 1024
"""Contexts that have asked once lately. Only who asks again is kept an answer for: most that ask
only once would push out those who do. Each takes some 100 bytes."""

NOT_INITIALIZED = json_error(503, "Service not initialized")

_NO_SEGMENTS = (b"", b".", b"..")
"""What stands in place of a context when a path is not canonical: the application redirects it."""


class _EvaluationRequest(Struct, frozen=True):
    """Who asks, and how.

    Args:
        sdk_kind: of flags.
        raw: the bytes that hold the context, as they came.
        reader: gets it from them.
        with_reasons: whether the reasons are wanted.
        secure_mode_hash: what secure mode wants.
    """

    sdk_kind: SDKKind
    raw: bytes
    reader: Callable[[bytes], Context]
    with_reasons: bool
    secure_mode_hash: str


class EvaluationResult(Struct, frozen=True):
    """A result.

    Args:
        body: what answers.
        cacheable: whether it is kept because the context had asked before.
    """

    body: EvalBody
    cacheable: bool


class _CacheEntry(Struct, frozen=True):
    """An answer that was given.

    Args:
        version: of the data.
        key: of the context, fully qualified; empty if nobody has to prove it.
        body: the answer.
        size: bytes that keeping it costs.
    """

    version: int
    key: str
    body: EvalBody
    size: int


@dataclass(slots=True)
class _ResultCache:
    """The answers that were given last to those who ask again, within `MAX_CACHED`."""

    entries: OrderedDict[tuple[object, ...], _CacheEntry] = field(default_factory=OrderedDict)
    """The one used last comes last."""
    size: int = 0
    _recent: set[int] = field(default_factory=set)
    """Hashes of the questions that were asked since there were last `MAX_RECENT` of them."""
    _recent_before: set[int] = field(default_factory=set)
    """Those of the time before."""

    def is_repeated(self, key: tuple[object, ...]) -> bool:
        """Whether a question was asked lately; from now on it was."""
        mark = hash(key)
        if mark in self._recent or mark in self._recent_before:
            return True
        if len(self._recent) >= MAX_RECENT:
            self._recent_before, self._recent = self._recent, set()
        self._recent.add(mark)
        return False

    def get(self, key: tuple[object, ...]) -> _CacheEntry | None:
        known = self.entries.get(key)
        if known is not None:
            self.entries.move_to_end(key)
        return known

    def put(self, key: tuple[object, ...], known: _CacheEntry) -> None:
        replaced = self.entries.pop(key, None)
        self.size += known.size - (replaced.size if replaced else 0)
        self.entries[key] = known
        while self.size > MAX_CACHED:
            _, oldest = self.entries.popitem(last=False)
            self.size -= oldest.size


class EvaluationHandler:
    """Answers evaluations at both doors.

    Args:
        max_body: bytes of the largest body that holds a context; 0 for the bound of
            `relay.web.context`.
    """

    def __init__(self, max_body: int = 0) -> None:
        self.budget = context_budget(max_body)
        self._cache = _ResultCache()

    def find(
        self, environment: Environment, sdk_kind: SDKKind, segment: bytes, query: bytes
    ) -> EvaluationResult | PreparedResponse | None:
        """Return the result that a GET asks for, or the refusal; None if it is the application's.

        Args:
            environment: whose flags.
            sdk_kind: which of them.
            segment: of the path, which holds the context, as on the wire.
            query: as on the wire.
        """
        if len(segment) > MAX_AT_ONCE or b"%" in segment or segment in _NO_SEGMENTS:
            return None
        if query and (b"%" in query or b"filter" in query):
            return None
        question = _request(sdk_kind, segment, context_in_path, query)
        try:
            program = environment.programs.current(sdk_kind)
            return self._evaluate(environment, program, question)
        except RequestRejected as e:
            return _of(environment, e.answer)

    def in_path(self, sdk_kind: SDKKind) -> Handler:
        """Return what answers a GET whose path ends in the context."""

        async def respond(request: Request, environment: Environment) -> Response:
            segment = request.path_params["context"].encode(errors="replace")
            query = request.scope["query_string"]
            question = _request(sdk_kind, segment, context_in_path, query)
            return (await self._complete(request, environment, question)).to_starlette()

        return respond

    def in_body(self, sdk_kind: SDKKind) -> Handler:
        """Return what answers a request whose body is the context."""

        async def respond(request: Request, environment: Environment) -> Response:
            try:
                body = await read_context_body(request, self.budget)
            except RequestRejected as e:
                return e.answer.to_starlette()
            question = _request(sdk_kind, body, context_in_body, request.scope["query_string"])
            return (await self._complete(request, environment, question)).to_starlette()

        return respond

    async def _complete(
        self, request: Request, environment: Environment, question: _EvaluationRequest
    ) -> PreparedResponse:
        none_match, encoding = header(request, "if-none-match"), header(request, "accept-encoding")
        evaluations, audience = environment.programs, question.sdk_kind
        try:
            if len(question.raw) > MAX_AT_ONCE:
                program = await evaluations.ready(audience)
                body = await asyncio.to_thread(_read_and_evaluated, environment, program, question)
            else:
                found = self._evaluate(environment, evaluations.current(audience), question)
                if found is None:
                    program = await evaluations.ready(audience)
                    found = self._evaluate(environment, program, question)
                body = found.body if found else None
        except RequestRejected as e:
            return _of(environment, e.answer)
        if body is None:
            return _of(environment, NOT_INITIALIZED)
        resource = resource_for(body, environment)
        answer = resource.variant(none_match, encoding)
        if answer is None:
            answer = await resource.compress_in_thread()
        return with_expiry(answer, environment, audience) or NOT_INITIALIZED

    def _evaluate(
        self, environment: Environment, program: Program | None, question: _EvaluationRequest
    ) -> EvaluationResult | None:
        """Return the result; None if it has to wait for the program.

        Raises:
            Refused: there is none for this context, or no data.
        """
        raw, reader = question.raw, question.reader
        place = (environment, question.sdk_kind, raw, question.with_reasons, reader)
        again = self._cache.is_repeated(place)
        known = self._cache.get(place) if again else None
        if (
            known is not None
            and program is not None
            and environment.payload is not None
            and known.version == program.version
        ):
            _check_secure_mode(environment, known.key, question)
            return EvaluationResult(known.body, cacheable=True)
        context = reader(raw)
        body = _evaluated(environment, program, question, context)
        if body is None or program is None:
            return None
        if again:
            key = context.fully_qualified_key if environment.spec.secure_mode else ""
            # Mostly shared, but not with the answers of other data, or of no group.
            size = ENTRY_SIZE + body.size + len(raw)
            self._cache.put(place, _CacheEntry(program.version, key, body, size))
        return EvaluationResult(body, again)


def _request(
    sdk_kind: SDKKind, raw: bytes, reader: Callable[[bytes], Context], query: bytes
) -> _EvaluationRequest:
    return _EvaluationRequest(
        sdk_kind, raw, reader, wants_reasons(query), secure_mode_hash_in(query)
    )


def _read_and_evaluated(
    environment: Environment, program: Program | None, question: _EvaluationRequest
) -> EvalBody | None:
    """Do for a large context what `_evaluated` does; in a thread."""
    return _evaluated(environment, program, question, question.reader(question.raw))


def _evaluated(
    environment: Environment,
    program: Program | None,
    question: _EvaluationRequest,
    context: Context,
) -> EvalBody | None:
    """Evaluate; None if that has to wait for the program.

    Raises:
        Refused: there is no result for this context, or no data.
    """
    if environment.spec.secure_mode:
        _check_secure_mode(environment, context.fully_qualified_key, question)
    if environment.payload is None:
        raise RequestRejected(NOT_INITIALIZED)
    if program is None:
        return None
    if context.has_empty_key:
        raise RequestRejected(NO_KEY)
    return program.body(context, with_reasons=question.with_reasons)


def _check_secure_mode(environment: Environment, key: str, question: _EvaluationRequest) -> None:
    """Secure mode is for those whose credential is public."""
    if question.sdk_kind is SDKKind.BROWSER:
        check_secure_mode_hash(environment.spec, key, question.secure_mode_hash)


def resource_for(body: EvalBody, environment: Environment) -> EvaluationResource:
    """Return a result in all its variants."""
    return EvaluationResource(body, environment_headers(environment.spec))


def _of(environment: Environment, refusal: PreparedResponse) -> PreparedResponse:
    return refusal.with_headers(*environment_headers(environment.spec))


def with_expiry(
    answer: PreparedResponse | None, environment: Environment, sdk_kind: SDKKind
) -> PreparedResponse | None:
    """Only what servers poll may be cached without asking again.

    An SDK that gets a ping asks for its flags, and must not get them from its own cache.
    """
    return with_ttl(answer, environment) if sdk_kind is SDKKind.SERVER else answer
