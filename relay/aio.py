"""Helpers for asyncio: interruptible waits, and work that leaves room for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from relay import clock
from relay.steps import Steps, Work

SLICE = 0.001
"""Seconds of work before other tasks of the event loop can run. The current step is finished first;
polls in between should wait no more than twice this time."""

T = TypeVar("T")


async def wait_for(event: asyncio.Event, delay: float) -> None:
    """Wait for `delay` seconds, or until `event` is set."""
    try:
        async with asyncio.timeout(delay):
            await event.wait()
    except TimeoutError:
        return


def run_for(seconds: float, work: Work[Any]) -> bool:
    """Do a part of some work that takes this time; return whether all is done."""
    return work.run(clock.monotonic() + seconds, clock.monotonic)


async def run_in_slices(steps: Steps[T]) -> T:
    """Return the result of work in steps; let other tasks run after each slice of it."""
    work = Work(steps)
    while True:
        if run_for(SLICE, work):
            return work.result
        await asyncio.sleep(0)


def in_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a daemon thread of that name; return its result to come.

    Threads of the loop's executor would keep the process from ending while a disk hangs.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(set_outcome: Callable[[], None]) -> None:
        if not future.cancelled():
            set_outcome()

    def run() -> None:
        try:
            value = work()
        except BaseException as e:  # noqa: BLE001 - raised again where the future is awaited
            error = e
            set_outcome = lambda: future.set_exception(error)  # noqa: E731
        else:
            set_outcome = lambda: future.set_result(value)  # noqa: E731
        with suppress(RuntimeError):  # the loop has ended in the meantime
            loop.call_soon_threadsafe(deliver, set_outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextmanager
def meanwhile(work: Coroutine[Any, Any, T]) -> Iterator[asyncio.Task[T]]:
    """Do some work beside the body; at its end that is cancelled, and what it raised is forgotten.

    Args:
        work: may be awaited as the task that is yielded, also more than once.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    try:
        yield task
    finally:
        task.cancel()
