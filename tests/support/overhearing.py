"""A look at what clients say to a server and are told, as bytes: a pipe before its port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field

from tests.support.serving import Address


@dataclass
class Overheard:
    """Bytes that have gone through, in both directions.

    Args:
        url: at which clients find the server.
    """

    url: str = ""
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


@asynccontextmanager
async def overhearing(address: Address) -> AsyncGenerator[Overheard, None]:
    """Pass connections on until left."""
    overheard = Overheard()
    passing: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            there, back = await address.connect()
            with closing(back):
                ways = [
                    asyncio.create_task(_copy(reader, back, overheard.asked)),
                    asyncio.create_task(_copy(there, writer, overheard.answered)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passing.add(asyncio.create_task(pass_on(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    overheard.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield overheard
    finally:
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)


async def _copy(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray
) -> None:
    """Copy until one of both ends."""
    while chunk := await source.read(2**16):
        kept += chunk
        target.write(chunk)
        await target.drain()
