"""What client-side SDKs ask for: all their flags, evaluated for one context (endpoints 1.5).

The same context asks again and again: its answer is looked up by the bytes of the request.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ref

from starlette.requests import Request
from starlette.responses import Response

from relay.environment import Environment
from relay.evaluation.audience import Audience
from relay.evaluation.program import Program
from relay.model.context import Context
from relay.web.answers import Answer, environment_headers, json_error
from relay.web.body import Refused
from relay.web.context import (
    NO_KEY,
    check_proof,
    context_in_body,
    context_in_path,
    read_context_body,
    room_for_contexts,
)
from relay.web.endpoint import Respond, header, parameter_in
from relay.web.polling import Resource, expiring

MAX_KEPT = 64 * 1024 * 1024
"""Bytes of the answers that are kept for contexts that ask again: all environments together."""

ENTRY_SIZE = 2 * 1024
"""Bytes that keeping an answer costs beside its bodies."""

NO_DATA = json_error(503, "Service not initialized")

_NO_SEGMENTS = (b"", b".", b"..")
"""What stands in place of a context when a path is not canonical: the application redirects it."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Who asks, and how.

    Args:
        audience: of flags.
        raw: the bytes that hold the context, as they came.
        context: reads them.
        with_reasons: whether the reasons are wanted.
        proof: what secure mode wants.
    """

    audience: Audience
    raw: bytes
    context: Callable[[bytes], Context]
    with_reasons: bool
    proof: str


@dataclass(frozen=True, slots=True)
class _Known:
    """An answer that was given.

    Args:
        environment: whose.
        version: of the data.
        key: of the context, fully qualified.
        resource: the answer.
    """

    environment: ref[Environment]
    version: int
    key: str
    resource: Resource
    size: int


@dataclass(slots=True)
class _Kept:
    """The answers that were given last, within `MAX_KEPT`."""

    answers: OrderedDict[tuple[object, ...], _Known] = field(default_factory=OrderedDict)
    """The one used last comes last."""
    size: int = 0

    def get(self, key: tuple[object, ...]) -> _Known | None:
        known = self.answers.get(key)
        if known is not None:
            self.answers.move_to_end(key)
        return known

    def put(self, key: tuple[object, ...], known: _Known) -> None:
        replaced = self.answers.pop(key, None)
        self.size += known.size - (replaced.size if replaced else 0)
        self.answers[key] = known
        while self.size > MAX_KEPT:
            _, oldest = self.answers.popitem(last=False)
            self.size -= oldest.size


class Evaluation:
    """Answers evaluations at both doors.

    Args:
        max_body: bytes of the largest body that holds a context; 0 for the bound of
            `relay.web.context`.
    """

    def __init__(self, max_body: int = 0) -> None:
        self.room = room_for_contexts(max_body)
        self._kept = _Kept()

    def answer(
        self,
        environment: Environment,
        audience: Audience,
        segment: bytes,
        query: bytes,
        *,
        if_none_match: bytes,
        accept_encoding: bytes,
    ) -> Answer | None:
        """Return the answer to a GET at once, but for CORS; None if this is for the application.

        Args:
            environment: whose flags.
            audience: which of them.
            segment: of the path, which holds the context, as on the wire.
            query: as on the wire.
            if_none_match: the header; empty if there is none.
            accept_encoding: the header; empty if there is none.
        """
        if b"%" in segment or b"%" in query or b"filter" in query or segment in _NO_SEGMENTS:
            return None
        question = _question(audience, segment, context_in_path, query)
        try:
            program = environment.evaluations.current(audience)
            resource = self._resource(environment, program, question)
        except Refused as e:
            return _of(environment, e.answer)
        if resource is None:
            return None
        return _timed(resource.variant(if_none_match, accept_encoding), environment, audience)

    def in_path(self, audience: Audience) -> Respond:
        """Return what answers a GET whose path ends in the context."""

        async def respond(request: Request, environment: Environment) -> Response:
            segment = request.path_params["context"].encode(errors="replace")
            query = request.scope["query_string"]
            question = _question(audience, segment, context_in_path, query)
            return (await self._complete(request, environment, question)).as_response()

        return respond

    def in_body(self, audience: Audience) -> Respond:
        """Return what answers a request whose body is the context."""

        async def respond(request: Request, environment: Environment) -> Response:
            try:
                body = await read_context_body(request, self.room)
            except Refused as e:
                return e.answer.as_response()
            question = _question(audience, body, context_in_body, request.scope["query_string"])
            return (await self._complete(request, environment, question)).as_response()

        return respond

    async def _complete(
        self, request: Request, environment: Environment, question: _Question
    ) -> Answer:
        none_match, encoding = header(request, "if-none-match"), header(request, "accept-encoding")
        evaluations, audience = environment.evaluations, question.audience
        try:
            resource = self._resource(environment, evaluations.current(audience), question)
            if resource is None:
                program = await evaluations.ready(audience)
                resource = self._resource(environment, program, question)
        except Refused as e:
            return _of(environment, e.answer)
        if resource is None:
            return _of(environment, NO_DATA)
        answer = resource.variant(none_match, encoding)
        if answer is None:
            await resource.compress_aside()
            answer = resource.compressed
        return _timed(answer, environment, audience) or NO_DATA

    def _resource(
        self, environment: Environment, program: Program | None, question: _Question
    ) -> Resource | None:
        """Return the result; None if it has to wait for the program.

        Raises:
            Refused: there is none for this context, or no data.
        """
        if environment.payload is None:
            program = None
        audience, raw, reasons = question.audience, question.raw, question.with_reasons
        place = (environment.spec.name, audience, raw, reasons, question.context)
        known = self._kept.get(place)
        if (
            known is not None
            and program is not None
            and known.version == program.version
            and known.environment() is environment
        ):
            _prove(environment, audience, known.key, question.proof)
            return known.resource
        context = question.context(raw)
        key = context.fully_qualified_key
        _prove(environment, audience, key, question.proof)
        if environment.payload is None:
            raise Refused(NO_DATA)
        if program is None:
            return None
        if context.has_empty_key:
            raise Refused(NO_KEY)
        resource = _result(environment, program.all(context, with_reasons=reasons))
        # A compressed body may join it, smaller than the plain one.
        size = ENTRY_SIZE + 2 * len(resource.body) + len(raw)
        self._kept.put(place, _Known(ref(environment), program.version, key, resource, size))
        return resource


def _question(
    audience: Audience, raw: bytes, context: Callable[[bytes], Context], query: bytes
) -> _Question:
    reasons = parameter_in(query, "withReasons") == "true"
    return _Question(audience, raw, context, reasons, parameter_in(query, "h"))


def _prove(environment: Environment, audience: Audience, key: str, proof: str) -> None:
    """Secure mode is for those whose credential is public."""
    if audience is Audience.BROWSER:
        check_proof(environment.spec, key, proof)


def _result(environment: Environment, body: bytes) -> Resource:
    """Make the resource of a body. Its ETag is equal at all replicas whose result is equal."""
    digest = hashlib.sha256(body).hexdigest()[:32].encode()
    return Resource(body, b'"%b"' % digest, environment_headers(environment.spec))


def _of(environment: Environment, refusal: Answer) -> Answer:
    return refusal.with_headers(*environment_headers(environment.spec))


def _timed(answer: Answer | None, environment: Environment, audience: Audience) -> Answer | None:
    """Only what servers poll may be cached without asking again.

    An SDK that gets a ping asks for its flags, and must not get them from its own cache.
    """
    return expiring(answer, environment) if audience is Audience.SERVER else answer
