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
from relay.evaluation.audience import Audience
from relay.evaluation.form import Body
from relay.evaluation.program import Program
from relay.model.context import Context
from relay.web.answers import Answer, environment_headers, json_error
from relay.web.body import Refused
from relay.web.context import (
    NO_KEY,
    check_proof,
    context_in_body,
    context_in_path,
    proof_in,
    read_context_body,
    room_for_contexts,
    wants_reasons,
)
from relay.web.deflating import Evaluated
from relay.web.endpoint import Respond, header
from relay.web.polling import expiring

MAX_KEPT = 64 * 1024 * 1024
"""Bytes of the answers that are kept for contexts that ask again: all environments together."""

ENTRY_SIZE = 2 * 1024
"""Bytes that keeping an answer costs beside its body."""

MAX_AT_ONCE = 8 * 1024
"""Bytes of a context that is evaluated on the event loop, a larger one in a thread: an array of
thousands of values is looked through for each condition."""

MAX_SEEN = 16 * 1024
"""Contexts that have asked once lately. Only who asks again is kept an answer for: most that ask
only once would push out those who do. Each takes some 100 bytes."""

NO_DATA = json_error(503, "Service not initialized")

_NO_SEGMENTS = (b"", b".", b"..")
"""What stands in place of a context when a path is not canonical: the application redirects it."""


class _Question(Struct, frozen=True):
    """Who asks, and how.

    Args:
        audience: of flags.
        raw: the bytes that hold the context, as they came.
        reader: gets it from them.
        with_reasons: whether the reasons are wanted.
        proof: what secure mode wants.
    """

    audience: Audience
    raw: bytes
    reader: Callable[[bytes], Context]
    with_reasons: bool
    proof: str


class Found(Struct, frozen=True):
    """A result.

    Args:
        body: what answers.
        again: whether it is kept because the context had asked before.
    """

    body: Body
    again: bool


class _Known(Struct, frozen=True):
    """An answer that was given.

    Args:
        version: of the data.
        key: of the context, fully qualified; empty if nobody has to prove it.
        body: the answer.
        size: bytes that keeping it costs.
    """

    version: int
    key: str
    body: Body
    size: int


@dataclass(slots=True)
class _Kept:
    """The answers that were given last to those who ask again, within `MAX_KEPT`."""

    answers: OrderedDict[tuple[object, ...], _Known] = field(default_factory=OrderedDict)
    """The one used last comes last."""
    size: int = 0
    _seen: set[int] = field(default_factory=set)
    """Hashes of the questions that were asked since there were last `MAX_SEEN` of them."""
    _seen_before: set[int] = field(default_factory=set)
    """Those of the time before."""

    def has_asked(self, key: tuple[object, ...]) -> bool:
        """Whether a question was asked lately; from now on it was."""
        mark = hash(key)
        if mark in self._seen or mark in self._seen_before:
            return True
        if len(self._seen) >= MAX_SEEN:
            self._seen_before, self._seen = self._seen, set()
        self._seen.add(mark)
        return False

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

    def find(
        self, environment: Environment, audience: Audience, segment: bytes, query: bytes
    ) -> Found | Answer | None:
        """Return the result that a GET asks for, or the refusal; None if it is the application's.

        Args:
            environment: whose flags.
            audience: which of them.
            segment: of the path, which holds the context, as on the wire.
            query: as on the wire.
        """
        if len(segment) > MAX_AT_ONCE or b"%" in segment or segment in _NO_SEGMENTS:
            return None
        if query and (b"%" in query or b"filter" in query):
            return None
        question = _question(audience, segment, context_in_path, query)
        try:
            program = environment.evaluations.current(audience)
            return self._found(environment, program, question)
        except Refused as e:
            return _of(environment, e.answer)

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
            if len(question.raw) > MAX_AT_ONCE:
                program = await evaluations.ready(audience)
                body = await asyncio.to_thread(_read_and_evaluated, environment, program, question)
            else:
                found = self._found(environment, evaluations.current(audience), question)
                if found is None:
                    program = await evaluations.ready(audience)
                    found = self._found(environment, program, question)
                body = found.body if found else None
        except Refused as e:
            return _of(environment, e.answer)
        if body is None:
            return _of(environment, NO_DATA)
        resource = resource_of(body, environment)
        answer = resource.variant(none_match, encoding)
        if answer is None:
            answer = await resource.compress_aside()
        return timed(answer, environment, audience) or NO_DATA

    def _found(
        self, environment: Environment, program: Program | None, question: _Question
    ) -> Found | None:
        """Return the result; None if it has to wait for the program.

        Raises:
            Refused: there is none for this context, or no data.
        """
        raw, reader = question.raw, question.reader
        place = (environment, question.audience, raw, question.with_reasons, reader)
        again = self._kept.has_asked(place)
        known = self._kept.get(place) if again else None
        if (
            known is not None
            and program is not None
            and environment.payload is not None
            and known.version == program.version
        ):
            _prove(environment, known.key, question)
            return Found(known.body, again=True)
        context = reader(raw)
        body = _evaluated(environment, program, question, context)
        if body is None or program is None:
            return None
        if again:
            key = context.fully_qualified_key if environment.spec.secure_mode else ""
            # Mostly shared, but not with the answers of other data, or of no group.
            size = ENTRY_SIZE + body.size + len(raw)
            self._kept.put(place, _Known(program.version, key, body, size))
        return Found(body, again)


def _question(
    audience: Audience, raw: bytes, reader: Callable[[bytes], Context], query: bytes
) -> _Question:
    return _Question(audience, raw, reader, wants_reasons(query), proof_in(query))


def _read_and_evaluated(
    environment: Environment, program: Program | None, question: _Question
) -> Body | None:
    """Do for a large context what `_evaluated` does; in a thread."""
    return _evaluated(environment, program, question, question.reader(question.raw))


def _evaluated(
    environment: Environment, program: Program | None, question: _Question, context: Context
) -> Body | None:
    """Evaluate; None if that has to wait for the program.

    Raises:
        Refused: there is no result for this context, or no data.
    """
    if environment.spec.secure_mode:
        _prove(environment, context.fully_qualified_key, question)
    if environment.payload is None:
        raise Refused(NO_DATA)
    if program is None:
        return None
    if context.has_empty_key:
        raise Refused(NO_KEY)
    return program.body(context, with_reasons=question.with_reasons)


def _prove(environment: Environment, key: str, question: _Question) -> None:
    """Secure mode is for those whose credential is public."""
    if question.audience is Audience.BROWSER:
        check_proof(environment.spec, key, question.proof)


def resource_of(body: Body, environment: Environment) -> Evaluated:
    """Return a result in all its variants."""
    return Evaluated(body, environment_headers(environment.spec))


def _of(environment: Environment, refusal: Answer) -> Answer:
    return refusal.with_headers(*environment_headers(environment.spec))


def timed(answer: Answer | None, environment: Environment, audience: Audience) -> Answer | None:
    """Only what servers poll may be cached without asking again.

    An SDK that gets a ping asks for its flags, and must not get them from its own cache.
    """
    return expiring(answer, environment) if audience is Audience.SERVER else answer
