"""Small real implementations of our contracts, driven by a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from relay.model.payload import Change, Payload
from relay.sources import Update
from relay.stores import Key, Stored, StoreStatus


class ScriptedSource:
    """A data source that yields what the test gives it."""

    protocol = ""

    def __init__(self) -> None:
        self._updates: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self.running = asyncio.Semaphore(0)
        """Released each time that somebody begins to listen."""
        self.bases: list[str] = []
        """The basis of each."""
        self.refreshed = 0
        self.looked: list[bool] = []
        """Hints that came, each with its doubt."""
        self.ended = 0

    async def give(self, *updates: Update | Exception) -> None:
        """Deliver updates and return when the last has been dealt with."""
        for update in updates:
            self._updates.put_nowait(update)
        await self._updates.join()

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        self.bases.append(basis)
        self.running.release()
        try:
            while True:
                update = await self._updates.get()
                try:
                    if isinstance(update, Exception):
                        raise update
                    yield update
                finally:
                    self._updates.task_done()
        finally:
            self.ended += 1

    def resync(self) -> None:
        self.refreshed += 1

    def check(self, *, reconnect: bool = False) -> None:
        self.looked.append(reconnect)


class RecordingHub:
    """A hub that records the changes that an environment publishes."""

    def __init__(self) -> None:
        self.published: list[tuple[Payload | None, Change]] = []

    def publish(self, payload: Payload | None, change: Change, since: float | None = None) -> None:
        self.published.append((payload, change))

    def confirm(self, payload: Payload) -> None:
        pass

    def interrupt(self, *, refused: bool) -> None:
        pass


class MemoryMirror:
    """A copy that is loaded when the test says so, and that records what it is told."""

    has_journal = False

    def __init__(self) -> None:
        self.loading: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()
        self.told: list[Change | str | None] = []
        self.status: StoreStatus | None = None
        self.ended = 0

    async def load(self) -> Stored | None:
        return await self.loading

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        del payload, full, unusable
        self.told.append(change)

    def suspend(self) -> None:
        self.told.append("hold")

    async def flushed(self) -> None:
        assert self.told

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1
