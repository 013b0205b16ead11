"""The SDK key of an environment is replaced while upstream, streams and polls are at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from relay.backoff import Backoff
from relay.environment import ConnectionState
from relay.model.credential import SDKKey
from relay.model.item import Kind
from relay.sources import DataSource
from relay.sources.polling import PollingSource
from relay.sources.streaming import StreamingSource
from relay.sources.timings import SourceTimings
from relay.telemetry.log import environment_log
from relay.upstream import Upstream
from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.serving import SDK_KEY, Address, Served, Stream, ask, serving, until
from tests.support.upstream import ScriptedUpstream

NEW_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a002"
SOON = Backoff(first=0.01, longest=0.02, growth=2.0)
FAST = SourceTimings(retry=SOON, refused=SOON, poll_interval=0.05, read_timeout=10)


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", 1, "one")))
        yield upstream


class Rotating:
    """A relay with one environment that follows the scripted upstream.

    Args:
        upstream: to follow.
        session: to follow it with.
        polls: whether it polls.
    """

    def __init__(self, upstream: ScriptedUpstream, session: Upstream, *, polls: bool) -> None:
        self._upstream, self._session, self._polls = upstream, session, polls
        self.served = Served()
        self.environment, self.relay = self.served.environment, self.served.relay
        self.environment.change(self.environment.spec, self.source(SDK_KEY))

    def source(self, key: str) -> DataSource:
        session, url = self._session, self._upstream.url
        if self._polls:
            return PollingSource(session, url, SDKKey(key), FAST)
        log = environment_log("main", "...test")
        return StreamingSource(session, url, SDKKey(key), log, FAST)

    def rotate(self, key: str, old_lasts: float | None = None) -> None:
        """Replace the key; the old one lasts some seconds more."""
        spec = self.environment.spec
        if old_lasts is not None:
            spec = spec.with_credential(spec.sdk_key, time.time() + old_lasts)
        spec = replace(spec, sdk_key=SDKKey(key))
        self.relay.change(self.environment, spec, self.source(key))

    @property
    def value(self) -> bytes:
        payload = self.environment.payload
        item = payload.get(Kind.FLAG, "lamp") if payload else None
        return item.json if item and item.json else b""


@asynccontextmanager
async def rotating(
    upstream: ScriptedUpstream, *, front: bool = True, polls: bool = False
) -> AsyncIterator[tuple[Rotating, Address]]:
    async with Upstream() as session:
        relay = Rotating(upstream, session, polls=polls)
        async with serving(relay.served, front=front) as address:
            await until(lambda: b"one" in relay.value)
            yield relay, address


async def status(address: Address, key: str) -> int:
    return (await ask(address, "/sdk/latest-all", [("Authorization", key)])).status


@pytest.mark.parametrize("front", [True, False])
async def test_a_rotation_has_no_gap(upstream, front):
    """Both keys are served until the old one expires; its streams end, and no others do."""
    async with rotating(upstream, front=front) as (relay, address):
        old = await Stream.open(address)
        await old.until(b"\n\n")
        stall = asyncio.Event()

        async def slowly(request):
            await stall.wait()
            return await upstream._stream(request, NEW_KEY)

        upstream.serve(NEW_KEY, all_data(flag("lamp", 3, "three")))
        upstream.script(NEW_KEY, slowly)
        relay.rotate(NEW_KEY, old_lasts=3.0)
        new = await Stream.open(address, key=NEW_KEY)
        assert b'"one"' in await new.until(b"\n\n"), "the data are the environment's, not the key's"
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        for stream in (old, new):
            assert b'"two"' in await stream.until(b"\n\n")
        assert {await status(address, key) for key in (SDK_KEY, NEW_KEY)} == {200}
        stall.set()
        await until(lambda: b"three" in relay.value)
        await upstream.left(SDK_KEY)
        for stream in (old, new):
            assert b'"three"' in await stream.until(b"\n\n")
        assert await old.rest() == b""
        assert await status(address, NEW_KEY) == 200
        await upstream.patch(NEW_KEY, flag("lamp", 4, "four"))
        assert b'"four"' in await new.until(b"\n\n")
        assert relay.environment.connection.state is ConnectionState.VALID
        assert relay.environment.connection.last_error is None
        for stream in (old, new):
            stream.close()


async def test_a_new_key_that_upstream_refuses_costs_nothing(upstream):
    """The old connection goes on until the new key is accepted."""
    async with rotating(upstream) as (relay, address):
        upstream.always(NEW_KEY, answers.status(401))
        requests = len(upstream.requests)
        relay.rotate(NEW_KEY, old_lasts=900.0)
        await upstream.requested(requests + 3)
        assert relay.environment.connection.state is ConnectionState.VALID
        await upstream.patch(SDK_KEY, flag("lamp", 2, "two"))
        await until(lambda: b"two" in relay.value)
        upstream.serve(NEW_KEY, all_data(flag("lamp", 3, "three")))
        upstream.always(NEW_KEY, None)
        await until(lambda: b"three" in relay.value)
        await upstream.left(SDK_KEY)
        assert await status(address, NEW_KEY) == 200


async def test_polls_rotate_as_well(upstream):
    """After the first poll with the new key there is none with the old one."""
    async with rotating(upstream, polls=True) as (relay, address):
        upstream.serve(NEW_KEY, all_data(flag("lamp", 2, "two")))
        relay.rotate(NEW_KEY)
        await until(lambda: b"two" in relay.value)
        upstream.requests.clear()
        await upstream.requested(3)
        assert {request.headers["Authorization"] for request in upstream.requests} == {NEW_KEY}
        assert await status(address, NEW_KEY) == 200
