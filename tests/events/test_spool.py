"""The spool: durable when it says so, with stable batches, bounded, and never blocking the loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import logging
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay import clock
from relay.errors import StoreUnavailable
from relay.events import dedup as dedup_module
from relay.events.dedup import REMEMBERED
from relay.events.memory import MemoryStore
from relay.events.spool import MAX_QUEUED, Spool
from relay.events.sqlite import LONGEST_ABSENCE, DiskStore
from relay.events.store import MAX_BATCH, MAX_PAYLOADS, Limits, elements, fitting
from relay.model.event import EventPayload, EventsEndpoint, Partition
from tests.support.clocks import SystemClock

PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
OTHER = Partition("test", EventsEndpoint.BULK, 4)
DIAGNOSTIC = Partition("prod", EventsEndpoint.BULK_DIAGNOSTIC)
LIMITS = Limits(memory=1024 * 1024)
ROOT = Path(__file__).parent.parent.parent
ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
"""Number of times that a process is killed; more in the nightly run."""


def payload(number=0, partition=PARTITION, payload_id=None, received=None, size=0):
    noise = base64.b64encode(random.Random(number).randbytes(size))[:size]  # keeps its size on disk
    body = b'[{"n":%d,"x":"%s"}]' % (number, noise)
    own_id = f"id-{number}" if payload_id is None else payload_id
    return EventPayload(partition, own_id, body, clock.unix() if received is None else received)


@contextlib.asynccontextmanager
async def opened(directory, limits=LIMITS, retry=0.01):
    spool = Spool(directory, limits, retry)
    await spool.open()
    try:
        yield spool
    finally:
        await spool.close()


async def drained(spool, partition=PARTITION):
    """Take and finish everything; return the batches with their bodies."""
    batches = []
    while (taken := await spool.take(partition)) is not None:
        batches.append(taken)
        await spool.finish(taken[0])
    return batches


def bodies(batches):
    return [body for _, members in batches for body in members]


def in_memory(capacity=1024 * 1024, **limits):
    return MemoryStore(Limits(memory=capacity, **limits))


STORES: list[DiskStore] = []


def on_disk(capacity=1024 * 1024, **limits):
    STORES.append(DiskStore(":memory:", Limits(disk=capacity, **limits)))
    return STORES[-1]


@pytest.fixture(autouse=True)
def closing_stores():
    """Close what `on_disk` has opened."""
    yield
    while STORES:
        STORES.pop().close()


both = pytest.mark.parametrize("new_store", [in_memory, on_disk])
"""Both stores keep the same contract."""


def stored(store, *payloads):
    if isinstance(store, MemoryStore):
        return store.add(payloads)
    with store.transaction():
        return store.add(payloads)


def quarantined(store):
    if isinstance(store, MemoryStore):
        return [(each.batch.payload_id, each.reason, each.body) for each in store.rejected]
    return store._db.execute("SELECT payload_id,reason,body FROM quarantine").fetchall()


# Appending


@pytest.mark.parametrize("durable", [True, False])
async def test_appended_payloads_come_out_once_and_in_order(tmp_path, durable):
    """With and without a directory."""
    async with opened(tmp_path if durable else None) as spool:
        assert spool.durable is durable
        assert await asyncio.gather(*(spool.append(payload(n)) for n in range(250))) == [True] * 250
        batches = await drained(spool)
        assert bodies(batches) == [payload(n).body for n in range(250)]
        assert await spool.take(PARTITION) is None


async def test_unfinished_payloads_survive_a_restart(tmp_path):
    """Payloads, the fixed batch and the known ids survive; the backlog is reported."""
    async with opened(tmp_path) as spool:
        await asyncio.gather(*(spool.append(payload(n)) for n in range(3)))
        first, _ = await spool.take(PARTITION)
        await spool.append(payload(3))
        await spool.append(payload(4, OTHER))
    backlog = []
    spool = Spool(tmp_path, LIMITS)
    spool.on_backlog = backlog.extend
    await spool.open()
    assert {(left.partition, left.payloads) for left in backlog} == {(PARTITION, 4), (OTHER, 1)}
    assert not await spool.append(payload(1))
    batches = await drained(spool)
    assert [batch.payloads for batch, _ in batches] == [3, 1]
    assert batches[0][0].payload_id == first.payload_id
    await spool.close()


async def test_a_payload_alone_keeps_its_id_and_joined_ones_get_a_new_one():
    """So upstream recognises an SDK's own retry of a payload that was forwarded unchanged."""
    async with opened(None) as spool:
        await spool.append(payload(1))
        alone, _ = await spool.take(PARTITION)
        await spool.append(payload(2))
        assert (await spool.take(PARTITION))[0] == alone, "a fixed batch changed"
        await spool.finish(alone)
        await spool.append(payload(3))
        joined, _ = await spool.take(PARTITION)
        assert alone.payload_id == "id-1"
        assert joined.payloads == 2
        assert joined.payload_id not in {"id-2", "id-3"}


@both
def test_known_payload_ids_are_dropped_for_ten_minutes(new_store):
    """Only within an environment and endpoint; payloads without an id are always new."""
    store = new_store()
    now = time.time()
    assert stored(store, payload(1), payload(1), payload(1, OTHER), payload(2, payload_id="")) == [
        *(True, False, True, True)
    ]
    assert stored(store, payload(1), payload(2, payload_id="")) == [False, True]
    store.expire(now + REMEMBERED - 5)
    assert stored(store, payload(1)) == [False]
    store.expire(now + REMEMBERED + 5)
    assert stored(store, payload(1)) == [True]


def test_the_number_of_known_ids_is_bounded(monkeypatch):
    """A flood of ids costs the oldest of them, not memory."""
    monkeypatch.setattr(dedup_module, "MAX_REMEMBERED", 10)
    store = in_memory()
    now = time.time()
    stored(store, *(payload(n, received=now + n) for n in range(20)))
    assert len(store.recent.seen) <= 10
    assert stored(store, payload(9), payload(19)) == [True, False]


def test_a_failed_transaction_remembers_no_ids():
    """Its payloads come again, and are new."""
    store = on_disk()

    def fail():
        with store.transaction():
            assert store.add([payload(1)]) == [True]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stored(store, payload(1), payload(1)) == [True, False]
    assert store.take(PARTITION)[1] == [payload(1).body]


# Batches


@given(st.lists(st.integers(0, 2 * MAX_BATCH), min_size=1, max_size=20))
def test_a_batch_is_as_long_as_fits(sizes):
    """At least one payload; more only within the limit; all that fit."""
    count = fitting(sizes)
    assert 1 <= count <= len(sizes)
    assert count == 1 or sum(sizes[:count]) <= MAX_BATCH
    assert count == len(sizes) or sum(sizes[: count + 1]) > MAX_BATCH


@both
def test_batches_are_bounded_in_payloads_and_bytes(new_store):
    """And a batch says whether more payloads are waiting."""
    store = new_store(10 * MAX_BATCH)
    stored(store, *(payload(n) for n in range(MAX_PAYLOADS + 1)))
    batch, _ = store.take(PARTITION)
    assert (batch.payloads, batch.more) == (MAX_PAYLOADS, True)
    store.finish(batch)
    batch, _ = store.take(PARTITION)
    assert (batch.payloads, batch.more) == (1, False)
    store.finish(batch)
    stored(store, *(payload(5000 + n, size=MAX_BATCH // 2 - 100) for n in range(3)))
    assert store.take(PARTITION)[0].payloads == 2


@both
def test_diagnostics_travel_alone(new_store):
    """One payload per request, with any body."""
    store = new_store()
    stored(store, *(EventPayload(DIAGNOSTIC, "", b"hello", time.time()) for _ in range(3)))
    batch, texts = store.take(DIAGNOSTIC)
    assert (batch.payloads, texts) == (1, [b"hello"])
    assert store.split(batch) is False


@both
def test_halves_have_ids_derived_from_the_whole(new_store, monkeypatch):
    """Splitting the same batch again gives the same halves under the same ids."""
    monkeypatch.setattr("relay.events.store.randomness.new_id", lambda: "whole")
    found = []
    for _ in range(2):
        store = new_store()
        stored(store, *(payload(n) for n in range(5)))
        whole, _ = store.take(PARTITION)
        assert store.split(whole) is True
        halves = []
        while (taken := store.take(PARTITION)) is not None:
            halves.append((taken[0].payload_id, taken[1]))
            store.finish(taken[0])
        found.append(halves)
    assert found[0] == found[1]
    assert [len(texts) for _, texts in found[0]] == [2, 3]
    assert len({payload_id for payload_id, _ in found[0]} | {"whole"}) == 3


@both
@given(count=st.integers(1, 40))
def test_splitting_to_the_end_loses_no_element(new_store, count):
    """A payload that is too large alone is split by its elements, each sent once and in order."""
    store = new_store()
    texts = [b'{"n": %d.0}' % n for n in range(count)]
    stored(store, EventPayload(PARTITION, "big", b"[" + b" , ".join(texts) + b"]", 1.0))
    seen, ids, done = [], set(), 0
    while (taken := store.take(PARTITION)) is not None:
        if store.split(taken[0]):
            continue
        parts = elements(taken[1][0])
        assert len(parts) == 1, "a part of several elements can be split"
        assert taken[0].payload_id not in ids
        ids.add(taken[0].payload_id)
        seen += parts
        done += store.finish(taken[0])
    assert seen == texts
    assert done == 1, "the payload is complete when its last part is"


@pytest.mark.parametrize("body", [b"", b"{}", b"[", b"hello", b"\xff", b'["\xff"]'])
def test_a_body_that_is_no_array_has_no_elements(body):
    """It cannot be split, and nothing is raised."""
    parts = elements(body)
    assert parts is None or b"".join(parts) in body


@both
def test_the_rejected_go_to_quarantine_which_is_bounded(new_store):
    """Body, id and reason are kept; the oldest are deleted."""
    store = new_store(30_000)
    for n in range(40):
        stored(store, payload(n, size=1000))
        batch, _ = store.take(PARTITION)
        assert store.quarantine(batch, "HTTP error 400") == 1
    assert store.take(PARTITION) is None
    kept = quarantined(store)
    assert kept[-1] == ("id-39", "HTTP error 400", payload(39, size=1000).body)
    assert 15 < len(kept) < 30


@both
def test_suspects_come_last_or_first(new_store):
    """As requested; among themselves in the order in which they were put aside."""
    store = new_store()
    stored(store, *(payload(n) for n in range(4)))
    whole, _ = store.take(PARTITION)
    store.split(whole)
    one, texts = store.take(PARTITION)
    assert texts == [payload(0).body, payload(1).body]
    assert store.put_aside(one) is True
    assert store.take(PARTITION, suspects=True)[0] == one
    other, texts = store.take(PARTITION)
    assert texts == [payload(2).body, payload(3).body]
    assert store.put_aside(other) is False, "only suspects are left"
    assert store.take(PARTITION)[0] == one
    assert store.put_aside(one) is False
    assert store.take(PARTITION)[0] == other
    stored(store, payload(4))
    new, texts = store.take(PARTITION)
    assert texts == [payload(4).body]
    assert new.more
    assert store.finish(new) == 1
    assert [store.finish(each) for each in (one, other, one)] == [2, 2, None]
    assert store.put_aside(one) is None
    assert store.take(PARTITION) is None


@both
def test_parts_of_a_payload_can_be_put_aside(new_store):
    """The payload is complete when its last part is."""
    store = new_store()
    stored(store, EventPayload(PARTITION, "big", b"[1,2,3,4]", 1.0), payload(5))
    store.split(store.take(PARTITION)[0])
    store.split(store.take(PARTITION)[0])
    part, texts = store.take(PARTITION)
    assert texts == [b"[1,2]"]
    store.put_aside(part)
    found = []
    while (taken := store.take(PARTITION)) is not None:
        found.append((taken[1], store.finish(taken[0])))
    assert found == [([b"[3,4]"], 0), ([payload(5).body], 1), ([b"[1,2]"], 1)]


@both
def test_suspects_are_evicted_first(new_store):
    """They are the oldest."""
    store = new_store(10_000)
    stored(store, *(payload(n, size=1000) for n in range(4)))
    store.split(store.take(PARTITION)[0])
    first, _ = store.take(PARTITION)
    store.put_aside(first)
    stored(store, *(payload(n, size=1000) for n in range(4, 8)))
    assert store.evicted == Counter({"prod": 2})
    assert store.finish(first) is None
    assert store.take(PARTITION)[1] == [payload(n, size=1000).body for n in (2, 3)]


@both
def test_some_payloads_of_a_batch_can_be_quarantined(new_store):
    """The others keep its id."""
    store = new_store()
    stored(store, *(payload(n) for n in range(4)))
    batch, _ = store.take(PARTITION)
    assert store.quarantine(batch, "malformed", [0, 2]) == 2
    left, texts = store.take(PARTITION)
    assert (left.payload_id, texts) == (batch.payload_id, [payload(1).body, payload(3).body])
    assert [row[1:] for row in quarantined(store)] == [
        ("malformed", payload(n).body) for n in (0, 2)
    ]
    assert store.quarantine(left, "malformed", [0, 1]) == 2
    assert store.take(PARTITION) is None


# Time


DAY = 86400.0
MOMENTS = st.lists(
    st.one_of(
        st.just("append"),
        st.sampled_from(["expire", "take", "restart"]),
        st.floats(-20 * DAY, 20 * DAY),
    ),
    min_size=3,
    max_size=30,
)


@pytest.mark.parametrize("durable", [True, False], ids=["disk", "memory"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moments=MOMENTS)
@example(["append", 8 * DAY, "expire", "append", "restart", "expire"])
@example(
    ["append", -8 * DAY, "expire", "append", "restart", "expire", 8 * DAY, "restart", "expire"]
)
@example(["append", 600.0, *["restart"] * 5, "expire"])
@example([-8 * DAY, "restart", "append", "restart", 8 * DAY, "restart", "expire"])
def test_a_clock_that_jumps_loses_nothing(durable, moments):
    """Whatever it does during a process or between two, every waiting payload is delivered."""

    async def run(folder, system):
        directory = folder if durable else None
        spool, count, evicted = Spool(directory, LIMITS), 0, Counter()
        spool.on_evicted = evicted.update
        await spool.open()
        for moment in moments:
            if moment == "append":
                assert await spool.append(payload(count))
                count += 1
            elif moment == "expire":
                await spool._do(lambda store: store.expire(clock.now()))
            elif moment == "take":
                await spool.take(PARTITION)
            elif moment != "restart":
                system.correct(moment)
            elif durable:
                await spool.close()
                system.restart()
                spool = Spool(directory, LIMITS)
                spool.on_evicted = evicted.update
                await spool.open()
        for number in range(0 if "restart" in moments else count):
            assert not await spool.append(payload(number)), "an id is forgotten"
        assert bodies(await drained(spool)) == [payload(number).body for number in range(count)]
        await spool.close()
        assert not evicted

    with tempfile.TemporaryDirectory() as folder, SystemClock() as system:
        asyncio.run(run(Path(folder), system))


def test_time_goes_on_in_a_file_that_is_closed_but_not_for_long(tmp_path):
    """A restart counts in full, a longer absence as five minutes."""
    began = clock.now()
    ages = []
    with SystemClock() as system:
        for absence in (0.0, 100.0, 9 * DAY, 0.0, 0.0, -9 * DAY, 50.0):
            system.correct(absence)
            system.restart()
            store = DiskStore(str(tmp_path / "events.db"), LIMITS)
            if not ages:
                stored(store, payload(1, received=began))
            ages.append(round(clock.now() - store.backlog()[0].oldest, -1))
            store.close()
    jumped = 100 + LONGEST_ABSENCE
    assert ages == [0, 100, jumped, jumped, jumped, jumped, jumped + 50]


def test_a_week_of_running_evicts_a_payload_across_restarts(tmp_path, monkeypatch):
    """Each process adds the time for which it ran."""
    now, left = 1e9, []
    monkeypatch.setattr(clock, "now", lambda: now)
    for day in range(9):
        store = DiskStore(str(tmp_path / "events.db"), LIMITS)
        if day == 0:
            stored(store, payload(1, received=now + 1))
        now += DAY
        with store.transaction():
            store.expire(now)
        left.append(len(store.backlog()))
        store.close()
    assert left == [1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_a_file_of_an_earlier_release_is_read(tmp_path):
    """Its payloads, batches and known ids, though its clock was wrong."""
    path = tmp_path / "events.db"
    long_ago = time.time() - 30 * DAY
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executescript(
            "CREATE TABLE lanes (id INTEGER PRIMARY KEY, environment TEXT NOT NULL,"
            " endpoint TEXT NOT NULL, schema INTEGER NOT NULL, tags TEXT NOT NULL,"
            " wrapper TEXT NOT NULL, UNIQUE (environment, endpoint, schema, tags, wrapper));"
            "CREATE TABLE posts (id INTEGER PRIMARY KEY, lane INTEGER NOT NULL, size INTEGER"
            " NOT NULL, length INTEGER NOT NULL, received REAL NOT NULL, payload_id TEXT NOT NULL,"
            " body BLOB NOT NULL);"
            "CREATE TABLE batches (id INTEGER PRIMARY KEY, lane INTEGER NOT NULL,"
            " first INTEGER NOT NULL, last INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER,"
            " payload_id TEXT NOT NULL);"
            "PRAGMA user_version=2;"
            "INSERT INTO lanes VALUES (1,'prod','BULK',4,'','');"
        )
        for number in (1, 2):
            body = gzip.compress(payload(number).body)
            row = (number, 1, 300, len(payload(number).body), long_ago, f"id-{number}", body)
            old.execute("INSERT INTO posts VALUES (?,?,?,?,?,?,?)", row)
        old.execute("INSERT INTO batches VALUES (1,1,1,1,0,NULL,'id-1')")
    store = DiskStore(str(path), LIMITS)
    with store.transaction():
        store.expire(clock.now())
    assert not store.evicted
    first, texts = store.take(PARTITION)
    assert (first.payload_id, texts) == ("id-1", [payload(1).body])
    assert store.put_aside(first)
    assert store.take(PARTITION)[1] == [payload(2).body]
    assert store.take(PARTITION, suspects=True)[0] == first
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as file:
        (version,) = file.execute("PRAGMA user_version").fetchone()
    assert version == 2, "an earlier release can read it, too"


# Bounds


@both
def test_a_full_store_evicts_the_oldest_and_counts_them(new_store):
    """A batch is evicted as a whole, as it never changes."""
    store = new_store(10_000)
    stored(store, *(payload(n, size=1000) for n in range(6)))
    fixed, _ = store.take(PARTITION)
    assert fixed.payloads == 6
    stored(store, *(payload(n, OTHER, size=1000) for n in range(4)))
    assert store.evicted == Counter({"prod": 6})
    assert store.take(PARTITION) is None
    assert store.finish(fixed) is None
    assert store.take(OTHER)[0].payloads == 4


@both
def test_old_payloads_are_evicted_diagnostics_sooner(new_store):
    """Each at its age; the young stay."""
    store = new_store(age=1000, diagnostic_age=100)
    stored(
        store,
        *(payload(1, received=0), payload(2, received=900)),
        *(payload(3, DIAGNOSTIC, received=0), payload(4, DIAGNOSTIC, received=190)),
    )
    store.expire(200)
    assert store.evicted == Counter({"prod": 1})
    assert store.take(DIAGNOSTIC)[1] == [payload(4).body]
    store.expire(1100)
    assert store.evicted == Counter({"prod": 3})
    assert store.take(PARTITION)[1] == [payload(2).body]


async def test_evictions_are_reported():
    """The callback gets the number of evicted payloads by environment."""
    async with opened(None, Limits(memory=5000)) as spool:
        evicted = Counter()
        spool.on_evicted = evicted.update
        await asyncio.gather(*(spool.append(payload(n, size=1000)) for n in range(20)))
        left = await drained(spool)
        assert evicted["prod"] + len(bodies(left)) == 20
        assert bodies(left)[-1] == payload(19, size=1000).body


def test_unused_space_is_returned(tmp_path):
    """After a long outage of upstream the file shrinks again."""
    store = DiskStore(str(tmp_path / "events.db"), LIMITS)
    stored(store, *(payload(n, size=50_000) for n in range(200)))
    while (taken := store.take(PARTITION)) is not None:
        with store.transaction():
            store.finish(taken[0])
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / "events.db").stat().st_size
    for _ in range(3):
        with store.transaction():
            store.expire(time.time())
        store.shrink()
    store.close()
    assert (tmp_path / "events.db").stat().st_size < before / 10


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 30), st.sampled_from([PARTITION, OTHER, DIAGNOSTIC])
        ),
        st.tuples(
            st.sampled_from(["take", "suspect", "finish", "split", "aside", "reject", "exclude"]),
            *(st.none(), st.none()),
        ),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_memory_and_disk_do_the_same(actions):
    """For any sequence of actions; and the disk then takes over the whole content of the memory."""
    memory, disk, moved = in_memory(), on_disk(), on_disk()
    last = {}
    for action in actions:
        assert _done(memory, *action, last) == _done(disk, *action, last)
    assert set(memory.backlog()) == set(disk.backlog())
    moved.receive(memory)
    for partition in (PARTITION, OTHER, DIAGNOSTIC):
        assert _emptied(moved, partition) == _emptied(disk, partition)
    assert [row[1:] for row in quarantined(moved)] == [row[1:] for row in quarantined(disk)]


def _done(store, action, count, partition, last):
    """Return the result of an action, but for ids."""
    if action == "add":
        return stored(store, *(payload(n, partition, received=n) for n in range(count)))
    if action in ("take", "suspect"):
        batch, texts = store.take(PARTITION, suspects=action == "suspect") or (None, [])
        last[store] = batch
        return batch and (batch.payloads, batch.oldest, batch.more, texts)
    batch = last.get(store)
    if batch is None:
        return None
    if action == "exclude":
        last[store] = None
        return store.quarantine(batch, "malformed", range(0, batch.payloads, 2))
    if action == "reject":
        return store.quarantine(batch, "HTTP error 400")
    actions = {"aside": store.put_aside, "finish": store.finish, "split": store.split}
    return actions[action](batch)


def _emptied(store, partition):
    found = []
    while (taken := store.take(partition)) is not None:
        found.append((taken[0].payloads, taken[1], store.finish(taken[0])))
    return found


# Failures


async def test_a_directory_that_cannot_be_made_is_logged_once(tmp_path, caplog):
    """Events wait in memory, and move to the disk when it works."""
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the directory should be")
    with caplog.at_level(logging.INFO, "relay.events"):
        async with opened(blocked) as spool:
            assert await spool.append(payload(1))
            batch, _ = await spool.take(PARTITION)
            await asyncio.gather(*(spool.append(payload(n)) for n in range(2, 5)))
            assert not spool.durable
            assert "File exists" in spool.outage
            blocked.unlink()
            while not spool.durable:
                await spool.append(payload(0, payload_id=""))
            assert (await spool.take(PARTITION))[0].payload_id == batch.payload_id
            assert await spool.finish(batch) == 1
            assert not await spool.append(payload(3)), "known ids move, too"
    texts = [record.getMessage() for record in caplog.records]
    assert [text for text in texts if "memory only" in text] == [texts[0]]
    assert texts[1] == "Events are kept on disk again"
    async with opened(blocked) as spool:
        assert bodies(await drained(spool))[:3] == [payload(n).body for n in range(2, 5)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can make a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_full_disk_loses_no_accepted_payload(small_disk, caplog):
    """Payloads go to memory, finished batches are removed later, and the disk takes all over."""
    with caplog.at_level(logging.INFO, "relay.events"):
        async with opened(small_disk / "spool", Limits(memory=4 << 20)) as spool:
            await spool.append(payload(0))
            batch, _ = await spool.take(PARTITION)
            ballast = small_disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass
            spool._retry = 3600
            for n in range(1, 100):
                assert await spool.append(payload(n, size=5000))
            assert not spool.durable
            assert await spool.finish(batch) == 1
            ballast.unlink()
            spool._try_at = 0.0
            assert await spool.append(payload(100))
            assert spool.durable
            found = bodies(await drained(spool))
    assert Counter(found) == Counter(
        [payload(n, size=5000).body for n in range(1, 100)] + [payload(100).body]
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_write_that_fails_moves_to_memory_and_back(tmp_path, monkeypatch, caplog):
    """As on a full disk: SQLite may not let its file grow."""
    with caplog.at_level(logging.INFO, "relay.events"):
        async with opened(tmp_path) as spool:
            backlogs = []
            spool.on_backlog = backlogs.append
            await spool.append(payload(0))
            batch, _ = await spool.take(PARTITION)
            await spool.append(payload(1))
            spool._retry = 3600
            spool._disk._db.execute("PRAGMA max_page_count=1")
            assert await spool.append(payload(2, size=100_000))
            assert not spool.durable
            assert "full" in spool.outage
            # The batch of the disk is delivered meanwhile; the partition continues with the memory.
            assert await spool.finish(batch) == 1
            taken = await spool.take(PARTITION)
            assert taken[1] == [payload(2, size=100_000).body]
            spool._try_at = 0.0
            await spool.append(payload(3))
            assert spool.durable
            assert spool.outage is None
            assert [left.payloads for left in backlogs[0]] == [2]
            # The content of the disk, then the batch that was fixed in memory.
            assert sorted(bodies(await drained(spool))) == sorted(
                payload(n, size=100_000 if n == 2 else 0).body for n in (1, 2, 3)
            )
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_damaged_file_is_set_aside(tmp_path, caplog):
    """It is kept for people; a new one takes its place at once."""
    (tmp_path / "events.db").write_bytes(b"this is no database, as anybody can see" * 100)
    async with opened(tmp_path) as spool:
        assert await spool.append(payload(1))
        assert spool.durable
    assert (tmp_path / "events.db.damaged").read_bytes().startswith(b"this is no database")
    assert "damaged" in caplog.text


async def test_a_file_of_another_release_is_left_alone(tmp_path, caplog):
    """Its events wait for the release that can read them."""
    with contextlib.closing(sqlite3.connect(tmp_path / "events.db")) as other:
        other.execute("PRAGMA user_version=99")
    before = (tmp_path / "events.db").read_bytes()
    async with opened(tmp_path) as spool:
        assert await spool.append(payload(1))
        assert not spool.durable
    assert (tmp_path / "events.db").read_bytes() == before
    assert "another release" in caplog.text


def test_a_damaged_payload_is_found_by_its_checksum(caplog):
    """It is counted as lost; the rest of its batch keeps the id."""
    store = on_disk()
    stored(store, payload(1), payload(2), payload(3))
    fixed, _ = store.take(PARTITION)
    store._db.execute("UPDATE posts SET body=x'5b375d' WHERE payload_id='id-2'")
    batch, texts = store.take(PARTITION)
    assert batch.payload_id == fixed.payload_id
    assert texts == [payload(1).body, payload(3).body]
    assert store.evicted == Counter({"prod": 1})
    assert "damaged 1 of 3" in caplog.text
    store._db.execute("UPDATE posts SET body=x'5b375d' WHERE payload_id='id-1'")
    assert store.take(PARTITION)[1] == [payload(3).body]
    assert store.split(batch) is False, "one payload of one element is left"
    store._db.execute("UPDATE posts SET body=x'5b375d'")
    assert store.take(PARTITION) is None


async def test_a_second_process_on_the_same_file_works_in_memory(tmp_path):
    """Two relays cannot deliver the same events."""
    async with opened(tmp_path) as first, opened(tmp_path) as second:
        assert await first.append(payload(1))
        assert await second.append(payload(2))
        assert first.durable
        assert not second.durable
        assert "locked" in second.outage
        assert bodies(await drained(first)) == [payload(1).body]


async def test_only_the_owner_can_read_the_files(tmp_path):
    """The directory and the files have private permissions."""
    async with opened(tmp_path / "new" / "spool") as spool:
        await spool.append(payload(1))
        folder = tmp_path / "new" / "spool"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


async def test_a_disk_that_hangs_blocks_nothing(tmp_path, monkeypatch):
    """The loop continues, waiting payloads are bounded, and the shutdown is in time."""
    monkeypatch.setattr("relay.events.spool.CLOSE_LIMIT", 0.05)
    freed = threading.Event()
    spool = Spool(tmp_path, LIMITS)
    await spool.open()
    spool._do(lambda _: freed.wait(60))
    big = EventPayload(PARTITION, "", b"x" * (MAX_QUEUED // 4), 1.0)
    waiting = [spool.append(big) for _ in range(4)]
    with pytest.raises(StoreUnavailable):
        spool.append(payload(1))
    started = time.monotonic()
    await spool.close()
    assert time.monotonic() - started < 1
    assert not any(each.done() for each in waiting)
    freed.set()
    await asyncio.gather(*waiting)
    await spool._closed


async def test_an_unexpected_error_reaches_its_caller_only():
    """The spool continues to work."""
    async with opened(None) as spool:
        with pytest.raises(ZeroDivisionError):
            await spool._do(lambda _: 1 / 0)
        assert await spool.append(payload(1))
        assert bodies(await drained(spool)) == [payload(1).body]


async def test_a_cancelled_append_keeps_its_payload():
    """A payload is stored even if its sender is gone."""
    async with opened(None) as spool:
        spool.append(payload(1)).cancel()
        await spool.append(payload(2))
        assert bodies(await drained(spool)) == [payload(1).body, payload(2).body]


async def test_one_synchronisation_serves_many_payloads(tmp_path):
    """Payloads that arrive together share transactions."""
    async with opened(tmp_path) as spool:
        commits = []
        spool._disk._db.set_trace_callback(lambda sql: sql == "COMMIT" and commits.append(sql))
        await asyncio.gather(*(spool.append(payload(n)) for n in range(1000)))
        assert len(commits) < 50


@both
def test_a_debugger_shows_how_full_a_store_is(new_store):
    """Its size and its capacity in bytes; no bodies."""
    store = new_store(5000)
    stored(store, payload(1, size=100))
    (size,) = {int(word) for word in repr(store).split() if word.isdigit()} - {5000, 1}
    assert 256 < size < 5000
    assert f"Store: {size} of 5000 bytes" in repr(store)
    assert repr(store.recent) == "<DedupWindow: 1 keys>"


async def test_a_debugger_shows_the_spool_s_file_and_outage(tmp_path):
    """The reason of an outage, or None."""
    assert repr(Spool(None, LIMITS)) == "<Spool: memory, outage: None>"
    (tmp_path / "events").write_text("a file in place of the folder")
    spool = Spool(tmp_path / "events", LIMITS)
    await spool.open()
    assert repr(spool) == f"<Spool: {tmp_path}/events/events.db, outage: {spool.outage}>"
    assert spool.outage
    await spool.close()


CHILD = """
import asyncio, sys, time
from pathlib import Path
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.events.store import Limits
from relay.events.spool import Spool

async def main():
    spool = Spool(Path(sys.argv[1]), Limits())
    await spool.open()
    partition = Partition("prod", EventsEndpoint.BULK, 4)
    async def client(name):
        for n in range(10**6):
            text = f"{sys.argv[2]}-{name}-{n}"
            body = b'["%s"]' % text.encode()
            await spool.append(EventPayload(partition, text, body, time.time()))
            print(text, flush=True)
    async def deliver():
        while True:
            if taken := await spool.take(partition):
                for body in taken[1]:
                    print("sent", taken[0].payload_id, body.decode(), flush=True)
                await spool.finish(taken[0])
            await asyncio.sleep(0.005)
    await asyncio.gather(deliver(), *(client(c) for c in range(8)))

asyncio.run(main())
"""


async def test_kill_9_loses_no_acknowledged_payload(tmp_path):
    """All acknowledged payloads come out, once or under one id."""
    acknowledged, sent = set(), {}

    def note(payload_id, text):
        sent.setdefault(text, set()).add(payload_id)

    for round_ in range(ROUNDS):
        with (tmp_path / "out").open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", CHILD, tmp_path / "spool", str(round_)),
                cwd=ROOT,
                stdout=out,
            )
            while (tmp_path / "out").stat().st_size < 4000 * (round_ % 10 + 1):
                await asyncio.sleep(0.005)
                assert process.returncode is None
            process.kill()
            await process.wait()
        for line in (tmp_path / "out").read_text().splitlines(keepends=True):
            words = line.split()
            if not line.endswith("\n"):
                continue
            if words[0] == "sent":
                note(words[1], words[2])
            else:
                acknowledged.add(f'["{words[0]}"]')
    async with opened(tmp_path / "spool") as spool:
        for batch, texts in await drained(spool):
            for text in texts:
                note(batch.payload_id, text.decode())
    assert len(acknowledged) > 30 * ROUNDS
    assert acknowledged <= set(sent)
    assert {len(ids) for ids in sent.values()} == {1}
