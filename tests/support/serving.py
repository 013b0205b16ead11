"""A real server around a relay, and the least of HTTP that a test needs to talk to it."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.environment import Environment
from relay.hub import Hub, StreamLimits
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.protocol.fdv1 import AllFormat, FlagsFormat
from relay.relay import Relay
from relay.server import Certificate, ServerOptions, listen, make_server
from relay.web.frontdoor import Door, DoorLimits, Poll
from relay.web.streams import STREAMS, StreamResponse
from tests.support.contracts import ScriptedSource

SDK_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a001"


class Served:
    """An environment with a scripted source, and the relay that serves it."""

    def __init__(self, limits: StreamLimits | None = None) -> None:
        self.source = ScriptedSource()
        spec = EnvironmentSpec("main", SDKKey(SDK_KEY), environment_id=EnvironmentID("env-1"))
        self.hub = Hub({"all": AllFormat(), "flags": FlagsFormat()}, limits)
        self.environment = Environment(spec, self.source, self.hub, logging.getLogger("main"))
        self.relay = Relay([self.environment], 0)

    def app(self) -> Starlette:
        """The streams, and an answer that tells that the application gave it."""

        async def stream(request: Request) -> Response:
            key = request.headers.get("authorization", "")
            environment = self.relay.by_sdk_key.get(key.removeprefix("api_key "))
            if environment is None:
                return Response(status_code=401)
            return StreamResponse(environment, STREAMS[request.url.path.encode()])

        async def echo(request: Request) -> Response:
            return Response(b"app:" + await request.body())

        streams = [Route(path.decode(), stream) for path in STREAMS]
        return Starlette(routes=[*streams, Route("/{path:path}", echo, methods=["GET", "POST"])])


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
    poll: Poll | None = None,
    limits: DoorLimits | None = None,
    certificate: Certificate | None = None,
    trust: ssl.SSLContext | None = None,
    drain: float = 2.0,
) -> AsyncGenerator[Address, None]:
    """Serve until left; the relay runs beside."""
    options = ServerOptions(0, certificate, drain, limits or DoorLimits())
    door = Door(served.relay, poll, options.limits) if front else None
    listener = listen(0)
    server = make_server(served.relay, served.app(), options, door)
    running = asyncio.create_task(served.relay.run())
    serve = asyncio.create_task(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    try:
        async with asyncio.timeout(5):
            await served.source.running.acquire()
        await until(lambda: server.started)
        yield Address(port, trust)
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
        self._reader = reader
        self.writer = writer
        self.head = b""

    @classmethod
    async def open(
        cls, address: Address, path: str = "/all", headers: Sequence[str] = (), key: str = SDK_KEY
    ) -> Stream:
        """Send the request and read the head of the response."""
        stream = cls(*await address.connect())
        lines = [f"GET {path} HTTP/1.1", "Host: x", f"Authorization: {key}", *headers, "", ""]
        stream.writer.write("\r\n".join(lines).encode())
        async with asyncio.timeout(5):
            stream.head = await stream._reader.readuntil(b"\r\n\r\n")
        return stream

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    async def chunk(self) -> bytes:
        """Return the next chunk; empty for the last."""
        async with asyncio.timeout(5):
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            return (await self._reader.readexactly(size + 2))[:-2]

    async def until(self, end: bytes) -> bytes:
        """Return the bytes of the body up to and including `end`."""
        received = b""
        while not received.endswith(end):
            chunk = await self.chunk()
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
            return await self._reader.read() == b""

    def close(self) -> None:
        self.writer.close()


def stalled_socket(port: int, path: str = "/all") -> socket.socket:
    """A client that asks for a stream and never reads."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode())
    return client
