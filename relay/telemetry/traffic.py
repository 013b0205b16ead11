"""What is asked of the relay: counts, and at level debug a line for each request (status 8.2, 8.3).

Both doors feed it. Counting costs an addition; lines are made only if the level was debug when the
process started. They hold neither keys nor contexts nor queries, unlike the reference's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.model.metrics import MetricValue
from relay.streams.hub import StreamTransport, decode_chunks

MASK_TAIL = 5
"""Characters of a credential that a line shows (status 8.3)."""

MAX_USER_AGENTS = 64
"""Kinds of clients that are counted apart, far more than a site has SDKs and versions of them. Of
all further ones, as when somebody makes names up, there is only one count."""

MAX_USER_AGENT = 80
"""Characters of a client's name that tell it apart."""

OTHER = "other"
"""The name of the clients beyond."""

_CREDENTIAL = re.compile(r"\b(?:sdk|mob|rel|api)-[0-9A-Za-z-]+")
_EVENT_STREAM = b"text/event-stream"
_METHOD_NOT_ALLOWED = 405

_log = logging.getLogger("relay.traffic")


class Series(NamedTuple):
    """What is counted apart. There is a bound on the number of each of these."""

    environment: str
    """Its display name."""
    route: str
    """The template, such as `/sdk/flags/{key}`."""
    method: str
    platform: str
    """`server`, `mobile` or `browser`: whose credential opens the route."""
    user_agent: str = ""
    """As `RequestMetrics.user_agent` gives it; empty if the client has no name."""


Counts = defaultdict[Series, MetricValue]


class RequestMetrics:
    """Counts of requests and streams since the start, and of the streams that are open."""

    def __init__(self) -> None:
        self.requests: Counts = defaultdict(MetricValue)
        """Requests that passed the choice of the environment, streams included."""
        self.new_streams: Counts = defaultdict(MetricValue)
        """Streams that were opened."""
        self.streams: Counts = defaultdict(MetricValue)
        """Streams that are open."""
        self.unusable: Counter[str] = Counter()
        """Posts and events of SDKs that could not be used, by environment."""
        self.discarded: Counter[str] = Counter()
        """Posts of SDKs that were dropped, as nobody is there to deliver them to."""
        self._user_agents: set[str] = set()
        self.logs = _log.isEnabledFor(logging.DEBUG)
        """Whether each request is logged."""

    def user_agent(self, own: bytes, general: bytes) -> str:
        """Return the name under which a client is counted.

        Args:
            own: the header `X-LaunchDarkly-User-Agent`, empty if there is none; it comes first.
            general: the header `User-Agent`, empty if there is none.
        """
        name = _readable((own or general)[:MAX_USER_AGENT])
        if name not in self._user_agents:
            if len(self._user_agents) >= MAX_USER_AGENTS:
                return OTHER
            self._user_agents.add(name)
        return name


def client_label(traffic: RequestMetrics, headers: Mapping[bytes, bytes]) -> str:
    """Return the name under which the client of a request at the front door is counted."""
    own, general = headers.get(b"x-launchdarkly-user-agent", b""), headers.get(b"user-agent", b"")
    return traffic.user_agent(own, general)


def label_value(value: str) -> str:
    """Return a name as the reference writes it in figures (status 8.2)."""
    return value.replace("/", "_") or "_"


def totals(counts: Mapping[Series, MetricValue]) -> Mapping[str, int]:
    """Return the sum for each environment."""
    sums: defaultdict[str, int] = defaultdict(int)
    for series, count in counts.items():
        sums[series.environment] += count.value
    return sums


def request_line(method: str, url: str, authorization: str, status: int, size: int | None) -> str:
    """Return the line of a request.

    Args:
        method: of the request.
        url: as `redact_url` gives it.
        authorization: the header; empty if there is none.
        status: of the answer.
        size: bytes of its body; None for a stream, whose line comes at its beginning.
    """
    end = "(streaming)" if size is None else f"bytes={size}"
    auth = _masked(authorization) if authorization else "n/a"
    return f"Request: method={method} url={url} auth={auth} status={status} {end}"


def closed_line(url: str, authorization: str, size: int) -> str:
    """Return the line of a stream that has ended; the arguments are those of `request_line`."""
    auth = _masked(authorization) if authorization else "n/a"
    return f"Stream closed: url={url} auth={auth} bytes={size}"


def redact_url(target: str, *, has_context: bool = False) -> str:
    """Return a request's target for a line: without keys and contexts, and of a query the place.

    People's data are in all kinds of queries, also where none belongs.

    Args:
        target: not decoded.
        has_context: whether the last segment of the path is a context.
    """
    path, mark, _ = target.partition("?")
    if has_context:
        path = path.rpartition("/")[0] + "/{context}"
    path = _CREDENTIAL.sub(lambda match: _masked(match[0]), path)
    return path + "?{query}" if mark else path


def log_request(line: str) -> None:
    """Write a line."""
    _log.debug("%s", line)


def _masked(credential: str) -> str:
    return "*" + credential[-MASK_TAIL:]


@lru_cache(maxsize=2 * MAX_USER_AGENTS)
def _readable(user_agent: bytes) -> str:
    """Return a client's name as one short line without credentials."""
    text = "".join(c if c.isprintable() else "?" for c in user_agent.decode("latin-1").strip())
    return _CREDENTIAL.sub(lambda match: _masked(match[0]), text)


class AccessLogMiddleware:
    """Middleware that logs each request which found a route; used only if `RequestMetrics.logs`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through, and log."""
        entry = _Entry(scope)

        async def noting(message: Message) -> None:
            entry.see(message)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            entry.end()


class _Entry:
    """What a line says of one request to the application."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._status = 0
        self._size = 0
        self._streams = False

    def see(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._streams = content_type.startswith(_EVENT_STREAM)
            if self._streams:
                self._note_request(None)
        elif self._scope["method"] != "HEAD":
            self._size += len(message.get("body", b""))

    def end(self) -> None:
        if self._streams:
            log_request(closed_line(self._url, self._authorization, self._size))
        elif self._status and self._found_route:
            self._note_request(self._size)

    def _note_request(self, size: int | None) -> None:
        method = self._scope["method"]
        log_request(request_line(method, self._url, self._authorization, self._status, size))

    @property
    def _found_route(self) -> bool:
        return "endpoint" in self._scope and self._status != _METHOD_NOT_ALLOWED

    @property
    def _url(self) -> str:
        path, mark = self._scope["raw_path"], b"?" if self._scope["query_string"] else b""
        has_context = "context" in self._scope.get("path_params", {})
        return redact_url((path + mark).decode("latin-1"), has_context=has_context)

    @property
    def _authorization(self) -> str:
        values = (value for name, value in self._scope["headers"] if name == b"authorization")
        header: bytes = next(values, b"")
        return header.decode("latin-1")


class LoggedTransport(asyncio.Protocol):
    """Stands between a transport and the subscription that owns it, to log the end of the stream.

    Args:
        transport: of the client; the head of the response has been written.
        url: as `redact_url` gives it.
        authorization: the header.
    """

    def __init__(self, transport: StreamTransport, url: str, authorization: str) -> None:
        self._transport = transport
        self._url = url
        self._authorization = authorization
        self._size = 0
        self._owner: asyncio.BaseProtocol = asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Tell the owner what the transport says."""
        self._owner = protocol
        self._transport.set_protocol(self)

    def write(self, data: bytes, /) -> None:
        """Write chunks, and count what they hold."""
        self._size += sum(map(len, decode_chunks(data)))
        self._transport.write(data)

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Write chunks, and count what they hold."""
        for part in parts:
            self.write(part)

    def close(self) -> None:
        """Close after everything has been sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes not yet sent."""
        return self._transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        """Pass on that the buffer is full."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the buffer has emptied."""
        self._owner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on that the client is gone, and log it."""
        self._owner.connection_lost(exc)
        log_request(closed_line(self._url, self._authorization, self._size))
