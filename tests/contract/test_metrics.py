"""A relay as a process, asked by Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from contextlib import closing

import pytest

from tests.support.figures import samples
from tests.support.process import RelayProcess, free_port
from tests.support.serving import Address, Stream, ask

FLAGS = ("serve", "--flags", "config/flags.yaml")
LISTENS = "Successfully registered Prometheus metrics exporter on port"
DEMO = ("Authorization", "sdk-demo")


@pytest.fixture
def exporter():
    """Where the figures are served."""
    return Address(free_port())


def settings(exporter: Address, **more: str) -> dict[str, str]:
    return {"USE_PROMETHEUS": "true", "PROMETHEUS_PORT": str(exporter.port), **more}


async def figures(address: Address) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name to labels to value."""
    reply = await ask(address, "/metrics")
    assert reply.status == 200
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for sample in samples(reply.body):
        found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_the_exporter_of_the_reference(tmp_path, exporter):
    """It has a port of its own, the reference's names and labels, and nothing but figures."""
    async with RelayProcess(tmp_path, *FLAGS, **settings(exporter)) as relay:
        await relay.said(f"{LISTENS} {exporter.port}")
        agent = ("User-Agent", "Go/1.2")
        await ask(relay.address, "/sdk/flags/greeting", [DEMO, agent])
        stream = await Stream.open(relay.address, key="sdk-demo")
        seen = await figures(exporter)
        client = (("env", "demo"), ("platformCategory", "server"), ("userAgent", "Go_1.2"))
        nameless = (*client[:2], ("userAgent", "_"))
        request = tuple(sorted((*client, ("method", "GET"), ("route", "_sdk_flags_{key}"))))
        assert seen["launchdarkly_relay_requests"][request] == 1
        assert seen["launchdarkly_relay_connections"] == {nameless: 1}
        assert seen["launchdarkly_relay_newconnections"] == {nameless: 1}
        assert seen["relay_streams"][("environment", "demo"), ("stream", "all")] == 1
        assert "launchdarkly_relay_requests" not in await figures(relay.address)
        for path in ("/", "/status", "/all", "/sdk/flags"):
            assert (await ask(exporter, path, [DEMO])).status == 404
        assert (await ask(exporter, "/metrics", method="POST")).status == 405
        assert (await ask(exporter, "/metrics", method="HEAD")).status == 200
        stream.close()
        assert await relay.stop() == 0


async def test_types_and_texts_are_the_reference_s(tmp_path, exporter):
    """But for the gauge; and the prefix is the configured one."""
    variables = settings(exporter, PROMETHEUS_PREFIX="shop")
    async with RelayProcess(tmp_path, *FLAGS, **variables) as relay:
        await relay.said(LISTENS)
        text = (await ask(exporter, "/metrics")).body.decode()
    assert re.findall(r"(?m)^# (.*shop.*)$", text) == [
        "HELP shop_connections current number of connections",
        "TYPE shop_connections gauge",
        "HELP shop_newconnections total number of connections",
        "TYPE shop_newconnections counter",
        "HELP shop_requests Number of hits to a route",
        "TYPE shop_requests counter",
    ]


async def test_without_it_there_is_no_second_port(tmp_path, exporter):
    """Unless it is asked for, nothing listens there, and `/metrics` is on the relay's own port."""
    async with RelayProcess(tmp_path, *FLAGS, PROMETHEUS_PORT=str(exporter.port)) as relay:
        assert (await figures(relay.address))["process_open_fds"][()] > 3
        assert not listens(exporter.port)


async def test_a_port_in_use_ends_the_start(tmp_path, exporter):
    """In the reference's words; the relay's own port is not kept either."""
    with closing(socket.create_server(("", exporter.port))):
        relay = RelayProcess(tmp_path, *FLAGS, **settings(exporter))
        with pytest.raises(AssertionError, match="the relay has ended"):
            async with relay:
                await relay.said("never")
        assert await relay.ended() == 1
    text = f"Error registering Prometheus metrics exporter: listen tcp :{exporter.port}: "
    assert text in relay.log


async def test_figures_are_served_while_streams_end(tmp_path, exporter):
    """The exporter answers as long as a client that does not read holds up the end."""
    flags = tmp_path / "flags.json"
    flags.write_text(json.dumps({"flagValues": {"long": "x" * 3_000_000}}))
    variables = settings(exporter, GRACEFUL_SHUTDOWN_TIMEOUT="3s")
    async with RelayProcess(tmp_path, "serve", "--flags", str(flags), **variables) as relay:
        await relay.said(LISTENS)
        with closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", relay.port))
            client.sendall(b"GET /all HTTP/1.1\r\nHost: x\r\nAuthorization: sdk-demo\r\n\r\n")
            while await open_streams(exporter) == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            relay.signal(signal.SIGTERM)
            await relay.until(lambda: not listens(relay.port))
            assert await open_streams(exporter) in {0, 1}
            assert await relay.ended() == 0


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def open_streams(exporter: Address) -> float:
    return (await figures(exporter))["relay_streams"][("environment", "demo"), ("stream", "all")]


async def test_scrapers_do_not_hold_up_the_end(tmp_path, exporter):
    """Neither a connection that rests nor one that does not finish its request."""
    async with RelayProcess(tmp_path, *FLAGS, **settings(exporter)) as relay:
        await relay.said(LISTENS)
        reader, writer = await exporter.connect()
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        half = await exporter.connect()
        half[1].write(b"GET /metrics HTTP/1.1\r\n")
        begin = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - begin < 2
        assert "Traceback" not in relay.log
        for each in (writer, half[1]):
            each.close()
