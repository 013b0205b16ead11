"""Work that takes its time does not block the event loop."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from relay import aio
from relay.aio import in_thread, run_in_slices
from relay.errors import InvalidData
from relay.protocol import fdv1
from tests.support.data import flag

FLAGS = {f"flag-{n}": flag(f"flag-{n}") for n in range(50)}
PUT = json.dumps({"path": "/", "data": {"flags": FLAGS, "segments": {}}}).encode()


@pytest.mark.parametrize(("slice_seconds", "minimum", "maximum"), [(0.0, 50, 60), (60.0, 0, 1)])
async def test_other_tasks_run_after_each_slice(monkeypatch, slice_seconds, minimum, maximum):
    """After each item, if the slices are that short; never within a slice."""
    monkeypatch.setattr(aio, "SLICE", slice_seconds)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    background = asyncio.create_task(other())
    changes = await run_in_slices(fdv1.in_steps("put", PUT))
    counted = turns
    background.cancel()
    assert changes == fdv1.parse("put", PUT)
    assert minimum <= counted <= maximum


async def test_errors_are_raised_as_without_slices():
    with pytest.raises(InvalidData, match="put message"):
        await run_in_slices(fdv1.in_steps("put", b"{"))


async def test_work_in_a_thread_has_its_result_or_error():
    """The thread has a name, and does not keep the process from ending."""
    thread = await in_thread(threading.current_thread, "worker")
    assert (thread.name, thread.daemon) == ("worker", True)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, "worker")


async def test_nobody_need_wait_for_a_thread():
    """Its result is dropped."""
    over = threading.Event()
    waiting = asyncio.ensure_future(in_thread(over.wait, "worker"))
    waiting.cancel()
    over.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await in_thread(lambda: 1, "worker") == 1
