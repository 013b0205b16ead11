"""The polling source against a real server."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest

from relay.backoff import Backoff
from relay.errors import ErrorKind
from relay.model.credential import SDKKey
from relay.model.payload import ChangeSet
from relay.sources import Interrupted, UpToDate
from relay.sources.polling import PollingSource
from relay.sources.timings import SourceTimings
from relay.upstream import Upstream
from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.upstream import ScriptedUpstream

KEY = "sdk-secret-4711"
FAST = SourceTimings(
    retry=Backoff(0.01, 30), refused=Backoff(0.01, 300), poll_interval=0.01, poll_timeout=0.2
)


@pytest.fixture(name="server")
async def scripted_upstream():
    async with ScriptedUpstream() as server:
        server.serve(KEY, all_data(flag("a")))
        yield server


@asynccontextmanager
async def polling(server):
    async with Upstream() as session:
        source = PollingSource(session, server.url, SDKKey(KEY), FAST)
        async with asyncio.timeout(20), aclosing(source.updates()) as updates:
            yield updates


async def test_unchanged_data_are_not_sent_again(server):
    """The second poll has the ETag of the first and is answered 304."""
    async with polling(server) as updates:
        assert (await anext(updates)).full
        assert await anext(updates) == UpToDate()
        server.serve(KEY, all_data(flag("b")))
        while not isinstance(update := await anext(updates), ChangeSet):
            pass
        assert update.items[0].key == "b"
    assert server.requests[0].path == "/sdk/latest-all"
    assert "If-None-Match" not in server.requests[0].headers
    assert server.requests[1].headers["If-None-Match"].startswith('"')


FAULTS = {
    "401": (answers.status(401), ErrorKind.ERROR_RESPONSE, True),
    "503": (answers.status(503), ErrorKind.ERROR_RESPONSE, False),
    "304 unasked": (answers.status(304), ErrorKind.ERROR_RESPONSE, False),
    "stalled": (answers.stall, ErrorKind.NETWORK_ERROR, False),
    "slow drip": (answers.drip(b" ", 0.05), ErrorKind.NETWORK_ERROR, False),
    "cut": (answers.body(b'{"fl', then="abort"), ErrorKind.NETWORK_ERROR, False),
    "half": (answers.body(b'{"flags":{'), ErrorKind.INVALID_DATA, False),
    "empty": (answers.body(b"{}"), ErrorKind.INVALID_DATA, False),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_interrupts_and_passes(server, fault):
    """The next poll is made in time, and the reason does not contain the key."""
    answer, kind, refused = FAULTS[fault]
    server.script(KEY, answer)
    async with polling(server) as updates:
        outage = await anext(updates)
        assert isinstance(outage, Interrupted)
        assert (outage.kind, outage.refused) == (kind, refused)
        assert KEY not in outage.reason
        assert (await anext(updates)).full


async def test_a_check_polls_now_and_ignores_older_data(server):
    """Neither lower versions nor an earlier state; a resync may go back."""
    first, second = all_data(flag()), all_data(flag(), flag("added"))
    lower = all_data(flag(version=0), flag("added"), flag("other"))
    server.serve(KEY, first)
    timings = SourceTimings(poll_interval=3600)
    async with Upstream() as session, asyncio.timeout(20):
        source = PollingSource(session, server.url, SDKKey(KEY), timings)
        updates = source.updates()
        assert (await anext(updates)).full
        server.serve(KEY, second)
        source.check()
        assert len((await anext(updates)).items) == 2
        for old in (first, lower):
            server.serve(KEY, old)
            source.check()
            assert await anext(updates) == UpToDate()
        server.serve(KEY, lower)
        source.resync()
        assert len((await anext(updates)).items) == 3
        await updates.aclose()


async def test_the_repr_states_url_and_etag():
    """Passwords in the URL are masked."""
    async with Upstream() as session:
        source = PollingSource(session, "http://me:hidden@sdk.example", SDKKey(KEY), FAST)
        assert repr(source) == "<PollingSource http://me:xxxxx@sdk.example/sdk/latest-all etag=''>"


async def test_a_body_without_end_is_rejected(server, monkeypatch):
    """Memory is bounded."""
    monkeypatch.setattr("relay.upstream.read_body.__defaults__", (1000,), raising=False)
    server.script(KEY, answers.body(b" " * 2000))
    async with polling(server) as updates:
        outage = await anext(updates)
        assert outage.kind is ErrorKind.INVALID_DATA
        assert "longer than 1000 bytes" in outage.reason
