"""A real server around a relay, and the least of HTTP that a test needs to talk to it."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from starlette.types import ASGIApp

from relay.environment import Environment
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.journal import Journal
from relay.programs import ProgramCache
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.relay import Relay
from relay.server.listeners import listen
from relay.server.options import Certificate, ServerOptions
from relay.server.server import make_server
from relay.server.site import Site
from relay.streams.admission import Admission
from relay.streams.channel import StreamFormat
from relay.streams.deltas import STREAM as DELTAS
from relay.streams.deltas import DeltaChannel
from relay.streams.evaluated import client_side_channels
from relay.streams.hub import Hub, StreamLimits
from relay.web.app import make_app
from relay.web.endpoints.evaluation import EvaluationHandler
from relay.web.endpoints.events import EventsHandler
from relay.web.fastpath.shared import ConnectionLimits, FastPath
from relay.web.handlers import Handlers
from tests.support.contracts import ScriptedSource

SDK_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a001"


class Served:
    """An environment with a scripted source, and the relay that serves it.

    Args:
        limits: of its streams.
        ping_jitter: of pings.
        admission: of its streams.
        more: what the environment is beside.
    """

    def __init__(
        self,
        limits: StreamLimits | None = None,
        *,
        ping_jitter: float = 0.0,
        admission: Admission | None = None,
        **more: Any,
    ) -> None:
        self.source = ScriptedSource()
        spec = EnvironmentSpec("main", SDKKey(SDK_KEY), environment_id=EnvironmentID("env-1"))
        spec = replace(spec, **more)
        journal = Journal(spec.lineage)
        evaluations = ProgramCache(journal)
        client_side = client_side_channels(evaluations, ping_jitter)
        channels = {DELTAS: DeltaChannel(journal), **client_side}
        self.admission = admission or Admission()
        formats: dict[str, StreamFormat] = {"all": AllFormat(), "flags": FlagsFormat()}
        self.hub = Hub(formats, limits, channels, self.admission)
        log = logging.getLogger("main")
        self.environment = Environment(
            spec, self.source, self.hub, log, programs=evaluations, journal=journal
        )
        self.serve(Relay([self.environment], 0, admission=self.admission))

    def serve(self, relay: Relay) -> None:
        """Serve another relay, with handlers of its own."""
        self.relay = relay
        self.handlers = Handlers.of(relay)
        self.traffic = self.handlers.traffic

    def use(self, **handlers: Any) -> None:
        """Replace handlers."""
        self.handlers = msgspec.structs.replace(self.handlers, **handlers)

    @property
    def events(self) -> EventsHandler:
        """The handler of events."""
        return self.handlers.events

    @property
    def evaluation(self) -> EvaluationHandler:
        """The handler of evaluations."""
        return self.handlers.evaluation

    def site(self, limits: ConnectionLimits | None = None) -> Site:
        """The relay with both of its paths."""
        site = site_of(self.handlers, limits)
        self.fast_path = site.fast_path
        return site


def site_of(handlers: Handlers, limits: ConnectionLimits | None = None) -> Site:
    """Return a relay with both of its paths."""
    fast_path = FastPath(handlers, limits)
    return Site(relay=handlers.relay, app=make_app(handlers), fast_path=fast_path)


@dataclass
class Address:
    """Where a server listens."""

    port: int
    tls: ssl.SSLContext | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        name = "localhost" if self.tls else None
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.tls, server_hostname=name, limit=2**24
        )

    async def ask(self, request: bytes) -> bytes:
        """Send bytes and return everything until the server closes."""
        reader, writer = await self.connect()
        writer.write(request)
        try:
            return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    served: Served,
    *,
    front: bool = True,
    app: ASGIApp | None = None,
    limits: ConnectionLimits | None = None,
    certificate: Certificate | None = None,
    trust: ssl.SSLContext | None = None,
    drain: float = 2.0,
) -> AsyncGenerator[Address, None]:
    """Serve until left; the relay runs beside.

    Without `app` both doors are those of production.
    """
    options = ServerOptions(0, certificate, drain, limits or ConnectionLimits())
    site = served.site(options.limits)
    if app is not None:
        site = msgspec.structs.replace(site, app=app)
    async with serving_site(site, options, front=front) as port:
        async with asyncio.timeout(5):
            await served.source.running.acquire()
        yield Address(port, trust)


@asynccontextmanager
async def serving_site(
    site: Site, options: ServerOptions, *, front: bool = True
) -> AsyncGenerator[int, None]:
    """Serve any relay until left; the port is given."""
    listener = listen(0)
    server = make_server(site.relay, site.app, options, site.fast_path if front else None)
    async with site.relay.upstream:
        running = asyncio.create_task(site.relay.run())
        serve = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.stop()
            await asyncio.wait([serve])
            running.cancel()
            await asyncio.wait([running])


async def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Stream:
    """One open stream, read chunk by chunk."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""

    @classmethod
    async def open(
        cls,
        address: Address,
        path: str = "/all",
        headers: Sequence[str] = (),
        key: str = SDK_KEY,
        *,
        method: str = "GET",
        body: bytes = b"",
    ) -> Stream:
        """Send the request and read the head of the response."""
        stream = cls(*await address.connect())
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: {key}", *headers, "", ""]
        stream.writer.write("\r\n".join(lines).encode() + body)
        async with asyncio.timeout(5):
            stream.head = await stream.reader.readuntil(b"\r\n\r\n")
        return stream

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    async def chunk(self, within: float = 5) -> bytes:
        """Return the next chunk; empty for the last."""
        async with asyncio.timeout(within):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def until(self, end: bytes, within: float = 5) -> bytes:
        """Return the bytes of the body up to and including `end`."""
        received = b""
        while not received.endswith(end):
            chunk = await self.chunk(within)
            assert chunk, received
            received += chunk
        return received

    async def rest(self) -> bytes:
        """Return the bytes until the proper end, then see that the server closes."""
        received = b""
        while chunk := await self.chunk():
            received += chunk
        return received

    async def closed(self) -> bool:
        """Wait until the server closes the connection."""
        async with asyncio.timeout(5):
            return await self.reader.read() == b""

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Reply:
    """A response: header names in lower case, without `date`; of a stream only the beginning."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(
    address: Address,
    path: str,
    headers: Sequence[tuple[str, str]] = (),
    *,
    method: str = "GET",
    body: bytes = b"",
    chunked: bool = False,
    patience: float = 0.1,
) -> Reply:
    """Send a request exactly as given and read the response.

    A stream is read until its first message is complete, or nothing comes for `patience` seconds.
    """
    reader, writer = await address.connect()
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        *(f"{name}: {value}" for name, value in headers),
    ]
    length = [f"Content-Length: {len(body)}"] if body else []
    if chunked:
        length = ["Transfer-Encoding: chunked"]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    writer.write("\r\n".join([*lines, *length, "", ""]).encode() + body)
    try:
        async with asyncio.timeout(5):
            return await _reply(reader, method, patience)
    finally:
        writer.close()


async def _reply(reader: asyncio.StreamReader, method: str, patience: float) -> Reply:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    headers: dict[str, str] = {}
    for name, value in (line.split(": ", 1) for line in lines):
        name = name.lower()  # noqa: PLW2901
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    assert headers.pop("date", None) or status.split()[1] == "400"
    code = int(status.split()[1])
    if method == "HEAD" or code == 304:
        return Reply(code, headers, b"")
    if "content-length" in headers:
        return Reply(code, headers, await reader.readexactly(int(headers["content-length"])))
    body = b""
    with suppress(TimeoutError):
        while not body.endswith(b"\n\n"):
            async with asyncio.timeout(patience):
                size = int(await reader.readuntil(b"\r\n"), 16)
                body += (await reader.readexactly(size + 2))[:-2]
    return Reply(code, headers, body)


def stalled_socket(port: int, path: str = "/all") -> socket.socket:
    """A client that asks for a stream and never reads."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode())
    return client
