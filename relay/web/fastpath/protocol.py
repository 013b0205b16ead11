"""uvicorn's HTTP protocol with a fast path: hot requests are answered without the application.

No task, no ASGI, no work that could have been done once per change. Polls are written from cached
bytes, the connection of a stream is handed over to the hub, and event payloads are answered when
they are stored. Anything unusual, and each error, is passed on to the application, which has the
same routes and gives the same bytes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any, ClassVar, cast

from httptools import HttpRequestParser
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from relay.model.metrics import MetricValue
from relay.streams.transport import StreamTransport
from relay.telemetry.redaction import redact_url
from relay.telemetry.traffic import RequestLabels
from relay.web.access_log import LoggedTransport, log_request, request_line
from relay.web.fastpath.cache import CLOSING, ENTRY_SIZE, JOINED_BODY, WireResponse
from relay.web.fastpath.events import CHUNKED, EventUpload, only_chunk
from relay.web.fastpath.heads import END, EVALUATION_STARTS, RequestHead, read_head
from relay.web.fastpath.shared import FastPath, SweptConnection
from relay.web.fastpath.streams import StreamRequest, stream_request
from relay.web.protocol import HTTPProtocol
from relay.web.responses import Headers
from relay.web.routes import Endpoint

USED_OF_UVICORN = (
    *("connections", "cycle", "flow", "headers", "parser", "pipeline", "scope", "transport", "url"),
    *("expect_100_continue", "timeout_keep_alive_task", "_unset_keepalive_if_required"),
    *("on_message_begin", "on_headers_complete", "on_body", "on_message_complete"),
    *("on_response_complete", "connection_lost", "server", "client", "scheme", "shutdown"),
)
"""Attributes of uvicorn's protocol that this module relies on; a test checks for each."""

MAX_HEADS_REMEMBERED = 32
"""Maximum number of upload heads remembered from one connection: enough for the clients behind a
proxy; bounds the cost of a client that makes up a new head for each upload."""

_VERSIONS = ("1.1", "1.0")


class FastHTTPProtocol(HTTPProtocol, SweptConnection):
    """Protocol of one connection.

    Args:
        shared: state shared by all connections.
        config, server_state, app_state, _loop: as in uvicorn's protocol.
    """

    def __init__(
        self,
        shared: FastPath,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared = shared
        self._last_activity = monotonic()
        """Monotonic time at which the client last sent or took bytes."""
        self._last_backlog = 0
        """Bytes in the write buffer at the last sweep."""
        self._head_size = 0
        """Bytes of an incomplete request head."""
        self._between_requests = True
        """True if no request is being read."""
        self._in_body = False
        """True if the head of the request that is being read is complete."""
        self._whole_head = b""
        """The bytes that are fed to the parser, if they are exactly one request head."""
        self._answered = False
        """True if the request that is being read does not go to the application."""
        self._deferred = b""
        """The deferred evaluation request."""
        self._received_meanwhile = b""
        """Bytes received since then."""
        self._stream: StreamRequest | None = None
        self._upload: EventUpload | None = None
        """The upload that is being received or stored."""
        self._upload_start = b""
        """The bytes that are fed to the parser, if they begin with an upload."""
        self._heads_remembered = 0
        """Number of upload heads remembered from this connection."""

    def __repr__(self) -> str:
        if not self.transport:  # before the connection, or after it was handed over
            state = "detached"
        elif self._deferred:
            state = "deferred"
        elif self._upload is not None:
            state = repr(self._upload)
        elif self._between_requests:
            state = "idle" if self._is_idle() else "responding"
        else:
            state = "in body" if self._in_body else "in head"
        return f"<FastHTTPProtocol [{state}]>"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note the transport; the addresses are only looked up for the application."""
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)

    def data_received(self, data: bytes) -> None:
        """Answer known requests at once; parse all others."""
        shared, now = self._shared, monotonic()
        if now >= shared.date_expires_at:
            shared.renew_date(self.server_state, now)
        if self._deferred:
            self._received_meanwhile += data
            self.transport.pause_reading()
            return
        if not self._head_size:  # all pieces of a request head have one time-out
            self._last_activity = now
        if self._upload is not None and self._upload.missing:
            self._continue_upload(self._upload, data)
            return
        if self._between_requests and self._is_idle():
            if data.startswith(b"POST "):
                if self._begin_known_upload(data):
                    return
                self._upload_start = data
            elif self._answer_from_cache(data):
                return
        self._parse(data)

    def _answer_from_cache(self, data: bytes) -> bool:
        """Serve from the response cache, or defer; return False if the parser is needed."""
        shared = self._shared
        cached, is_evaluation = shared.cache.get(data), False
        if cached is None:
            is_evaluation = data.startswith(EVALUATION_STARTS)
            cached = None if is_evaluation else shared.cache.get_similar(data)
        if isinstance(cached, WireResponse):
            self._write(cached)
            return True
        if cached is not None and self._can_open():
            self._hand_over(cached)
            return True
        if data.find(END) != len(data) - len(END):
            return False
        if is_evaluation:
            if shared.scheduler.defer(self):
                self._deferred = data
                return True
            if self._answer_known_client(data):
                return True
        self._whole_head = data
        return False

    def resume(self) -> None:
        """Answer the deferred request, then the bytes received since."""
        head, self._deferred = self._deferred, b""
        if self.transport.is_closing() or not head:
            return
        if not self._answer_known_client(head):
            self._whole_head = head
            self._parse(head)
        received, self._received_meanwhile = self._received_meanwhile, b""
        if received:
            self.transport.resume_reading()
            self.data_received(received)

    def shutdown(self) -> None:
        """Close the connection as soon as no response is outstanding."""
        self.resume()
        super().shutdown()

    def _answer_known_client(self, head: bytes) -> bool:
        """Answer a request that differs from an earlier one in its context only."""
        shared = self._shared
        if shared.evaluation is None or len(head) > shared.limits.max_head_size:
            return False
        response = shared.evaluation.answer_known(head)
        if response is None:
            return False
        if response.size:
            shared.cache.keep(head, response)
        self._write(response)
        return True

    def _parse(self, data: bytes) -> None:
        if not self._in_body:
            self._head_size += len(data)
        super().data_received(data)
        self._whole_head = self._upload_start = b""
        if self._stream is not None:
            self._hand_over(self._stream)
        elif self._reads_head and self._head_size > self._shared.limits.max_head_size:
            self._refuse_head()

    @property
    def _reads_head(self) -> bool:
        return not self._between_requests and self._head_size > 0

    def _is_idle(self) -> bool:
        """Return whether a response can be written now, in order and to a client that reads."""
        cycle = self.cycle
        return (cycle is None or cycle.response_complete) and not (
            self.pipeline or self.flow.write_paused or self.transport.is_closing()
        )

    def on_message_begin(self) -> None:
        """Reset the state of the request."""
        self._between_requests = False
        self._answered = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Answer a hot request; pass any other on to the application."""
        size, self._head_size = self._head_size, 0
        self._in_body = True
        if self.transport.is_closing():
            self._answered = True
        elif self.parser.get_http_version() not in _VERSIONS:
            self._refuse(b"505 HTTP Version Not Supported")
        elif size > self._shared.limits.max_head_size and self._is_head_too_large():
            self._refuse_head()
        elif self._answer():
            self._answered = True
        else:
            self._begin_in_application()

    def _begin_in_application(self) -> None:
        """Start the application for the request whose head has been read."""
        if self.scheme is None:
            self.server = get_local_addr(self.transport)
            self.client = get_remote_addr(self.transport)
            self.scheme = "https" if is_ssl(self.transport) else "http"
        # uvicorn would cut off a fragment; in a request target it is an ordinary part of the path.
        url, headers = self.url.replace(b"#", b"%23"), self.headers
        expects_more = self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_more
        self.headers.extend(headers)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Feed the body to the upload, or else to the application."""
        if not self._answered:
            super().on_body(body)
        elif self._upload is not None and not self._upload.receive(body):
            self._pass_on(self._upload)

    def on_message_complete(self) -> None:
        """Note the end of the request; accept the upload."""
        self._between_requests = True
        self._in_body = False
        if self._answered and self._upload is not None:
            self._accept_upload(self._upload)
        if not self._answered:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the memory of the upload."""
        if self._upload is not None:
            self._upload.release()
        super().connection_lost(exc)

    def _answer(self) -> bool:
        """Handle the request that has just been parsed; return False if it is the application's."""
        parser = self.parser
        if parser.get_http_version() != "1.1":
            return False
        head = read_head(
            self._shared.relay,
            parser.get_method(),
            self.url,
            self.headers,
            self._whole_head,
            closes=not parser.should_keep_alive(),
        )
        handler = self._HANDLERS.get(head.access.route.endpoint) if head else None
        return head is not None and handler is not None and handler(self, head)

    def _open_stream(self, head: RequestHead) -> bool:
        logs = self._shared.traffic.logs
        if logs and head.access.route.endpoint is not Endpoint.STREAM:
            return False
        request = stream_request(self._shared.traffic, head)
        if request is None:
            return False
        if not logs:
            self._shared.cache.keep(head.raw, request)
        return self._open(request)

    def _open(self, request: StreamRequest) -> bool:
        if not self._can_open():
            return False
        self._stream = request
        return True

    def _can_open(self) -> bool:
        return not (self.transport.get_write_buffer_size() or self._shared.relay.stopping)

    def _answer_evaluation(self, head: RequestHead) -> bool:
        """Answer an evaluation request."""
        handler = self._shared.evaluation
        if handler is None or self._shared.traffic.logs:
            return False
        response = handler.answer(head)
        if response is None:
            return False
        self._shared.cache.keep(head.raw, response)
        self._write(response)
        return True

    def _begin_upload(self, head: RequestHead) -> bool:
        """Begin an upload of events: one at a time, as it is answered only when it is stored."""
        events, logs = self._shared.events, self._shared.traffic.logs
        if events is None or logs or not self._is_idle():
            return False
        start = self._upload_start[: self._upload_start.find(END) + len(END)]
        upload = events.begin(head, start)
        if upload is None:
            return False
        # As the current cycle, it makes later requests and a shutdown wait.
        self._upload = self.cycle = cast("Any", upload)
        return True

    def _accept_upload(self, upload: EventUpload) -> None:
        """Accept a complete upload, and answer it when it is stored."""
        events = self._shared.events
        stored = events.accept(upload) if events else None
        if events is None or stored is None:
            self._pass_on(upload)
            return
        if upload.head is None and upload.start and self._heads_remembered < MAX_HEADS_REMEMBERED:
            self._heads_remembered += 1
            events.remember(upload.start, upload)
        self._answer_when_stored(upload, stored)

    def _answer_when_stored(self, upload: EventUpload, stored: asyncio.Future[bool]) -> None:
        if stored.done():
            self._answer_upload(upload, stored)
        else:
            stored.add_done_callback(partial(self._answer_upload, upload))

    def _begin_known_upload(self, data: bytes) -> bool:
        """Begin an upload with a known head, without the parser."""
        events, end = self._shared.events, data.find(END) + len(END)
        if events is None or self._shared.traffic.logs or end < len(END):
            return False
        known = events.find_head(data[:end])
        if known is None:
            return False
        head, payload_id, length = known
        body: bytes | None = data[end:]
        if length == CHUNKED:
            body = only_chunk(data[end:])
            length = len(body or b"")
        if body is None or len(body) > length:
            return False  # several chunks, or pipelined requests
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        stored = events.accept_whole(head, payload_id, body) if len(body) == length else None
        if stored is not None and head.keep_alive and _is_successful(stored):
            self.server_state.total_requests += 1
            self.transport.write(head.to_wire(self._shared.date))
            return True
        upload = events.begin_known(head, data[:end], payload_id)
        self._upload = self.cycle = cast("Any", upload)
        if stored is not None:
            upload.receive(body)
            self._answer_when_stored(upload, stored)
        else:
            upload.missing = length
            self._between_requests, self._in_body = False, True
            self._continue_upload(upload, body)
        return True

    def _continue_upload(self, upload: EventUpload, data: bytes) -> None:
        """Receive a part of the body of an upload with a known head, and the bytes after it."""
        following = b""
        if len(data) > upload.missing:
            data, following = data[: upload.missing], data[upload.missing :]
        upload.missing -= len(data)
        if not upload.receive(data):
            upload.missing = 0
            self._pass_on(upload)
        elif not upload.missing:
            self._between_requests, self._in_body = True, False
            self._accept_upload(upload)
        if following:
            self._parse(following)

    def _answer_upload(self, upload: EventUpload, stored: asyncio.Future[bool]) -> None:
        upload.release()
        upload.response_complete = True
        self._upload = None
        self._last_activity = monotonic()
        if self._shared.events is None or self.transport.is_closing():
            return
        head = upload.head
        if head is not None and upload.keep_alive and _is_successful(stored):
            self.transport.write(head.to_wire(self._shared.date))
        else:
            response = self._shared.events.answer(upload, stored)
            if not upload.keep_alive:
                response = response.with_headers(CLOSING)
            self.transport.write(response.head + self._shared.date + response.body)
        if not upload.keep_alive:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1

    def _pass_on(self, upload: EventUpload) -> None:
        """Pass an upload on to the application, with the bytes received of it."""
        body = b"".join(upload.parts)
        upload.release()
        self._upload = self.cycle = cast("Any", None)
        self._answered = False
        if upload.head is not None:  # the parser has not seen it
            self._between_requests, self._in_body = True, False
            self._parse(upload.start + body)
            return
        self._begin_in_application()
        if body:
            super().on_body(body)

    def _answer_poll(self, head: RequestHead) -> bool:
        access, headers = head.access, head.headers
        if self._shared.poll is None:
            return False
        none_match, encoding = headers.get(b"if-none-match"), headers.get(b"accept-encoding")
        prepared = self._shared.poll.respond(
            access, head.segment.decode(), none_match or b"", encoding or b""
        )
        if prepared is None:
            return False
        traffic = self._shared.traffic
        count = traffic.requests[access.labels(traffic, "GET", headers)]
        environment, body = access.environment, prepared.body
        payload = environment.payload
        response = WireResponse(
            environment, payload, prepared.head, (body,), count, closes=head.closes
        )
        if traffic.logs:
            response.line = self._log_line(prepared.status, len(body))
        if environment.spec.ttl <= 0:  # otherwise it states its expiry, different each time
            # A larger body is that of the resource.
            copied = response.body_size if response.body_size <= JOINED_BODY else 0
            response.size = ENTRY_SIZE + copied
        self._shared.cache.keep(head.raw, response)
        self._write(response)
        return True

    def _log_line(self, status: int, size: int | None) -> str:
        return request_line("GET", self._redacted_url, self._authorization, status, size)

    @property
    def _redacted_url(self) -> str:
        return redact_url(self.url.decode("latin-1").removesuffix("?"))

    @property
    def _authorization(self) -> str:
        return dict(self.headers)[b"authorization"].decode("latin-1")

    def _write(self, response: WireResponse) -> None:
        """Write a complete response, and count it."""
        if response.line:
            log_request(response.line)
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        response.count.value += 1
        self.transport.writelines(response.to_wire(self._shared.date))
        if response.closes:
            self.transport.close()

    def _hand_over(self, request: StreamRequest) -> None:
        """Hand the connection over to the hub, and release the memory of this protocol."""
        self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        self.connections.discard(self)
        count = self._count_stream(request.labels)
        transport: StreamTransport = self.transport
        head = _stream_head(request.headers, self._shared.date)
        if self._shared.traffic.logs:
            log_request(self._log_line(200, None))
            self.transport.write(head)
            url, authorization = self._redacted_url, self._authorization
            transport, head = LoggedTransport(self.transport, url, authorization), b""
        vars(self).clear()
        hub, grant = request.grant.environment.hub, request.grant
        hub.subscribe(request.name, transport, head, count, request.client, grant=grant)

    def _count_stream(self, labels: RequestLabels) -> MetricValue:
        """Count a new stream; return the counter of open ones."""
        traffic = self._shared.traffic
        traffic.requests[labels].value += 1
        traffic.new_streams[labels].value += 1
        return traffic.streams[labels]

    def _is_head_too_large(self) -> bool:
        """Return whether the head is too large without the bytes received together with it."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > self._shared.limits.max_head_size

    def _refuse_head(self) -> None:
        if len(self.url) > self._shared.limits.max_head_size // 2:
            self._refuse(b"414 URI Too Long")
        else:
            self._refuse(b"431 Request Header Fields Too Large")

    def _refuse(self, status: bytes) -> None:
        """Respond with an error status, and close the connection."""
        self._answered = True
        if self._is_idle():
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n" % status
            self.transport.write(head + self._shared.date)
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client has exceeded a time limit."""
        limits = self._shared.limits
        backlog = self.transport.get_write_buffer_size()
        if backlog < self._last_backlog:
            self._last_activity = now
        self._last_backlog = backlog
        idle_time = now - self._last_activity
        if backlog:
            if idle_time > limits.stall_timeout:
                self.transport.abort()
        elif self._reads_head:
            if idle_time > limits.head_timeout:
                self._refuse(b"408 Request Timeout")
        elif idle_time > limits.keep_alive and (self._is_idle() or not self._between_requests):
            self.transport.close()

    _HANDLERS: ClassVar[Mapping[Endpoint, _Handler]] = {
        Endpoint.POLL: _answer_poll,
        Endpoint.STREAM: _open_stream,
        Endpoint.PINGS: _open_stream,
        Endpoint.EVALUATED_STREAM: _open_stream,
        Endpoint.EVALUATION: _answer_evaluation,
        Endpoint.EVENTS: _begin_upload,
    }
    """Handlers of hot routes."""


_Handler = Callable[[FastHTTPProtocol, RequestHead], bool]
"""Answers a request, or begins to; returns False if it is the application's."""


def _is_successful(stored: asyncio.Future[bool]) -> bool:
    return stored.done() and not stored.cancelled() and stored.exception() is None


def _stream_head(headers: Headers, date: bytes) -> bytes:
    lines = (b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 200 OK\r\n" + b"".join(lines) + b"transfer-encoding: chunked\r\n" + date


def protocol_factory(shared: FastPath) -> type[asyncio.Protocol]:
    """Return the factory of connection protocols, for uvicorn's option `http`.

    The initial values of all connections of a server are attributes of their class: cloud functions
    connect by the thousand, and uvicorn would set thirty attributes for each of them.
    """
    classes: list[Callable[[], FastHTTPProtocol]] = []

    def make_protocol(**arguments: Any) -> FastHTTPProtocol:
        if not classes:
            classes.append(_class_like(FastHTTPProtocol(shared, **arguments)))
        return classes[0]()

    return cast("type[asyncio.Protocol]", make_protocol)


def _class_like(model: FastHTTPProtocol) -> Callable[[], FastHTTPProtocol]:
    """Return a class whose instances begin with the attributes of `model`.

    Its `__init__` replaces those of all base classes: it sets the attributes that an instance must
    not share, and no others.
    """

    def init(protocol: FastHTTPProtocol) -> None:
        protocol.parser = parser = HttpRequestParser(protocol)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        protocol.pipeline = deque()
        protocol._last_activity = monotonic()  # noqa: SLF001 - an instance of our own class

    own = ("parser", "pipeline", "_last_activity")
    shared = {
        # A plain function would become a method.
        name: staticmethod(value) if hasattr(value, "__get__") else value
        for name, value in vars(model).items()
        if name not in own
    }
    protocol_class: Callable[[], FastHTTPProtocol] = type(
        "FastHTTPProtocol", (FastHTTPProtocol,), {**shared, "__init__": init}
    )
    return protocol_class
