"""Stores and payloads for tests."""

from __future__ import annotations

import base64
import contextlib
import random
import sqlite3

import pytest

from relay import clock
from relay.events.memory import MemoryStore
from relay.events.sqlite import DiskStore
from relay.events.store import Limits
from relay.model.event import EventPayload, EventsEndpoint, Partition

PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
OTHER = Partition("test", EventsEndpoint.BULK, 4)
DIAGNOSTIC = Partition("prod", EventsEndpoint.BULK_DIAGNOSTIC)
LIMITS = Limits(memory=1024 * 1024)


def payload(number=0, partition=PARTITION, payload_id=None, received=None, size=0):
    noise = base64.b64encode(random.Random(number).randbytes(size))[:size]  # keeps its size on disk
    body = b'[{"n":%d,"x":"%s"}]' % (number, noise)
    own_id = f"id-{number}" if payload_id is None else payload_id
    return EventPayload(partition, own_id, body, clock.now() if received is None else received)


def in_memory(capacity=1024 * 1024, **limits):
    return MemoryStore(Limits(memory=capacity, **limits))


DATABASES: dict[DiskStore, sqlite3.Connection] = {}
"""The databases of the stores that `on_disk` has made."""


@contextlib.contextmanager
def recorded_connections():
    """The connections to databases that are opened in the block."""
    opened, connect = [], sqlite3.connect

    def recording(*arguments, **options):
        opened.append(connect(*arguments, **options))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", recording)
        yield opened


def on_disk(capacity=1024 * 1024, path=":memory:", **limits):
    with recorded_connections() as opened:
        store = DiskStore(str(path), Limits(disk=capacity, **limits))
    DATABASES[store] = opened[0]
    return store


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
    return DATABASES[store].execute("SELECT payload_id,reason,body FROM quarantine").fetchall()


DAY = 86400.0
