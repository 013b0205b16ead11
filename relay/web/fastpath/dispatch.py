"""Dispatch of a request head that the fast path sees for the first time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from relay.telemetry.redaction import redact_url
from relay.web.access_log import request_line
from relay.web.cache import CacheEntry
from relay.web.fastpath.cache import ENTRY_SIZE, JOINED_BODY, WireResponse
from relay.web.fastpath.evaluation import PendingResponse
from relay.web.fastpath.events import EventUpload
from relay.web.fastpath.heads import RequestHead
from relay.web.fastpath.shared import FastPath
from relay.web.fastpath.streams import StreamRequest
from relay.web.routes import Endpoint

Outcome = WireResponse | StreamRequest | EventUpload | PendingResponse
"""A response to write, a stream to hand over, an upload whose body is to be received, or a response
that waits for a database."""


def dispatch(shared: FastPath, head: RequestHead) -> Outcome | None:
    """Begin a request, and cache the response if it is worth it; None leaves it to the application.

    Args:
        shared: state shared by all connections.
        head: of the request. A GET must have arrived alone.
    """
    handler = _HANDLERS.get(head.access.route.endpoint)
    outcome = None if handler is None else handler(shared, head)
    if isinstance(outcome, CacheEntry) and outcome.size:
        shared.cache.keep(head.raw, outcome)
    return outcome


def log_line(head: RequestHead, status: int, size: int | None) -> str:
    """Return the access log line of a request with an SDK key."""
    return request_line("GET", redacted_url(head), authorization(head), status, size)


def redacted_url(head: RequestHead) -> str:
    """Return the target of a request for the log."""
    return redact_url(head.url.decode("latin-1").removesuffix("?"))


def authorization(head: RequestHead) -> str:
    """Return the `Authorization` header."""
    return head.headers[b"authorization"].decode("latin-1")


def _open_stream(shared: FastPath, head: RequestHead) -> StreamRequest | None:
    request = shared.streams.request(head)
    if request is not None and shared.traffic.logs:
        request.size = 0  # a cached one could not be logged
    return request


def _open_client_stream(shared: FastPath, head: RequestHead) -> StreamRequest | None:
    return None if shared.traffic.logs else shared.streams.request(head)


def _answer_evaluation(
    shared: FastPath, head: RequestHead
) -> WireResponse | PendingResponse | None:
    return None if shared.traffic.logs else shared.evaluation.answer(head)


def _answer_poll(shared: FastPath, head: RequestHead) -> WireResponse | None:
    access, headers, polling = head.access, head.headers, shared.polling
    none_match, encoding = headers.get(b"if-none-match"), headers.get(b"accept-encoding")
    key = polling.key(access, head.segment.decode(), headers, head.query)
    prepared = polling.respond(access, key, none_match or b"", encoding or b"")
    if prepared is None:
        return None
    noted = polling.note(access, key, headers, prepared)
    traffic, environment, body = shared.traffic, access.environment, prepared.body
    count = traffic.requests[access.labels(traffic, "GET", headers)]
    response = WireResponse(
        environment, environment.payload, prepared.head, (body,), count, closes=head.closes
    )
    response.answer = polling.counter(access, key, prepared)
    if traffic.logs:
        response.line = log_line(head, prepared.status, len(body))
    expires = environment.spec.ttl > 0  # at another time for each response
    if not (expires or noted):
        # A larger body is that of the resource, and not a copy.
        response.size = ENTRY_SIZE + (len(body) if len(body) <= JOINED_BODY else 0)
    return response


def _begin_upload(shared: FastPath, head: RequestHead) -> EventUpload | None:
    return None if shared.traffic.logs else shared.events.begin(head)


_HANDLERS: Mapping[Endpoint, Callable[[FastPath, RequestHead], Outcome | None]] = {
    Endpoint.STREAM: _open_stream,
    Endpoint.PINGS: _open_client_stream,
    Endpoint.EVALUATED_STREAM: _open_client_stream,
    Endpoint.POLL: _answer_poll,
    Endpoint.EVALUATION: _answer_evaluation,
    Endpoint.EVENTS: _begin_upload,
}
