"""What the fast path does for a request head that it sees for the first time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from relay.environment import Environment
from relay.model.metrics import MetricValue
from relay.telemetry.redaction import redact_url
from relay.telemetry.traffic import Series, client_label
from relay.web.access import by_plain_key
from relay.web.access_log import request_line
from relay.web.endpoints.polling import template
from relay.web.endpoints.streams import STREAMS, stream_headers
from relay.web.fastpath.cache import CachedResponse, EvaluationResponse
from relay.web.fastpath.events import EventUpload
from relay.web.fastpath.requests import RequestHead
from relay.web.fastpath.shared import FastPath
from relay.web.fastpath.streams import StreamRequest, client_stream_request

Outcome = CachedResponse | EvaluationResponse | StreamRequest | EventUpload
"""A response to write, a stream to hand over, or an upload whose body is to be received."""

_EVALUATION_PREFIX = b"/sdk/evalx/"


Handler = Callable[[FastPath, RequestHead], Outcome | None]
"""Begins a request; None leaves it to the application. A GET must have arrived alone."""


def find_handler(raw: bytes) -> Handler | None:
    """Return the handler of a request by its first bytes; None if only the application knows it."""
    start = _START.match(raw)
    return None if start is None else _HANDLERS.get((start[1], start[2]))


def log_line(head: RequestHead, status: int, size: int | None) -> str:
    """Return the access log line of a request with an SDK key."""
    url = redact_url(head.url.decode("ascii"))
    return request_line("GET", url, authorization(head), status, size)


def authorization(head: RequestHead) -> str:
    """Return the `Authorization` header."""
    return head.headers[b"authorization"].decode("latin-1")


def _environment_of(shared: FastPath, head: RequestHead) -> Environment | None:
    """Return the environment of a request with an SDK key."""
    return None if head.has_body else by_plain_key(shared.relay.by_sdk_key, head.headers)


def _open_stream(shared: FastPath, head: RequestHead) -> StreamRequest | None:
    environment, stream = _environment_of(shared, head), STREAMS.get(head.url)
    if environment is None or stream is None:
        return None
    lines = stream_headers(environment, closes=head.closes)
    request = StreamRequest(environment, stream, lines, _series(shared, head, environment))
    if not shared.traffic.logs:
        shared.cache.put(head.raw, request)
    return request


def _open_client_stream(shared: FastPath, head: RequestHead) -> StreamRequest | None:
    if shared.traffic.logs or head.has_body:
        return None
    relay, traffic = shared.relay, shared.traffic
    return client_stream_request(relay, traffic, head.url, head.headers, closes=head.closes)


def _answer_sdk(shared: FastPath, head: RequestHead) -> Outcome | None:
    if head.url.startswith(_EVALUATION_PREFIX):
        return _answer_evaluation(shared, head)
    return _answer_poll(shared, head)


def _answer_evaluation(shared: FastPath, head: RequestHead) -> EvaluationResponse | None:
    if shared.evaluation is None or shared.traffic.logs or head.has_body:
        return None
    return shared.evaluation.answer(head.raw, head.url, head.headers, closes=head.closes)


def _answer_poll(shared: FastPath, head: RequestHead) -> CachedResponse | None:
    environment = _environment_of(shared, head)
    if environment is None or shared.poll is None or not head.url.isascii():
        return None
    etag, encoding = head.headers.get(b"if-none-match"), head.headers.get(b"accept-encoding")
    prepared = shared.poll(environment, head.url.decode("ascii"), etag or b"", encoding or b"")
    if prepared is None:
        return None
    count: MetricValue = shared.traffic.requests[_series(shared, head, environment)]
    response = CachedResponse(
        environment, prepared.head, (prepared.body,), count, closes=head.closes
    )
    if shared.traffic.logs:
        response.line = log_line(head, prepared.status, len(prepared.body))
    shared.cache.put(head.raw, response)
    return response


def _begin_upload(shared: FastPath, head: RequestHead) -> EventUpload | None:
    if shared.events is None or shared.traffic.logs:
        return None
    upload = shared.events.begin(head.url, head.headers)
    if upload is not None:
        upload.keep_alive, upload.start = not head.closes, head.raw
    return upload


def _series(shared: FastPath, head: RequestHead, environment: Environment) -> Series:
    route = template(head.url.decode("ascii"))
    user_agent = client_label(shared.traffic, head.headers)
    return Series(environment.spec.name, route, "GET", "server", user_agent)


_START = re.compile(rb"(GET|POST) /([a-z]+)[/ ]")

_HANDLERS: Mapping[tuple[bytes, bytes], Handler] = {
    (b"GET", b"all"): _open_stream,
    (b"GET", b"flags"): _open_stream,
    (b"GET", b"eval"): _open_client_stream,
    (b"GET", b"meval"): _open_client_stream,
    (b"GET", b"ping"): _open_client_stream,
    (b"GET", b"mping"): _open_client_stream,
    (b"GET", b"sdk"): _answer_sdk,
    (b"GET", b"msdk"): _answer_evaluation,
    (b"POST", b"bulk"): _begin_upload,
    (b"POST", b"diagnostic"): _begin_upload,
    (b"POST", b"events"): _begin_upload,
    (b"POST", b"mobile"): _begin_upload,
}
"""Handlers by method and first segment of the path."""
