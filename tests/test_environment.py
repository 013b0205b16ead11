"""An environment follows its source, publishes changes and keeps its mirrors current."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

import pytest

from relay.environment import ConnectionState, Environment
from relay.errors import ErrorKind
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Item, Kind
from relay.model.journal import Full, Journal
from relay.model.payload import Change, ChangeSet, Payload, Selector
from relay.relay import Relay
from relay.sources import Interrupted, UpToDate
from relay.stores import Stored
from relay.telemetry.log import environment_log
from tests.support.clocks import SystemClock
from tests.support.contracts import MemoryMirror, RecordingHub, ScriptedSource
from tests.support.serving import until

LOG = logging.getLogger("relay.env.test")


def flag(key, version):
    return Item(Kind.FLAG, key, version, b'{"version":%d}' % version)


def put(*items, invalid=()):
    return ChangeSet(items, full=True, invalid=invalid)


OUTAGE = Interrupted(ErrorKind.NETWORK_ERROR, "Error in stream connection (will retry): gone")
REFUSED = Interrupted(ErrorKind.ERROR_RESPONSE, "HTTP error 401", status=401, refused=True)


class Stage:
    """An environment whose source, hub and mirrors the test controls."""

    def __init__(self, mirrors=0, name="test"):
        self.source, self.hub = ScriptedSource(), RecordingHub()
        self.mirrors = [MemoryMirror() for _ in range(mirrors)]
        spec = EnvironmentSpec(name, SDKKey(f"sdk-{name}"))
        self.environment = Environment(spec, self.source, self.hub, LOG, self.mirrors)

    async def __aenter__(self):
        self._task = asyncio.create_task(self.environment.run())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def test_a_put_is_served_published_and_mirrored():
    """Memory first, then subscribers, then the database."""
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 1)))
        env = stage.environment
        assert env.payload.get(Kind.FLAG, "a") == flag("a", 1)
        (payload, change), *rest = stage.hub.published
        assert (payload, change.replace, rest) == (env.payload, True, [])
        assert stage.mirrors[0].told == [change]
        assert env.connection.state is ConnectionState.VALID
        assert env.init_done.is_set()


async def test_updates_without_a_change_are_not_published():
    """An old version and an identical put do not reach subscribers.

    Mirrors are updated after the put: one of them may have asked for a resync.
    """
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 5)))
        await stage.source.give(ChangeSet((flag("a", 4),)), UpToDate())
        assert len(stage.mirrors[0].told) == 1
        await stage.source.give(put(flag("a", 5)))
        assert len(stage.hub.published) == 1
        assert stage.mirrors[0].told[1:] == [None]


async def test_an_empty_environment_is_data():
    """A put without items makes the environment able to serve."""
    async with Stage() as stage:
        await stage.source.give(put())
        assert len(stage.environment.payload) == 0
        assert stage.hub.published[0][1].replace


async def test_a_patch_before_the_first_put_is_passed_on_but_not_served():
    """One flag is not the data of an environment (streams 2.2)."""
    async with Stage() as stage:
        await stage.source.give(ChangeSet((flag("a", 1),)))
        assert stage.environment.payload is None
        ((payload, change),) = stage.hub.published
        assert payload is None
        assert change.visible == (flag("a", 1),)


async def test_a_patch_before_the_first_put_leaves_stored_data_alone():
    """Stored data is served unchanged until upstream delivers."""
    async with Stage(mirrors=1) as stage:
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 1)])))
        await asyncio.sleep(0.01)
        await stage.source.give(ChangeSet((flag("a", 2),)))
        assert stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 1)
        payload, change = stage.hub.published[-1]
        assert payload is stage.environment.payload
        assert change.visible == (flag("a", 2),)


async def test_an_outage_keeps_the_data_and_suspends_the_mirrors(caplog):
    """Logged once when it begins and once when it ends; mirrors must not write meanwhile."""
    caplog.set_level(logging.INFO)
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 1)), OUTAGE, OUTAGE, OUTAGE)
        env = stage.environment
        assert env.connection.state is ConnectionState.INTERRUPTED
        assert env.connection.last_error[0] is ErrorKind.NETWORK_ERROR
        assert env.payload.get(Kind.FLAG, "a")
        assert caplog.text.count(OUTAGE.reason) == 1
        await stage.source.give(put(flag("a", 1)))
        assert env.connection.state is ConnectionState.VALID
        assert caplog.text.count("Upstream is connected") == 2
        assert stage.mirrors[0].told[1:] == ["hold", "hold", "hold", None]


async def test_before_the_first_data_an_outage_is_still_initialising():
    """`/status` says INITIALIZING until upstream has delivered once (streams 2.5)."""
    async with Stage() as stage:
        await stage.source.give(OUTAGE)
        assert stage.environment.connection.state is ConnectionState.INITIALIZING
        assert not stage.environment.init_done.is_set()


async def test_a_refused_key_turns_the_connection_off_until_it_is_accepted():
    """The source goes on trying; what comes then counts."""
    async with Stage() as stage:
        await stage.source.give(REFUSED)
        assert stage.environment.connection.state is ConnectionState.OFF
        assert stage.environment.init_done.is_set()
        await stage.source.give(put(flag("a", 1)))
        assert stage.environment.connection.state is ConnectionState.VALID


async def test_stored_data_are_served_at_once():
    """Before upstream delivers; but the connection is not reported as valid."""
    async with Stage(mirrors=1) as stage:
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 1)])))
        await asyncio.sleep(0.01)
        env = stage.environment
        assert env.payload.get(Kind.FLAG, "a") == flag("a", 1)
        assert env.connection.state is ConnectionState.INITIALIZING
        assert stage.mirrors[0].told == []


LARGE = Item(Kind.FLAG, "large", 1, b'{"version":1,"text":"%b"}' % (b"x" * 2000))
"""Beside it, any change is small."""


class Snapshot(MemoryMirror):
    """A mirror with a journal."""

    has_journal = True


def before_a_restart(*items):
    """Return what a relay of before has stored, and its journal."""
    journal, payload = (
        Journal(EnvironmentSpec("test", SDKKey("sdk-test")).lineage),
        Payload.of(items),
    )
    journal.record(payload, Change(items, items, replace=True), full=True)
    return Stored(payload, journal=journal.saved(payload) if journal.state else None), journal


@contextlib.asynccontextmanager
async def restarted():
    """Yield an environment with a snapshot and a database."""
    stage = Stage(mirrors=1)
    stage.snapshot = Snapshot()
    stage.environment.mirrors = (stage.snapshot, *stage.mirrors)
    async with stage:
        yield stage


async def test_clients_of_before_a_restart_are_known():
    """The journal is loaded before anything is served, and goes on with what upstream sends."""
    stored, journal = before_a_restart(flag("a", 1), LARGE)
    async with restarted() as stage:
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 2), LARGE])))
        giving = asyncio.create_task(stage.source.give(put(flag("a", 2), LARGE, flag("c", 1))))
        await asyncio.sleep(0.01)
        environment = stage.environment
        assert environment.payload is None  # neither database nor upstream come first
        stage.snapshot.loading.set_result(stored)
        await giving
        answer = environment.journal.answer(journal.state)
        assert not isinstance(answer, Full)
        assert set(answer.items) == {flag("a", 2), flag("c", 1)}
        assert stage.hub.published[0][0] is stored.payload


@pytest.mark.parametrize("stored", [None, Stored(Payload.of([flag("a", 1)]))])
async def test_a_snapshot_without_a_journal_delays_nothing(stored):
    async with restarted() as stage:
        stage.snapshot.loading.set_result(stored)
        await stage.source.give(put(flag("a", 2)))
        assert stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 2)


async def test_a_disk_that_hangs_does_not_keep_upstream_waiting(monkeypatch):
    """Data that it gives later come too late."""
    monkeypatch.setattr("relay.environment.RECALL_TIMEOUT", 0.01)
    stored, journal = before_a_restart(flag("a", 1))
    async with restarted() as stage:
        await stage.source.give(put(flag("a", 2)))
        stage.snapshot.loading.set_result(stored)
        await asyncio.sleep(0.01)
        assert stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 2)
        assert isinstance(stage.environment.journal.answer(journal.state), Full)


NAME = Selector("(p:UP:1)", "UP", 1)
LATER = Selector("(p:UP:2)", "UP", 2)


async def named_before_a_restart(stage):
    """Let the snapshot hold data that upstream has given a name."""
    items = (flag("a", 1), LARGE)
    journal, payload = Journal("test"), Payload.of(items)
    journal.record(payload, Change(items, items, replace=True), full=True, selector=NAME)
    assert journal.naming is not None
    journal.naming.run()
    stage.snapshot.loading.set_result(Stored(payload, journal=journal.saved(payload)))
    await until(lambda: stage.source.bases)


async def test_upstream_continues_from_the_data_of_before_a_restart():
    """A difference to them is data, though nothing else has come from upstream."""
    async with restarted() as stage:
        await named_before_a_restart(stage)
        environment = stage.environment
        assert stage.source.bases == ["(p:UP:1)"]
        await stage.source.give(ChangeSet((flag("a", 2),), selector=LATER, since="(p:UP:1)"))
        assert environment.payload.get(Kind.FLAG, "a") == flag("a", 2)
        assert environment.connection.state is ConnectionState.VALID
        assert environment.journal.state == "(p:UP:2)"
        assert set(environment.journal.answer("(p:UP:1)").items) == {flag("a", 2)}


async def test_upstream_confirms_the_data_of_before_a_restart():
    """They are current then, and mirrors may be written."""
    async with restarted() as stage:
        await named_before_a_restart(stage)
        await stage.source.give(UpToDate())
        assert stage.environment.connection.state is ConnectionState.INITIALIZING
        await stage.source.give(UpToDate("(p:UP:1)"))
        assert stage.environment.connection.state is ConnectionState.VALID
        assert stage.mirrors[0].told == [None]
        assert stage.source.refreshed == 0


@pytest.mark.parametrize(
    "update",
    [UpToDate("(p:UP:1)"), ChangeSet((flag("a", 2),), selector=LATER, since="(p:UP:1)")],
)
async def test_what_builds_on_other_data_is_not_applied(update):
    """A database had newer ones meanwhile; so upstream is asked for everything."""
    async with restarted() as stage:
        await named_before_a_restart(stage)
        newer = Payload.of([flag("a", 7), LARGE])
        stage.mirrors[0].loading.set_result(Stored(newer))
        await until(lambda: stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 7))
        await stage.source.give(update)
        environment = stage.environment
        assert environment.payload.get(Kind.FLAG, "a") == flag("a", 7)
        assert environment.connection.state is ConnectionState.INITIALIZING
        assert stage.source.refreshed == 1
        await stage.source.give(ChangeSet((flag("a", 2), LARGE), full=True, selector=LATER))
        assert environment.payload.get(Kind.FLAG, "a") == flag("a", 2)
        assert environment.journal.state == "(p:UP:2)"


async def test_the_age_of_stored_data_is_that_of_the_mirror():
    """Until upstream delivers, the age of the data is the one the mirror reports."""
    async with Stage(mirrors=1) as stage:
        connection = stage.environment.connection
        assert connection.data_age is None
        data = Payload.of([flag("a", 1)])
        stage.mirrors[0].loading.set_result(Stored(data, age=1000.5))
        await asyncio.sleep(0.01)
        assert 1000.5 <= connection.data_age < 1060
        await stage.source.give(put(flag("a", 1)))
        assert 0 <= connection.data_age < 60


@pytest.mark.parametrize(
    ("second", "age"), [(flag("a", 1), 700), (flag("a", 2), 700), (flag("a", 0), None)]
)
async def test_the_age_is_that_of_the_data_served(second, age):
    """A database does not know it; a snapshot counts if its data is the same or newer."""
    async with Stage(mirrors=2) as stage:
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 1)])))
        await asyncio.sleep(0.01)
        stage.mirrors[1].loading.set_result(Stored(Payload.of([second]), age=700))
        await asyncio.sleep(0.01)
        data_age = stage.environment.connection.data_age
        assert data_age is None if age is None else 700 <= data_age < 760


async def test_mirrors_are_confirmed_while_nothing_changes(monkeypatch):
    """So they know how old their data is even if nothing changes for a long time."""
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 1)), UpToDate())
        assert len(stage.mirrors[0].told) == 1
        monkeypatch.setattr("relay.environment.CONFIRM_EVERY", 0.0)
        await stage.source.give(UpToDate(), put(flag("a", 1)))
        assert stage.mirrors[0].told[1:] == [None, None]


@pytest.mark.parametrize("jump", [-8 * 86400, 8 * 86400])
async def test_a_corrected_clock_does_not_confirm_mirrors_early(jump):
    """A jump of the wall clock does not count as elapsed time."""
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 1)))
        with SystemClock() as system:
            system.correct(jump)
            await stage.source.give(UpToDate())
        assert len(stage.mirrors[0].told) == 1
        assert stage.environment.connection.data_age < 60


@pytest.mark.parametrize("first", [0, 1])
async def test_the_newer_of_two_mirrors_is_served(first):
    """Whichever is loaded first."""
    async with Stage(mirrors=2) as stage:
        for n in (first, 1 - first):
            stage.mirrors[n].loading.set_result(Stored(Payload.of([flag("a", n)])))
            await asyncio.sleep(0.01)
        assert stage.environment.payload.get(Kind.FLAG, "a").version == 1


async def test_upstream_takes_precedence_over_stored_data():
    """Even if a mirror loads late and has greater versions."""
    async with Stage(mirrors=1) as stage:
        await stage.source.give(put(flag("a", 1)))
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 9)])))
        await asyncio.sleep(0.01)
        assert stage.environment.payload.get(Kind.FLAG, "a").version == 1


async def test_upstream_confirming_stored_data_updates_the_mirrors():
    """Nothing changed for subscribers, but a mirror must learn that it may write."""
    async with Stage(mirrors=1) as stage:
        stage.mirrors[0].loading.set_result(Stored(Payload.of([flag("a", 1)])))
        await asyncio.sleep(0.01)
        await stage.source.give(put(flag("a", 1)))
        assert stage.mirrors[0].told == [None]
        assert len(stage.hub.published) == 1


async def test_unusable_items_are_listed_until_they_are_fixed(caplog):
    """Each is logged once, however often it is repeated."""
    bad = InvalidItem(Kind.FLAG, "w", "Expected `int`")
    async with Stage() as stage:
        await stage.source.give(put(flag("w", 1)), put(flag("a", 1), invalid=(bad,)))
        await stage.source.give(put(flag("a", 1), invalid=(bad,)))
        env = stage.environment
        assert list(env.invalid.values()) == [bad]
        assert env.rejected == 2
        assert caplog.text.count('flag "w"') == 1
        assert env.payload.get(Kind.FLAG, "w") == flag("w", 1)
        await stage.source.give(ChangeSet((flag("w", 2),)))
        assert env.invalid == {}


async def test_the_source_is_closed_when_the_environment_ends():
    """Cancelling is the only way to stop, and leaves nothing open."""
    async with Stage() as stage:
        await stage.source.give(put(flag("a", 1)))
    assert stage.source.ended == 1


async def test_one_environment_cannot_hurt_another(caplog, monkeypatch):
    """An unexpected error is logged, the data stays available, and the environment restarts."""
    monkeypatch.setattr("relay.relay.RESTART_DELAY", 0.001)
    bad, good = Stage(name="bad"), Stage(name="good")
    relay = Relay([bad.environment, good.environment], init_timeout=5)
    task = asyncio.create_task(relay.run())
    await bad.source.give(put(flag("a", 1)), RuntimeError("an accident"))
    await good.source.give(put(flag("b", 1)))
    async with asyncio.timeout(5):
        await bad.source.running.acquire()
        await bad.source.running.acquire()
    assert good.environment.connection.state is ConnectionState.VALID
    assert bad.environment.connection.state is ConnectionState.INTERRUPTED
    assert bad.environment.payload is not None
    assert "an accident" in caplog.text
    await bad.source.give(put(flag("a", 2)))
    assert bad.environment.connection.state is ConnectionState.VALID
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


NEW = EnvironmentSpec("test", SDKKey("sdk-new"))


async def test_a_new_key_takes_over_without_a_gap():
    """The old source is followed until the new one has delivered everything, then closed."""
    async with Stage(mirrors=1) as stage:
        env, successor = stage.environment, ScriptedSource()
        await stage.source.give(put(flag("a", 1)))
        env.change(NEW, successor)
        assert env.spec is NEW
        await stage.source.give(ChangeSet((flag("a", 2),)))
        assert env.payload.get(Kind.FLAG, "a") == flag("a", 2)
        await successor.give(UpToDate(), ChangeSet((flag("a", 3),)))
        assert env.payload.get(Kind.FLAG, "a") == flag("a", 2), "no data before the put"
        await stage.source.give(ChangeSet((flag("a", 4),)))
        assert stage.source.ended == 0
        await successor.give(put(flag("a", 4), flag("b", 1)))
        assert len(env.payload) == 2
        await asyncio.sleep(0)
        assert stage.source.ended == 1
        await successor.give(ChangeSet((flag("a", 5),)))
        assert env.payload.get(Kind.FLAG, "a") == flag("a", 5)
        env.check()
        env.resync()
        assert (successor.looked, successor.refreshed) == ([False], 1)
        assert (stage.source.looked, stage.source.refreshed) == ([], 0)
    assert successor.ended == 1


async def test_a_new_key_that_is_refused_leaves_the_old_one_at_work(caplog):
    """Said once; state and mirrors are those of the source that works."""
    caplog.set_level(logging.INFO)
    async with Stage(mirrors=1) as stage:
        env, successor = stage.environment, ScriptedSource()
        await stage.source.give(put(flag("a", 1)))
        env.change(NEW, successor)
        await successor.give(REFUSED, OUTAGE, REFUSED)
        assert env.connection.state is ConnectionState.VALID
        assert env.connection.last_error is None
        assert "hold" not in stage.mirrors[0].told
        assert caplog.text.count("The former SDK key is still used upstream") == 1
        await stage.source.give(OUTAGE)
        assert env.connection.state is ConnectionState.INTERRUPTED
        await successor.give(put(flag("a", 2)))
        assert env.connection.state is ConnectionState.VALID
        assert "The new SDK key is used upstream" in caplog.text


async def test_a_second_rotation_overtakes_the_first():
    """Only the newest key matters; the one between is closed at once."""
    async with Stage() as stage:
        first, second = ScriptedSource(), ScriptedSource()
        await stage.source.give(put(flag("a", 1)))
        stage.environment.change(NEW, first)
        await first.give(UpToDate())
        stage.environment.change(replace(NEW, sdk_key=SDKKey("sdk-newer")), second)
        await second.give(UpToDate())
        assert (stage.source.ended, first.ended, second.ended) == (0, 1, 0)
        await second.give(put(flag("a", 2)))
        assert stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 2)
        await asyncio.sleep(0)
        assert (stage.source.ended, first.ended, second.ended) == (1, 1, 0)


async def test_a_rotation_survives_a_failure_of_the_environment():
    """Both keys are followed again; one that has taken over stays."""
    stage, successor = Stage(), ScriptedSource()
    for deliver in (False, True):
        async with stage:
            if not deliver:
                stage.environment.change(NEW, successor)
            else:
                await successor.give(put(flag("a", 1)))
    assert stage.source.ended == 2
    async with stage:
        await successor.give(put(flag("a", 2)))
        assert stage.environment.payload.get(Kind.FLAG, "a") == flag("a", 2)
    assert stage.source.ended == 2
    assert successor.ended == 3


async def test_a_new_key_before_the_first_data(caplog):
    """Whichever delivers first is served, and the new one wins."""
    async with Stage() as stage:
        env, successor = stage.environment, ScriptedSource()
        env.change(NEW, successor)
        await stage.source.give(REFUSED)
        assert env.connection.state is ConnectionState.OFF
        await successor.give(put(flag("a", 1)))
        assert env.connection.state is ConnectionState.VALID


async def test_mirrors_are_replaced_while_it_runs():
    """New ones are filled at once, old ones end, and one that stays is not disturbed."""
    async with Stage(mirrors=2) as stage:
        env, (gone, stays), comes = stage.environment, stage.mirrors, MemoryMirror()
        await stage.source.give(put(flag("a", 1)))
        told = list(stays.told)
        env.change(replace(env.spec, prefix="new"), mirrors=[stays, comes])
        assert comes.told == [None]
        await until(lambda: gone.ended == 1)
        await stage.source.give(ChangeSet((flag("a", 2),)))
        assert (len(gone.told), len(stays.told), len(comes.told)) == (1, len(told) + 1, 2)
        assert (stays.ended, comes.ended) == (0, 0)
    assert (gone.ended, stays.ended, comes.ended) == (1, 1, 1)


async def test_a_new_mirror_gets_no_data_that_upstream_has_not_confirmed():
    """During an outage the database may know more; the mirror waits like the others."""
    async with Stage() as stage:
        env, mirror = stage.environment, MemoryMirror()
        await stage.source.give(put(flag("a", 1)), OUTAGE)
        env.change(env.spec, mirrors=[mirror])
        assert mirror.told == []
        await stage.source.give(UpToDate())
        assert mirror.told == [None]


async def test_the_log_follows_name_and_key(caplog):
    """Sources and mirrors hold the same log, and need not be told."""
    caplog.set_level(logging.INFO)
    spec, source = EnvironmentSpec("old", SDKKey("sdk-1111")), ScriptedSource()
    log = environment_log("old", "...1111")
    env = Environment(spec, source, RecordingHub(), log)
    env.change(EnvironmentSpec("new", SDKKey("sdk-2222")))
    log.info("hello")
    (record,) = caplog.records
    assert (record.name, record.environment) == ("relay.env.new", "new")
    assert record.masked_key == "...2222"


async def test_the_repr_states_connection_and_size():
    """The key is not shown."""
    async with Stage() as stage:
        assert repr(stage.environment) == "<Environment 'test' INITIALIZING no data>"
        await stage.source.give(put(flag("a", 1)))
        assert repr(stage.environment) == "<Environment 'test' VALID 1 items>"


async def test_a_relay_knows_when_upstream_has_answered():
    """True when each environment has data; False when one is refused or time is over."""
    for answers, expected in [((put(), put()), True), ((put(), REFUSED), False), ((put(),), False)]:
        stages = [Stage(name="one"), Stage(name="two")]
        relay = Relay([stage.environment for stage in stages], init_timeout=0.2)
        task = asyncio.create_task(relay.run())
        for stage, answer in zip(stages, answers, strict=False):
            await stage.source.give(answer)
        assert await relay.wait_until_synced() is expected
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
