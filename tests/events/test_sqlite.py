"""The store on disk: its file, its clock, and what survives a process."""

from __future__ import annotations

import contextlib
import gzip
import sqlite3
import time
from collections import Counter

import pytest

from relay import clock
from relay.events.sqlite import LONGEST_ABSENCE, DiskStore
from tests.events.stores import (
    DATABASES,
    DAY,
    LIMITS,
    PARTITION,
    on_disk,
    payload,
    stored,
)
from tests.support.clocks import SystemClock


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


def test_any_batch_of_an_earlier_process_may_have_been_delivered(tmp_path):
    """Nothing is written when a batch is sent."""
    for earlier in (False, True):
        store = DiskStore(str(tmp_path / "events.db"), LIMITS)
        if not earlier:
            stored(store, payload(1))
        with store.transaction():
            batch, _ = store.take(PARTITION)
        assert batch.maybe_delivered is earlier
        store.close()


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
    assert first.maybe_delivered
    assert store.put_aside(first)
    assert store.take(PARTITION)[1] == [payload(2).body]
    assert store.take(PARTITION, suspects=True)[0] == first
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as file:
        (version,) = file.execute("PRAGMA user_version").fetchone()
    assert version == 2, "an earlier release can read it, too"


def test_unused_space_is_returned(tmp_path):
    """After a long outage of upstream the file shrinks again."""
    store = on_disk(path=tmp_path / "events.db", capacity=1 << 30)
    stored(store, *(payload(n, size=50_000) for n in range(200)))
    while (taken := store.take(PARTITION)) is not None:
        with store.transaction():
            store.finish(taken[0])
    DATABASES[store].execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = (tmp_path / "events.db").stat().st_size
    for _ in range(3):
        with store.transaction():
            store.expire(time.time())
    store.close()
    assert (tmp_path / "events.db").stat().st_size < before / 10


def test_a_damaged_payload_is_found_by_its_checksum(caplog):
    """It is counted as lost; the rest of its batch keeps the id."""
    store = on_disk()
    stored(store, payload(1), payload(2), payload(3))
    fixed, _ = store.take(PARTITION)
    DATABASES[store].execute("UPDATE posts SET body=x'5b375d' WHERE payload_id='id-2'")
    batch, texts = store.take(PARTITION)
    assert batch.payload_id == fixed.payload_id
    assert texts == [payload(1).body, payload(3).body]
    assert store.evicted == Counter({"prod": 1})
    assert "damaged 1 of 3" in caplog.text
    DATABASES[store].execute("UPDATE posts SET body=x'5b375d' WHERE payload_id='id-1'")
    assert store.take(PARTITION)[1] == [payload(3).body]
    assert store.split(batch) is False, "one payload of one element is left"
    DATABASES[store].execute("UPDATE posts SET body=x'5b375d'")
    assert store.take(PARTITION) is None
