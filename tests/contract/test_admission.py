"""Large data for more clients than read them: bounded, in order, and in nobody's way."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from relay.protocol import fdv1
from relay.streams.admission import Admission
from relay.streams.hub import StreamLimits
from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY, Address, Served, Stream, ask, serving, until
from tests.support.upstream import ScriptedUpstream

MiB = 1024 * 1024
PADDING = "x" * (3 * MiB)
"""Far more than the kernel takes for a client that does not read."""
SMALL = "sdk-5ca1ab1e-0001-4000-8000-000000000sml"
SILENT = 400
"""Clients that do not read, for whom the relay would have to keep more than a gigabyte."""


def silent_client(address: Address, path: str = "/all") -> socket.socket:
    """Return a client that asks for a stream and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(10)
    client.connect(("127.0.0.1", address.port))
    if address.tls is not None:
        client = address.tls.wrap_socket(client, server_hostname="localhost")
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode())
    return client


async def full(served: Served, version: int) -> None:
    """Let the environment have one large flag and nothing else."""
    flags = {"a": {"key": "a", "version": version, "pad": PADDING}}
    changes = fdv1.parse("put", json.dumps({"path": "/", "data": {"flags": flags}}).encode())
    assert changes is not None
    await served.source.give(changes)


async def patch(served: Served, version: int) -> None:
    """Change a small flag beside it."""
    data = {"key": "b", "version": version}
    changes = fdv1.parse("patch", json.dumps({"path": "/flags/b", "data": data}).encode())
    assert changes is not None
    await served.source.give(changes)


@asynccontextmanager
async def occupied(
    door: dict, path: str = "/all", patience: float = 60
) -> AsyncIterator[tuple[Served, Address, socket.socket]]:
    """A relay that sends large data to one client at a time, and the client, which does not read."""
    served = Served(admission=Admission(1, patience))
    async with serving(served, **door) as address:
        await full(served, 1)
        with await asyncio.to_thread(silent_client, address, path) as client:
            await until(lambda: served.admission.unread > 0)
            yield served, address, client


def versions(message: bytes) -> dict[str, int]:
    """Return the version of each flag of a put of FDv1."""
    assert message.startswith(b"event: put\ndata: ")
    data = json.loads(message.removeprefix(b"event: put\ndata: "))["data"]
    return {key: each["version"] for key, each in data["flags"].items()}


async def test_a_stream_waits_until_who_does_not_read_has_gone(door):
    """It has its head at once, and its data when there is room."""
    async with occupied(door) as (served, address, client):
        stream = await Stream.open(address)
        assert stream.status == 200
        await asyncio.sleep(0.1)
        assert served.admission.waiting == 1
        metrics = (await ask(address, "/metrics")).body
        assert b"\nrelay_streams_delayed 1\n" in metrics
        assert b"\nrelay_streams_unread_bytes 0\n" not in metrics
        assert b"\nrelay_streams_cut_total 0\n" in metrics
        client.close()
        assert versions(await stream.until(b"\n\n")) == {"a": 1}
        assert served.admission.waiting == 0
        assert served.admission.cut == 0
        stream.close()


async def test_who_does_not_read_is_cut_and_all_who_read_get_their_data_in_order(door):
    """One after the other, as they have come."""
    async with occupied(door, patience=0.3) as (served, address, client):
        streams = [await Stream.open(address) for _ in range(6)]
        order = []

        async def read(number: int) -> None:
            await streams[number].until(b"\n\n")
            order.append(number)

        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            for number in reversed(range(6)):
                tasks.create_task(read(number))
        assert order == sorted(order)
        assert served.admission.cut == 1
        with pytest.raises(OSError, match="reset"):  # not merely closed: nothing is left to send
            await asyncio.to_thread(read_all, client)
        for stream in streams:
            stream.close()


def read_all(client: socket.socket) -> None:
    """Read to the end; below TLS, where that is used."""
    with socket.socket(fileno=client.detach()) as raw:
        raw.settimeout(10)
        while raw.recv(MiB):
            pass


async def test_a_client_that_goes_while_it_waits_gives_up_its_place(door):
    """The next one is served as if it had not been there."""
    async with occupied(door) as (served, address, client):
        gone, stays = [await Stream.open(address) for _ in range(2)]
        assert served.admission.waiting == 2
        gone.close()
        await until(lambda: served.admission.waiting == 1)
        client.close()
        await stays.until(b"\n\n")
        assert len(served.hub) == 1
        stays.close()


async def test_who_waits_gets_the_newest_data_and_then_each_change(door):
    """Whatever has changed meanwhile, it gets one put, and no change that is in it."""
    async with occupied(door) as (served, address, client):
        stream = await Stream.open(address)
        await patch(served, 1)
        await full(served, 2)
        await patch(served, 2)
        client.close()
        assert versions(await stream.until(b"\n\n")) == {"a": 2, "b": 2}
        await patch(served, 3)
        change = await stream.until(b"\n\n")
        assert change.startswith(b"event: patch\n")
        assert b'"version":3}' in change.replace(b" ", b"")
        stream.close()


async def test_who_waits_with_fdv2_gets_the_newest_data_and_then_each_change(door):
    """One transfer with the state at that moment, which the next one builds on."""
    async with occupied(door, "/sdk/stream") as (served, address, client):
        stream = await Stream.open(address, "/sdk/stream")
        await patch(served, 1)
        await patch(served, 2)
        client.close()
        transfer = await stream.until(b"\n\n")
        while b"event: payload-transferred" not in transfer:
            transfer += await stream.until(b"\n\n")
        assert transfer.count(b'"intentCode":"xfer-full"') == 1
        assert transfer.count(b"event: put-object") == 2
        assert state_of(transfer) == served.environment.journal.state
        await patch(served, 3)
        change = await stream.until(b"\n\n")
        while b"event: payload-transferred" not in change:
            change += await stream.until(b"\n\n")
        assert change.count(b"event: put-object") == 1
        assert state_of(change) == served.environment.journal.state
        stream.close()


def state_of(transfer: bytes) -> str:
    """Return the state that a transfer leads to."""
    return json.loads(transfer.rpartition(b"data: ")[2])["state"]


async def test_small_answers_pass_by(door):
    """Polls, health, and streams that get little are answered while others wait."""
    async with occupied(door) as (served, address, _):
        waiting = await Stream.open(address)
        poll = await ask(address, "/sdk/flags/a", [("Authorization", SDK_KEY)])
        assert poll.status == 200
        assert (await ask(address, "/status")).status == 200
        state = quote(served.environment.journal.state)
        current = await Stream.open(address, f"/sdk/stream?basis={state}")
        assert b'"intentCode":"none"' in await current.until(b"\n\n")
        assert served.admission.waiting == 1
        for stream in (waiting, current):
            stream.close()


async def test_heartbeats_reach_those_who_wait(door):
    """So that nothing on the way takes the connection for dead."""
    served = Served(StreamLimits(heartbeat_interval=0.1), admission=Admission(1, 60))
    async with serving(served, **door) as address:
        await full(served, 1)
        with await asyncio.to_thread(silent_client, address) as client:
            await until(lambda: served.admission.unread > 0)
            stream = await Stream.open(address)
            assert [await stream.chunk() for _ in range(2)] == [b":\n", b":\n"]
            client.close()
            body = await stream.until(b"\n\n")
            assert versions(body.lstrip(b":\n")) == {"a": 1}
            stream.close()


async def test_those_who_wait_end_properly_at_the_shutdown(door):
    """They get the end of their body; who has begun and does not read does not hold it up."""
    async with occupied(door) as (served, address, _):
        stream = await Stream.open(address)
        closing = asyncio.create_task(served.hub.close(1.0))
        assert await stream.rest() == b""
        await closing
        assert served.admission.waiting == 0
        await until(lambda: served.admission.unread == 0)
        stream.close()


async def test_new_data_for_open_streams_are_admitted_too(door):
    """Each has the newest data in the end, and those who do not read are cut."""
    served = Served(admission=Admission(1, 0.3))
    async with serving(served, **door) as address:
        await served.source.give(fdv1.parse("put", b'{"path":"/","data":{"flags":{}}}'))
        streams = [await Stream.open(address) for _ in range(4)]
        with await asyncio.to_thread(silent_client, address):
            await until(lambda: len(served.hub) == 5)
            for stream in streams:
                await stream.until(b"\n\n")
            await full(served, 1)
            await until(lambda: served.admission.waiting > 0)
            await full(served, 2)
            for stream in streams:
                got = {}
                while got != {"a": 2}:
                    before, got = got, versions(await stream.until(b"\n\n"))
                    assert before.get("a", 0) <= got["a"]
            await until(lambda: served.admission.waiting == 0)
            assert len(served.hub) in (4, 5)
        for stream in streams:
            stream.close()


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with 3 MB for one environment and a small flag for another."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", value=PADDING)))
        upstream.serve(SMALL, all_data(flag("lamp")))
        yield upstream


async def first_chunk(stream: Stream) -> bytes:
    """Wait for longer than usual."""
    for _ in range(6):
        with suppress(TimeoutError):
            return await stream.chunk()
    raise TimeoutError


def peak_memory(relay: RelayProcess) -> int:
    """Return the most bytes that the relay has ever held."""
    status = Path(f"/proc/{relay.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def unread_in_kernel(port: int) -> int:
    """Return the bytes that the kernel keeps for the clients of a port."""
    rows = (
        Path("/proc/net/tcp6").read_text().splitlines()
        + Path("/proc/net/tcp").read_text().splitlines()
    )
    found = (row.split() for row in rows if f":{port:04X} " in row)
    return sum(
        int(row[4].partition(":")[0], 16) for row in found if row[1].endswith(f":{port:04X}")
    )


@pytest.mark.parametrize("encrypted", [False, True])
async def test_memory_is_bounded_and_polls_are_answered_meanwhile(upstream, tmp_path, encrypted):
    """Hundreds of clients that do not read cost neither memory nor time of those who do."""
    trust, cert, key = ssl.create_default_context(), tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    authority.configure_trust(trust)
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    tls = {"TLS_ENABLED": "true", "TLS_CERT": str(cert), "TLS_KEY": str(key)}
    variables = {"LD_ENV_large": SDK_KEY, "LD_ENV_small": SMALL, "STREAM_URI": upstream.url}
    variables |= {"MAX_UNREAD_DATA": "64MiB", "INIT_TIMEOUT": "20s", **(tls if encrypted else {})}
    async with RelayProcess(tmp_path, **variables) as relay:
        await relay.said("Initialized", 2)
        address = Address(relay.port, trust if encrypted else None)
        slowest, kernel, over = 0.0, 0, asyncio.Event()

        async def poll() -> None:
            nonlocal slowest, kernel
            while not over.is_set():
                for path in ("/sdk/flags", "/status"):
                    begin = time.monotonic()
                    reply = await ask(address, path, [("Authorization", SMALL)])
                    slowest = max(slowest, time.monotonic() - begin)
                    assert reply.status == 200
                kernel = max(kernel, unread_in_kernel(relay.port))
                await asyncio.sleep(0.02)

        polling = asyncio.create_task(poll())
        with ExitStack() as stack:
            for _ in range(SILENT):
                stack.enter_context(await asyncio.to_thread(silent_client, address))
            stream = await Stream.open(address)
            await first_chunk(stream)
            over.set()
            await polling
        stream.close()
        assert peak_memory(relay) < 250 * MiB
        assert kernel < 100 * MiB
        assert slowest < 2.0
