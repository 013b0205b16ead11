"""Where accepted events wait for their delivery: on disk, so that they survive us, or in memory.

One thread owns the database. Whatever gathers while it works goes into its next transaction: one
synchronisation of the disk makes many posts safe. While the disk does not work, a store in memory
takes its place; without a directory that is all there is, and it needs no thread.
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

GATHER = 0.003
"""Seconds in which posts gather for one transaction, where the last one had several."""

EXPIRE_EVERY = 60.0
"""Seconds between two removals of what is too old."""

CLOSE_LIMIT = 5.0
"""Seconds that the last transaction has at the end; a disk that hangs does not hold us up."""

SKEW = 60.0
"""Seconds by which the time of a post may differ from ours; else it is by a clock that jumps."""

MAX_OVERFLOW = 10_000
"""Changes of batches that wait for the disk. A batch whose end is forgotten is sent again under its
id, so nothing is lost or counted twice by it."""

MAX_QUEUED = 64 * 1024 * 1024
"""Bytes of posts that are not safe yet: more means that the disk hangs, and SDKs must be told."""

_log = logging.getLogger("relay.events")


@dataclass(slots=True)
class _Job:
    """Something to do in the next transaction: a post to add, or a call with the store."""

    work: EventPayload | Callable[[EventStore], Any]
    done: asyncio.Future[Any]
    value: Any = None
    error: Exception | None = None


class Spool:
    """The store and the thread that owns it. All methods belong to one event loop.

    Args:
        directory: where the file is; None for memory only.
        limits: how much may wait.
        retry: seconds between attempts while the disk does not work.
    """

    def __init__(self, directory: Path | None, limits: Limits, retry: float = 10.0) -> None:
        self.on_stored: Callable[[EventPayload, bool], None] = lambda _post, _new: None
        """Called in the event loop with each post that is safe, and whether it was new; before the
        result of `append`, and whether or not anybody waits for that."""
        self.on_evicted: Callable[[Counter[str]], None] = lambda _: None
        """Called in the event loop with the posts that were given up, by environment."""
        self.on_backlog: Callable[[list[Backlog]], None] = lambda _: None
        """Called in the event loop with all that waits, each time the file has been opened."""
        self.outage: str | None = None
        """Why the disk does not work; None while it does, or if there is none."""
        self._path = None if directory is None else directory / "events.db"
        self._limits = limits
        self._retry = retry
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._queued = 0
        self.memory = MemoryStore(limits)
        """What waits while there is no disk."""
        self._disk: DiskStore | None = None
        self._overflow: deque[Callable[[EventStore], Any]] = deque(maxlen=MAX_OVERFLOW)
        """What is to be done to the disk's store when it works again."""
        self._try_at = 0.0
        self._expire_at = time.monotonic() + EXPIRE_EVERY
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._answers: dict[bool, asyncio.Future[bool]] = {}
        """What is said of posts that are safe at once: whether they were new."""

    @property
    def durable(self) -> bool:
        """Whether what is accepted now survives the end of this process."""
        return self._disk is not None

    async def open(self) -> None:
        """Begin to work, with the disk if it works."""
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        if self._path is None:
            self._tidying = self._loop.call_later(EXPIRE_EVERY, self._expire_memory)
        else:
            self._thread.start()
            await self._do(lambda _: None)

    async def close(self) -> None:
        """Do what has been asked for, for a bounded time, and let go of the file."""
        if self._path is None:
            self._tidying.cancel()
            self._log_losses()
        else:
            self._jobs.put(None)
            await asyncio.wait({self._closed}, timeout=CLOSE_LIMIT)

    def append(self, post: EventPayload) -> asyncio.Future[bool]:
        """Take a post.

        Returns:
            Resolves when the post is safe, with whether it was new; at once without a directory.

        Raises:
            StoreUnavailable: too many wait for a disk that hangs.
        """
        now = clock.now()
        if not -SKEW < post.received - now < SKEW:
            post = post._replace(received=now)
        if self._path is None:
            new = self.memory.append(post)
            self.on_stored(post, new)
            if self.memory.evicted:
                self.on_evicted(self._evictions())
            return self._answers.get(new) or self._answer(new)
        if self._queued + len(post.body) > MAX_QUEUED:
            raise StoreUnavailable("the disk does not take events fast enough")
        self._queued += len(post.body)
        return self._do(post)

    async def take(
        self, partition: Partition, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a lane and its bodies; None if nothing waits.

        The batch is in the spool, and the same again until it is finished, split, put aside or
        quarantined.

        Args:
            partition: whose.
            suspects: prefer those that were put aside; of them the one put aside first.
        """
        work = lambda store: store.take(partition, suspects=suspects)  # noqa: E731 - one of all alike
        taken: tuple[Batch, list[bytes]] | None = await self._do(work)
        return taken

    async def finish(self, batch: Batch) -> int | None:
        """Forget a batch; return the posts that are done with, None if they were evicted."""
        work = lambda store: store.finish(batch)  # noqa: E731 - one of all alike
        done: int | None = await self._change(work, batch.posts)
        return done

    async def split(self, batch: Batch) -> bool:
        """Put two halves in the place of a batch; return whether it has two."""
        return bool(await self._change(lambda store: store.split(batch), True))

    async def put_aside(self, batch: Batch) -> bool:
        """Let the others go before a batch; return whether others than suspects wait."""
        return bool(await self._change(lambda store: store.put_aside(batch), True))

    async def quarantine(self, batch: Batch, reason: str, only: Sequence[int] | None = None) -> int:
        """Set a batch aside, or the posts at these places in it; return how many are done with."""
        work = lambda store: store.quarantine(batch, reason, only)  # noqa: E731 - one of all alike
        posts = batch.posts if only is None else len(only)
        return int(await self._change(work, posts) or 0)

    def _change(self, work: Callable[[EventStore], Any], otherwise: Any) -> asyncio.Future[Any]:
        """Change a batch, later if it is on a disk that does not work; then return `otherwise`."""

        def change(store: EventStore) -> Any:
            result = work(store)
            if result is not None:
                return result
            if self._disk is None and self._path is not None:
                self._overflow.append(work)
                return otherwise
            return None  # it was evicted meanwhile

        return self._do(change)

    def _do(self, work: EventPayload | Callable[[EventStore], Any]) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        job = _Job(work, done)
        if self._path is None:
            self._do_now(job)
        else:
            self._jobs.put(job)
        return done

    def _answer(self, new: bool) -> asyncio.Future[bool]:
        answer = self._answers[new] = asyncio.get_running_loop().create_future()
        answer.set_result(new)
        return answer

    def _do_now(self, job: _Job) -> None:
        try:
            _do_all([job], self.memory)
        except Exception as e:  # noqa: BLE001 - a defect of ours must reach who waits
            job.error = e
        self._settle([job], self._evictions())

    def _expire_memory(self) -> None:
        self._tidying = self._loop.call_later(EXPIRE_EVERY, self._expire_memory)
        self._do(lambda store: store.expire(clock.now()))

    def _run(self) -> None:
        """Do everything that is asked for, in the thread, until the end."""
        several, ended = False, False
        while not ended:
            jobs, ended = self._next_jobs(gather=several)
            several = len(jobs) > 1
            if ended:
                self._try_at = 0.0  # the last chance
            try:
                self._recover()
                self._perform(jobs)
            except Exception as e:  # noqa: BLE001 - a defect of ours must reach those who wait
                for job in jobs:
                    job.error = e
            self._in_loop(self._settle, jobs, self._evictions())
        self._log_losses()
        if self._disk is not None:
            with contextlib.suppress(sqlite3.Error):
                self._disk.close()
        self._in_loop(self._closed.set_result, None)

    def _log_losses(self) -> None:
        lost = sum(left.posts for left in self.memory.backlog())
        if lost:
            _log.warning("%d posts of events could not be delivered and are lost", lost)

    def _next_jobs(self, *, gather: bool) -> tuple[list[_Job], bool]:
        """Wait for something to do; return all of it, and whether it is the last."""
        jobs: list[_Job] = []
        due = self._expire_at if self.outage is None else min(self._expire_at, self._try_at)
        try:
            job = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
            if gather:
                time.sleep(GATHER)
            while job is not None:
                jobs.append(job)
                job = self._jobs.get_nowait()
        except queue.Empty:
            return jobs, False
        return jobs, True

    def _perform(self, jobs: Sequence[_Job]) -> None:
        """Do all jobs in one transaction; in memory if the disk fails."""
        tidy = time.monotonic() >= self._expire_at
        if tidy:
            self._expire_at = time.monotonic() + EXPIRE_EVERY
        if not jobs and not tidy:
            return
        if self._disk is not None:
            try:
                with self._disk.transaction():
                    _do_all(jobs, self._disk, tidy=tidy)
                if tidy:
                    self._disk.shrink()
            except sqlite3.Error as e:
                self._begin_outage(e)
            else:
                return
        _do_all(jobs, self.memory, tidy=tidy)

    def _recover(self) -> None:
        """Open the file if it is not open and the time has come; what is in memory moves there."""
        if self._path is None or self._disk is not None or time.monotonic() < self._try_at:
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
        self._in_loop(self._loop.call_soon, self.on_backlog, backlog)  # likewise
        if self.outage is not None:
            _log.info("Events are kept on disk again")
        self.outage = None

    def _begin_outage(self, error: Exception) -> None:
        """Continue in memory, and say so once."""
        disk, self._disk = self._disk, None
        self._try_at = time.monotonic() + self._retry
        if disk is not None:
            with contextlib.suppress(sqlite3.Error):
                disk.close()
        reason = describe(error)
        if isinstance(error, sqlite3.DatabaseError) and _is_damage(error) and self._path:
            self._set_aside(self._path)
        if self.outage is None:
            text = "Events are kept in memory only, up to %d bytes: %s: %s; trying again every %g s"
            _log.warning(text, self._limits.memory, self._path, reason, self._retry)
        self.outage = reason

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
        with contextlib.suppress(RuntimeError):  # the loop has ended without us
            self._loop.call_soon_threadsafe(call, *arguments)


def _do_all(jobs: Sequence[_Job], store: EventStore, *, tidy: bool = False) -> None:
    if tidy:
        store.expire(clock.now())
    posts = [job for job in jobs if isinstance(job.work, EventPayload)]
    verdicts = store.add([job.work for job in posts if isinstance(job.work, EventPayload)])
    for job, verdict in zip(posts, verdicts, strict=True):
        job.value = verdict
    for job in jobs:
        if not isinstance(job.work, EventPayload):
            job.value = job.work(store)


def _prepare(path: Path) -> None:
    """Make the directory and the file; SQLite makes its others as private as this one."""
    make_directory(path.parent)
    os.close(open_private(path, os.O_RDWR | os.O_CREAT))


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
