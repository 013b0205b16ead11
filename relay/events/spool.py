"""Spool of accepted events until their delivery: on disk, to survive the process, or in memory.

`MemorySpool` works at once. `DiskSpool` has a thread for its store: payloads that arrive during a
transaction share the next one, so one synchronisation of the disk makes many of them safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from relay import clock
from relay.aio import wait_for
from relay.errors import StoreUnavailable
from relay.events.fallback import FallbackStore
from relay.events.memory import MemoryStore
from relay.events.store import NO_EVICTIONS, Backlog, EventStore, Limits
from relay.model.event import EventPayload

GATHER = 0.003
"""Seconds in which payloads gather for one transaction, if the last one had several."""

EXPIRE_EVERY = 60.0
"""Seconds between two removals of payloads that are too old."""

CLOSE_LIMIT = 5.0
"""Time limit in seconds for the last transaction; a disk that hangs does not delay the shutdown."""

SKEW = 60.0
"""Maximum difference in seconds between a payload's time of arrival and `clock`. Beyond it, the
system's clock has been changed, and the time is replaced."""

MAX_QUEUED = 64 * 1024 * 1024
"""Maximum size in bytes of payloads that are not safe yet. More means that the disk hangs, and that
SDKs must get an error."""

T = TypeVar("T")


class SpoolResult(NamedTuple):
    """Result of a transaction.

    Args:
        payloads: payloads that are safe now.
        new: whether each of them is new.
        evicted: number of evicted payloads, by environment.
        backlog: the backlog if the file has just been opened, without these payloads; else None.
    """

    payloads: Sequence[EventPayload] = ()
    new: Sequence[bool] = ()
    evicted: Mapping[str, int] = NO_EVICTIONS
    backlog: Sequence[Backlog] | None = None


class Spool(Protocol):
    """Contract of spools. Call all methods in one event loop."""

    @property
    def outage(self) -> str | None:
        """Reason why the disk fails; None while it works, or without one."""

    @property
    def durable(self) -> bool:
        """True if payloads accepted now survive the end of this process."""

    @property
    def memory(self) -> MemoryStore | None:
        """The store, if the spool keeps payloads in memory only."""

    def append(self, payload: EventPayload) -> bool | asyncio.Future[bool]:
        """Store a payload.

        Returns:
            Whether the payload is new, if it is safe at once; otherwise a future of that, which
            resolves when it is safe. The payload is stored even if the future is cancelled.

        Raises:
            StoreUnavailable: the disk hangs and too many payloads wait for it.
        """

    def do(self, work: Callable[[EventStore], T]) -> asyncio.Future[T]:
        """Call a function with the store, after all payloads appended before; return its result."""

    def results(self) -> AsyncIterator[SpoolResult]:
        """Work until the spool is closed; yield each result before callers learn of theirs.

        The results of payloads that are safe at once are those of `append`.
        """

    async def close(self) -> None:
        """Finish the work, within a time limit, and end the results."""


class MemorySpool:
    """Spool without a file; it is lost with the process.

    Args:
        limits: limits of size and age.
    """

    outage = None
    durable = False

    def __init__(self, limits: Limits) -> None:
        self.memory = MemoryStore(limits)
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<MemorySpool: {self.memory}>"

    def append(self, payload: EventPayload) -> bool:
        """Store a payload; return whether it is new."""
        now = clock.now()
        if not -SKEW < payload.received - now < SKEW:
            payload = payload._replace(received=now)
        return self.memory.append(payload)

    def do(self, work: Callable[[EventStore], T]) -> asyncio.Future[T]:
        """Call a function with the store; return its result."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(work(self.memory))
        except Exception as e:  # noqa: BLE001 - unexpected errors must reach the caller
            done.set_exception(e)
        return done

    async def results(self) -> AsyncIterator[SpoolResult]:
        """Evict payloads that are too old, until the spool is closed; yield how many."""
        while not self._closed.is_set():
            await wait_for(self._closed, EXPIRE_EVERY)
            self.memory.expire(clock.now())
            yield SpoolResult(evicted=self.memory.pop_evicted())

    async def close(self) -> None:
        """End the results; log what is lost."""
        self._closed.set()
        self.memory.close()


class DiskSpool:
    """Spool with a file.

    Args:
        directory: directory of the file.
        limits: limits of size and age.
        retry: seconds between attempts while the disk fails.
    """

    memory = None

    def __init__(self, directory: Path, limits: Limits, retry: float = 10.0) -> None:
        self.outage: str | None = None
        self.durable = False
        self._path = directory / "events.db"
        self._store = FallbackStore(self._path, limits, retry)
        """Used by the thread only."""
        self._tick = min(retry, EXPIRE_EVERY)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        """Jobs on their way to the thread; None to end it."""
        self._results: asyncio.Queue[SpoolResult | None] = asyncio.Queue()
        """Results on their way to the caller; None at the end."""
        self._queued = 0
        """Size in bytes of the payloads that are not safe yet."""
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<DiskSpool: {self._path}, outage: {self.outage}>"

    def append(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Store a payload; return a future of whether it is new."""
        size = len(payload.body)
        if self._queued + size > MAX_QUEUED:
            raise StoreUnavailable("the disk does not take events fast enough")
        self._queued += size
        now = clock.now()
        if not -SKEW < payload.received - now < SKEW:
            payload = payload._replace(received=now)
        ack: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._jobs.put((payload, ack))
        return ack

    def do(self, work: Callable[[EventStore], T]) -> asyncio.Future[T]:
        """Call a function with the store, after all payloads appended before; return its result."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((work, outcome))
        return outcome

    async def results(self) -> AsyncIterator[SpoolResult]:
        """Work until the spool is closed; yield each result before callers learn of theirs."""
        loop = asyncio.get_running_loop()
        # A daemon: a disk that hangs does not delay the exit of the process.
        threading.Thread(target=self._run, args=(loop,), name="spool", daemon=True).start()
        while (result := await self._results.get()) is not None:
            yield result
        self._closed.set()

    async def close(self) -> None:
        """Finish the work, within a time limit, and close the file."""
        self._jobs.put(None)
        await wait_for(self._closed, CLOSE_LIMIT)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do the work of the thread until the spool is closed."""
        several = ended = False
        expire_at = clock.monotonic() + EXPIRE_EVERY
        timeout = 0.0  # open the file at once
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            while not ended:
                jobs, ended = self._next_jobs(timeout, gather=several)
                several, timeout = len(jobs) > 1, self._tick
                if ended:
                    self._store.retry_now()  # the last chance
                expire = clock.monotonic() >= expire_at
                if expire:
                    expire_at = clock.monotonic() + EXPIRE_EVERY
                try:
                    done = _perform(self._store, jobs, expire=expire)
                except Exception as e:  # noqa: BLE001 - unexpected errors must reach the callers
                    loop.call_soon_threadsafe(self._fail, jobs, e)
                else:
                    loop.call_soon_threadsafe(self._finish, jobs, done)
            self._store.close()
            loop.call_soon_threadsafe(self._results.put_nowait, None)

    def _next_jobs(self, timeout: float, *, gather: bool) -> tuple[list[_Job], bool]:
        """Wait for jobs; return all that are queued, and whether they are the last."""
        jobs: list[_Job] = []
        with contextlib.suppress(queue.Empty):
            job = self._jobs.get(timeout=timeout)
            if gather:
                time.sleep(GATHER)
            while job is not None:
                jobs.append(job)
                job = self._jobs.get_nowait()
            return jobs, True
        return jobs, False

    def _finish(self, jobs: Sequence[_Job], done: _Done) -> None:
        self.outage, self.durable = done.outage, done.outage is None
        # Who waits for the results is called before those who wait for the futures.
        self._results.put_nowait(SpoolResult(done.payloads, done.new, done.evicted, done.backlog))
        values, new = iter(done.values), iter(done.new)
        for work, future in jobs:
            if isinstance(work, EventPayload):
                self._queued -= len(work.body)
                value = next(new)
            else:
                value = next(values)
            if not future.done():  # nor cancelled
                future.set_result(value)

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        for work, future in jobs:
            if isinstance(work, EventPayload):
                self._queued -= len(work.body)
            if not future.done():
                future.set_exception(error)


_Job = tuple[EventPayload | Callable[[EventStore], Any], asyncio.Future[Any]]
"""Payload to store, or other work, and the future of the result."""


class _Done(NamedTuple):
    """Result of a transaction, on its way from the thread to the event loop."""

    payloads: Sequence[EventPayload]
    new: Sequence[bool]
    values: Sequence[Any]
    evicted: Mapping[str, int]
    backlog: Sequence[Backlog] | None
    outage: str | None


def _perform(store: FallbackStore, jobs: Sequence[_Job], *, expire: bool) -> _Done:
    """Store payloads, then do other work, in one transaction."""
    payloads = [work for work, _ in jobs if isinstance(work, EventPayload)]
    works = [work for work, _ in jobs if not isinstance(work, EventPayload)]

    def work_all() -> tuple[list[bool], list[Any]]:
        if expire:
            store.expire(clock.now())
        return store.add(payloads), [work(store) for work in works]

    backlog = store.reopen()
    new, values = store.perform(work_all) if jobs or expire else ([], [])
    return _Done(payloads, new, values, store.pop_evicted(), backlog, store.outage)
