"""Client-side evaluation: all flags, evaluated for one context (endpoints 1.5).

SDKs that speak FDv2 may name the state of their data, and get the flags that they miss (fdv2 13.8).

Clients repeat their requests, so results are cached by the bytes of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from msgspec import Struct
from starlette.requests import Request

from relay.bigsegments.environment import BigSegments
from relay.bigsegments.memberships import NO_MEMBERSHIPS, Memberships
from relay.environment import Environment
from relay.evaluation.client import EvalClient
from relay.evaluation.clientjournal import ClientDelta
from relay.evaluation.compiled.fragments import EvalBody
from relay.evaluation.compiled.program import Program
from relay.evaluation.sdkkind import SDKKind
from relay.model.answers import UP_TO_DATE, AnswerCounter
from relay.model.context import Context
from relay.model.journal import Full
from relay.protocol import flageval
from relay.protocol.flageval import ClientState, Transfer
from relay.registry import Registry
from relay.web.access import Access
from relay.web.bases import is_behind, wait_until_reached
from relay.web.bodies import RequestRejected
from relay.web.cache import CacheEntry, ResponseCache
from relay.web.compression import EvaluationResource
from relay.web.contexts import (
    NO_KEY,
    EvaluationQuery,
    check_secure_mode_hash,
    context_budget,
    context_in_body,
    context_in_path,
    json_in_path,
    read_context_body,
)
from relay.web.requests import header
from relay.web.resources import with_ttl
from relay.web.responses import PreparedResponse, environment_headers, json_error

MAX_CACHED = 64 * 1024 * 1024
"""Bytes of cached results, of all environments together."""

ENTRY_SIZE = 2 * 1024
"""Bytes that a cached result takes besides its body."""

MAX_AT_ONCE = 8 * 1024
"""Bytes of a context that is evaluated on the event loop; a larger one is evaluated in a thread:
each condition may search an array of thousands of values."""

MAX_RECENT = 16 * 1024
"""Requests that are remembered so as to recognise repeated ones, some 100 bytes each. Only results
of repeated requests are cached: contexts that are evaluated once would evict the others."""

NOT_INITIALIZED = json_error(503, "Service not initialized")


class _EvaluationRequest(Struct, frozen=True):
    """Request for an evaluation.

    Args:
        sdk_kind: decides which flags are visible.
        raw: context as received.
        reader: parses `raw`.
        with_reasons: whether to include evaluation reasons.
        secure_mode_hash: sent by the client; empty without one.
        basis: state of the data of a client that speaks FDv2, empty without one; None for FDv1.
    """

    sdk_kind: SDKKind
    raw: bytes
    reader: Callable[[bytes], Context]
    with_reasons: bool
    secure_mode_hash: str
    basis: str | None

    @classmethod
    def of(
        cls,
        sdk_kind: SDKKind,
        raw: bytes,
        reader: Callable[[bytes], Context],
        query: bytes,
        *,
        fdv2: bool,
    ) -> _EvaluationRequest:
        """Return a request with the parameters in a query."""
        if not query:  # most have none
            return cls(sdk_kind, raw, reader, False, "", "" if fdv2 else None)
        parameters = EvaluationQuery.parse(query)
        reasons, proof = parameters.with_reasons, parameters.secure_mode_hash
        return cls(sdk_kind, raw, reader, reasons, proof, parameters.basis if fdv2 else None)

    @property
    def data_basis(self) -> str:
        """State of the environment's data that the client names; empty without one."""
        return ClientState.parse(self.basis).data if self.basis else ""

    @property
    def json(self) -> bytes:
        """The context in JSON."""
        return json_in_path(self.raw) if self.reader is context_in_path else self.raw


class EvaluationResult(CacheEntry, eq=False):
    """Result of an evaluation.

    Args:
        environment: provides the flags.
        payload: its data that the flags were evaluated with.
        body: of the response.
        key: fully qualified key of the context; empty without secure mode.
        answer: counts the answer to a client that may name its state, each time that it is given;
            None for FDv1.
        known: the same, of the answer that the client has it already.
        size: see `CacheEntry`; 0 unless the request was repeated, and so is worth caching.
    """

    body: EvalBody
    key: str
    answer: AnswerCounter | None = None
    known: AnswerCounter | None = None

    def counter(self, response: PreparedResponse) -> AnswerCounter | None:
        """Return what counts a response with this result."""
        return self.known if response.status == HTTPStatus.NOT_MODIFIED else self.answer


class PendingEvaluation(Struct, frozen=True, eq=False):
    """Evaluation that waits for memberships in big segments.

    Args:
        environment: to evaluate for.
        request: what is asked.
        context: to evaluate for; it may be.
        cache_key: key of the result in the cache; None if it is not worth caching.
        big_segments: of the environment.
        keys: context keys whose memberships have to be read.
    """

    environment: Environment
    request: _EvaluationRequest
    context: Context
    cache_key: tuple[object, ...] | None
    big_segments: BigSegments
    keys: tuple[str, ...]

    def read(self) -> asyncio.Future[Any]:
        """Read the memberships; the future is done when the evaluation can be finished."""
        return self.big_segments.read(self.keys)


class _RecentRequests:
    """Memory of recent requests, by which repeated ones are recognised."""

    def __init__(self) -> None:
        self._latest: set[int] = set()
        """Hashes of up to `MAX_RECENT` requests."""
        self._before: set[int] = set()
        """Hashes of the `MAX_RECENT` requests before."""

    def is_repeated(self, key: tuple[object, ...]) -> bool:
        """Return whether a request was seen recently, and remember it."""
        digest = hash(key)
        if digest in self._latest or digest in self._before:
            return True
        if len(self._latest) >= MAX_RECENT:
            self._before, self._latest = self._latest, set()
        self._latest.add(digest)
        return False


class EvaluationHandler:
    """Handler of evaluation requests, for the application and the fast path.

    Args:
        registry: of the environments.
        max_body: bytes of the largest body with a context; 0 for
            `relay.web.contexts.MAX_CONTEXT`.
    """

    def __init__(self, registry: Registry[Environment], max_body: int = 0) -> None:
        self.budget = context_budget(max_body)
        self.results: ResponseCache[EvaluationResult] = ResponseCache(registry, MAX_CACHED)
        self._recent = _RecentRequests()

    def __repr__(self) -> str:
        return f"<EvaluationHandler [{len(self.results)} results, {self.results.size} bytes]>"

    def evaluate(
        self,
        environment: Environment,
        sdk_kind: SDKKind,
        segment: bytes,
        query: bytes,
        *,
        fdv2: bool = False,
    ) -> EvaluationResult | PreparedResponse | PendingEvaluation | None:
        """Return the result for a GET, or the refusal; None if it is left to the application.

        If memberships have to be read first, the evaluation is pending; see `finish`. It is left to
        the application, too, if these data seem to be behind those of the client.

        Args:
            environment: to evaluate for.
            sdk_kind: decides which flags are visible.
            segment: of the path, with the context, without percent escapes.
            query: as received.
            fdv2: whether the client speaks FDv2.
        """
        if len(segment) > MAX_AT_ONCE:
            return None
        evaluation = _EvaluationRequest.of(sdk_kind, segment, context_in_path, query, fdv2=fdv2)
        if evaluation.basis and is_behind(environment, evaluation.data_basis):
            return None
        try:
            program = environment.programs.current(sdk_kind)
            return self._evaluate(environment, program, evaluation)
        except RequestRejected as e:
            return _with_environment_headers(environment, e.response)

    async def in_path(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a GET whose path ends in the context."""
        segment = request.path_params["context"].encode(errors="replace")
        return await self._complete(request, access, segment, context_in_path)

    async def in_body(self, request: Request, access: Access) -> PreparedResponse:
        """Respond to a request whose body is the context."""
        try:
            body = await read_context_body(request, self.budget)
        except RequestRejected as e:
            return e.response
        return await self._complete(request, access, body, context_in_body)

    async def _complete(
        self, request: Request, access: Access, raw: bytes, reader: Callable[[bytes], Context]
    ) -> PreparedResponse:
        none_match, encoding = header(request, "if-none-match"), header(request, "accept-encoding")
        environment, sdk_kind = access.environment, access.sdk_kind
        query, fdv2 = request.scope["query_string"], access.route.evaluates_fdv2
        evaluation = _EvaluationRequest.of(sdk_kind, raw, reader, query, fdv2=fdv2)
        if evaluation.basis:
            await wait_until_reached(environment, evaluation.data_basis)
        try:
            if len(evaluation.raw) > MAX_AT_ONCE:
                result = await _evaluate_in_thread(environment, evaluation)
            else:
                result = await self._evaluate_when_ready(environment, evaluation)
        except RequestRejected as e:
            return _with_environment_headers(environment, e.response)
        if result is None:
            return _with_environment_headers(environment, NOT_INITIALIZED)
        resource = resource_for(result.body, environment)
        response = resource.variant(none_match, encoding)
        if counter := result.counter(response or resource.plain):
            counter.add()
        if response is None:
            response = await resource.compress_in_thread()
        return with_expiry(response, environment, sdk_kind)

    async def _evaluate_when_ready(
        self, environment: Environment, evaluation: _EvaluationRequest
    ) -> EvaluationResult | None:
        """Return the result, once program and memberships are there; None if there is no payload.

        Raises:
            RequestRejected: the context is invalid or not allowed, or there is no data.
        """
        programs, sdk_kind = environment.programs, evaluation.sdk_kind
        result = self._evaluate(environment, programs.current(sdk_kind), evaluation)
        if result is None:
            program = await programs.ready(sdk_kind)
            result = self._evaluate(environment, program, evaluation)
        while isinstance(result, PendingEvaluation):
            memberships = await result.big_segments.memberships(result.keys)
            await programs.ready(sdk_kind)  # there may be other data than before
            result = self.finish(result, memberships)
        return result

    def _evaluate(
        self, environment: Environment, program: Program | None, evaluation: _EvaluationRequest
    ) -> EvaluationResult | PendingEvaluation | None:
        """Return the result, from the cache if possible; None if the program is not ready.

        Raises:
            RequestRejected: the context is invalid or not allowed, or there is no data.
        """
        raw, reader, basis = evaluation.raw, evaluation.reader, evaluation.basis
        cache_key = (environment, evaluation.sdk_kind, raw, evaluation.with_reasons, reader, basis)
        repeated = self._recent.is_repeated(cache_key)
        known = self.results.get(cache_key) if repeated else None
        if known is not None:
            _check_secure_mode(environment, known.key, evaluation)
            return known
        context = reader(raw)
        _check(environment, program, evaluation, context)
        if program is None:
            return None
        key = cache_key if repeated else None
        return self._evaluate_context(environment, program, evaluation, context, cache_key=key)

    def finish(
        self, pending: PendingEvaluation, memberships: Memberships | None = None
    ) -> EvaluationResult | PendingEvaluation | None:
        """Return the result of an evaluation whose memberships have been read.

        Args:
            pending: the evaluation.
            memberships: those that were read; None for those that are known.

        Returns:
            None if the program is not ready; another pending evaluation if it needs others.
        """
        environment, request, cache_key = pending.environment, pending.request, pending.cache_key
        # They may turn out to be the same as before.
        known = self.results.get(cache_key) if cache_key is not None else None
        if known is not None:
            return known
        program = environment.programs.current(request.sdk_kind)
        if program is None:
            return None
        return self._evaluate_context(
            environment,
            program,
            request,
            pending.context,
            cache_key=cache_key,
            memberships=memberships,
        )

    def _evaluate_context(
        self,
        environment: Environment,
        program: Program,
        request: _EvaluationRequest,
        context: Context,
        *,
        cache_key: tuple[object, ...] | None,
        memberships: Memberships | None = None,
    ) -> EvaluationResult | PendingEvaluation:
        big_segments = environment.big_segments
        keys = program.members_needed(context) if big_segments is not None else ()
        if not keys or big_segments is None:
            memberships = NO_MEMBERSHIPS
        elif memberships is None or not memberships.hold(keys):
            memberships = big_segments.known(keys)
            if memberships is None:
                return PendingEvaluation(
                    environment, request, context, cache_key, big_segments, keys
                )
        missed = _missed(environment, program, request)
        evaluated = _evaluated(program, request, context, memberships, missed)
        key = context.fully_qualified_key if environment.spec.secure_mode else ""
        result = _result(environment, evaluated, key)
        if isinstance(evaluated, Transfer):
            _count(result, evaluated, request, partial(_everything, program, request, context))
        if keys:
            result.memberships = memberships
        if cache_key is not None:
            # Entries share most of their bodies. Each is counted in full all the same: those of
            # contexts without a group share nothing.
            result.size = ENTRY_SIZE + result.body.size + len(request.raw)
            self.results.put(cache_key, result)
        return result


class _Missed(NamedTuple):
    """State that a client has named, and the answer that brings it up to date."""

    named: ClientState
    answer: Full | ClientDelta


def _missed(
    environment: Environment, program: Program, request: _EvaluationRequest
) -> _Missed | None:
    """Return what a client misses; None if it does not speak FDv2."""
    if request.basis is None:
        return None
    named = ClientState.parse(request.basis)
    journal = environment.programs.client_journal
    return _Missed(named, journal.answer(program, request.sdk_kind, named.data))


def _evaluated(
    program: Program,
    request: _EvaluationRequest,
    context: Context,
    memberships: Memberships,
    missed: _Missed | None,
) -> EvalBody | Transfer:
    """Return the response; with its kind, if the client speaks FDv2. May run in a thread."""
    members, reasons = memberships.by_key, request.with_reasons
    if missed is None:
        return program.body(context, members, with_reasons=reasons)
    client = EvalClient(request.json, context, request.sdk_kind, with_reasons=reasons)
    client.memberships = members
    return flageval.respond(flageval.POLL, program, client, *missed)


def _everything(program: Program, request: _EvaluationRequest, context: Context) -> int:
    """Return about how many bytes all results have."""
    form = flageval.POLL.form(with_reasons=request.with_reasons)
    return program.fill(form, context).size


def _result(
    environment: Environment, evaluated: EvalBody | Transfer, key: str = ""
) -> EvaluationResult:
    body = evaluated.body if isinstance(evaluated, Transfer) else evaluated
    return EvaluationResult(environment, environment.payload, body, key)


def _count(
    result: EvaluationResult,
    transfer: Transfer,
    request: _EvaluationRequest,
    everything: Callable[[], int],
) -> None:
    """Let a result have the counters of the answers that it may be given as."""
    journal, body = result.environment.programs.client_journal, transfer.body
    count = partial(
        journal.counter,
        request.sdk_kind,
        with_reasons=request.with_reasons,
        everything=everything,
    )
    result.answer = count(transfer.kind, transfer.cause, body.size)
    if body.digest:
        result.known = count(*UP_TO_DATE, 0)


async def _evaluate_in_thread(
    environment: Environment, evaluation: _EvaluationRequest
) -> EvaluationResult | None:
    """Return the result for a large context; None if there is no payload.

    Raises:
        RequestRejected: the context is invalid or not allowed, or there is no data.
    """
    program = await environment.programs.ready(evaluation.sdk_kind)

    def parse() -> Context:
        context = evaluation.reader(evaluation.raw)
        _check(environment, program, evaluation, context)
        return context

    context = await asyncio.to_thread(parse)
    if program is None:
        return None
    memberships, keys = NO_MEMBERSHIPS, program.members_needed(context)
    if keys and environment.big_segments is not None:
        memberships = await environment.big_segments.memberships(keys)
    missed = _missed(environment, program, evaluation)
    evaluated = await asyncio.to_thread(
        _evaluated, program, evaluation, context, memberships, missed
    )
    result = _result(environment, evaluated)
    if isinstance(evaluated, Transfer):
        _count(result, evaluated, evaluation, lambda: 0)
    return result


def _check(
    environment: Environment,
    program: Program | None,
    evaluation: _EvaluationRequest,
    context: Context,
) -> None:
    """Check that a context may be evaluated.

    Raises:
        RequestRejected: the context is invalid or not allowed, or there is no data.
    """
    if environment.spec.secure_mode:
        _check_secure_mode(environment, context.fully_qualified_key, evaluation)
    if environment.payload is None:
        raise RequestRejected(NOT_INITIALIZED)
    if program is not None and context.has_empty_key:
        raise RequestRejected(NO_KEY)


def _check_secure_mode(environment: Environment, key: str, evaluation: _EvaluationRequest) -> None:
    """Check the secure mode hash of a browser: only browsers have a public credential.

    Raises:
        RequestRejected: the hash is wrong.
    """
    if evaluation.sdk_kind is SDKKind.BROWSER:
        check_secure_mode_hash(environment.spec, key, evaluation.secure_mode_hash)


def resource_for(body: EvalBody, environment: Environment) -> EvaluationResource:
    """Return a result as a resource, with all its variants."""
    return EvaluationResource(body, environment_headers(environment.spec))


def _with_environment_headers(
    environment: Environment, response: PreparedResponse
) -> PreparedResponse:
    return response.with_headers(*environment_headers(environment.spec))


def with_expiry(
    response: PreparedResponse, environment: Environment, sdk_kind: SDKKind
) -> PreparedResponse:
    """Return the response with its TTL if it is for a server.

    Clients must revalidate: one that gets a ping must not read its flags from its HTTP cache.
    """
    return with_ttl(response, environment) if sdk_kind is SDKKind.SERVER else response
