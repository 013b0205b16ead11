"""The supervisor: opens the sockets, forks feeder and workers, and replaces those that die.

It has no event loop, no thread and no connection, so that it can fork at any time. The sockets are
its own: connections wait in them while their process is replaced.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import signal
import socket
from collections.abc import Sequence

from relay import clock
from relay.server.children import ADOPT, ALIVE_EVERY, FAILED, RELEASE, Child

_log = logging.getLogger("relay.server")

GRACE = 3.0
"""Seconds beyond the drain time after which processes are killed at shutdown."""


class Supervisor:
    """Keeps processes running until a signal.

    Args:
        feeder: the process that feeds the others.
        workers: the others.
        drain: time limit in seconds for the shutdown of each kind.
    """

    def __init__(self, feeder: Child, workers: Sequence[Child], drain: float) -> None:
        self._feeder = feeder
        self._workers = workers
        self._children = (feeder, *workers)
        self._drain = drain
        self._substitutes: dict[int, Child] = {}
        """By number of a worker that cannot be kept alive, the one that accepts on its socket."""
        self._stopping = False
        self._failed = False
        self._signals: set[signal.Signals] = set()
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        self._wakeup_end = wakeup

    def __repr__(self) -> str:
        return f"<Supervisor of {len(self._workers)} workers>"

    def run(self) -> int:
        """Run until a signal, or until a process cannot start; return the exit code."""
        gc.collect()
        gc.freeze()  # what is shared by all stays shared
        signal.set_wakeup_fd(self._wakeup_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        while not self._stopping:
            for child in self._children:
                if child.due:
                    child.start()
                    _log.info("The %s is process %d", child.name, child.pid)
            self._wait(ALIVE_EVERY / 2)
            self._handle_signals()
            self._kill_silent()
            self._find_substitutes()
        return self._stop()

    def _note(self, number: int, _frame: object) -> None:
        self._signals.add(signal.Signals(number))

    def _wait(self, seconds: float) -> None:
        """Wait for signs of life and signals."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakeup, selectors.EVENT_READ)
            for child in self._children:
                if child.control is not None:
                    selector.register(child.control, selectors.EVENT_READ, child)
            for key, _ in selector.select(seconds):
                if isinstance(key.data, Child):
                    if not key.data.note_life():
                        key.data.drop_control()
                else:
                    with contextlib.suppress(BlockingIOError):
                        self._wakeup.recv(4096)

    def _handle_signals(self) -> None:
        signals, self._signals = self._signals, set()
        if signal.SIGCHLD in signals:
            self._reap()
        if signal.SIGHUP in signals:
            for child in self._children:
                child.signal(signal.SIGHUP)
        if signals & {signal.SIGTERM, signal.SIGINT}:
            self._stopping = True

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.pid == pid:
                    self._bury(child, os.waitstatus_to_exitcode(status))

    def _bury(self, child: Child, code: int) -> None:
        child.bury()
        if self._stopping:
            return
        if code == FAILED and not child.has_started:
            self._failed = self._stopping = True  # it has logged why
            return
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        delay = max(0.0, child.start_at - clock.monotonic())
        _log.error("The %s has ended (%s); another one starts in %.1f s", child.name, reason, delay)

    def _kill_silent(self) -> None:
        for child in self._children:
            if child.is_silent:
                _log.error("The %s shows no sign of life and is killed", child.name)
                child.signal(signal.SIGKILL)

    def _find_substitutes(self) -> None:
        """Let no socket be without a worker for long: the kernel goes on to give it its share."""
        now = clock.monotonic()
        for number, worker in enumerate(self._workers):
            substitute = self._substitutes.get(number)
            if substitute is not None and not substitute.is_alive:
                del self._substitutes[number]
            elif substitute is not None and worker.is_alive:
                substitute.tell(RELEASE + bytes([number]))
                del self._substitutes[number]
            elif substitute is None and worker.pid is None and worker.start_at > now:
                alive = [other for other in self._workers if other.is_alive]
                if alive:
                    self._substitutes[number] = alive[number % len(alive)]
                    self._substitutes[number].tell(ADOPT + bytes([number]))

    def _stop(self) -> int:
        """Stop the workers, then the feeder, which has to take their last events."""
        for children in (self._workers, (self._feeder,)):
            for child in children:
                child.signal(signal.SIGTERM)
            deadline = clock.monotonic() + self._drain + GRACE
            while any(child.pid for child in children):
                left = deadline - clock.monotonic()
                if left <= 0 or self._signals & {signal.SIGTERM, signal.SIGINT}:
                    for child in children:
                        child.signal(signal.SIGKILL)
                self._wait(min(max(left, 0.01), ALIVE_EVERY / 2))
                self._reap()
        return FAILED if self._failed else 0
