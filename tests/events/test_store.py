"""The contract of event stores: stable batches, bounded, in memory and on disk alike."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.events import dedup as dedup_module
from relay.events.dedup import REMEMBERED
from relay.events.store import MAX_BATCH, MAX_PAYLOADS, elements, fitting
from relay.model.event import EventPayload
from tests.events.stores import (
    DIAGNOSTIC,
    OTHER,
    PARTITION,
    both,
    in_memory,
    on_disk,
    payload,
    quarantined,
    stored,
)


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


@both
def test_a_batch_may_have_been_delivered_once_that_is_recorded(new_store):
    """Not its halves, which were never sent."""
    store = new_store()
    stored(store, *(payload(n) for n in range(4)))
    batch, _ = store.take(PARTITION)
    assert not batch.maybe_delivered
    assert store.mark_maybe_delivered(batch) is True
    batch, _ = store.take(PARTITION)
    assert batch.maybe_delivered
    store.split(batch)
    half, _ = store.take(PARTITION)
    assert not half.maybe_delivered
    assert store.mark_maybe_delivered(batch) is None


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


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(0, 30), st.sampled_from([PARTITION, OTHER, DIAGNOSTIC])
        ),
        st.tuples(
            st.sampled_from(
                ["take", "suspect", "finish", "split", "aside", "doubt", "reject", "exclude"]
            ),
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
    moved.receive(memory.export())
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
        return batch and (
            *(batch.payloads, batch.oldest, batch.more, batch.maybe_delivered),
            texts,
        )
    batch = last.get(store)
    if batch is None:
        return None
    if action == "exclude":
        last[store] = None
        return store.quarantine(batch, "malformed", range(0, batch.payloads, 2))
    if action == "reject":
        return store.quarantine(batch, "HTTP error 400")
    actions = {
        "aside": store.put_aside,
        "doubt": store.mark_maybe_delivered,
        "finish": store.finish,
        "split": store.split,
    }
    return actions[action](batch)


def _emptied(store, partition):
    found = []
    while (taken := store.take(partition)) is not None:
        found.append((taken[0].payloads, taken[1], store.finish(taken[0])))
    return found


@both
def test_a_debugger_shows_how_full_a_store_is(new_store):
    """Its size and its capacity in bytes; no bodies."""
    store = new_store(5000)
    stored(store, payload(1, size=100))
    (size,) = {int(word) for word in repr(store).split() if word.isdigit()} - {5000, 1}
    assert 256 < size < 5000
    assert f"Store: {size} of 5000 bytes" in repr(store)
    assert repr(store.recent) == "<DedupWindow: 1 keys>"
