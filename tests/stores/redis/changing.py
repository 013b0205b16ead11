"""Data that change all the time, and a mirror that follows: for databases that fail meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from relay.backoff import Backoff
from relay.config.schema import Redis as RedisOptions
from relay.errors import StoreUnavailable
from relay.model.payload import ChangeSet, Payload
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from tests.stores.contract import flag, segment

LOG = logging.getLogger("relay.env.test")
TIMINGS = MirrorTimings(probe=0.1, compare=0.5, retry=Backoff(0.05, 0.2), finish=1.0)
PATIENCE = 30.0
"""Seconds in which a database heals and is up to date again."""

START = Payload.of([flag("lamp", 1), segment("crowd", 1)])


class Upstream:
    """Changes flags, and lets a mirror follow.

    Args:
        mirror: of the database.
    """

    def __init__(self, mirror: DatabaseMirror) -> None:
        self.mirror = mirror
        self.payload = START
        self.writes = asyncio.Event()
        self.writes.set()
        mirror.update(START, None, full=True)

    async def run(self) -> None:
        """Bring a new version of one item after the other."""
        for version in range(2, 100_000):
            await self.writes.wait()
            make = random.choice((flag, segment))
            items = (make(f"k{version % 7}", version), flag("lamp", version))
            self.payload, change = self.payload.apply(ChangeSet(items))
            self.mirror.update(self.payload, change)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def changing(options: RedisOptions, prefix: str) -> AsyncIterator[Upstream]:
    """Keep a database up to date with data that change, and see that no version goes back.

    At the end the database has what upstream has, or it is a failure.
    """
    store, seen = (data_store(connect(options), prefix) for _ in range(2))
    async with aclosing(store), aclosing(seen):
        upstream = Upstream(DatabaseMirror(store, "redis", lambda: None, LOG, TIMINGS))

        async def watch() -> None:
            newest: dict = {}
            while True:
                with contextlib.suppress(StoreUnavailable):
                    for key, version in (await seen.versions() or {}).items():
                        assert version.number >= newest.get(key, 0)
                        newest[key] = version.number
                await asyncio.sleep(0.01)

        writing = asyncio.create_task(upstream.mirror.run())
        tasks = [writing, asyncio.create_task(upstream.run()), asyncio.create_task(watch())]
        try:
            await upstream.mirror.flushed()
            yield upstream
            async with asyncio.timeout(PATIENCE):
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        upstream.writes.clear()
                        stored = await seen.load()
                        if stored and set(stored.payload) == set(upstream.payload):
                            break
                    await asyncio.sleep(0.02)
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)


def logged(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOG.name]
