"""An HTTP proxy for tests."""

from __future__ import annotations

import asyncio
import socket
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def a_proxy(
    expected_auth: str = "", tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[int, list[str]]]:
    """A small forward proxy: absolute-form requests, and CONNECT; anything unauthorised is 407.

    Yields its port and the heads of requests so far. Whatever host it is asked for is this machine.
    """
    seen: list[str] = []
    tasks: set[asyncio.Task[None] | None] = set()

    async def pipe(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line = head.split("\r\n")[0]
        seen.append(head)
        if expected_auth and f"Proxy-Authorization: {expected_auth}" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        method, target, _ = line.split(" ")
        authority = target if method == "CONNECT" else target.split("/")[2]
        _, port = authority.split(":")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(port))
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            far_writer.write(head.replace(f"http://{authority}", "", 1).encode())
        async with asyncio.TaskGroup() as both:
            both.create_task(pipe(reader, far_writer))
            both.create_task(pipe(far_reader, writer))

    listener = socket.create_server(("127.0.0.1", 0))
    server = await asyncio.start_server(serve, sock=listener, ssl=tls)
    try:
        yield listener.getsockname()[1], seen
    finally:
        server.close()
        running = [task for task in tasks if task]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
