"""Event store on disk with a store in memory that takes its place while the disk fails."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from relay import clock
from relay.events.memory import MemoryStore
from relay.events.sqlite import DiskStore
from relay.events.store import Backlog, Batch, EventStore, Limits
from relay.files import make_directory, open_private
from relay.model.event import EventPayload, Partition
from relay.reasons import describe
from relay.telemetry.outage import OutageLog

MAX_OVERFLOW = 10_000
"""Maximum number of changes to batches that wait for the disk. If one is dropped, its batch is sent
again under the same id, so nothing is lost or counted twice."""

_log = logging.getLogger("relay.events")

T = TypeVar("T")


class FallbackStore:
    """Event store that survives the failures of its disk. It blocks.

    Args:
        path: path of the file.
        limits: limits of size and age.
        retry: seconds between attempts while the disk fails.
    """

    def __init__(self, path: Path, limits: Limits, retry: float) -> None:
        self._path = path
        self._limits = limits
        self._retry = retry
        self._retry_at = 0.0
        self._outage = OutageLog(_log)
        self._disk: DiskStore | None = None
        self._memory = MemoryStore(limits)
        self._overflow: deque[Callable[[EventStore], object]] = deque(maxlen=MAX_OVERFLOW)
        """Changes to make to the store on disk when it works again."""

    def __repr__(self) -> str:
        return f"<FallbackStore: {self._store}, outage: {self.outage}>"

    @property
    def outage(self) -> str | None:
        """Reason why the disk fails; None while it works, or before the first attempt."""
        return self._outage.reason

    @property
    def _store(self) -> EventStore:
        return self._memory if self._disk is None else self._disk

    # The file

    def reopen(self) -> list[Backlog] | None:
        """Open the file if it is closed and an attempt is due; move the memory's content to it.

        Returns:
            The backlog of the file; None if it has not been opened.
        """
        for _ in range(2):  # a damaged file is replaced at once
            if self._disk is None and clock.monotonic() >= self._retry_at:
                backlog = self._open()
                if backlog is not None:
                    return backlog
        return None

    def retry_now(self) -> None:
        """Make an attempt due."""
        self._retry_at = 0.0

    def perform(self, work: Callable[[], T]) -> T:
        """Return the result of a function that uses the store, in one transaction.

        If the disk fails, the function is called a second time, and works in memory.
        """
        if self._disk is not None:
            try:
                with self._disk.transaction():
                    return work()
            except sqlite3.Error as e:
                self._begin_outage(e)
        return work()

    def pop_evicted(self) -> Mapping[str, int]:
        """Return the number of payloads evicted since the last call, by environment."""
        return self._store.pop_evicted()

    def close(self) -> None:
        """Close the file; log what is lost with the memory."""
        self._memory.close()
        if self._disk is not None:
            _close(self._disk)

    def _open(self) -> list[Backlog] | None:
        disk = None
        try:
            _prepare(self._path)
            disk = DiskStore(str(self._path), self._limits)
            with disk.transaction():
                for change in self._overflow:
                    change(disk)
                disk.receive(self._memory.export())
                backlog = disk.backlog()
        except (OSError, sqlite3.Error) as e:
            if disk is not None:
                _close(disk)
            self._begin_outage(e)
            return None
        self._disk = disk
        self._overflow.clear()
        self._memory = MemoryStore(self._limits)
        self._outage.end("Events are kept on disk again")
        return backlog

    def _begin_outage(self, error: Exception) -> None:
        """Continue in memory, and log it once."""
        disk, self._disk = self._disk, None
        self._retry_at = clock.monotonic() + self._retry
        if disk is not None:
            self._memory.recent = disk.recent  # an SDK's retry is one in memory, too
            _close(disk)
        reason = describe(error)
        if isinstance(error, sqlite3.DatabaseError) and _is_damage(error):
            self._set_aside()
        text = "Events are kept in memory only, up to %d bytes: %s: %s; trying again every %g s"
        limit = self._limits.memory
        self._outage.begin(reason, text, limit, self._path, reason, self._retry)

    def _set_aside(self) -> None:
        _log.error("%s is damaged and set aside as %s.damaged", self._path, self._path.name)
        self._retry_at = 0.0
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(OSError):
                Path(f"{self._path}{suffix}").replace(f"{self._path}.damaged{suffix}")

    # The store that is in use

    def add(self, payloads: Sequence[EventPayload], /) -> list[bool]:
        """Store payloads; return for each whether it is new."""
        return self._store.add(payloads)

    def take(
        self, partition: Partition, /, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a partition and its bodies; None if nothing is waiting."""
        return self._store.take(partition, suspects=suspects)

    def expire(self, now: float, /) -> None:
        """Evict payloads that are too old."""
        self._store.expire(now)

    def backlog(self) -> list[Backlog]:
        """Return the backlog of each partition that is not empty."""
        return self._store.backlog()

    # Changes of batches. While the disk fails, those of its own batches are made later.

    def finish(self, batch: Batch, /) -> int | None:
        """Remove a batch; return the number of payloads that are complete."""
        return self._change(lambda store: store.finish(batch), batch.payloads)

    def split(self, batch: Batch, /) -> bool | None:
        """Replace a batch by its halves; return False if it cannot be split."""
        return self._change(lambda store: store.split(batch), True)

    def put_aside(self, batch: Batch, /) -> bool | None:
        """Make a batch a suspect; return whether anything but suspects is waiting."""
        return self._change(lambda store: store.put_aside(batch), True)

    def mark_maybe_delivered(self, batch: Batch, /) -> bool | None:
        """Record that upstream may have a batch already."""
        return self._change(lambda store: store.mark_maybe_delivered(batch), True)

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None, /
    ) -> int | None:
        """Move payloads to the quarantine; return the number that are complete."""
        count = batch.payloads if only is None else len(only)
        return self._change(lambda store: store.quarantine(batch, reason, only), count)

    def _change(self, change: Callable[[EventStore], T | None], expected: T) -> T | None:
        """Change a batch; if it is on a disk that fails, do it later and return `expected`."""
        result = change(self._store)
        if result is None and self._disk is None:
            self._overflow.append(change)
            return expected
        return result  # None if the batch was evicted meanwhile


def _prepare(path: Path) -> None:
    """Create the directory and the file; SQLite gives its other files the same permissions."""
    make_directory(path.parent)
    os.close(open_private(path, os.O_RDWR | os.O_CREAT))


def _close(disk: DiskStore) -> None:
    with contextlib.suppress(sqlite3.Error):
        disk.close()


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
