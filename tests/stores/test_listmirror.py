"""The mirror of the list of environments: it tries again, tells outages once, and ends in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from relay.backoff import Backoff
from relay.errors import InvalidData, StoreUnavailable
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.listmirror import ListMirror, ListTimings
from tests.support.environments import description
from tests.support.serving import until

LOG = logging.getLogger("relay.autoconfig")
FAST = ListTimings(gather=0.0, retry=Backoff(0.001, 0.001), finish=5.0)
AT_THE_END = ListTimings(gather=3600.0, finish=5.0)
LIST = EnvironmentList({"id-alpha": describe(description())}, {}, 5.0)


class Store:
    """A place for a list that fails when the test says so."""

    label = "file /x"

    def __init__(self) -> None:
        self.content: EnvironmentList | Exception | None = None
        self.failure: Exception | None = None
        self.hangs = False
        self.attempts = 0
        self.closed = False

    async def load(self) -> EnvironmentList | None:
        await self._fail()
        if isinstance(self.content, Exception):
            raise self.content
        return self.content

    async def save(self, environments: EnvironmentList) -> None:
        await self._fail()
        self.content = environments

    async def aclose(self) -> None:
        self.closed = True

    async def _fail(self) -> None:
        self.attempts += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure


@asynccontextmanager
async def running(mirror: ListMirror, content: EnvironmentList = LIST) -> AsyncIterator[None]:
    task = asyncio.create_task(mirror.run(lambda: content))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_store_that_cannot_be_read_is_tried_again(caplog):
    """Until it can; one line tells of the begin, and one of the end."""
    caplog.set_level(logging.INFO)
    store, mirror = (s := Store()), ListMirror(s, LOG, FAST)
    store.content, store.failure = LIST, StoreUnavailable("no answer")
    loading = asyncio.create_task(mirror.load(asyncio.Event()))
    await until(lambda: store.attempts > 5)
    store.failure = None
    assert await loading is LIST
    assert [record.getMessage() for record in caplog.records] == [
        "The stored list of environments (file /x) cannot be read: no answer; trying again",
        "The stored list of environments (file /x) can be used again",
    ]


async def test_nobody_waits_for_a_list_that_is_not_needed_any_more():
    """Once LaunchDarkly has delivered."""
    store, known = Store(), asyncio.Event()
    store.failure = StoreUnavailable("no answer")
    loading = asyncio.create_task(ListMirror(store, LOG, AT_THE_END).load(known))
    await until(lambda: store.attempts > 0)
    known.set()
    assert await loading is None


async def test_an_unusable_list_has_one_line(caplog):
    """It is not tried again: only the next write makes it better."""
    store = Store()
    store.content = InvalidData("file", "it has been altered")
    assert await ListMirror(store, LOG, FAST).load(asyncio.Event()) is None
    store.content = EnvironmentList(LIST.environments, {}, 5.0, {"env:b": "odd", "env:c": "odd"})
    assert await ListMirror(store, LOG, FAST).load(asyncio.Event()) is store.content
    assert [record.getMessage() for record in caplog.records] == [
        "The stored list of environments (file /x) is not used: it has been altered",
        "The stored list of environments (file /x): 2 of its entries are not used; env:b: odd",
    ]


async def test_a_write_that_fails_is_tried_again(caplog):
    """One line tells of the begin, and one of the end."""
    caplog.set_level(logging.INFO)
    store, mirror = (s := Store()), ListMirror(s, LOG, FAST)
    async with running(mirror):
        store.failure = StoreUnavailable("No space left on device")
        mirror.update()
        await until(lambda: store.attempts > 5)
        store.failure = None
        await until(lambda: store.content is LIST)
        attempts = store.attempts
        mirror.update()
        await until(lambda: store.attempts > attempts)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_the_last_change_is_written_at_the_end():
    """Even if it was waiting for others."""
    store, mirror = (s := Store()), ListMirror(s, LOG, AT_THE_END)
    async with running(mirror):
        mirror.update()
        await asyncio.sleep(0)
    assert store.content is LIST
    assert store.attempts == 1
    assert store.closed


async def test_a_store_that_hangs_does_not_keep_the_relay_from_ending():
    """Nor does a write that has begun: it is begun once more, within the limit."""
    store = Store()
    mirror = ListMirror(store, LOG, ListTimings(gather=0.0, finish=0.01))
    store.hangs = True
    async with running(mirror):
        mirror.update()
        await until(lambda: store.attempts == 1)
    assert store.attempts == 2
    assert store.content is None
