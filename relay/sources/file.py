"""A flags file on disk, read again whenever it changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from relay import clock
from relay.aio import wait_for
from relay.errors import ErrorKind, InvalidData
from relay.files import FileState, file_state
from relay.model.item import Item, Kind, version_of_time
from relay.model.payload import ChangeSet
from relay.protocol import filedata
from relay.reasons import describe
from relay.sources import Interrupted, Update, UpToDate
from relay.sources.timings import SourceTimings

MAX_FILE = 128 * 1024 * 1024
"""Maximum size of a file in bytes: the same as for one upstream message."""


class FileSource:
    """Data source for a file in the SDKs' file-data format.

    An unusable file changes nothing; it is reported once for each state of the file.

    Args:
        path: path of the file, which need not exist yet.
        timings: delays between checks.
    """

    protocol = ""

    def __init__(self, path: Path, timings: SourceTimings = SourceTimings()) -> None:
        self._path = path
        self._timings = timings
        self._read_now = asyncio.Event()
        self._items: dict[tuple[Kind, str], Item] = {}

    def __repr__(self) -> str:
        return f"<FileSource {self._path} {len(self._items)} items>"

    def resync(self) -> None:
        """Read the file now."""
        self._read_now.set()

    def check(self, *, reconnect: bool = False) -> None:
        """Read the file now."""
        del reconnect  # a file has no connection and no cache
        self._read_now.set()

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield all data on each change of the file, and confirmations, until cancelled."""
        del basis  # files have no names for their content
        last_state: FileState | str | None = "nothing yet"
        usable, last_yield = False, 0.0
        while True:
            forced = self._read_now.is_set()
            self._read_now.clear()
            state = await asyncio.to_thread(file_state, self._path)
            if forced or state != last_state:
                last_state = state
                update = await asyncio.to_thread(self._read)
                usable, last_yield = isinstance(update, ChangeSet), clock.monotonic()
                yield update
            elif usable and clock.monotonic() - last_yield >= self._timings.confirm_every:
                last_yield = clock.monotonic()
                yield UpToDate()
            await wait_for(self._read_now, self._timings.file_interval)

    def _read(self) -> ChangeSet | Interrupted:
        name = str(self._path)
        try:
            text, version = _read_file(self._path)
            items = filedata.numbered(filedata.read(text, name), self._items, version, name)
        except OSError as e:
            return Interrupted(ErrorKind.UNKNOWN, f"{name} cannot be read: {describe(e)}")
        except InvalidData as e:
            return Interrupted(ErrorKind.INVALID_DATA, f"{e} (the data before stay in force)")
        self._items = {(item.kind, item.key): item for item in items}
        return ChangeSet(items, full=True)


def _read_file(path: Path) -> tuple[bytes, int]:
    """Return the content of a file, and the item version derived from its modification time."""
    with path.open("rb") as file:
        version = version_of_time(os.fstat(file.fileno()).st_mtime)
        text = file.read(MAX_FILE + 1)
    if len(text) > MAX_FILE:
        raise InvalidData(str(path), f"it is longer than {MAX_FILE} bytes")
    return text, version
