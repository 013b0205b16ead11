"""A database mirror keeps a real database equal to the payload."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from relay.backoff import Backoff
from relay.model.item import Kind
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.protocol import fdv1
from relay.steps import finish
from relay.stores import StoreState
from relay.stores.conflicts import NEVER, ConflictTimings
from relay.stores.fingerprint import Fingerprint
from relay.stores.mirror import MAX_PENDING, SINGLE_RUN, DatabaseMirror, MirrorTimings
from relay.stores.redis.connect import connect
from relay.stores.redis.store import RedisStore
from tests.stores.contract import flag, segment
from tests.support.redis import RedisServer, pump, recorded
from tests.support.serving import until

LOG = logging.getLogger("relay.env.test")
QUICK = ConflictTimings(second_look=0.02, refresh=0.1, newer=0.2, extra=0.2)
TIMINGS = MirrorTimings(
    probe=0.05, compare=0.05, retry=Backoff(0.02, 0.05), finish=1.0, mark=0.0, conflicts=QUICK
)
CAUTIOUS = replace(TIMINGS, conflicts=replace(QUICK, newer=NEVER))
"""Timings with which newer items of the database are kept."""
START = Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)])


class Site:
    """A running mirror, and an upstream that answers its resyncs."""

    def __init__(self, server: RedisServer, timings: MirrorTimings = TIMINGS, **options) -> None:
        self.payload = EMPTY
        self.resyncs = 0
        self.server = server
        self.store = RedisStore(connect(server.options(read_timeout=0.3, **options)), "p")
        self.mirror = DatabaseMirror(self.store, "redis", self._resync, LOG, timings)

    def _resync(self) -> None:
        self.resyncs += 1
        # Upstream answers with its data at that time: those of now may be outdated by then.
        asyncio.get_running_loop().call_soon(lambda: self.update(self.payload))

    def update(self, payload: Payload, change: Change | None = None, *, full: bool = True) -> None:
        self.payload = payload
        self.mirror.update(payload, change, full=full)

    def apply(self, changes: ChangeSet) -> None:
        """Apply a change set as an environment does."""
        payload, change = self.payload.apply(changes)
        self.update(payload, change, full=changes.full)

    async def wait_marked(self, payload: Payload | None = None) -> None:
        """Wait until the fingerprint of the payload stands beside the data."""
        fingerprint = finish(Fingerprint.of(payload or self.payload))
        text = str(fingerprint).encode()
        await until(lambda: self.server.do("HGET", "p:$relay", "fingerprint") == text)

    async def wait_equal(self) -> None:
        """Wait until the database equals the payload."""
        await self.wait_for_content(self.payload)

    async def wait_for_content(self, payload: Payload) -> None:
        store = RedisStore(connect(self.server.options()), "p")
        stored = None
        try:
            async with asyncio.timeout(5):
                while (stored := await store.load()) is None or set(stored.payload) != set(payload):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(
                f"{stored and set(stored.payload)} is not {set(payload)}"
            ) from None
        finally:
            await store.aclose()

    async def __aenter__(self):
        self._task = asyncio.create_task(self.mirror.run())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled() or self._task.exception() is None


@pytest.fixture
async def site(server):
    async with Site(server) as site:
        yield site


async def test_an_empty_database_is_filled(site):
    """The first update writes all items, tombstones included."""
    site.update(START)
    async with asyncio.timeout(5):
        await site.mirror.flushed()
    await site.wait_equal()
    assert site.mirror.status.state is StoreState.VALID


async def test_the_repr_states_server_and_state(site):
    """The prefix is included, because environments share servers."""
    assert repr(site.mirror) == f"<DatabaseMirror {site.store.server} 'p' INITIALIZING>"


async def test_changes_are_written_as_they_come(server):
    """They do not wait for the next comparison."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.update(START)
        await site.mirror.flushed()
        site.apply(ChangeSet((flag("lamp", 4), flag("new", 1))))
        site.apply(ChangeSet((flag("new", 2, None), segment("crowd", 6))))
        async with asyncio.timeout(5):
            await site.mirror.flushed()
        await site.wait_equal()


async def test_more_changes_than_the_queue_holds(server):
    """Beyond the bound everything is compared, and nothing is lost."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.update(START)
        await site.mirror.flushed()
        for n in range(MAX_PENDING + 10):
            site.apply(ChangeSet((flag(f"f{n}", 1),)))
        assert len(site.mirror._pending) <= MAX_PENDING + 1
        await site.mirror.flushed()
        await site.wait_equal()


@pytest.mark.parametrize(
    "damage",
    [
        ("FLUSHALL",),
        ("DEL", "p:$inited"),
        ("DEL", "p:features"),
        ("HDEL", "p:features", "lamp"),
        ("HDEL", "p:features", "gone"),
        ("HSET", "p:features", "lamp", "{nope"),
        ("HSET", "p:features", "lamp", '{"key":"lamp","version":1}'),
        ("HSET", "p:segments", "crowd", '{"version":4,"deleted":true}'),
        ("SET", "p:features", "no hash"),
    ],
)
async def test_a_damaged_database_heals(site, damage):
    """Deleted or overwritten items are restored without a resync."""
    site.update(START)
    await site.mirror.flushed()
    site.server.do(*damage)
    await site.wait_equal()
    assert site.resyncs == 0


@pytest.mark.parametrize(
    "loss",
    [
        ("FLUSHALL",),
        ("DEL", "p:$inited"),
        ("DEL", "p:$relay"),
        ("DEL", "p:features"),
        ("DEL", "p:segments"),
        ("HSET", "p:$relay", "fingerprint", "another relay's"),
    ],
)
async def test_a_probe_finds_a_loss(server, loss):
    """Nobody waits for the comparison of all items, which is rare."""
    async with Site(server, replace(TIMINGS, compare=NEVER)) as site:
        site.update(START)
        await site.wait_marked()
        server.do(*loss)
        await site.wait_equal()
        await site.wait_marked()


async def test_while_nothing_happens_no_item_is_read(server):
    """A probe reads the marker and the fingerprint only, also after changes."""
    async with Site(server, replace(TIMINGS, compare=NEVER)) as site:
        site.update(START)
        site.apply(ChangeSet((flag("new", 1), flag("lamp", 4, None))))
        await site.wait_marked()
        server.do("CONFIG", "RESETSTAT")
        await until(lambda: server.calls().get("hget", 0) > 5)
        assert "hgetall" not in server.calls()
        assert "hset" not in server.calls()


async def test_round_trips_for_changes(server):
    """Two each, and one more behind the last, when nothing waits for it."""
    trips = 0

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def count() -> None:
            nonlocal trips
            while data := await reader.read(2**20):
                trips += 1
                inner.write(data)
            inner.close()

        inner_reader, inner = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(count(), pump(inner_reader, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as front:
        port = front.sockets[0].getsockname()[1]
        timings = MirrorTimings(probe=60, compare=NEVER)
        async with Site(server, timings, url=f"redis://127.0.0.1:{port}") as site:
            site.update(START)
            await site.wait_marked()
            before = trips
            for version in range(10, 20):
                site.apply(ChangeSet((flag("lamp", version),)))
                async with asyncio.timeout(5):
                    await site.mirror.flushed()
            assert trips == before + 2 * 10
            await site.wait_marked()
            assert trips == before + 2 * 10 + 1
            site.apply(ChangeSet((flag("lamp", 20),)))
            await site.wait_marked()  # though nothing else comes


@asynccontextmanager
async def changing(site: Site) -> AsyncIterator[None]:
    """Let items change so often that something always waits to be written."""

    async def change() -> None:
        for version in range(10, 100_000):
            site.apply(ChangeSet((flag("lamp", version), flag(f"k{version % 5}", version))))
            await asyncio.sleep(0.001)

    task = asyncio.create_task(change())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_while_items_change_no_other_is_read(server, caplog):
    """Probes know that what is not written yet is missing; nothing is repaired."""
    caplog.set_level(logging.INFO)
    async with Site(server, replace(TIMINGS, compare=NEVER)) as site:
        site.update(START)
        await site.wait_marked()
        server.do("CONFIG", "RESETSTAT")
        async with changing(site):
            await until(lambda: server.calls().get("hget", 0) > 5)
            assert "hgetall" not in server.calls()
        await site.wait_equal()
    assert caplog.messages == []


async def test_a_comparison_while_items_change_repairs_nothing(server, caplog):
    """Changes that wait to be written are written first."""
    caplog.set_level(logging.INFO)
    async with Site(server) as site:
        site.update(START)
        await site.wait_marked()
        server.do("CONFIG", "RESETSTAT")
        async with changing(site):
            await until(lambda: server.calls().get("hgetall", 0) > 5)
        await site.mirror.flushed()
    assert caplog.messages == []


async def test_a_loss_is_found_while_items_change(server):
    """A probe is due at its time, however many writes come in between."""
    async with Site(server, replace(TIMINGS, compare=NEVER)) as site:
        site.update(START)
        await site.wait_marked()
        async with changing(site):
            server.do("DEL", "p:segments")
            await until(lambda: server.do("HLEN", "p:segments") == 1)


async def test_relays_at_the_same_versions_share_a_fingerprint(server):
    """One of them got the data at once, the other one in changes."""
    changed = Payload.of([*START, flag("new", 1)])
    timings = replace(TIMINGS, compare=NEVER)
    async with Site(server, timings) as one, Site(server, timings) as other:
        one.update(START)
        await one.wait_marked()
        one.apply(ChangeSet((flag("new", 1),)))
        other.update(changed)
        await one.wait_marked()
        await other.wait_marked()
        server.do("CONFIG", "RESETSTAT")
        await until(lambda: server.calls().get("hget", 0) > 5)
        assert "hset" not in server.calls()


class SmallStore(RedisStore):
    """Holds small items only."""

    def problem_with(self, item):
        return "it is too large" if item.json and len(item.json) > 100 else None


async def test_what_the_database_cannot_hold_keeps_its_last_version(server, caplog):
    """SDKs read on, other items are written, and log and status name the item once."""
    large = flag("lamp", 4, b'{"version":4,"text":"%b"}' % (b"x" * 100))
    async with Site(server, replace(TIMINGS, compare=NEVER)) as site:
        site.mirror._store = SmallStore(connect(server.options()), "p")
        site.update(START)
        await site.wait_marked()
        site.apply(ChangeSet((large, flag("new", 1))))
        await site.wait_for_content(Payload.of([*START, flag("new", 1)]))
        await site.mirror.flushed()
        [bad] = site.mirror.status.invalid
        assert str(bad) == 'flag "lamp": it is too large'
        site.apply(ChangeSet((flag("new", 2),)))
        await site.wait_marked(Payload.of([*START, flag("new", 2)]))
        server.do("CONFIG", "RESETSTAT")
        await until(lambda: server.calls().get("hget", 0) > 5)
        assert "hgetall" not in server.calls()
        assert caplog.text.count("cannot hold a flag") == 1
        site.apply(ChangeSet((flag("lamp", 5),)))
        await site.wait_equal()
        await until(lambda: not site.mirror.status.invalid)


async def test_a_change_for_a_wiped_database_brings_everything(server):
    """There is never a partial data set: each write checks the marker."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.update(START)
        await site.mirror.flushed()
        server.do("FLUSHALL")
        site.apply(ChangeSet((flag("new", 1),)))
        await site.wait_equal()


async def test_an_old_backup_heals(site, caplog):
    """Older items are rewritten; items that upstream lacks are removed after two resyncs."""
    caplog.set_level(logging.INFO)
    site.update(START)
    await site.mirror.flushed()
    backup = RedisStore(connect(site.server.options()), "p")
    await backup.init(Payload.of([flag("lamp", 1), flag("long-deleted", 1), segment("crowd", 5)]))
    await backup.aclose()
    await site.wait_equal()
    assert site.resyncs == 2
    assert caplog.text.count("asking upstream for everything") == 2
    assert 'flag "long-deleted" in version 1, upstream has none' in caplog.text


async def test_an_old_backup_heals_each_time(site, caplog):
    """An item that comes back is removed again, later, and this is logged."""
    site.update(START)
    await site.mirror.flushed()
    for _ in range(2):
        site.server.do("HSET", "p:features", "long-deleted", '{"key":"long-deleted","version":1}')
        await site.wait_equal()
        await site.mirror.flushed()
    assert caplog.text.count('holds again what was replaced (flag "long-deleted")') == 1


async def test_items_that_vanish_or_go_back_upstream_do_so_in_the_database(site):
    """A full data set replaces everything this relay has written."""
    site.update(START)
    await site.mirror.flushed()
    site.apply(ChangeSet((flag("lamp", 1),), full=True))
    await site.wait_equal()
    assert site.resyncs == 0


async def test_newer_items_are_replaced_after_upstream_was_asked_twice(site, caplog):
    """Otherwise SDKs would read them forever. The log names them and states the reason."""
    caplog.set_level(logging.INFO)
    site.update(START)
    await site.mirror.flushed()
    site.server.do("HSET", "p:features", "lamp", '{"key":"lamp","version":99}')
    site.server.do("HSET", "p:features", "gone", '{"key":"gone","version":98}')
    await until(lambda: site.resyncs == 1)
    site.apply(ChangeSet((flag("lamp", 50), flag("new", 1))))
    newest = [flag("lamp", 99), flag("gone", 98), flag("new", 1), segment("crowd", 5)]
    await site.wait_for_content(Payload.of(newest))
    await site.wait_equal()
    assert site.resyncs == 2
    [line] = [line for line in caplog.messages if "upstream's data have replaced it" in line]
    assert (
        f"Redis data store {site.server.url} held what upstream does not have, though it was asked"
        ' for everything twice (flag "gone" in version 98, upstream has 4; flag "lamp" in version'
        " 99, upstream has 50)"
    ) in line


async def test_a_single_run_keeps_newer_items(server):
    """It does not know what earlier runs replaced; items only in the database are removed."""
    once = replace(SINGLE_RUN, conflicts=replace(SINGLE_RUN.conflicts, refresh=0.1, extra=0.1))
    store = RedisStore(connect(server.options()), "p")
    await store.init(Payload.of([flag("lamp", 99), flag("long-deleted", 1), flag("new", 1)]))
    await store.aclose()
    async with Site(server, once) as site:
        site.update(Payload.of([flag("lamp", 3), flag("new", 2)]))
        async with asyncio.timeout(5):
            await site.mirror.flushed()
        await site.wait_for_content(Payload.of([flag("lamp", 99), flag("new", 2)]))


async def test_foreign_newer_items_do_not_keep_vanished_ones(server):
    """One foreign item stays untouched; the rest follows upstream."""
    async with Site(server, CAUTIOUS) as site:
        site.update(START)
        await site.mirror.flushed()
        server.do("HSET", "p:features", "lamp", '{"key":"lamp","version":99}')
        await until(lambda: site.resyncs == 1)
        site.apply(ChangeSet((flag("lamp", 3), flag("new", 1)), full=True))
        await site.wait_for_content(Payload.of([flag("lamp", 99), flag("new", 1)]))


async def test_a_relay_behind_a_busy_writer_resyncs(server):
    """Even though the database changes all the time; it never overwrites that writer."""
    async with Site(server) as site:
        site.update(START)
        await site.mirror.flushed()
        for version in range(10, 10_000):
            server.do("HSET", "p:features", "lamp", f'{{"key":"lamp","version":{version}}}')
            await asyncio.sleep(QUICK.second_look / 10)
            if site.resyncs == 3:
                break
        assert site.resyncs == 3
        assert json.loads(server.hash("p:features")["lamp"])["version"] == version


async def test_a_relay_that_is_behind_catches_up_by_resyncing(server):
    """It sees newer items, resyncs, and gets the data of the other relay."""
    ahead = Payload.of([flag("lamp", 4), flag("new", 1), segment("crowd", 5)])
    async with Site(server) as quick, Site(server) as slow:
        quick.update(ahead)
        await quick.mirror.flushed()
        slow.update(Payload.of([flag("lamp", 3), segment("crowd", 5)]), full=False)
        slow.payload = ahead  # what a fresh payload will be
        async with asyncio.timeout(5):
            await slow.mirror.flushed()
        await quick.wait_equal()
        assert slow.resyncs == 1


@pytest.mark.parametrize(
    "behind",
    [
        [flag("lamp", 3), segment("crowd", 5)],
        [flag("lamp", 4), segment("crowd", 5)],
        [flag("lamp", 3), flag("new", 1), segment("crowd", 5)],
        [],
    ],
    ids=["older and fewer", "fewer", "older", "nothing"],
)
async def test_two_relays_never_fight(server, caplog, behind):
    """A relay whose upstream stays behind doubles its delay each time, and logs it."""
    ahead = Payload.of([flag("lamp", 4), flag("new", 1), segment("crowd", 5)])
    async with Site(server) as quick, Site(server) as slow:
        quick.update(ahead)
        await quick.mirror.flushed()
        slow.update(Payload.of(behind))

        def waits() -> list[float]:
            return [r.args[-1] for r in caplog.records if "something else writes to it" in r.msg]

        await until(lambda: len(waits()) == 3)
        assert waits() == [0.4, 0.8, 1.6]
        await quick.wait_equal()
        assert quick.resyncs == 0


async def test_nothing_is_written_while_upstream_is_lost(site):
    """The data may be outdated then; it is written when upstream is back."""
    site.update(START)
    await site.mirror.flushed()
    site.mirror.suspend()
    site.server.do("FLUSHALL")
    reads = site.server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"]
    await asyncio.sleep(TIMINGS.probe * 4)  # nothing happens: there is nothing to wait for
    assert site.server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"] == reads
    assert site.server.do("DBSIZE") == 0
    site.update(site.payload, full=False)
    await site.wait_equal()


async def test_a_database_that_starts_late_or_dies_is_repaired(tmp_path, caplog):
    """One line is logged when it is lost and one when it is back; updates never wait."""
    server = RedisServer(tmp_path)
    async with Site(server) as site:
        caplog.set_level(logging.INFO)
        site.update(START)
        await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
        with server:
            await site.wait_equal()
            await until(lambda: site.mirror.status.state is StoreState.VALID)
            server.kill()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            server.start()
            await site.wait_equal()
            await until(lambda: caplog.text.count("is available again") == 2)
            assert caplog.text.count("is unavailable") == 2
            assert f"redis://127.0.0.1:{server.port}" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "repair_it"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("ACL", "SETUSER", "default", "-hset"), ("ACL", "SETUSER", "default", "+hset")),
    ],
)
async def test_a_database_that_refuses_is_retried(tmp_path, caplog, break_it, repair_it):
    """Read-only, full or without permission: repaired once it accepts writes; two log lines."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.update(START)
            await site.mirror.flushed()
            server.do(*break_it)
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            # Several more tries, each of which can read.
            tries = server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"]
            await until(
                lambda: server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"] > tries + 6
            )
            server.do(*repair_it)
            await site.wait_equal()
            await until(lambda: "is available again" in caplog.text)
            assert caplog.text.count("is unavailable") == 1
            assert caplog.text.count("is available again") == 1


async def test_a_database_that_hangs_times_out_and_is_retried(tmp_path):
    """Updates take no time meanwhile."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.update(START)
            await site.mirror.flushed()
            server.pause()
            for version in range(4, 200):
                site.apply(ChangeSet((flag("lamp", version),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            server.go_on()
            await site.wait_equal()


async def test_loading_waits_for_the_database(tmp_path, caplog):
    """A relay may start before its database."""
    folder = tmp_path / "s"
    folder.mkdir()
    server = RedisServer(folder)
    site = Site(server)
    loading = asyncio.create_task(site.mirror.load())
    await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
    with server:
        server.do("SET", "p:$inited", "")
        server.do("HSET", "p:features", "lamp", '{"key":"lamp","version":3}', "bad", "{nope")
        stored = await loading
        assert list(stored.payload) == [flag("lamp", 3, b'{"key":"lamp","version":3}')]
        assert [bad.key for bad in site.mirror.status.invalid] == ["bad"]
        assert caplog.text.count('unreadable flag "bad"') == 1
        await site.store.aclose()


async def test_loading_stops_once_upstream_has_delivered(tmp_path):
    """Data from upstream takes precedence over stored data."""
    site = Site(RedisServer(tmp_path))
    loading = asyncio.create_task(site.mirror.load())
    await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
    site.update(START)
    async with asyncio.timeout(5):
        assert await loading is None


async def test_the_last_changes_are_written_at_the_end(server):
    """All updates before the end are in the database after it."""
    async with Site(server) as site:
        site.update(START)
        await site.mirror.flushed()
        site.apply(ChangeSet((flag("lamp", 9),)))
    await site.wait_equal()


async def test_a_change_that_is_being_written_at_the_end_is_not_lost(tmp_path):
    """The mirror cannot know whether it arrived, so it writes it again."""
    with RedisServer(tmp_path) as server:
        async with Site(server, MirrorTimings(probe=60)) as site:
            site.update(START)
            await site.mirror.flushed()
            server.pause()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: not site.mirror._pending)
            asyncio.get_running_loop().call_later(0.1, server.go_on)
        await site.wait_equal()


async def test_a_database_that_hangs_does_not_hold_up_the_end(tmp_path):
    """The end takes no longer than its time limit."""
    with RedisServer(tmp_path) as server:
        async with Site(server, MirrorTimings(finish=0.2)) as site:
            site.update(START)
            await site.mirror.flushed()
            server.pause()
            site.apply(ChangeSet((flag("lamp", 9),)))
            begin = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begin < 2
        server.go_on()


def parsed(item, key: str) -> dict:
    value = json.loads(item)
    return {"tombstone": value["version"]} if value.get("deleted") else {"key": key, **value}


def assert_same(ours: dict, theirs: dict, step: str) -> None:
    """Compare items, except for properties that ld-relay adds or drops: Relay keeps upstream's bytes."""
    assert ours.keys() == theirs.keys(), step
    for field, value in ours.items():
        mine, recorded = parsed(value, field), parsed(theirs[field], field)
        assert ("tombstone" in mine) == ("tombstone" in recorded), (step, field)
        common = mine.keys() & recorded.keys() - {"fallthrough"}
        assert {k: mine[k] for k in common} == {k: recorded[k] for k in common}, (step, field)


UNLIKE_LD_RELAY = {
    # A put without segments is of an environment without segments, and so is what follows it.
    "put with flags only": {"segments": {}},
    "another writer changes a flag behind the relay's back; the relay then patches it with a lower"
    " version": {"segments": {}},
    # Relay notices that the data is gone, and writes everything again.
    "the $inited marker and all data removed behind the relay's back, then a patch": None,
}


@pytest.mark.parametrize("recording", recorded(), ids=lambda recording: recording["name"])
async def test_recorded_contents(server, recording):
    """After each recorded message the database has the same content as with ld-relay."""
    prefix = recording["prefix"] or "launchdarkly"
    store = RedisStore(connect(server.options()), recording["prefix"])
    site = Site(server, MirrorTimings(probe=60))
    await site.store.aclose()
    site.mirror = DatabaseMirror(store, "redis", site._resync, LOG, MirrorTimings(probe=60))
    async with site:
        for step in recording["steps"]:
            for command in step["before"]:
                server.do(*command)
            if step["upstream"]:
                event, text = step["upstream"].strip("\n").split("\ndata: ", 1)
                changes = fdv1.parse(event.removeprefix("event: "), text.encode())
                site.apply(changes)
                async with asyncio.timeout(5):
                    await site.mirror.flushed()
            name, expected = step["step"], step["keys"]
            deviation = UNLIKE_LD_RELAY.get(name, {})
            if deviation is None:
                stored = await store.load()
                assert set(stored.payload) == set(site.payload), name
                continue
            for kind in ("features", "segments"):
                theirs = deviation.get(kind, expected.get(kind, {}))
                assert_same(
                    {k: v.decode() for k, v in server.hash(f"{prefix}:{kind}").items()},
                    theirs,
                    f"{name}: {kind}",
                )
            assert (server.do("GET", f"{prefix}:$inited") == b"") == expected["marked"], name
            assert server.hash("other:features") == {"foreign": b'{"key":"foreign","version":1}'}
    assert site.payload.get(Kind.FLAG, "zeta") is not None


async def test_a_database_recovers_while_upstream_is_lost(tmp_path):
    """Nothing is written, but the outage ends."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.update(START)
            await site.mirror.flushed()
            server.kill()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            site.mirror.suspend()
            server.start()
            await until(lambda: site.mirror.status.state is StoreState.VALID)
            assert server.do("DBSIZE") == 0
