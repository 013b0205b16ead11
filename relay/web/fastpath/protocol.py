"""HTTP protocol of the fast path: hot requests are answered without the application.

No task, no ASGI, no work that could have been done once per change. Polls are written from cached
bytes, the connection of a stream is handed over to the hub, and event payloads are answered when
they are stored. Anything unusual, and each error, is passed on to the application, which has the
same routes and gives the same bytes.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from functools import partial
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from relay.clock import monotonic
from relay.streams.transport import StreamTransport, TLSTransport
from relay.web.access_log import LoggedTransport, log_request
from relay.web.fastpath.application import ApplicationProtocol
from relay.web.fastpath.cache import CLOSING, WireResponse
from relay.web.fastpath.dispatch import authorization, dispatch, log_line, redacted_url
from relay.web.fastpath.evaluation import PendingResponse
from relay.web.fastpath.events import CHUNKED, EventUpload, only_chunk
from relay.web.fastpath.heads import END, EVALUATION_STARTS, RequestHead, read_head
from relay.web.fastpath.shared import FastPath, SweptConnection
from relay.web.fastpath.streams import StreamRequest

MAX_HEADS_REMEMBERED = 32
"""Maximum number of upload heads remembered from one connection: enough for the clients behind a
proxy; bounds the cost of a client that makes up a new head for each upload."""


class ConnectionState(Enum):
    """State of a connection.

    ```
                      ┌─────────────────── response written ───────────────────┐
                      ▼                                                        │
    CLOSED ── made ─► READY ── whole hot request ─► (answered at once: READY)  │
                      │  ├──── evaluation in its turn later ──────────────► WAITING
                      │  ├──── head of an upload ─► UPLOADING ── complete ─────┘
                      │  ├──── anything unusual ──► APPLICATION ── idle, next bytes ─► READY
                      │  └──── stream ─► CLOSED (the hub owns the connection)
    ```

    An upload that turns out to be unusual goes from `UPLOADING` to `APPLICATION` with all of its
    bytes.
    """

    READY = "ready"
    """Between two requests."""
    UPLOADING = "uploading"
    """The body of an upload is being received."""
    WAITING = "waiting"
    """A response is outstanding; bytes received meanwhile are kept, and reading is paused."""
    APPLICATION = "application"
    """`ApplicationProtocol` reads, and the application answers."""
    CLOSED = "closed"
    """Not connected, or handed over."""


READY, UPLOADING, WAITING, APPLICATION, CLOSED = ConnectionState


class FastHTTPProtocol(asyncio.Protocol, SweptConnection):
    """Protocol of one connection.

    Args:
        shared: state shared by all connections.
        config, server_state, app_state: as in uvicorn's protocol.
    """

    __slots__ = (
        "_app_state",
        "_application",
        "_config",
        "_deferred",
        "_heads_remembered",
        "_last_activity",
        "_last_backlog",
        "_pending",
        "_received",
        "_server_state",
        "_shared",
        "_state",
        "_transport",
        "_upload",
        "_write_paused",
    )

    def __init__(
        self,
        shared: FastPath,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._shared = shared
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._state = CLOSED
        self._transport: asyncio.Transport
        """Set when the connection is made."""
        self._application: ApplicationProtocol | None = None
        """Made for the first request that the application answers."""
        self._upload: EventUpload | None = None
        """The upload that is being received or stored."""
        self._deferred = b""
        """Head of the evaluation request that waits for its turn, or for memberships."""
        self._pending: PendingResponse | None = None
        """Response to that request, if it waits for memberships."""
        self._received = b""
        """Bytes received in the state `WAITING`."""
        self._write_paused = False
        """True while the client does not take the bytes written."""
        self._last_activity = monotonic()
        """Monotonic time at which the client last sent or took bytes."""
        self._last_backlog = 0
        """Bytes in the write buffer at the last sweep."""
        self._heads_remembered = 0
        """Number of upload heads remembered from this connection."""

    def __repr__(self) -> str:
        detail = self._application if self._state is APPLICATION else self._upload
        return f"<FastHTTPProtocol [{self._state.value}]{f' {detail}' if detail else ''}>"

    # Callbacks of the transport and the server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport; the addresses are only looked up for the application."""
        connections: set[Any] = self._server_state.connections  # the type names uvicorn's own
        connections.add(self)
        self._transport = cast("asyncio.Transport", transport)
        self._state = READY

    def data_received(self, data: bytes) -> None:
        """Pass bytes to what the state says."""
        shared, state, now = self._shared, self._state, monotonic()
        if now >= shared.date_expires_at:
            shared.renew_date(self._server_state, now)
        if state is APPLICATION and self._application and self._application.is_idle:
            self._state = state = READY
        if state is READY:
            self._last_activity = now
            self._begin(data)
        elif state is APPLICATION and self._application:
            if not self._application.reads_head:  # all pieces of a head have one time-out
                self._last_activity = now
            self._application.data_received(data)
        elif state is UPLOADING and self._upload:
            self._last_activity = now
            self._receive(self._upload, data)
        elif state is WAITING:
            self._received += data
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the memory of the upload, and end the application's request."""
        connections: set[Any] = self._server_state.connections
        connections.discard(self)
        self._state, self._deferred = CLOSED, b""
        if self._upload is not None:
            self._upload.release()
        if self._application is not None:
            self._application.connection_lost(exc)

    def pause_writing(self) -> None:
        """Leave requests to the application, which waits for slow clients."""
        self._write_paused = True
        if self._application is not None:
            self._application.pause_writing()

    def resume_writing(self) -> None:
        """Answer again."""
        self._write_paused = False
        if self._application is not None:
            self._application.resume_writing()

    def shutdown(self) -> None:
        """Close the connection as soon as no response is outstanding."""
        if self._deferred:
            self.resume()
        if self._upload is not None:
            self._upload.keep_alive = False
        elif self._state is APPLICATION and self._application is not None:
            self._application.shutdown()
        elif self._state is not CLOSED:
            self._transport.close()

    def check(self, now: float) -> None:
        """Close the connection if its client has exceeded a time limit."""
        limits, application = self._shared.limits, self._application
        backlog = self._transport.get_write_buffer_size()
        if backlog < self._last_backlog:
            self._last_activity = now
        self._last_backlog = backlog
        if application is not None:
            self._last_activity = max(self._last_activity, application.last_response)
        idle_time = now - self._last_activity
        if backlog:
            if idle_time > limits.stall_timeout:
                self._transport.abort()
        elif self._state is not APPLICATION or application is None:
            if self._state is not WAITING and idle_time > limits.keep_alive:
                self._transport.close()
        elif application.reads_head:
            if idle_time > limits.head_timeout:
                application.refuse(b"408 Request Timeout")
        elif idle_time > limits.keep_alive and (application.is_idle or application.reads_body):
            self._transport.close()

    # Requests

    def _begin(self, data: bytes) -> None:
        """Answer known requests at once; parse all others."""
        if self._transport.is_closing():
            return
        if self._write_paused:
            self._pass_on(data)
        elif data.startswith(b"POST "):
            if not self._begin_known_upload(data):
                self._begin_unknown(data, data.find(END) + len(END))
        elif not self._answer_from_cache(data):
            end = data.find(END) + len(END)
            if end != len(data):  # incomplete, or pipelined
                self._pass_on(data)
            elif not data.startswith(EVALUATION_STARTS):
                self._begin_unknown(data, end)
            elif self._shared.scheduler.defer(self):
                self._state, self._deferred = WAITING, data
            else:
                self._evaluate(data)

    def resume(self) -> None:
        """Answer the deferred evaluation request, then the bytes received since."""
        head, self._deferred = self._deferred, b""
        pending, self._pending = self._pending, None
        if head and not self._transport.is_closing():
            self._state = READY
            if pending is None:
                self._evaluate(head)
            else:
                self._write_evaluated(head, self._shared.evaluation.finish(pending))
            if self._state is not WAITING:
                self._continue()

    def _await_members(self, head: bytes, pending: PendingResponse) -> None:
        """Answer an evaluation request when memberships in big segments have been read."""
        if self._shared.relay.stopping:
            self._pass_on(head)
            return
        self._state, self._deferred, self._pending = WAITING, head, pending
        pending.evaluation.read().add_done_callback(self._use_members)

    def _use_members(self, _read: asyncio.Future[Any]) -> None:
        if self._deferred and not self._shared.scheduler.defer(self):
            self.resume()

    def _continue(self) -> None:
        """Take the bytes that were received while a response was outstanding."""
        received, self._received = self._received, b""
        if received:
            self._transport.resume_reading()
            self.data_received(received)

    def _answer_from_cache(self, data: bytes) -> bool:
        """Serve from the response cache; return False if there is no fresh response."""
        shared = self._shared
        cached = shared.cache.get(data)
        if cached is None and not data.startswith(EVALUATION_STARTS):
            cached = shared.cache.get_similar(data)
        if isinstance(cached, WireResponse):
            self._write(cached)
        elif cached is not None and self._can_hand_over():
            self._hand_over(cached)
        else:
            return False
        return True

    def _evaluate(self, head: bytes) -> None:
        """Answer an evaluation request; most differ from an earlier one in their context only."""
        shared = self._shared
        response = None
        if shared.evaluation is not None and len(head) <= shared.limits.max_head_size:
            response = shared.evaluation.answer_known(head)
        if response is None:
            self._begin_unknown(head, len(head))
            return
        if isinstance(response, PendingResponse):
            self._await_members(head, response)
        else:
            self._write_evaluated(head, response)

    def _write_evaluated(self, head: bytes, response: WireResponse | None) -> None:
        """Write a response and cache it if it is worth it; without one, ask the application."""
        if response is None:
            self._pass_on(head)
            return
        if response.size:
            self._shared.cache.keep(head, response)
        self._write(response)

    def _begin_unknown(self, data: bytes, end: int) -> None:
        """Parse a head, and begin its request; leave anything unusual to the application.

        Args:
            data: bytes of the request.
            end: number of bytes of the head; less than those of the blank line if incomplete.
        """
        shared, head = self._shared, None
        if len(END) <= end <= shared.limits.max_head_size:
            head = read_head(shared.relay, data[:end])
        outcome = None if head is None else dispatch(shared, head)
        if isinstance(outcome, WireResponse):
            self._write(outcome)
        elif isinstance(outcome, PendingResponse):
            self._await_members(data, outcome)
        elif isinstance(outcome, EventUpload):
            self._state, self._upload = UPLOADING, outcome
            self._receive(outcome, data[end:])
        elif outcome is not None and self._can_hand_over():
            self._hand_over(outcome, head)
        else:
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        """Let the application answer a request that begins with these bytes."""
        if self._application is None:
            self._application = ApplicationProtocol(
                self._shared, self._config, self._server_state, self._app_state
            )
            self._application.connection_made(self._transport)
            # The server knows this protocol; it must not shut down both.
            self._application.connections.discard(self._application)
            if self._write_paused:
                self._application.pause_writing()
        self._state = APPLICATION
        self._application.data_received(data)

    # Responses

    def _write(self, response: WireResponse) -> None:
        """Write a complete response, and count it."""
        if response.line:
            log_request(response.line)
        self._server_state.total_requests += 1
        response.count.value += 1
        if response.answer is not None:
            response.answer.add()
        self._transport.writelines(response.to_wire(self._shared.date))
        if response.closes:
            self._transport.close()

    # Streams

    def _can_hand_over(self) -> bool:
        return not (self._transport.get_write_buffer_size() or self._shared.relay.stopping)

    def _hand_over(self, request: StreamRequest, head: RequestHead | None = None) -> None:
        """Hand the connection over to the hub, which replaces this protocol.

        Args:
            request: what the client wants.
            head: of the request; needed only if requests are logged.
        """
        shared, state = self._shared, self._server_state
        connections: set[Any] = state.connections
        connections.discard(self)
        self._state = CLOSED
        state.total_requests += 1
        profile = request.profile
        counts = profile.counts
        counts.requests.value += 1
        counts.opened.value += 1
        transport: StreamTransport = self._transport
        start = profile.to_wire(shared.date)
        if self._transport.get_extra_info("sslcontext") is not None:
            transport = TLSTransport(self._transport)
        if shared.traffic.logs and head is not None:
            log_request(log_line(head, 200, None))
            transport.write(start)
            logged = LoggedTransport(transport, redacted_url(head), authorization(head))
            transport, start = logged, b""
        self._application = None
        hub, grant = request.grant.environment.hub, request.grant
        hub.subscribe(request.name, transport, start, counts.open, request.client, grant=grant)

    # Uploads

    def _begin_known_upload(self, data: bytes) -> bool:
        """Begin an upload with a known head, without the parser."""
        events, end = self._shared.events, data.find(END) + len(END)
        if self._shared.traffic.logs or end < len(END):
            return False
        known = events.find_head(data[:end])
        if known is None:
            return False
        head, payload_id, length = known
        received = data[end:]
        if length == CHUNKED:
            body = only_chunk(received)
        elif len(received) > length:
            return False  # pipelined requests
        else:
            body = received if len(received) == length else None
        stored = None if body is None else events.accept_whole(head, payload_id, body)
        if stored is not None and head.keep_alive and _is_successful(stored):
            self._server_state.total_requests += 1
            self._transport.write(head.to_wire(self._shared.date))
            return True
        self._upload = upload = events.begin_known(head, data[:end], payload_id)
        if stored is not None:
            upload.receive(received)
            self._await_stored(upload, stored)
        else:
            self._state, upload.missing = UPLOADING, length
            self._receive(upload, received)
        return True

    def _receive(self, upload: EventUpload, data: bytes) -> None:
        """Receive a part of the body of an upload, and the bytes after it."""
        following = b""
        if 0 <= upload.missing < len(data):
            data, following = data[: upload.missing], data[upload.missing :]
        if not upload.receive(data) or (upload.is_complete and not self._accept(upload)):
            raw = b"".join((upload.start, *upload.parts, following))
            upload.release()
            self._upload = None
            self._pass_on(raw)
        elif following and self._state is READY:
            self._pass_on(following)  # pipelined requests
        elif following:
            self.data_received(following)

    def _accept(self, upload: EventUpload) -> bool:
        """Accept a complete upload; return False if it is the application's."""
        events = self._shared.events
        stored = events.accept(upload)
        if stored is None:
            return False
        if upload.head is None and self._heads_remembered < MAX_HEADS_REMEMBERED:
            self._heads_remembered += 1
            events.remember(upload.start, upload)
        self._await_stored(upload, stored)
        return True

    def _await_stored(self, upload: EventUpload, stored: asyncio.Future[bool]) -> None:
        self._state = WAITING
        if stored.done():
            self._answer_upload(upload, stored)
        else:
            stored.add_done_callback(partial(self._answer_upload, upload))

    def _answer_upload(self, upload: EventUpload, stored: asyncio.Future[bool]) -> None:
        """Answer an upload that is stored, or could not be."""
        upload.release()
        self._upload = None
        self._last_activity = monotonic()
        events, head = self._shared.events, upload.head
        if self._state is CLOSED or self._transport.is_closing():
            return
        self._state = READY
        self._server_state.total_requests += 1
        if head is not None and upload.keep_alive and _is_successful(stored):
            self._transport.write(head.to_wire(self._shared.date))
        else:
            response = events.answer(upload, stored)
            if not upload.keep_alive:
                response = response.with_headers(CLOSING)
            self._transport.write(response.head + self._shared.date + response.body)
        if not upload.keep_alive:
            self._transport.close()
        self._continue()


def _is_successful(stored: asyncio.Future[bool]) -> bool:
    return stored.done() and not stored.cancelled() and stored.exception() is None


def protocol_factory(shared: FastPath) -> type[asyncio.Protocol]:
    """Return the factory of connection protocols, for uvicorn's option `http`."""
    return cast("type[asyncio.Protocol]", partial(FastHTTPProtocol, shared))
