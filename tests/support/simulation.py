"""An event loop of virtual time for several processes, whose order is drawn.

Callbacks carry their process in a context variable. So a process can be stopped, with its callbacks
held, can crash, and has a clock of its own. Everything else is the program's code, unchanged.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any

from relay import clock, randomness

START = 1_800_000_000.0
"""Unix time at which virtual time begins."""


class Process:
    """A process of the simulated world: it runs by itself, and can be stopped.

    Args:
        name: for messages.
        rate: seconds of its clock in a second of the world.
    """

    def __init__(self, name: str, rate: float = 1.0) -> None:
        self.name = name
        self.rate = rate
        self.is_stopped = False
        self.is_dead = False
        self.queue: deque[asyncio.Handle] = deque()
        """Callbacks that are due."""
        self.context = copy_context()
        self.context.run(_PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<Process {self.name}>"

    @property
    def runs(self) -> bool:
        return not (self.is_stopped or self.is_dead)


_PROCESS: ContextVar[Process] = ContextVar("process")


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs processes and the world around them.

    Args:
        seed: of all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = Random(seed)
        self.now = 0.0
        """Time of the world."""
        self.world = Process("world")
        self.processes = [self.world]
        self.after_each: Callable[[], None] = lambda: None
        """Called after each callback."""
        self.steps = 0
        """Number of callbacks so far."""
        self._timers: list[tuple[float, int, asyncio.Handle, Process]] = []
        self._count = 0

    def process(self, name: str, rate: float = 1.0) -> Process:
        """Return a new process."""
        process = Process(name, rate)
        self.processes.append(process)
        return process

    def after(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        """Let the world do something in some of its seconds."""
        handle = asyncio.Handle(callback, args, self, self.world.context)
        self._push(self.now + delay, handle, self.world)

    # The contract of event loops

    def time(self) -> float:
        return self.now * _PROCESS.get(self.world).rate

    def call_soon(  # type: ignore[override]  # simpler types
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        process = _PROCESS.get(self.world) if context is None else self._of(context)
        handle = asyncio.Handle(callback, args, self, context)
        process.queue.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # simpler types
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]  # simpler types
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        process = _PROCESS.get(self.world) if context is None else self._of(context)
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._push(when / process.rate, handle, process)
        return handle

    def _of(self, context: Context) -> Process:
        return context.get(_PROCESS, self.world)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Leave it where it is; it is skipped."""

    def _push(self, when: float, handle: asyncio.Handle, process: Process) -> None:
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle, process))

    def _run_once(self) -> None:
        ready = [each for each in self.processes if each.queue and each.runs]
        while not ready:
            assert self._timers, "everything waits, and nothing will ever happen"
            self.now = max(self.now, self._timers[0][0])
            while self._timers and self._timers[0][0] <= self.now:
                _, _, handle, process = heapq.heappop(self._timers)
                if not handle.cancelled():
                    process.queue.append(handle)
            ready = [each for each in self.processes if each.queue and each.runs]
        process = ready[0] if len(ready) == 1 else self.random.choice(ready)
        handle = process.queue.popleft()
        if not handle.cancelled():
            self.steps += 1
            handle._run()
            self.after_each()

    def use(self) -> None:
        """Let the program's clock and chance be this loop's, until `release`."""
        clock.use(self.time, lambda: START + self.time())
        randomness.seed(self.random.randrange(2**32))

    def release(self) -> None:
        """Give clock and chance back, and end."""
        clock.use()
        randomness.seed()
        for each in self.processes:
            each.is_stopped = each.is_dead = False
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()
