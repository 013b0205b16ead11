"""A mirror keeps a real database equal to the payload, whatever happens to either."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from relay.model.item import Kind
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.protocol import fdv1
from relay.stores import StoreState
from relay.stores.conflicts import NEVER, ConflictTimes
from relay.stores.mirror import MAX_PENDING, ONCE, DatabaseMirror, MirrorTimings
from relay.stores.redis.store import RedisStore
from tests.stores.contract import flag, segment
from tests.support.redis import RedisServer, recorded
from tests.support.serving import until

LOG = logging.getLogger("relay.env.test")
QUICK = ConflictTimes(second_look=0.02, refresh=0.1, newer=0.2, extra=0.2)
TIMES = MirrorTimings(probe=0.05, retry=0.02, longest_retry=0.05, finish=1.0, conflicts=QUICK)
CAUTIOUS = replace(TIMES, conflicts=replace(QUICK, newer=NEVER))
"""What is newer in the database stays."""
START = Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)])


class Site:
    """A mirror that runs, and the upstream that it may ask."""

    def __init__(self, server: RedisServer, times: MirrorTimings = TIMES, **options) -> None:
        self.payload = EMPTY
        self.refreshed = 0
        self.server = server
        self.store = RedisStore(server.options(read_timeout=0.3, **options), "p")
        self.mirror = DatabaseMirror(self.store, "redis", self._refresh, LOG, times)

    def _refresh(self) -> None:
        self.refreshed += 1
        asyncio.get_running_loop().call_soon(self.tell, self.payload)

    def tell(self, payload: Payload, change: Change | None = None, *, full: bool = True) -> None:
        self.payload = payload
        self.mirror.update(payload, change, full=full)

    def apply(self, changes: ChangeSet) -> None:
        """What an environment does with a change set."""
        payload, change = self.payload.apply(changes)
        self.tell(payload, change, full=changes.full)

    async def equal(self) -> None:
        """Wait until the database holds the payload."""
        await self.holds(self.payload)

    async def holds(self, payload: Payload) -> None:
        store = RedisStore(self.server.options(), "p")
        found = None
        try:
            async with asyncio.timeout(5):
                while (found := await store.load()) is None or set(found.payload) != set(payload):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{found and set(found.payload)} is not {set(payload)}") from None
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
    """The first word of upstream makes the database whole, tombstones included."""
    site.tell(START)
    async with asyncio.timeout(5):
        await site.mirror.flushed()
    await site.equal()
    assert site.mirror.status.state is StoreState.VALID


async def test_changes_are_written_as_they_come(server):
    """Without waiting for the next comparison."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.tell(START)
        await site.mirror.flushed()
        site.apply(ChangeSet((flag("lamp", 4), flag("new", 1))))
        site.apply(ChangeSet((flag("new", 2, None), segment("crowd", 6))))
        async with asyncio.timeout(5):
            await site.mirror.flushed()
        await site.equal()


async def test_more_changes_than_wait_one_by_one(server):
    """Beyond a bound nothing is lost: everything is compared."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.tell(START)
        await site.mirror.flushed()
        for n in range(MAX_PENDING + 10):
            site.apply(ChangeSet((flag(f"f{n}", 1),)))
        assert len(site.mirror._pending) <= MAX_PENDING + 1
        await site.mirror.flushed()
        await site.equal()


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
    """Wiped, robbed, overwritten: it is whole again soon, and upstream was not bothered."""
    site.tell(START)
    await site.mirror.flushed()
    site.server.do(*damage)
    await site.equal()
    assert site.refreshed == 0


async def test_a_change_for_a_wiped_database_brings_everything(server):
    """There is never a partial data set: the marker is looked at with each write."""
    async with Site(server, MirrorTimings(probe=60)) as site:
        site.tell(START)
        await site.mirror.flushed()
        server.do("FLUSHALL")
        site.apply(ChangeSet((flag("new", 1),)))
        await site.equal()


async def test_an_old_backup_heals(site, caplog):
    """Older items are written again; what upstream no longer has goes, once it was asked twice."""
    caplog.set_level(logging.INFO)
    site.tell(START)
    await site.mirror.flushed()
    backup = RedisStore(site.server.options(), "p")
    await backup.init(Payload.of([flag("lamp", 1), flag("long-deleted", 1), segment("crowd", 5)]))
    await backup.aclose()
    await site.equal()
    assert site.refreshed == 2
    assert caplog.text.count("asking upstream for everything") == 2
    assert 'flag "long-deleted" in version 1, upstream has none' in caplog.text


async def test_an_old_backup_heals_each_time(site, caplog):
    """What was removed and is there again goes again, though later, and that is said."""
    site.tell(START)
    await site.mirror.flushed()
    for _ in range(2):
        site.server.do("HSET", "p:features", "long-deleted", '{"key":"long-deleted","version":1}')
        await site.equal()
        await until(lambda: not site.mirror._conflicts)
    assert caplog.text.count('holds again what was replaced (flag "long-deleted")') == 1


async def test_what_vanished_or_went_back_upstream_does_so_in_the_database(site):
    """A full data set of upstream stands above what we had written ourselves."""
    site.tell(START)
    await site.mirror.flushed()
    site.apply(ChangeSet((flag("lamp", 1),), full=True))
    await site.equal()
    assert site.refreshed == 0


async def test_what_is_newer_than_upstream_is_replaced_once_upstream_was_asked_twice(site, caplog):
    """Left from another project, it would be read for ever; the log says what it was, and why."""
    caplog.set_level(logging.INFO)
    site.tell(START)
    await site.mirror.flushed()
    site.server.do("HSET", "p:features", "lamp", '{"key":"lamp","version":99}')
    site.server.do("HSET", "p:features", "gone", '{"key":"gone","version":98}')
    await until(lambda: site.refreshed == 1)
    site.apply(ChangeSet((flag("lamp", 50), flag("new", 1))))
    newest = [flag("lamp", 99), flag("gone", 98), flag("new", 1), segment("crowd", 5)]
    await site.holds(Payload.of(newest))
    await site.equal()
    assert site.refreshed == 2
    [line] = [line for line in caplog.messages if "upstream's data have replaced it" in line]
    assert (
        f"Redis data store {site.server.url} held what upstream does not have, though it was asked"
        ' for everything twice (flag "gone" in version 98, upstream has 4; flag "lamp" in version'
        " 99, upstream has 50)"
    ) in line


async def test_a_run_that_ends_leaves_what_is_newer(server):
    """It does not know what the runs before it replaced; what only the database has goes."""
    once = replace(ONCE, conflicts=replace(ONCE.conflicts, refresh=0.1, extra=0.1))
    store = RedisStore(server.options(), "p")
    await store.init(Payload.of([flag("lamp", 99), flag("long-deleted", 1), flag("new", 1)]))
    await store.aclose()
    async with Site(server, once) as site:
        site.tell(Payload.of([flag("lamp", 3), flag("new", 2)]))
        async with asyncio.timeout(5):
            await site.mirror.flushed()
        await site.holds(Payload.of([flag("lamp", 99), flag("new", 2)]))


async def test_newer_items_of_others_do_not_keep_what_vanished(server):
    """One item that is not ours is left alone; the rest follows upstream."""
    async with Site(server, CAUTIOUS) as site:
        site.tell(START)
        await site.mirror.flushed()
        server.do("HSET", "p:features", "lamp", '{"key":"lamp","version":99}')
        await until(lambda: site.refreshed == 1)
        site.apply(ChangeSet((flag("lamp", 3), flag("new", 1)), full=True))
        await site.holds(Payload.of([flag("lamp", 99), flag("new", 1)]))


async def test_a_relay_behind_a_busy_writer_asks_as_well(server):
    """Though the database never looks the same twice; and it never writes against that writer."""
    async with Site(server) as site:
        site.tell(START)
        await site.mirror.flushed()
        for version in range(10, 10_000):
            server.do("HSET", "p:features", "lamp", f'{{"key":"lamp","version":{version}}}')
            await asyncio.sleep(QUICK.second_look / 10)
            if site.refreshed == 3:
                break
        assert site.refreshed == 3
        assert json.loads(server.hash("p:features")["lamp"])["version"] == version


async def test_a_relay_that_is_behind_catches_up_by_asking(server):
    """It sees newer data, asks upstream, and gets what the other relay has."""
    ahead = Payload.of([flag("lamp", 4), flag("new", 1), segment("crowd", 5)])
    async with Site(server) as quick, Site(server) as slow:
        quick.tell(ahead)
        await quick.mirror.flushed()
        slow.tell(Payload.of([flag("lamp", 3), segment("crowd", 5)]), full=False)
        slow.payload = ahead  # what a fresh payload will be
        async with asyncio.timeout(5):
            await slow.mirror.flushed()
        await quick.equal()
        assert slow.refreshed == 1


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
    """One whose upstream stays behind for ever waits twice as long each time, and says so."""
    ahead = Payload.of([flag("lamp", 4), flag("new", 1), segment("crowd", 5)])
    async with Site(server) as quick, Site(server) as slow:
        quick.tell(ahead)
        await quick.mirror.flushed()
        slow.tell(Payload.of(behind))

        def waits() -> list[float]:
            return [r.args[-1] for r in caplog.records if "something else writes to it" in r.msg]

        await until(lambda: len(waits()) == 3)
        assert waits() == [0.4, 0.8, 1.6]
        await quick.equal()
        assert quick.refreshed == 0


async def test_nothing_is_written_while_upstream_is_lost(site):
    """Nobody vouches for the data then; they are written when upstream is back."""
    site.tell(START)
    await site.mirror.flushed()
    site.mirror.suspend()
    site.server.do("FLUSHALL")
    looks = site.server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"]
    await asyncio.sleep(TIMES.probe * 4)  # nothing happens: there is nothing to wait for
    assert site.server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"] == looks
    assert site.server.do("DBSIZE") == 0
    site.tell(site.payload, full=False)
    await site.equal()


async def test_a_database_that_comes_late_or_dies_is_made_whole(tmp_path, caplog):
    """One line when it is missed and one when it is back; flags are never in its way."""
    server = RedisServer(tmp_path)
    async with Site(server) as site:
        caplog.set_level(logging.INFO)
        site.tell(START)
        await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
        with server:
            await site.equal()
            await until(lambda: site.mirror.status.state is StoreState.VALID)
            server.kill()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            server.start()
            await site.equal()
            await until(lambda: caplog.text.count("is available again") == 2)
            assert caplog.text.count("is unavailable") == 2
            assert f"redis://127.0.0.1:{server.port}" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "mend_it"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("ACL", "SETUSER", "default", "-hset"), ("ACL", "SETUSER", "default", "+hset")),
    ],
)
async def test_a_database_that_refuses_is_tried_again(tmp_path, caplog, break_it, mend_it):
    """A read-only replica, a full one, one without rights: whole as soon as it accepts, two lines."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.tell(START)
            await site.mirror.flushed()
            server.do(*break_it)
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            # Several more tries, each of which can read.
            tries = server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"]
            await until(
                lambda: server.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"] > tries + 6
            )
            server.do(*mend_it)
            await site.equal()
            await until(lambda: "is available again" in caplog.text)
            assert caplog.text.count("is unavailable") == 1
            assert caplog.text.count("is available again") == 1


async def test_a_database_that_hangs_is_given_up_and_tried_again(tmp_path):
    """Following takes no time meanwhile."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.tell(START)
            await site.mirror.flushed()
            server.pause()
            for version in range(4, 200):
                site.apply(ChangeSet((flag("lamp", version),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            server.go_on()
            await site.equal()


async def test_what_is_stored_is_loaded_when_the_database_comes(tmp_path, caplog):
    """A relay that starts before its database waits for it."""
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


async def test_nothing_is_loaded_once_upstream_has_come(tmp_path):
    """What upstream says stands above all that is stored."""
    site = Site(RedisServer(tmp_path))
    loading = asyncio.create_task(site.mirror.load())
    await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
    site.tell(START)
    async with asyncio.timeout(5):
        assert await loading is None


async def test_the_last_changes_are_written_at_the_end(server):
    """What was followed before the end is in the database after it."""
    async with Site(server) as site:
        site.tell(START)
        await site.mirror.flushed()
        site.apply(ChangeSet((flag("lamp", 9),)))
    await site.equal()


async def test_a_change_that_is_being_written_at_the_end_is_not_lost(tmp_path):
    """Whether it arrived is not known, so it is written again."""
    with RedisServer(tmp_path) as server:
        async with Site(server, MirrorTimings(probe=60)) as site:
            site.tell(START)
            await site.mirror.flushed()
            server.pause()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: not site.mirror._pending)
            asyncio.get_running_loop().call_later(0.1, server.go_on)
        await site.equal()


async def test_a_database_that_hangs_does_not_hold_up_the_end(tmp_path):
    """The end takes no longer than the time that is allowed for it."""
    with RedisServer(tmp_path) as server:
        async with Site(server, MirrorTimings(finish=0.2)) as site:
            site.tell(START)
            await site.mirror.flushed()
            server.pause()
            site.apply(ChangeSet((flag("lamp", 9),)))
            begin = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begin < 2
        server.go_on()


def as_written(item, key: str) -> dict:
    value = json.loads(item)
    return {"tombstone": value["version"]} if value.get("deleted") else {"key": key, **value}


def assert_same(ours: dict, theirs: dict, step: str) -> None:
    """Our bytes are upstream's, so properties that the reference adds or drops may differ."""
    assert ours.keys() == theirs.keys(), step
    for field, value in ours.items():
        mine, recorded = as_written(value, field), as_written(theirs[field], field)
        assert ("tombstone" in mine) == ("tombstone" in recorded), (step, field)
        common = mine.keys() & recorded.keys() - {"fallthrough"}
        assert {k: mine[k] for k in common} == {k: recorded[k] for k in common}, (step, field)


UNLIKE_THE_REFERENCE = {
    # A put without segments is of an environment without segments, and so is what follows it.
    "put with flags only": {"segments": {}},
    "another writer changes a flag behind the relay's back; the relay then patches it with a lower"
    " version": {"segments": {}},
    # Row 21: it is noticed that the data are gone, and everything is written again.
    "the $inited marker and all data removed behind the relay's back, then a patch": None,
}


@pytest.mark.parametrize("recording", recorded(), ids=lambda recording: recording["name"])
async def test_recorded_contents(server, recording):
    """After each recorded message the database holds what the reference would have there."""
    prefix = recording["prefix"] or "launchdarkly"
    store = RedisStore(server.options(), recording["prefix"])
    site = Site(server, MirrorTimings(probe=60))
    await site.store.aclose()
    site.mirror = DatabaseMirror(store, "redis", site._refresh, LOG, MirrorTimings(probe=60))
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
            unlike = UNLIKE_THE_REFERENCE.get(name, {})
            if unlike is None:
                stored = await store.load()
                assert set(stored.payload) == set(site.payload), name
                continue
            for kind in ("features", "segments"):
                theirs = unlike.get(kind, expected.get(kind, {}))
                assert_same(
                    {k: v.decode() for k, v in server.hash(f"{prefix}:{kind}").items()},
                    theirs,
                    f"{name}: {kind}",
                )
            assert (server.do("GET", f"{prefix}:$inited") == b"") == expected["marked"], name
            assert server.hash("other:features") == {"foreign": b'{"key":"foreign","version":1}'}
    assert site.payload.get(Kind.FLAG, "zeta") is not None


async def test_a_database_is_found_again_while_upstream_is_lost(tmp_path):
    """Nobody writes to it, but it is no longer said to be away."""
    with RedisServer(tmp_path) as server:
        async with Site(server) as site:
            site.tell(START)
            await site.mirror.flushed()
            server.kill()
            site.apply(ChangeSet((flag("lamp", 9),)))
            await until(lambda: site.mirror.status.state is StoreState.INTERRUPTED)
            site.mirror.suspend()
            server.start()
            await until(lambda: site.mirror.status.state is StoreState.VALID)
            assert server.do("DBSIZE") == 0
