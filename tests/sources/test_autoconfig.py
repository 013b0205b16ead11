"""The automatic-configuration stream against a real server."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, asynccontextmanager

import pytest

from relay.backoff import Backoff
from relay.errors import ErrorKind
from relay.model.credential import AutoConfigKey
from relay.protocol.autoconfig import Delete, Put, Upsert
from relay.sources import Interrupted
from relay.sources.autoconfig import AutoConfigStream
from relay.sources.timings import SourceTimings
from relay.upstream import Upstream
from tests.support import environments
from tests.support import upstream as answers
from tests.support.environments import description, environment_list
from tests.support.upstream import ScriptedUpstream

KEY = "rel-secret-4711"
FAST = SourceTimings(
    retry=Backoff(0.01, 0.02), refused=Backoff(0.01, 300), read_timeout=0.2, confirm_every=0.0
)


@pytest.fixture(name="server")
async def scripted_upstream():
    async with ScriptedUpstream() as server:
        server.serve(KEY, environment_list(description()))
        yield server


@asynccontextmanager
async def following(server):
    async with Upstream() as session:
        log = logging.getLogger("relay.autoconfig")
        stream = AutoConfigStream(session, server.url + "/", AutoConfigKey(KEY), log, FAST)
        async with asyncio.timeout(10), aclosing(stream.updates()) as updates:
            yield updates


async def until(updates, kind):
    """Return the next update of a kind, skipping all others."""
    async for update in updates:
        if isinstance(update, kind):
            return update
    raise AssertionError


async def test_it_asks_as_ld_relay_does(server):
    """The key goes into `Authorization`, and the version of the protocol into the query."""
    async with following(server) as updates:
        assert list((await until(updates, Put)).environments) == ["id-alpha"]
    (request,) = server.requests
    assert request.path == "/relay_auto_config?rpacProtocolVersion=2"
    assert request.headers["Authorization"] == KEY
    assert request.headers["Accept"] == "text/event-stream"


async def test_messages_come_one_by_one(server, caplog):
    """Those without effect are logged and left out."""
    caplog.set_level("INFO")
    async with following(server) as updates:
        await until(updates, Put)
        await server.raw(KEY, b"event: hello\ndata: x\n\n")
        await server.raw(KEY, environments.patch(description("beta")))
        assert (await until(updates, Upsert)).id == "id-beta"
        await server.raw(KEY, environments.delete("beta", 2))
        assert (await until(updates, Delete)).id == "id-beta"
    assert 'Ignoring unrecognized stream event: "hello"' in caplog.text


@pytest.mark.parametrize("data", [b"data: x\n", b""])
async def test_a_reconnect_is_no_failure(server, data, caplog):
    """LaunchDarkly asks for it when the policy of the key has changed."""
    caplog.set_level("INFO")
    async with following(server) as updates:
        await until(updates, Put)
        server.serve(KEY, environment_list(description("beta")))
        await server.raw(KEY, b"event: reconnect\n" + data + b"\n")
        update = await anext(updates)
        while not isinstance(update, Put):
            assert not isinstance(update, Interrupted)
            update = await anext(updates)
        assert list(update.environments) == ["id-beta"]
    assert "due to a policy change" in caplog.text


@pytest.mark.parametrize(
    ("status", "refused"), [(401, True), (403, True), (404, False), (503, False)]
)
async def test_refusals_and_outages(server, status, refused):
    """Only 401 and 403 refuse the key; whatever it is, it is tried again."""
    server.script(KEY, answers.status(status), answers.status(status))
    async with following(server) as updates:
        for _ in range(2):
            update = await until(updates, Interrupted)
            assert (update.status, update.refused) == (status, refused)
            assert ("Invalid auto-configuration key" in update.reason) is refused
            assert KEY not in update.reason
        await until(updates, Put)


@pytest.mark.parametrize(
    "answer",
    [
        answers.body(environments.put(description())[:50]),
        answers.body(environments.put(description())[:50], then="abort"),
        answers.body(environments.put(description())[:50], then="stall"),
        answers.body(b"<html>", "text/html"),
        answers.hang_up,
        answers.body(b"event: put\ndata: {\n\n", then="stall"),
        answers.body(b'event: put\ndata: {"path":"/"}\n\n', then="stall"),
    ],
)
async def test_a_stream_that_breaks_is_opened_again(server, answer):
    """Cut or stalled in a message, malformed, or no stream at all."""
    server.script(KEY, answer)
    async with following(server) as updates:
        update = await until(updates, Interrupted)
        assert not update.refused
        assert list((await until(updates, Put)).environments) == ["id-alpha"]


async def test_malformed_data_are_named(server):
    """The next connection brings everything again."""
    async with following(server) as updates:
        await until(updates, Put)
        await server.raw(KEY, b"event: patch\ndata: nonsense\n\n")
        update = await until(updates, Interrupted)
        assert update.kind is ErrorKind.INVALID_DATA
        await until(updates, Put)


async def test_a_large_put(server):
    """Ten megabytes are a list like any other."""
    padding = "x" * 10_000
    many = [description(f"e{n}", padding=padding) for n in range(1000)]
    server.serve(KEY, environment_list(*many))
    async with following(server) as updates:
        assert len((await until(updates, Put)).environments) == 1000
