"""SIGTERM: streams end properly, the exit code is 0, and it takes less than docker's 10 seconds."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from contextlib import closing

import pytest

from relay.server.listeners import CannotListen, listen
from relay.server.options import ServerOptions
from relay.server.run import run_once, serve
from tests.support.process import free_port
from tests.support.serving import Address, Served, Stream

STREAMS = 1000

SERVER = """
import asyncio, sys, uvloop
from relay.server.run import ServerOptions, Site, serve
from tests.support.process import free_port
from tests.support.serving import Served
from relay.protocol import fdv1

async def main():
    served = Served()
    put = b'{"path":"/","data":{"flags":{"a":{"key":"a","version":1}}}}'
    giving = asyncio.create_task(served.source.give(fdv1.parse("put", put)))
    options = ServerOptions(int(sys.argv[1]))
    return await serve(options, served.site)

sys.exit(uvloop.run(main()))
"""


async def start() -> tuple[asyncio.subprocess.Process, Address]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(port))
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await Address(port).connect()
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return process, Address(port)


async def test_a_thousand_streams_end_properly():
    """Each of many streams gets the end of its body, and the process ends with 0 in time."""
    process, address = await start()
    streams = [await Stream.open(address) for _ in range(STREAMS)]
    begin = time.monotonic()
    process.terminate()
    bodies = await asyncio.gather(*(stream.rest() for stream in streams))
    assert all(body.startswith(b"event: put\n") for body in bodies)
    async with asyncio.timeout(10):
        assert await process.wait() == 0
    assert time.monotonic() - begin < 10
    for stream in streams:
        stream.close()


async def test_a_second_signal_forces_the_end():
    """A user who asks twice does not want to wait for streams."""
    process, address = await start()
    streams = [await Stream.open(address) for _ in range(STREAMS)]
    begin = time.monotonic()
    process.terminate()
    await streams[0].rest()
    process.terminate()
    async with asyncio.timeout(10):
        await process.wait()
    assert time.monotonic() - begin < 1.9
    for stream in streams:
        stream.close()


async def test_a_port_in_use_is_an_error():
    """The text is the reference's, and the exit code 1."""
    with closing(listen(0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"Error starting http listener on port: {port}  "):
            listen(port)
        served = Served()
        with pytest.raises(CannotListen):
            await serve(ServerOptions(port), served.site)


async def test_both_families_are_listened_on():
    """The relay answers on IPv4 and, where there is one, on IPv6."""
    with closing(listen(0)) as listener:
        port = listener.getsockname()[1]
        families = ["127.0.0.1"] + (["::1"] if listener.family == socket.AF_INET6 else [])
        for host in families:
            _, writer = await asyncio.open_connection(host, port)
            writer.close()


async def test_settling_tells_whether_there_are_data():
    """Without upstream data the one-shot run ends in failure."""
    assert not await run_once(Served().relay)
