"""The store that falls back: nothing is lost or done twice while the disk fails and comes back."""

from __future__ import annotations

import logging

import pytest

from relay.events.fallback import FallbackStore
from relay.events.store import Limits
from tests.events.stores import LIMITS, PARTITION, payload


@pytest.fixture
def store(tmp_path):
    """A store whose file is open; it retries at once, but only when asked to reopen."""
    store = FallbackStore(tmp_path / "spool" / "events.db", LIMITS, retry=0.0)
    assert store.reopen() == []
    yield store
    store.close()


def add(store, *numbers):
    return store.perform(lambda: store.add([payload(number) for number in numbers]))


def take(store):
    return store.perform(lambda: store.take(PARTITION))


def fail(connections):
    """Let the file grow no more, as on a full disk."""
    connections[-1].execute("PRAGMA max_page_count=1")


def large(number):
    return payload(number, size=100_000)


def test_work_that_the_disk_refuses_is_done_in_memory(connections, store):
    """All of it, once; the file is opened again when that is asked for."""
    calls = []

    def work():
        calls.append(1)
        return store.add([large(1), large(2)])

    fail(connections)
    assert store.perform(work) == [True, True]
    assert len(calls) == 2
    assert "full" in store.outage
    assert take(store)[1] == [large(1).body, large(2).body]
    (backlog,) = store.reopen()
    assert (backlog.partition, backlog.payloads) == (PARTITION, 2)
    assert store.outage is None
    assert take(store)[1] == [large(1).body, large(2).body]


def test_an_error_that_is_not_the_disk_s_is_raised(store):
    """And nothing of its transaction is kept."""

    def work():
        store.add([payload(1)])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.perform(work)
    assert store.outage is None
    assert take(store) is None
    assert add(store, 1) == [True]


@pytest.mark.parametrize("change", ["finish", "split", "aside", "doubt", "quarantine"])
def test_a_change_of_a_batch_on_a_disk_that_fails_is_made_later(connections, store, change):
    """The caller gets the result that it will have."""
    add(store, *range(4))
    batch, _ = take(store)
    fail(connections)
    store.perform(lambda: store.add([large(9)]))
    work, expected = {
        "finish": (lambda: store.finish(batch), 4),
        "split": (lambda: store.split(batch), True),
        "aside": (lambda: store.put_aside(batch), True),
        "doubt": (lambda: store.mark_maybe_delivered(batch), True),
        "quarantine": (lambda: store.quarantine(batch, "malformed", [0, 1]), 2),
    }[change]
    assert store.perform(work) == expected
    assert store.reopen() is not None
    first, texts = take(store)
    if change in ("finish", "aside"):
        assert texts == [large(9).body]
    else:
        count = {"split": 2, "doubt": 4, "quarantine": 2}[change]
        assert first.payloads == count
        assert (first.payload_id == batch.payload_id) is (change != "split")


def test_a_batch_of_the_memory_may_be_on_its_way_when_the_disk_takes_over(connections, store):
    """So the first one of each partition is marked, and keeps its id."""
    fail(connections)
    store.perform(lambda: store.add([large(1), large(2)]))
    batch, _ = take(store)
    assert not batch.maybe_delivered
    store.reopen()
    moved, _ = take(store)
    assert moved == batch
    assert moved.maybe_delivered


def test_a_retry_is_recognised_though_the_disk_fails_meanwhile(connections, store):
    """An SDK sends a payload again that is on the disk; and once more when that is back."""
    assert store.perform(lambda: store.add([payload(1)])) == [True]
    fail(connections)
    assert store.perform(lambda: store.add([large(2)])) == [True]
    assert store.perform(lambda: store.add([payload(1), payload(3)])) == [False, True]
    (backlog,) = store.reopen()
    assert backlog.payloads == 3
    assert store.perform(lambda: store.add([payload(1), payload(3)])) == [False, False]


def test_what_came_while_the_file_was_in_use_is_taken_once(tmp_path):
    """Another process has it, so nobody knows what is in it; an SDK sends something again."""
    path = tmp_path / "events.db"
    former, store = (FallbackStore(path, LIMITS, retry=0.0) for _ in range(2))
    former.reopen()
    former.perform(lambda: former.add([payload(1)]))
    assert store.reopen() is None
    assert store.perform(lambda: store.add([payload(1), payload(2), payload(3)])) == [True] * 3
    former.close()
    (backlog,) = store.reopen()
    assert backlog.payloads == 3
    assert take(store)[1] == [payload(1).body, payload(2).body, payload(3).body]
    store.close()


def test_what_a_failed_transaction_evicted_is_not_counted(tmp_path):
    """It is still there."""
    limits = Limits(disk=150_000, memory=1 << 20)
    store = FallbackStore(tmp_path / "events.db", limits, retry=0.0)
    store.reopen()
    store.perform(lambda: store.add([large(1)]))

    def work():
        store.add([large(2)])  # evicts the first one
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.perform(work)
    assert not store.pop_evicted()
    assert take(store)[1] == [large(1).body]
    store.close()


def test_the_file_is_not_tried_again_before_its_time(tmp_path, caplog):
    """But when it is asked for; the outage is logged once."""
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the directory should be")
    store = FallbackStore(blocked / "events.db", LIMITS, retry=3600.0)
    with caplog.at_level(logging.INFO, "relay.events"):
        assert store.reopen() is None
        blocked.unlink()
        assert store.reopen() is None
        assert "File exists" in store.outage
        add(store, 1)
        store.retry_now()
        assert [left.payloads for left in store.reopen()] == [1]
        assert store.reopen() is None, "it is open already"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    store.close()


def test_a_damaged_file_is_replaced_at_once(tmp_path, caplog):
    """It is kept for people."""
    path = tmp_path / "events.db"
    path.write_bytes(b"this is no database, as anybody can see" * 100)
    store = FallbackStore(path, LIMITS, retry=3600.0)
    assert store.reopen() == []
    assert store.outage is None
    assert (tmp_path / "events.db.damaged").exists()
    assert "damaged" in caplog.text
    store.close()


def test_what_is_lost_with_the_memory_is_logged(connections, store, caplog):
    """At the end of a process whose disk still fails."""
    fail(connections)
    store.perform(lambda: store.add([large(1), large(2)]))
    store.close()
    assert "2 posts of events could not be delivered and are lost" in caplog.text


def test_a_debugger_shows_the_store_in_use(connections, store):
    """And the reason of an outage."""
    assert repr(store) == f"<FallbackStore: <DiskStore: 0 of {1024**3} bytes>, outage: None>"
    fail(connections)
    store.perform(lambda: store.add([large(1)]))
    assert "MemoryStore" in repr(store)
    assert "full" in repr(store)
