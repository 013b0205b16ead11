"""The part of an archive that belongs to one environment: somebody else reads the archive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from relay.model.payload import ChangeSet
from relay.sources import Interrupted, Update, UpToDate


class ArchiveSource:
    """Data source that yields what it is given; the newest of each kind of update counts."""

    protocol = ""

    def __init__(self) -> None:
        self._data: ChangeSet | None = None
        """The data given last: all of them."""
        self._waiting: ChangeSet | None = None
        """The data, until they are taken."""
        self._state: UpToDate | Interrupted | None = None
        """State of the archive since then, until it is taken."""
        self._given = asyncio.Event()

    def __repr__(self) -> str:
        items = "no data" if self._data is None else f"{len(self._data.items)} items"
        return f"<ArchiveSource {items}>"

    def give(self, update: Update) -> None:
        """Let the source yield an update soon; a change set has to be full."""
        if isinstance(update, ChangeSet):
            self._data = self._waiting = update
            self._state = None
        else:
            self._state = update
        self._given.set()

    def resync(self) -> None:
        """Yield all data again."""
        self._waiting = self._data
        self._given.set()

    def check(self, *, reconnect: bool = False) -> None:
        """Do nothing: whoever reads the archive looks at it all the time."""

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield all data, then what is given, until cancelled."""
        del basis  # archives have no names for their content
        self.resync()
        while True:
            await self._given.wait()
            self._given.clear()
            data, self._waiting = self._waiting, None
            state, self._state = self._state, None
            if data is not None:
                yield data
            if state is not None:
                yield state
