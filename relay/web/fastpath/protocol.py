"""uvicorn's HTTP protocol with prepared answers: hot requests need no application.

No task, no ASGI, no work that could have been done once per change. Polls are written from prepared
bytes; the connection of a stream goes over to the hub; posts of events are answered when they are
safe. Whatever is not plainly one of these, and each error, goes on to the application, which has
the same routes and gives the same bytes.
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

from relay.environment import Environment
from relay.model.metrics import MetricValue
from relay.streams.transport import StreamTransport
from relay.telemetry.redaction import redact_url
from relay.telemetry.traffic import Series, client_label
from relay.web.access import by_plain_key
from relay.web.access_log import LoggedTransport, log_request, request_line
from relay.web.endpoints.polling import template
from relay.web.endpoints.streams import STREAMS, stream_headers
from relay.web.fastpath.cache import CLOSE, CLOSING, CachedResponse, EvaluationResponse, assemble
from relay.web.fastpath.events import CHUNKED, EventUpload, only_chunk
from relay.web.fastpath.heads import END
from relay.web.fastpath.shared import FastPath, SweptConnection
from relay.web.fastpath.streams import StreamRequest, client_stream_request
from relay.web.protocol import HTTPProtocol
from relay.web.responses import Headers

USED_OF_UVICORN = (
    *("connections", "cycle", "flow", "headers", "parser", "pipeline", "scope", "transport", "url"),
    *("expect_100_continue", "timeout_keep_alive_task", "_unset_keepalive_if_required"),
    *("on_message_begin", "on_headers_complete", "on_body", "on_message_complete"),
    *("on_response_complete", "connection_lost", "server", "client", "scheme", "shutdown"),
)
"""The attributes of uvicorn's protocol that this module relies on; a test looks for each."""

MAX_HEADS_REMEMBERED = 32
"""Heads of posts that one connection may teach: of the clients behind a proxy; one that makes up a
new one for each post costs no more than that."""

_VERSIONS = ("1.1", "1.0")
_EVALUATED = b"/sdk/evalx/"
_EVALUATIONS = (b"GET /sdk/evalx/", b"GET /msdk/evalx/")
_ODD_HEADERS = frozenset((b"expect", b"upgrade"))
_BODY_HEADERS = _ODD_HEADERS | {b"content-length", b"transfer-encoding"}


class FastHTTPProtocol(HTTPProtocol, SweptConnection):
    """One connection.

    Args:
        shared: what all connections share.
        config, server_state, app_state, _loop: uvicorn's.
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
        """When the client last said something, or took something."""
        self._backlog = 0
        self._head_size = 0
        """Bytes of an incomplete request head."""
        self._between_requests = True
        """Whether no request is being read."""
        self._in_body = False
        """Whether what comes belongs to a request whose head is complete."""
        self._whole_head = b""
        """The bytes that the parser is fed with, if they are exactly one request head."""
        self._answered = False
        """Whether the request that is being read needs no application."""
        self._closes = False
        """Whether the client wants the connection to end with the answer."""
        self._deferred = b""
        """The question that waits for its turn."""
        self._received_meanwhile = b""
        """What the client has said since."""
        self._stream: StreamRequest | None = None
        self._upload: EventUpload | None = None
        """What is being received or kept."""
        self._upload_start = b""
        """What the parser is fed with, if it begins with a post."""
        self._heads_remembered = 0
        """Heads of posts that this connection has taught."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note what the door needs; who is connected to whom, only the application asks."""
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)

    def data_received(self, data: bytes) -> None:
        """Answer at once what was answered before; parse everything else."""
        door, now = self._shared, monotonic()
        if now >= door.date_expires_at:
            door.renew_date(self.server_state, now)
        if self._deferred:
            self._received_meanwhile += data
            self.transport.pause_reading()
            return
        if not self._head_size:  # the head of a request has one time-out for all its pieces
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
        """Do what was done for the same request before, or see to it later."""
        door = self._shared
        asks = data.startswith(_EVALUATIONS)
        given = door.cache.get_evaluated(data) if asks else door.cache.get(data)
        if isinstance(given, CachedResponse):
            self._write(given)
            return True
        if given is not None and self._can_open():
            self._hand_over(given)
            return True
        if data.find(END) != len(data) - len(END):
            return False
        if asks:
            if door.scheduler.defer(self):
                self._deferred = data
                return True
            if self._answer_known_client(data):
                return True
        self._whole_head = data
        return False

    def resume(self) -> None:
        """Answer the question that has waited."""
        head, self._deferred = self._deferred, b""
        if self.transport.is_closing() or not head:
            return
        if not self._answer_known_client(head):
            self._whole_head = head
            self._parse(head)
        early, self._received_meanwhile = self._received_meanwhile, b""
        if early:
            self.transport.resume_reading()
            self.data_received(early)

    def shutdown(self) -> None:
        """End as soon as nobody waits for an answer."""
        self.resume()
        super().shutdown()

    def _answer_known_client(self, head: bytes) -> bool:
        """Answer a request that differs from an earlier one in its context only."""
        door = self._shared
        if door.evaluation is None or len(head) > door.limits.max_head_size:
            return False
        told = door.evaluation.answer_known(head)
        if told is None:
            return False
        self._write_evaluation(head, told)
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
        """Whether an answer written now follows the previous one, to a client that reads."""
        cycle = self.cycle
        return (cycle is None or cycle.response_complete) and not (
            self.pipeline or self.flow.write_paused or self.transport.is_closing()
        )

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self._between_requests = False
        self._answered = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Answer a hot request; give any other to the application."""
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
        """Give the request, whose head has been read, to the application."""
        if self.scheme is None:
            self.server = get_local_addr(self.transport)
            self.client = get_remote_addr(self.transport)
            self.scheme = "https" if is_ssl(self.transport) else "http"
        # uvicorn would cut a fragment off; in a request it is an ordinary part of the path.
        url, headers = self.url.replace(b"#", b"%23"), self.headers
        expects_more = self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_more
        self.headers.extend(headers)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Give the body to the application, unless it is that of a post which is taken here."""
        if not self._answered:
            super().on_body(body)
        elif self._upload is not None and not self._upload.receive(body):
            self._pass_on(self._upload)

    def on_message_complete(self) -> None:
        """Note that the request has been read."""
        self._between_requests = True
        self._in_body = False
        if self._answered and self._upload is not None:
            self._accept_upload(self._upload)
        if not self._answered:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of what the client has sent."""
        if self._upload is not None:
            self._upload.release()
        super().connection_lost(exc)

    def _answer(self) -> bool:
        """Answer the request that has just been parsed, or begin to, if it is plain and hot."""
        parser = self.parser
        method, (_, _, path) = parser.get_method(), self.url.partition(b"/")
        answer = self._ANSWERS.get((method, path.partition(b"/")[0]))
        if answer is None or parser.get_http_version() != "1.1":
            return False
        self._closes = not parser.should_keep_alive()
        headers = dict(self.headers)
        if len(headers) != len(self.headers) or not _ODD_HEADERS.isdisjoint(headers):
            return False
        return answer(self, headers)

    def _environment_of(self, headers: Mapping[bytes, bytes]) -> Environment | None:
        """Return the environment of a GET that is all that has come."""
        if not self._whole_head or not _BODY_HEADERS.isdisjoint(headers):
            return None
        return by_plain_key(self._shared.relay.by_sdk_key, headers)

    def _take_stream(self, headers: Mapping[bytes, bytes]) -> bool:
        environment, stream = self._environment_of(headers), STREAMS.get(self.url)
        if environment is None or stream is None:
            return False
        given = stream_headers(environment, closes=self._closes)
        opening = StreamRequest(environment, stream, given, self._series(environment))
        if not self._shared.traffic.logs:
            self._shared.cache.put(self._whole_head, opening)
        return self._open(opening)

    def _take_client_stream(self, headers: Mapping[bytes, bytes]) -> bool:
        traffic = self._shared.traffic
        if traffic.logs or not self._whole_head or not _BODY_HEADERS.isdisjoint(headers):
            return False
        relay, closes = self._shared.relay, self._closes
        opening = client_stream_request(relay, traffic, self.url, headers, closes=closes)
        return opening is not None and self._open(opening)

    def _open(self, opening: StreamRequest) -> bool:
        if not self._can_open():
            return False
        self._stream = opening
        return True

    def _can_open(self) -> bool:
        return not (self.transport.get_write_buffer_size() or self._shared.relay.stopping)

    def _answer_sdk(self, headers: Mapping[bytes, bytes]) -> bool:
        if self.url.startswith(_EVALUATED):
            return self._answer_evaluation(headers)
        return self._answer_poll(headers)

    def _answer_evaluation(self, headers: Mapping[bytes, bytes]) -> bool:
        """Answer a context that asks for its flags."""
        questions, logs = self._shared.evaluation, self._shared.traffic.logs
        if (
            questions is None
            or logs
            or not self._whole_head
            or not _BODY_HEADERS.isdisjoint(headers)
        ):
            return False
        told = questions.answer(self._whole_head, self.url, headers, closes=self._closes)
        if told is None:
            return False
        self._write_evaluation(self._whole_head, told)
        return True

    def _write_evaluation(self, head: bytes, told: EvaluationResponse) -> None:
        """Answer a context; remember that if it may well ask again."""
        if told.cacheable:
            prepared = CachedResponse(
                told.environment, told.head, told.pieces, told.count, closes=told.closes
            )
            self._shared.cache.put_evaluated(head, prepared)
        start = told.head + CLOSE if told.closes else told.head
        written = assemble(start, self._shared.date, told.pieces)
        self._respond(written, told.count, closes=told.closes)

    def _begin_upload(self, headers: Mapping[bytes, bytes]) -> bool:
        """Begin to receive a post of events: one at a time, as it is answered after a while."""
        posts, logs = self._shared.events, self._shared.traffic.logs
        if posts is None or logs or not self._is_idle():
            return False
        post = posts.begin(self.url, headers)
        if post is None:
            return False
        post.keep_alive = not self._closes
        post.start = self._upload_start[: self._upload_start.find(END) + len(END)]
        # So that requests which come meanwhile wait, and a shutdown does, too.
        self._upload = self.cycle = cast("Any", post)
        return True

    def _accept_upload(self, post: EventUpload) -> None:
        """See to it that a post that has come is answered when it is safe."""
        posts = self._shared.events
        kept = posts.accept(post) if posts else None
        if posts is None or kept is None:
            self._pass_on(post)
            return
        if post.head is None and post.start and self._heads_remembered < MAX_HEADS_REMEMBERED:
            self._heads_remembered += 1
            posts.remember(post.start, post)
        if kept.done():
            self._answer_upload(post, kept)
        else:
            kept.add_done_callback(partial(self._answer_upload, post))

    def _begin_known_upload(self, data: bytes) -> bool:
        """Take a post whose head means what another one's meant; the parser is not needed."""
        posts, end = self._shared.events, data.find(END) + len(END)
        if posts is None or self._shared.traffic.logs or end < len(END):
            return False
        post = posts.known(data[:end])
        if post is None:
            return False
        body: bytes | None = data[end:]
        if post.missing == CHUNKED:
            body = only_chunk(data[end:])
            post.missing = len(body or b"")
        if body is None or len(body) > post.missing:
            return False  # more requests, or chunks
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._upload = self.cycle = cast("Any", post)
        self._between_requests, self._in_body = False, True
        self._continue_upload(post, body)
        return True

    def _continue_upload(self, post: EventUpload, data: bytes) -> None:
        """Take a part of the body of a post whose head is known, and what follows it."""
        rest = b""
        if len(data) > post.missing:
            data, rest = data[: post.missing], data[post.missing :]
        post.missing -= len(data)
        if not post.receive(data):
            post.missing = 0
            self._pass_on(post)
        elif not post.missing:
            self._between_requests, self._in_body = True, False
            self._accept_upload(post)
        if rest:
            self._parse(rest)

    def _answer_upload(self, post: EventUpload, kept: asyncio.Future[object]) -> None:
        post.release()
        post.response_complete = True
        self._upload = None
        self._last_activity = monotonic()
        if self._shared.events is None or self.transport.is_closing():
            return
        head = post.head
        if head is not None and post.keep_alive and not kept.cancelled() and not kept.exception():
            self.transport.write(head.to_wire(self._shared.date))
        else:
            answer = self._shared.events.answer(post, kept)
            if not post.keep_alive:
                answer = answer.with_headers(CLOSING)
            self.transport.write(answer.head + self._shared.date + answer.body)
        if not post.keep_alive:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1

    def _pass_on(self, post: EventUpload) -> None:
        """Give a post to the application after all, with what has come of it."""
        body = b"".join(post.parts)
        post.release()
        self._upload = self.cycle = cast("Any", None)
        self._answered = False
        if post.head is not None:  # the parser has not seen it
            self._between_requests, self._in_body = True, False
            self._parse(post.start + body)
            return
        self._begin_in_application()
        if body:
            super().on_body(body)

    def _answer_poll(self, headers: Mapping[bytes, bytes]) -> bool:
        environment, head = self._environment_of(headers), self._whole_head
        if environment is None or self._shared.poll is None or not self.url.isascii():
            return False
        none_match, encoding = headers.get(b"if-none-match"), headers.get(b"accept-encoding")
        answer = self._shared.poll(
            environment, self.url.decode("ascii"), none_match or b"", encoding or b""
        )
        if answer is None:
            return False
        traffic = self._shared.traffic
        count = traffic.requests[self._series(environment)]
        prepared = CachedResponse(
            environment, answer.head, (answer.body,), count, closes=self._closes
        )
        if traffic.logs:
            prepared.line = self._line(answer.status, len(answer.body))
        self._shared.cache.put(head, prepared)
        self._write(prepared)
        return True

    def _series(self, environment: Environment) -> Series:
        route = template(self.url.decode("ascii"))
        agent = client_label(self._shared.traffic, dict(self.headers))
        return Series(environment.spec.name, route, "GET", "server", agent)

    def _line(self, status: int, size: int | None) -> str:
        return request_line("GET", self._shown, self._authorization, status, size)

    @property
    def _shown(self) -> str:
        return redact_url(self.url.decode("ascii"))

    @property
    def _authorization(self) -> str:
        return dict(self.headers)[b"authorization"].decode("latin-1")

    def _write(self, prepared: CachedResponse) -> None:
        if prepared.line:
            log_request(prepared.line)
        written = prepared.to_wire(self._shared.date)
        self._respond(written, prepared.count, closes=prepared.closes)

    def _respond(self, written: tuple[bytes, ...], count: MetricValue, *, closes: bool) -> None:
        """Write a whole answer, and count it."""
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        count.value += 1
        self.transport.writelines(written)
        if closes:
            self.transport.close()

    def _hand_over(self, opening: StreamRequest) -> None:
        """Give the connection to the hub, and leave nothing of this object behind."""
        self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        self.connections.discard(self)
        count = self._count_stream(opening.series)
        wire: StreamTransport = self.transport
        head = _stream_head(opening.headers, self._shared.date)
        if self._shared.traffic.logs:
            log_request(self._line(200, None))
            self.transport.write(head)
            wire, head = LoggedTransport(self.transport, self._shown, self._authorization), b""
        vars(self).clear()
        opening.environment.hub.subscribe(opening.name, wire, head, count, opening.client)

    def _count_stream(self, series: Series) -> MetricValue:
        """Count a new stream; return the count of those that are open."""
        traffic = self._shared.traffic
        traffic.requests[series].value += 1
        traffic.new_streams[series].value += 1
        return traffic.streams[series]

    def _is_head_too_large(self) -> bool:
        """Whether the head itself is too large, not only what was received together with it."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > self._shared.limits.max_head_size

    def _refuse_head(self) -> None:
        if len(self.url) > self._shared.limits.max_head_size // 2:
            self._refuse(b"414 URI Too Long")
        else:
            self._refuse(b"431 Request Header Fields Too Large")

    def _refuse(self, status: bytes) -> None:
        """Answer that a request is unacceptable, and close."""
        self._answered = True
        if self._is_idle():
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n" % status
            self.transport.write(head + self._shared.date)
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client has kept us waiting for too long."""
        limits = self._shared.limits
        backlog = self.transport.get_write_buffer_size()
        if backlog < self._backlog:
            self._last_activity = now
        self._backlog = backlog
        waited = now - self._last_activity
        if backlog:
            if waited > limits.stall_timeout:
                self.transport.abort()
        elif self._reads_head:
            if waited > limits.head_timeout:
                self._refuse(b"408 Request Timeout")
        elif waited > limits.keep_alive and (self._is_idle() or not self._between_requests):
            self.transport.close()

    _ANSWERS: ClassVar[Mapping[tuple[bytes, bytes], _Answer]] = {
        (b"GET", b"all"): _take_stream,
        (b"GET", b"flags"): _take_stream,
        (b"GET", b"eval"): _take_client_stream,
        (b"GET", b"meval"): _take_client_stream,
        (b"GET", b"ping"): _take_client_stream,
        (b"GET", b"mping"): _take_client_stream,
        (b"GET", b"sdk"): _answer_sdk,
        (b"GET", b"msdk"): _answer_evaluation,
        (b"POST", b"bulk"): _begin_upload,
        (b"POST", b"diagnostic"): _begin_upload,
        (b"POST", b"events"): _begin_upload,
        (b"POST", b"mobile"): _begin_upload,
    }
    """By method and first segment of the path, what takes a request that is plain."""


_Answer = Callable[[FastHTTPProtocol, Mapping[bytes, bytes]], bool]
"""Answers a request with these headers, or begins to; False if it is the application's."""


def _stream_head(headers: Headers, date: bytes) -> bytes:
    lines = (b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 200 OK\r\n" + b"".join(lines) + b"transfer-encoding: chunked\r\n" + date


def protocol_factory(shared: FastPath) -> type[asyncio.Protocol]:
    """Return what uvicorn wants as `http`: it makes the protocol of each connection.

    What all connections of a server begin with are attributes of their class: functions come by the
    thousand, and uvicorn gives each of their connections thirty.
    """
    kinds: list[Callable[[], FastHTTPProtocol]] = []

    def connection(**uvicorns: Any) -> FastHTTPProtocol:
        if not kinds:
            kinds.append(_class_like(FastHTTPProtocol(shared, **uvicorns)))
        return kinds[0]()

    return cast("type[asyncio.Protocol]", connection)


def _class_like(first: FastHTTPProtocol) -> Callable[[], FastHTTPProtocol]:
    """Return the class of connections that begin as this one did."""

    def begin(connection: FastHTTPProtocol) -> None:
        connection.parser = parser = HttpRequestParser(connection)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        connection.pipeline = deque()
        connection._last_activity = monotonic()  # noqa: SLF001 - it is one of ours

    own = ("parser", "pipeline", "_seen")
    shared = {
        # A function would become a method.
        name: staticmethod(value) if hasattr(value, "__get__") else value
        for name, value in vars(first).items()
        if name not in own
    }
    kind: Callable[[], FastHTTPProtocol] = type(
        "FastHTTPProtocol", (FastHTTPProtocol,), {**shared, "__init__": begin}
    )
    return kind
