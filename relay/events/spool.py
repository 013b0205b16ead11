"""Spool of accepted events until their delivery: on disk, to survive the process, or in memory.

One thread owns the database. Jobs that arrive during a transaction share the next one, so one
synchronisation of the disk makes many payloads safe. While the disk fails, a store in memory takes
its place; without a directory there is only the store in memory, and no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay import clock
from relay.errors import StoreUnavailable
from relay.events.memory import MemoryStore
from relay.events.sqlite import DiskStore
from relay.events.store import Backlog, Batch, EventStore, Limits
from relay.files import make_directory, open_private
from relay.model.event import EventPayload, Partition
from relay.reasons import describe
from relay.telemetry.outage import OutageLog

GATHER = 0.003
"""Seconds in which jobs gather for one transaction, if the last one had several."""

EXPIRE_EVERY = 60.0
"""Seconds between two removals of payloads that are too old."""

CLOSE_LIMIT = 5.0
"""Time limit in seconds for the last transaction; a disk that hangs does not delay the shutdown."""

SKEW = 60.0
"""Maximum difference in seconds between a payload's time of arrival and `clock`. Beyond it, the
system's clock has been changed, and the time is replaced."""

MAX_OVERFLOW = 10_000
"""Maximum number of changes to batches that wait for the disk. If one is dropped, its batch is sent
again under the same id, so nothing is lost or counted twice."""

MAX_QUEUED = 64 * 1024 * 1024
"""Maximum size in bytes of payloads that are not safe yet. More means that the disk hangs, and that
SDKs must get an error."""

_log = logging.getLogger("relay.events")


@dataclass(slots=True)
class _Job:
    """Work for the next transaction: a payload to add, or a function to call with the store."""

    work: EventPayload | Callable[[EventStore], Any]
    done: asyncio.Future[Any]
    value: Any = None
    error: Exception | None = None


class Spool:
    """Event store and the thread that owns it. Call all methods in one event loop.

    Args:
        directory: directory of the file; None for memory only.
        limits: limits of size and age.
        retry: seconds between attempts while the disk fails.
    """

    def __init__(self, directory: Path | None, limits: Limits, retry: float = 10.0) -> None:
        self.on_stored: Callable[[EventPayload, bool], None] = lambda _payload, _new: None
        """Called in the event loop with each payload that is safe, and whether it was new; before
        `append` resolves, and even if its result was cancelled."""
        self.on_evicted: Callable[[Counter[str]], None] = lambda _: None
        """Called in the event loop with the number of evicted payloads by environment."""
        self.on_backlog: Callable[[list[Backlog]], None] = lambda _: None
        """Called in the event loop with the whole backlog each time the file has been opened."""
        self._outage = OutageLog(_log)
        self._path = None if directory is None else directory / "events.db"
        self._limits = limits
        self._retry = retry
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._queued = 0
        """Size in bytes of the payloads that are not safe yet."""
        self.memory = MemoryStore(limits)
        """Store without a disk, or during an outage."""
        self._disk: DiskStore | None = None
        self._overflow: deque[Callable[[EventStore], Any]] = deque(maxlen=MAX_OVERFLOW)
        """Changes to make to the store on disk when it works again."""
        self._try_at = 0.0
        self._expire_at = clock.monotonic() + EXPIRE_EVERY
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._resolved: dict[bool, asyncio.Future[bool]] = {}
        """Shared resolved futures for payloads that are safe at once, by whether they were new."""

    @property
    def outage(self) -> str | None:
        """Reason why the disk fails; None while it works, or without a directory."""
        return self._outage.reason

    @property
    def durable(self) -> bool:
        """True if payloads accepted now survive the end of this process."""
        return self._disk is not None

    def __repr__(self) -> str:
        where = "memory" if self._path is None else str(self._path)
        return f"<Spool: {where}, outage: {self.outage}>"

    async def open(self) -> None:
        """Start; return when the disk is in use, or known to fail."""
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        if self._path is None:
            self._expiry_timer = self._loop.call_later(EXPIRE_EVERY, self._expire_memory)
        else:
            self._thread.start()
            await self._do(lambda _: None)

    async def close(self) -> None:
        """Finish all jobs, within a time limit, and close the file."""
        if self._path is None:
            self._expiry_timer.cancel()
            self._log_losses()
        else:
            self._jobs.put(None)
            await asyncio.wait({self._closed}, timeout=CLOSE_LIMIT)

    def append(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Store a payload.

        Returns:
            Future of whether it was new. Resolves when the payload is safe; without a directory at
            once.

        Raises:
            StoreUnavailable: the disk hangs and too many payloads wait for it.
        """
        now = clock.now()
        if not -SKEW < payload.received - now < SKEW:
            payload = payload._replace(received=now)
        if self._path is None:
            new = self.memory.append(payload)
            self.on_stored(payload, new)
            if self.memory.evicted:
                self.on_evicted(self._evictions())
            return self._resolved.get(new) or self._resolve(new)
        if self._queued + len(payload.body) > MAX_QUEUED:
            raise StoreUnavailable("the disk does not take events fast enough")
        self._queued += len(payload.body)
        return self._do(payload)

    async def take(
        self, partition: Partition, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a partition and its bodies; None if nothing is waiting.

        The batch stays in the spool: until it is finished, split, put aside or quarantined, it is
        returned again, unchanged.

        Args:
            partition: partition to deliver.
            suspects: prefer suspects, the one first that was put aside first.
        """
        work = lambda store: store.take(partition, suspects=suspects)  # noqa: E731 - as the others
        taken: tuple[Batch, list[bytes]] | None = await self._do(work)
        return taken

    async def finish(self, batch: Batch) -> int | None:
        """Remove a batch; return the number of payloads that are complete, None if evicted."""
        work = lambda store: store.finish(batch)  # noqa: E731 - as the others
        done: int | None = await self._change(work, batch.payloads)
        return done

    async def split(self, batch: Batch) -> bool:
        """Replace a batch by its halves; return False if it cannot be split."""
        return bool(await self._change(lambda store: store.split(batch), True))

    async def put_aside(self, batch: Batch) -> bool:
        """Make a batch a suspect; return whether anything but suspects is waiting."""
        return bool(await self._change(lambda store: store.put_aside(batch), True))

    async def quarantine(self, batch: Batch, reason: str, only: Sequence[int] | None = None) -> int:
        """Quarantine a batch, or only some positions of it; return the number that are complete."""
        work = lambda store: store.quarantine(batch, reason, only)  # noqa: E731 - as the others
        count = batch.payloads if only is None else len(only)
        return int(await self._change(work, count) or 0)

    def _change(self, work: Callable[[EventStore], Any], otherwise: Any) -> asyncio.Future[Any]:
        """Change a batch; if it is on a disk that fails, do it later and return `otherwise`."""

        def change(store: EventStore) -> Any:
            result = work(store)
            if result is not None:
                return result
            if self._disk is None and self._path is not None:
                self._overflow.append(work)
                return otherwise
            return None  # evicted meanwhile

        return self._do(change)

    def _do(self, work: EventPayload | Callable[[EventStore], Any]) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        job = _Job(work, done)
        if self._path is None:
            self._perform_now(job)
        else:
            self._jobs.put(job)
        return done

    def _resolve(self, new: bool) -> asyncio.Future[bool]:
        future = self._resolved[new] = asyncio.get_running_loop().create_future()
        future.set_result(new)
        return future

    def _perform_now(self, job: _Job) -> None:
        try:
            _perform_all([job], self.memory)
        except Exception as e:  # noqa: BLE001 - unexpected errors must reach the caller
            job.error = e
        self._settle([job], self._evictions())

    def _expire_memory(self) -> None:
        self._expiry_timer = self._loop.call_later(EXPIRE_EVERY, self._expire_memory)
        self._do(lambda store: store.expire(clock.now()))

    def _run(self) -> None:
        """Perform jobs in the thread until the spool is closed."""
        several, ended = False, False
        while not ended:
            jobs, ended = self._next_jobs(gather=several)
            several = len(jobs) > 1
            if ended:
                self._try_at = 0.0  # the last chance
            try:
                self._recover()
                self._perform(jobs)
            except Exception as e:  # noqa: BLE001 - unexpected errors must reach the callers
                for job in jobs:
                    job.error = e
            self._in_loop(self._settle, jobs, self._evictions())
        self._log_losses()
        if self._disk is not None:
            with contextlib.suppress(sqlite3.Error):
                self._disk.close()
        self._in_loop(self._closed.set_result, None)

    def _log_losses(self) -> None:
        lost = sum(backlog.payloads for backlog in self.memory.backlog())
        if lost:
            _log.warning("%d posts of events could not be delivered and are lost", lost)

    def _next_jobs(self, *, gather: bool) -> tuple[list[_Job], bool]:
        """Wait for jobs; return all that are queued, and whether they are the last."""
        jobs: list[_Job] = []
        due = self._expire_at if self.outage is None else min(self._expire_at, self._try_at)
        try:
            job = self._jobs.get(timeout=max(0.0, due - clock.monotonic()))
            if gather:
                time.sleep(GATHER)
            while job is not None:
                jobs.append(job)
                job = self._jobs.get_nowait()
        except queue.Empty:
            return jobs, False
        return jobs, True

    def _perform(self, jobs: Sequence[_Job]) -> None:
        """Perform jobs in one transaction; in memory if the disk fails."""
        expire = clock.monotonic() >= self._expire_at
        if expire:
            self._expire_at = clock.monotonic() + EXPIRE_EVERY
        if not jobs and not expire:
            return
        if self._disk is not None:
            try:
                with self._disk.transaction():
                    _perform_all(jobs, self._disk, expire=expire)
                if expire:
                    self._disk.shrink()
            except sqlite3.Error as e:
                self._begin_outage(e)
            else:
                return
        _perform_all(jobs, self.memory, expire=expire)

    def _recover(self) -> None:
        """Open the file if it is closed and a retry is due, and move the memory's content to it."""
        if self._path is None or self._disk is not None or clock.monotonic() < self._try_at:
            return
        disk = None
        try:
            _prepare(self._path)
            disk = DiskStore(str(self._path), self._limits)
            with disk.transaction():
                for work in self._overflow:
                    work(disk)
                disk.receive(self.memory)
                backlog = disk.backlog()
        except (OSError, sqlite3.Error) as e:
            if disk is not None:
                with contextlib.suppress(sqlite3.Error):
                    disk.close()
            self._begin_outage(e)
            return
        self._disk = disk
        self._overflow.clear()
        self.memory = MemoryStore(self._limits)
        # `call_soon` lets the consequences of results that are settled already come first.
        self._in_loop(self._loop.call_soon, self.on_backlog, backlog)
        self._outage.end("Events are kept on disk again")

    def _begin_outage(self, error: Exception) -> None:
        """Continue in memory, and log it once."""
        disk, self._disk = self._disk, None
        self._try_at = clock.monotonic() + self._retry
        if disk is not None:
            with contextlib.suppress(sqlite3.Error):
                disk.close()
        reason = describe(error)
        if isinstance(error, sqlite3.DatabaseError) and _is_damage(error) and self._path:
            self._set_aside(self._path)
        text = "Events are kept in memory only, up to %d bytes: %s: %s; trying again every %g s"
        limit = self._limits.memory
        self._outage.begin(reason, text, limit, self._path, reason, self._retry)

    def _set_aside(self, path: Path) -> None:
        _log.error("%s is damaged and set aside as %s.damaged", path, path.name)
        self._try_at = 0.0
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(OSError):
                Path(f"{path}{suffix}").replace(f"{path}.damaged{suffix}")

    def _evictions(self) -> Counter[str]:
        evicted: Counter[str] = Counter()
        for store in (self._disk, self.memory):
            if store is not None:
                evicted += store.evicted
                store.evicted.clear()
        return evicted

    def _settle(self, jobs: Sequence[_Job], evicted: Counter[str]) -> None:
        for job in jobs:
            if isinstance(job.work, EventPayload):
                self._queued -= len(job.work.body)
                if job.error is None:
                    self.on_stored(job.work, job.value)
            if job.done.done():
                continue
            if job.error is None:
                job.done.set_result(job.value)
            else:
                job.done.set_exception(job.error)
        if evicted:
            self.on_evicted(evicted)

    def _in_loop(self, call: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(call, *arguments)


def _perform_all(jobs: Sequence[_Job], store: EventStore, *, expire: bool = False) -> None:
    if expire:
        store.expire(clock.now())
    additions = [job for job in jobs if isinstance(job.work, EventPayload)]
    verdicts = store.add([job.work for job in additions if isinstance(job.work, EventPayload)])
    for job, verdict in zip(additions, verdicts, strict=True):
        job.value = verdict
    for job in jobs:
        if not isinstance(job.work, EventPayload):
            job.value = job.work(store)


def _prepare(path: Path) -> None:
    """Create the directory and the file; SQLite gives its other files the same permissions."""
    make_directory(path.parent)
    os.close(open_private(path, os.O_RDWR | os.O_CREAT))


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
