"""Spool of accepted events until their delivery: on disk, to survive the process, or in memory.

`MemorySpool` works at once. `DiskSpool` has a thread for its store: payloads that arrive during a
transaction share the next one, so one synchronisation of the disk makes many of them safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
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
        """Work until the spool is closed; yield each result before its futures resolve.

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
        self._thread = _Thread("spool")
        self._tick = min(retry, EXPIRE_EVERY)
        self._payloads: list[EventPayload] = []
        """Payloads of the next transaction."""
        self._acks: list[asyncio.Future[bool]] = []
        self._works: list[Callable[[EventStore], Any]] = []
        """Other work of the next transaction."""
        self._outcomes: list[asyncio.Future[Any]] = []
        self._gathered = self._written = 0
        """Sizes in bytes of the payloads of the next transaction, and of the current one."""
        self._wake = asyncio.Event()
        """Set when a transaction is due."""
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<DiskSpool: {self._path}, outage: {self.outage}>"

    def append(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Store a payload; return a future of whether it is new."""
        self._gathered += len(payload.body)
        if self._gathered + self._written > MAX_QUEUED:
            self._gathered -= len(payload.body)
            raise StoreUnavailable("the disk does not take events fast enough")
        now = clock.now()
        if not -SKEW < payload.received - now < SKEW:
            payload = payload._replace(received=now)
        ack: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not self._payloads:
            self._wake.set()
        self._payloads.append(payload)
        self._acks.append(ack)
        return ack

    def do(self, work: Callable[[EventStore], T]) -> asyncio.Future[T]:
        """Call a function with the store, after all payloads appended before; return its result."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._works.append(work)
        self._outcomes.append(outcome)
        self._wake.set()
        return outcome

    async def results(self) -> AsyncIterator[SpoolResult]:
        """Work until the spool is closed; yield each result before its futures resolve."""
        expire_at = clock.monotonic() + EXPIRE_EVERY
        several = ended = False
        self._wake_regularly()
        while not ended:
            if several:
                await asyncio.sleep(GATHER)
            if not (several and self._wake.is_set()):
                await self._wake.wait()
            self._wake.clear()
            ended = self._closing
            if ended:
                await self._thread.call(self._store.retry_now)  # the last chance
            if clock.monotonic() >= expire_at:
                expire_at = clock.monotonic() + EXPIRE_EVERY
                self.do(lambda store: store.expire(clock.now()))
            payloads, self._payloads = self._payloads, []
            acks, self._acks = self._acks, []
            works, self._works = self._works, []
            outcomes, self._outcomes = self._outcomes, []
            self._written, self._gathered = self._gathered, 0
            several = len(payloads) + len(works) > 1
            try:
                done = await self._thread.call(partial(_perform, self._store, payloads, works))
            except Exception as e:  # noqa: BLE001 - unexpected errors must reach the callers
                _reject((*acks, *outcomes), e)
            else:
                self.outage, self.durable = done.outage, done.outage is None
                yield SpoolResult(payloads, done.new, done.evicted, done.backlog)
                _resolve(acks, done.new)
                _resolve(outcomes, done.values)
            self._written = 0
        await self._thread.call(self._store.close)
        self._thread.end()
        self._closed.set()

    def _wake_regularly(self) -> None:
        """Make transactions without work, in which a file that is closed is opened again."""
        self._timer = asyncio.get_running_loop().call_later(self._tick, self._wake_regularly)
        self._wake.set()

    async def close(self) -> None:
        """Finish the work, within a time limit, and close the file."""
        self._closing = True
        self._wake.set()
        await wait_for(self._closed, CLOSE_LIMIT)
        if self._timer is not None:
            self._timer.cancel()


class _Done(NamedTuple):
    """Result of a transaction, on its way from the thread to the event loop."""

    new: Sequence[bool]
    values: Sequence[object]
    evicted: Mapping[str, int]
    backlog: Sequence[Backlog] | None
    outage: str | None


def _perform(
    store: FallbackStore,
    payloads: Sequence[EventPayload],
    works: Sequence[Callable[[EventStore], object]],
) -> _Done:
    """Store payloads, then do other work, in one transaction."""
    new: Sequence[bool] = ()
    values: Sequence[object] = ()
    backlog = store.reopen()
    if payloads or works:
        new, values = store.perform(lambda: (store.add(payloads), [work(store) for work in works]))
    return _Done(new, values, store.pop_evicted(), backlog, store.outage)


def _resolve(futures: Sequence[asyncio.Future[Any]], values: Sequence[object]) -> None:
    for future, value in zip(futures, values, strict=True):
        if not future.done():  # nor cancelled
            future.set_result(value)


def _reject(futures: Sequence[asyncio.Future[Any]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


class _Thread:
    """Thread that makes calls one after another. Unlike an executor's, it never delays the exit.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Return a future of the result of a function."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def make_call() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                try:
                    value = function()
                except Exception as e:  # noqa: BLE001 - it belongs to the caller
                    loop.call_soon_threadsafe(_reject, [future], e)
                else:
                    loop.call_soon_threadsafe(_resolve, [future], [value])

        self._calls.put(make_call)
        return future

    def end(self) -> None:
        """End the thread after all calls made before."""
        self._calls.put(None)

    def _run(self) -> None:
        while (make_call := self._calls.get()) is not None:
            make_call()
