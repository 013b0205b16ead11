"""The relay runs its environments, which come, change and go, and ends what they had opened."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind
from relay.model.credential import CredentialKind, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol.fdv1 import AllFormat
from relay.registry import Registry
from relay.relay import Relay
from relay.sources import Interrupted
from relay.stores import Mirror
from relay.streams.hub import Hub
from tests.streams.test_hub import Buffer
from tests.support.contracts import MemoryMirror, ScriptedSource
from tests.support.serving import until

SDK = CredentialKind.SDK_KEY


class Stage:
    """An environment whose source the test controls, and streams of it."""

    def __init__(self, name: str = "a", *mirrors: Mirror) -> None:
        self.source, self.hub = ScriptedSource(), Hub({"all": AllFormat()})
        self.spec = EnvironmentSpec(name, SDKKey(f"sdk-{name}"), MobileKey(f"mob-{name}"))
        log = logging.getLogger("relay.env.test")
        self.environment = Environment(self.spec, self.source, self.hub, log, mirrors)

    async def put(self) -> None:
        item = Item(Kind.FLAG, "flag", 1, b'{"key":"flag","version":1}')
        await self.source.give(ChangeSet((item,), full=True))

    def stream(self, relay: Relay, kind: CredentialKind, key: str) -> Client:
        """Open a stream with a credential."""
        grant = relay.registry.grant(kind, key)
        assert grant is not None
        client = Client()
        self.hub.subscribe("all", client, grant=grant)
        return client


class Client(Buffer):
    """A client that reads everything and closes at the end of its stream."""

    def write(self, data: bytes) -> None:
        super().write(data)
        asyncio.get_running_loop().call_soon(self.read)

    def close(self) -> None:
        super().close()
        asyncio.get_running_loop().call_soon(self.abort)


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[Relay]:
    task = asyncio.create_task(relay.run())
    await asyncio.sleep(0)
    try:
        yield relay
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_its_repr_tells_the_state() -> None:
    """The number of environments, and whether it shuts down; no keys."""
    relay = Relay([], init_timeout=5)
    assert repr(relay) == "<Relay: 0 environments>"
    relay.stopping = True
    assert repr(relay) == "<Relay: 0 environments, stopping>"


async def test_an_environment_that_comes_late_runs_like_the_first_ones(caplog) -> None:
    """It is followed, served, and its start is reported."""
    caplog.set_level(logging.INFO)
    first, late = Stage("a"), Stage("b")
    async with running(Relay([first.environment], 5)) as relay:
        await first.put()
        relay.put(late.environment)
        assert relay.registry.find(SDK, "sdk-b") is late.environment
        await late.put()
        assert late.environment.connection.state is ConnectionState.VALID
        await until(lambda: 'Initialized LaunchDarkly client for "b"' in caplog.text)
    assert (first.source.ended, late.source.ended) == (1, 1)


async def test_the_time_for_the_start_begins_when_an_environment_comes(caplog) -> None:
    """One that comes when `init_timeout` is over has this time all the same."""
    late = Stage("late")
    async with running(Relay([], 0.05)) as relay:
        await until(lambda: not relay.starting)
        relay.put(late.environment)
        await late.put()
        await until(late.environment.init_done.is_set)
        await asyncio.sleep(0)
        silent = Stage("silent")
        relay.put(silent.environment)
        await until(lambda: 'Error initializing LaunchDarkly client for "silent"' in caplog.text)
    assert 'Error initializing LaunchDarkly client for "late"' not in caplog.text


async def test_a_removed_environment_stops_and_its_streams_end() -> None:
    """Source and mirrors are cancelled; environments beside it notice nothing."""
    gone, stays = Stage("a", MemoryMirror()), Stage("b")
    async with running(Relay([gone.environment, stays.environment], 5)) as relay:
        await gone.put()
        await stays.put()
        client, other = gone.stream(relay, SDK, "sdk-a"), stays.stream(relay, SDK, "sdk-b")
        relay.remove(gone.environment)
        assert relay.registry.find(SDK, "sdk-a") is None
        assert list(relay.environments) == ["b"]
        await until(lambda: gone.source.ended == 1)
        await until(lambda: client.closed)
        await until(lambda: len(gone.hub) == 0)
        assert not other.closed
        assert stays.source.ended == 0
        relay.remove(gone.environment)
        assert list(relay.environments) == ["b"]


async def test_a_removed_environment_may_come_again() -> None:
    """As a new object of the same name."""
    stage, successor = Stage("a"), Stage("a")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        relay.remove(stage.environment)
        relay.put(successor.environment)
        await successor.put()
        assert relay.registry.find(SDK, "sdk-a") is successor.environment
        assert stage.source.ended == 1
        assert successor.source.ended == 0


async def test_a_relay_has_started_when_all_have_data_or_a_refused_key() -> None:
    """Or when the time for that is over, whatever is missing."""
    one, refused = Stage("a"), Stage("b")
    async with running(Relay([one.environment, refused.environment], 5)) as relay:
        waiting = asyncio.create_task(relay.wait_until_started())
        await one.put()
        await asyncio.sleep(0.02)
        assert not waiting.done()
        why = Interrupted(ErrorKind.ERROR_RESPONSE, "HTTP error 401", 401, refused=True)
        await refused.source.give(why)
        async with asyncio.timeout(5):
            await waiting
    async with running(Relay([Stage("a").environment], 0.02)) as relay, asyncio.timeout(5):
        await relay.wait_until_started()


async def test_last_writes_of_a_removed_environment_come_before_its_successor() -> None:
    """Both may have the same snapshot."""
    may_end = asyncio.Event()

    class SlowMirror(MemoryMirror):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                await may_end.wait()

    stage, successor = Stage("a", SlowMirror()), Stage("a")
    other, gone = Stage("b"), Stage("c")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        relay.remove(stage.environment)
        for each in (gone, successor, other):
            relay.put(each.environment)
        await asyncio.sleep(0.02)
        relay.remove(gone.environment)  # this leaves the others waiting
        await asyncio.sleep(0.02)
        assert successor.source.running.locked()
        assert other.source.running.locked()
        may_end.set()
        async with asyncio.timeout(5):
            await successor.source.running.acquire()
            await other.source.running.acquire()
        assert gone.source.running.locked()


async def test_an_environment_that_fails_while_it_is_removed_does_not_return(
    caplog, monkeypatch
) -> None:
    """The error is logged, and that is all."""
    monkeypatch.setattr("relay.relay.RESTART_DELAY", 0.0)

    class BadMirror(MemoryMirror):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                raise RuntimeError("an accident")

    stage = Stage("a", BadMirror())
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        await stage.source.running.acquire()
        relay.remove(stage.environment)
        await until(lambda: "an accident" in caplog.text)
        await asyncio.sleep(0.02)
        assert stage.source.running.locked(), "it was run again"


async def test_streams_of_a_revoked_credential_end_and_no_others() -> None:
    """Within a second, while the same environment goes on streaming to others."""
    stage = Stage("a")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        relay.change(stage.environment, stage.spec.with_credential(SDKKey("sdk-2")))
        revoked, stays = stage.stream(relay, SDK, "sdk-2"), stage.stream(relay, SDK, "sdk-a")
        began = time.monotonic()
        relay.change(stage.environment, stage.spec)
        await until(lambda: revoked.closed)
        assert time.monotonic() - began < 1
        assert not stays.closed
        assert len(stage.hub) == 1
        assert stage.source.ended == 0


async def test_one_timer_ends_each_credential_in_its_time() -> None:
    """In the order of the expiries, whatever the order in which they were put."""
    stage = Stage("a")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        spec, now = stage.spec, time.time()
        for key, seconds in (("sdk-3", 0.3), ("sdk-1", 0.1), ("sdk-9", 900.0), ("sdk-2", 0.2)):
            spec = spec.with_credential(SDKKey(key), now + seconds)
        relay.change(stage.environment, spec)
        clients = {key: stage.stream(relay, SDK, f"sdk-{key}") for key in "1239"}
        for ended in ("1", "12", "123"):
            await until(lambda e=ended: all(clients[key].closed for key in e))
        assert not clients["9"].closed
        assert len(stage.hub) == 1


async def test_an_earlier_expiry_moves_the_timer() -> None:
    """And a withdrawn one leaves everything open."""
    stage = Stage("a")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        old = SDKKey("sdk-old")
        relay.change(stage.environment, stage.spec.with_credential(old, time.time() + 900))
        client = stage.stream(relay, SDK, "sdk-old")
        relay.change(stage.environment, stage.spec.with_credential(old, time.time() + 0.05))
        relay.change(stage.environment, stage.spec.with_credential(old))
        kept = stage.stream(relay, SDK, "sdk-old")
        await asyncio.sleep(0.1)
        assert not client.closed
        assert not kept.closed
        relay.change(stage.environment, stage.spec.with_credential(old, time.time() + 0.05))
        await until(lambda: client.closed and kept.closed)


async def test_what_was_changed_before_the_start_counts() -> None:
    """Expiries that were put before `run` have their timer then; removed ones never run."""
    gone, stays = Stage("a"), Stage("b")
    relay = Relay([gone.environment, stays.environment], 5)
    relay.remove(gone.environment)
    spec = stays.spec.with_credential(SDKKey("sdk-old"), time.time() + 0.1)
    relay.change(stays.environment, spec)
    async with running(relay):
        await stays.put()
        client = stays.stream(relay, SDK, "sdk-old")
        await until(lambda: client.closed)
        assert gone.source.running.locked()


async def test_settings_change_in_place() -> None:
    """Data, streams and the source stay; name and settings are new at once."""
    stage = Stage("a")
    async with running(Relay([stage.environment], 5)) as relay:
        await stage.put()
        client, payload = stage.stream(relay, SDK, "sdk-a"), stage.environment.payload
        relay.change(stage.environment, replace(stage.spec, name="new", ttl=5.0, secure_mode=True))
        assert list(relay.environments) == ["new"]
        assert stage.environment.spec.ttl == 5.0
        assert stage.environment.payload is payload
        assert relay.registry.spec_of("a") is stage.environment.spec
        assert not client.closed
        assert stage.source.ended == 0


async def test_a_refused_change_changes_nothing() -> None:
    """Two environments cannot have one name."""
    a, b = Stage("a"), Stage("b")
    relay = Relay([a.environment, b.environment], 5)
    with suppress(ValueError):
        relay.change(b.environment, replace(b.spec, name="a", ttl=5.0))
    assert b.environment.spec is b.spec
    assert relay.environments == {"a": a.environment, "b": b.environment}


async def test_a_relay_without_environments_runs_on() -> None:
    """The first may come later."""
    relay = Relay([], 0)
    async with running(relay):
        stage = Stage()
        await asyncio.sleep(0)
        relay.put(stage.environment)
        await stage.put()


def test_the_registry_may_be_given() -> None:
    """Events and the relay ask the same one."""
    registry: Registry[Environment] = Registry()
    stage = Stage()
    assert Relay([stage.environment], 0, registry=registry).registry is registry
    assert registry.spec_of("a") is stage.spec
