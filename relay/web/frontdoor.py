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
from relay.hub import Wire
from relay.model.count import Count
from relay.web.answers import Headers
from relay.web.auth import by_plain_key
from relay.web.door import Connection, Door
from relay.web.heads import END
from relay.web.polling import template
from relay.web.posting import CHUNKED, Receiving, only_chunk
from relay.web.prepared import CLOSE, CLOSING, Prepared, Told, assembled
from relay.web.protocol import HTTPProtocol
from relay.web.streams import STREAMS, Opening, client_opening, stream_headers
from relay.web.traffic import LoggedWire, Series, client, note, request_line, shown

USED_OF_UVICORN = (
    *("connections", "cycle", "flow", "headers", "parser", "pipeline", "scope", "transport", "url"),
    *("expect_100_continue", "timeout_keep_alive_task", "_unset_keepalive_if_required"),
    *("on_message_begin", "on_headers_complete", "on_body", "on_message_complete"),
    *("on_response_complete", "connection_lost", "server", "client", "scheme", "shutdown"),
)
"""The attributes of uvicorn's protocol that this module relies on; a test looks for each."""

MAX_LESSONS = 32
"""Heads of posts that one connection may teach: of the clients behind a proxy; one that makes up a
new one for each post costs no more than that."""

_VERSIONS = ("1.1", "1.0")
_EVALUATED = b"/sdk/evalx/"
_QUESTIONS = (b"GET /sdk/evalx/", b"GET /msdk/evalx/")
_ODD_HEADERS = frozenset((b"expect", b"upgrade"))
_BODY_HEADERS = _ODD_HEADERS | {b"content-length", b"transfer-encoding"}


class FrontDoor(HTTPProtocol, Connection):
    """One connection.

    Args:
        door: what all connections share.
        config, server_state, app_state, _loop: uvicorn's.
    """

    def __init__(
        self,
        door: Door,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door = door
        self._seen = monotonic()
        """When the client last said something, or took something."""
        self._backlog = 0
        self._head_size = 0
        """Bytes of an incomplete request head."""
        self._between = True
        """Whether no request is being read."""
        self._in_body = False
        """Whether what comes belongs to a request whose head is complete."""
        self._whole = b""
        """The bytes that the parser is fed with, if they are exactly one request head."""
        self._answered = False
        """Whether the request that is being read needs no application."""
        self._closes = False
        """Whether the client wants the connection to end with the answer."""
        self._waits = b""
        """The question that waits for its turn."""
        self._early = b""
        """What the client has said since."""
        self._stream: Opening | None = None
        self._post: Receiving | None = None
        """What is being received or kept."""
        self._post_start = b""
        """What the parser is fed with, if it begins with a post."""
        self._lessons = 0
        """Heads of posts that this connection has taught."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note what the door needs; who is connected to whom, only the application asks."""
        self.connections.add(self)
        self.transport = transport
        self.flow = FlowControl(transport)

    def data_received(self, data: bytes) -> None:
        """Answer at once what was answered before; parse everything else."""
        door, now = self._door, monotonic()
        if now >= door.stale_at:
            door.renew_date(self.server_state, now)
        if self._waits:
            self._early += data
            self.transport.pause_reading()
            return
        if not self._head_size:  # the head of a request has one time-out for all its pieces
            self._seen = now
        if self._post is not None and self._post.missing:
            self._take_more(self._post, data)
            return
        if self._between and self._is_idle():
            if data.startswith(b"POST "):
                if self._take_known(data):
                    return
                self._post_start = data
            elif self._answer_again(data):
                return
        self._parse(data)

    def _answer_again(self, data: bytes) -> bool:
        """Do what was done for the same request before, or see to it later."""
        door = self._door
        asks = data.startswith(_QUESTIONS)
        given = door.given.told(data) if asks else door.given.find(data)
        if isinstance(given, Prepared):
            self._write(given)
            return True
        if given is not None and self._can_open():
            self._hand_over(given)
            return True
        if data.find(END) != len(data) - len(END):
            return False
        if asks:
            if door.turns.has_to_wait(self):
                self._waits = data
                return True
            if self._tell_known(data):
                return True
        self._whole = data
        return False

    def go_on(self) -> None:
        """Answer the question that has waited."""
        head, self._waits = self._waits, b""
        if self.transport.is_closing() or not head:
            return
        if not self._tell_known(head):
            self._whole = head
            self._parse(head)
        early, self._early = self._early, b""
        if early:
            self.transport.resume_reading()
            self.data_received(early)

    def shutdown(self) -> None:
        """End as soon as nobody waits for an answer."""
        self.go_on()
        super().shutdown()

    def _tell_known(self, head: bytes) -> bool:
        """Answer a request that differs from an earlier one in its context only."""
        door = self._door
        if door.questions is None or len(head) > door.limits.max_head_size:
            return False
        told = door.questions.known(head)
        if told is None:
            return False
        self._tell(head, told)
        return True

    def _parse(self, data: bytes) -> None:
        if not self._in_body:
            self._head_size += len(data)
        super().data_received(data)
        self._whole = self._post_start = b""
        if self._stream is not None:
            self._hand_over(self._stream)
        elif self._reads_head and self._head_size > self._door.limits.max_head_size:
            self._refuse_head()

    @property
    def _reads_head(self) -> bool:
        return not self._between and self._head_size > 0

    def _is_idle(self) -> bool:
        """Whether an answer written now follows the previous one, to a client that reads."""
        cycle = self.cycle
        return (cycle is None or cycle.response_complete) and not (
            self.pipeline or self.flow.write_paused or self.transport.is_closing()
        )

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        self._between = False
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
        elif size > self._door.limits.max_head_size and self._is_head_too_large():
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
        elif self._post is not None and not self._post.take(body):
            self._pass_on(self._post)

    def on_message_complete(self) -> None:
        """Note that the request has been read."""
        self._between = True
        self._in_body = False
        if self._answered and self._post is not None:
            self._keep(self._post)
        if not self._answered:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of what the client has sent."""
        if self._post is not None:
            self._post.release()
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

    def _opened(self, headers: Mapping[bytes, bytes]) -> Environment | None:
        """Return the environment of a GET that is all that has come."""
        if not self._whole or not _BODY_HEADERS.isdisjoint(headers):
            return None
        return by_plain_key(self._door.relay.by_sdk_key, headers)

    def _take_stream(self, headers: Mapping[bytes, bytes]) -> bool:
        environment, stream = self._opened(headers), STREAMS.get(self.url)
        if environment is None or stream is None:
            return False
        given = stream_headers(environment, closes=self._closes)
        opening = Opening(environment, stream, given, self._series(environment))
        if not self._door.traffic.logs:
            self._door.given.keep(self._whole, opening)
        return self._open(opening)

    def _take_client_stream(self, headers: Mapping[bytes, bytes]) -> bool:
        traffic = self._door.traffic
        if traffic.logs or not self._whole or not _BODY_HEADERS.isdisjoint(headers):
            return False
        relay, closes = self._door.relay, self._closes
        opening = client_opening(relay, traffic, self.url, headers, closes=closes)
        return opening is not None and self._open(opening)

    def _open(self, opening: Opening) -> bool:
        if not self._can_open():
            return False
        self._stream = opening
        return True

    def _can_open(self) -> bool:
        return not (self.transport.get_write_buffer_size() or self._door.relay.stopping)

    def _answer_sdk(self, headers: Mapping[bytes, bytes]) -> bool:
        if self.url.startswith(_EVALUATED):
            return self._answer_question(headers)
        return self._answer_poll(headers)

    def _answer_question(self, headers: Mapping[bytes, bytes]) -> bool:
        """Answer a context that asks for its flags."""
        questions, logs = self._door.questions, self._door.traffic.logs
        if questions is None or logs or not self._whole or not _BODY_HEADERS.isdisjoint(headers):
            return False
        told = questions.answer(self._whole, self.url, headers, closes=self._closes)
        if told is None:
            return False
        self._tell(self._whole, told)
        return True

    def _tell(self, head: bytes, told: Told) -> None:
        """Answer a context; remember that if it may well ask again."""
        if told.again:
            prepared = Prepared(
                told.environment, told.head, told.pieces, told.counter, closes=told.closes
            )
            self._door.given.keep_told(head, prepared)
        start = told.head + CLOSE if told.closes else told.head
        written = assembled(start, self._door.date, told.pieces)
        self._respond(written, told.counter, closes=told.closes)

    def _take_post(self, headers: Mapping[bytes, bytes]) -> bool:
        """Begin to receive a post of events: one at a time, as it is answered after a while."""
        posts, logs = self._door.posts, self._door.traffic.logs
        if posts is None or logs or not self._is_idle():
            return False
        post = posts.begin(self.url, headers)
        if post is None:
            return False
        post.keep_alive = not self._closes
        post.start = self._post_start[: self._post_start.find(END) + len(END)]
        # So that requests which come meanwhile wait, and a shutdown does, too.
        self._post = self.cycle = cast("Any", post)
        return True

    def _keep(self, post: Receiving) -> None:
        """See to it that a post that has come is answered when it is safe."""
        posts = self._door.posts
        kept = posts.accept(post) if posts else None
        if posts is None or kept is None:
            self._pass_on(post)
            return
        if post.head is None and post.start and self._lessons < MAX_LESSONS:
            self._lessons += 1
            posts.learn(post.start, post)
        if kept.done():
            self._end_post(post, kept)
        else:
            kept.add_done_callback(partial(self._end_post, post))

    def _take_known(self, data: bytes) -> bool:
        """Take a post whose head means what another one's meant; the parser is not needed."""
        posts, end = self._door.posts, data.find(END) + len(END)
        if posts is None or self._door.traffic.logs or end < len(END):
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
        self._post = self.cycle = cast("Any", post)
        self._between, self._in_body = False, True
        self._take_more(post, body)
        return True

    def _take_more(self, post: Receiving, data: bytes) -> None:
        """Take a part of the body of a post whose head is known, and what follows it."""
        rest = b""
        if len(data) > post.missing:
            data, rest = data[: post.missing], data[post.missing :]
        post.missing -= len(data)
        if not post.take(data):
            post.missing = 0
            self._pass_on(post)
        elif not post.missing:
            self._between, self._in_body = True, False
            self._keep(post)
        if rest:
            self._parse(rest)

    def _end_post(self, post: Receiving, kept: asyncio.Future[object]) -> None:
        post.release()
        post.response_complete = True
        self._post = None
        self._seen = monotonic()
        if self._door.posts is None or self.transport.is_closing():
            return
        head = post.head
        if head is not None and post.keep_alive and not kept.cancelled() and not kept.exception():
            self.transport.write(head.written(self._door.date))
        else:
            answer = self._door.posts.answer(post, kept)
            if not post.keep_alive:
                answer = answer.with_headers(CLOSING)
            self.transport.write(answer.head + self._door.date + answer.body)
        if not post.keep_alive:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1

    def _pass_on(self, post: Receiving) -> None:
        """Give a post to the application after all, with what has come of it."""
        body = b"".join(post.parts)
        post.release()
        self._post = self.cycle = cast("Any", None)
        self._answered = False
        if post.head is not None:  # the parser has not seen it
            self._between, self._in_body = True, False
            self._parse(post.start + body)
            return
        self._begin_in_application()
        if body:
            super().on_body(body)

    def _answer_poll(self, headers: Mapping[bytes, bytes]) -> bool:
        environment, head = self._opened(headers), self._whole
        if environment is None or self._door.poll is None or not self.url.isascii():
            return False
        none_match, encoding = headers.get(b"if-none-match"), headers.get(b"accept-encoding")
        answer = self._door.poll(
            environment, self.url.decode("ascii"), none_match or b"", encoding or b""
        )
        if answer is None:
            return False
        traffic = self._door.traffic
        count = traffic.requests[self._series(environment)]
        prepared = Prepared(environment, answer.head, (answer.body,), count, closes=self._closes)
        if traffic.logs:
            prepared.line = self._line(answer.status, len(answer.body))
        self._door.given.keep(head, prepared)
        self._write(prepared)
        return True

    def _series(self, environment: Environment) -> Series:
        route = template(self.url.decode("ascii"))
        agent = client(self._door.traffic, dict(self.headers))
        return Series(environment.spec.name, route, "GET", "server", agent)

    def _line(self, status: int, size: int | None) -> str:
        return request_line("GET", self._shown, self._authorization, status, size)

    @property
    def _shown(self) -> str:
        return shown(self.url.decode("ascii"))

    @property
    def _authorization(self) -> str:
        return dict(self.headers)[b"authorization"].decode("latin-1")

    def _write(self, prepared: Prepared) -> None:
        if prepared.line:
            note(prepared.line)
        written = prepared.written(self._door.date)
        self._respond(written, prepared.count, closes=prepared.closes)

    def _respond(self, written: tuple[bytes, ...], count: Count, *, closes: bool) -> None:
        """Write a whole answer, and count it."""
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        count.value += 1
        self.transport.writelines(written)
        if closes:
            self.transport.close()

    def _hand_over(self, opening: Opening) -> None:
        """Give the connection to the hub, and leave nothing of this object behind."""
        self._unset_keepalive_if_required()
        self.server_state.total_requests += 1
        self.connections.discard(self)
        count = self._count_stream(opening.series)
        wire: Wire = self.transport
        head = _stream_head(opening.headers, self._door.date)
        if self._door.traffic.logs:
            note(self._line(200, None))
            self.transport.write(head)
            wire, head = LoggedWire(self.transport, self._shown, self._authorization), b""
        vars(self).clear()
        opening.environment.hub.subscribe(opening.name, wire, head, count, opening.viewer)

    def _count_stream(self, series: Series) -> Count:
        """Count a new stream; return the count of those that are open."""
        traffic = self._door.traffic
        traffic.requests[series].value += 1
        traffic.new_streams[series].value += 1
        return traffic.streams[series]

    def _is_head_too_large(self) -> bool:
        """Whether the head itself is too large, not only what was received together with it."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > self._door.limits.max_head_size

    def _refuse_head(self) -> None:
        if len(self.url) > self._door.limits.max_head_size // 2:
            self._refuse(b"414 URI Too Long")
        else:
            self._refuse(b"431 Request Header Fields Too Large")

    def _refuse(self, status: bytes) -> None:
        """Answer that a request is unacceptable, and close."""
        self._answered = True
        if self._is_idle():
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n" % status
            self.transport.write(head + self._door.date)
        self.transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client has kept us waiting for too long."""
        limits = self._door.limits
        backlog = self.transport.get_write_buffer_size()
        if backlog < self._backlog:
            self._seen = now
        self._backlog = backlog
        waited = now - self._seen
        if backlog:
            if waited > limits.stall_timeout:
                self.transport.abort()
        elif self._reads_head:
            if waited > limits.head_timeout:
                self._refuse(b"408 Request Timeout")
        elif waited > limits.keep_alive and (self._is_idle() or not self._between):
            self.transport.close()

    _ANSWERS: ClassVar[Mapping[tuple[bytes, bytes], _Take]] = {
        (b"GET", b"all"): _take_stream,
        (b"GET", b"flags"): _take_stream,
        (b"GET", b"eval"): _take_client_stream,
        (b"GET", b"meval"): _take_client_stream,
        (b"GET", b"ping"): _take_client_stream,
        (b"GET", b"mping"): _take_client_stream,
        (b"GET", b"sdk"): _answer_sdk,
        (b"GET", b"msdk"): _answer_question,
        (b"POST", b"bulk"): _take_post,
        (b"POST", b"diagnostic"): _take_post,
        (b"POST", b"events"): _take_post,
        (b"POST", b"mobile"): _take_post,
    }
    """By method and first segment of the path, what takes a request that is plain."""


_Take = Callable[[FrontDoor, Mapping[bytes, bytes]], bool]
"""Answers a request with these headers, or begins to; False if it is the application's."""


def _stream_head(headers: Headers, date: bytes) -> bytes:
    lines = (b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 200 OK\r\n" + b"".join(lines) + b"transfer-encoding: chunked\r\n" + date


def front_door(door: Door) -> type[asyncio.Protocol]:
    """Return what uvicorn wants as `http`: it makes the protocol of each connection.

    What all connections of a server begin with are attributes of their class: functions come by the
    thousand, and uvicorn gives each of their connections thirty.
    """
    kinds: list[Callable[[], FrontDoor]] = []

    def connection(**uvicorns: Any) -> FrontDoor:
        if not kinds:
            kinds.append(_kind_like(FrontDoor(door, **uvicorns)))
        return kinds[0]()

    return cast("type[asyncio.Protocol]", connection)


def _kind_like(first: FrontDoor) -> Callable[[], FrontDoor]:
    """Return the class of connections that begin as this one did."""

    def begin(connection: FrontDoor) -> None:
        connection.parser = parser = HttpRequestParser(connection)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        connection.pipeline = deque()
        connection._seen = monotonic()  # noqa: SLF001 - it is one of ours

    own = ("parser", "pipeline", "_seen")
    shared = {
        # A function would become a method.
        name: staticmethod(value) if hasattr(value, "__get__") else value
        for name, value in vars(first).items()
        if name not in own
    }
    kind: Callable[[], FrontDoor] = type("FrontDoor", (FrontDoor,), {**shared, "__init__": begin})
    return kind
