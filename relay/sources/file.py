"""A flags file on disk, read again whenever it changes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from relay.aio import wait_for
from relay.backoff import SourceTimings
from relay.errors import ErrorKind, InvalidData
from relay.model.item import Item, Kind, version_of_time
from relay.model.payload import ChangeSet
from relay.protocol import filedata
from relay.reasons import describe
from relay.sources import Interrupted, Update, UpToDate

MAX_FILE = 128 * 1024 * 1024
"""Bytes: as much as upstream may send at once."""

Mark = tuple[int, int, int]
"""Time of the last change, size, and inode, because editors replace files."""


class FileSource:
    """An environment's data from a file in the SDKs' file-data format.

    A file that cannot be used changes nothing; that is said once for each state of the file.

    Args:
        path: of the file; need not exist yet.
        times: waiting times.
    """

    def __init__(self, path: Path, times: SourceTimings = SourceTimings()) -> None:  # noqa: B008 - frozen
        self._path = path
        self._times = times
        self._again = asyncio.Event()
        self._items: dict[tuple[Kind, str], Item] = {}

    def resync(self) -> None:
        """Read the file now."""
        self._again.set()

    def check(self, *, reconnect: bool = False) -> None:
        """Read the file now."""
        del reconnect  # what a file holds is never late
        self._again.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield all data when the file has changed, and how it stands, until cancelled."""
        seen: Mark | str | None = "nothing yet"
        good, told = False, 0.0
        while True:
            forced = self._again.is_set()
            self._again.clear()
            mark = await asyncio.to_thread(_mark, self._path)
            if forced or mark != seen:
                seen = mark
                update = await asyncio.to_thread(self._read)
                good, told = isinstance(update, ChangeSet), time.monotonic()
                yield update
            elif good and time.monotonic() - told >= self._times.confirm_every:
                told = time.monotonic()
                yield UpToDate()
            await wait_for(self._again, self._times.file_interval)

    def _read(self) -> ChangeSet | Interrupted:
        name = str(self._path)
        try:
            text, changed = _text(self._path)
            items = filedata.numbered(filedata.read(text, name), self._items, changed, name)
        except OSError as e:
            return Interrupted(ErrorKind.UNKNOWN, f"{name} cannot be read: {describe(e)}")
        except InvalidData as e:
            return Interrupted(ErrorKind.INVALID_DATA, f"{e} (the data before stay in force)")
        self._items = {(item.kind, item.key): item for item in items}
        return ChangeSet(items, full=True)


def _text(path: Path) -> tuple[bytes, int]:
    """Return what a file holds, and the version that its last change gives to items."""
    with path.open("rb") as file:
        changed = version_of_time(os.fstat(file.fileno()).st_mtime)
        text = file.read(MAX_FILE + 1)
    if len(text) > MAX_FILE:
        raise InvalidData(str(path), f"it is longer than {MAX_FILE} bytes")
    return text, changed


def _mark(path: Path) -> Mark | None:
    """Return the state of a file; None if it cannot be seen."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
