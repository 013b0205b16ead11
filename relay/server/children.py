"""Processes of a relay, as their supervisor sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable

from relay import clock

ALIVE_EVERY = 1.0
"""Seconds between two signs of life."""

ADOPT, RELEASE = b"a", b"r"
"""Commands to a worker, each with the number of another one: accept connections on its socket, too,
or no longer."""

START_LIMIT = 60.0
"""Seconds that a process may take to start before its first sign of life."""

QUICK_DEATHS, QUICK = 3, 10.0
"""Number of deaths within these seconds after which the next start is delayed."""

MAX_RESTART_DELAY = 10.0
"""Maximum seconds between a death and the next start."""

FAILED = 1
"""Exit code of a process that cannot start because of the configuration."""

Work = Callable[[socket.socket], int]
"""Work of a process; takes its end of the control socket and returns the exit code."""


class Child:
    """A process, and those that replace it.

    Args:
        name: for log lines.
        silence: seconds without a sign of life after which it is killed.
        work: what it does.
    """

    def __init__(self, name: str, silence: float, work: Work) -> None:
        self.name = name
        self.pid: int | None = None
        """Process ID; None while there is none."""
        self.control: socket.socket | None = None
        """Our end of its control socket."""
        self.has_started = False
        """True once any process of this name has shown a sign of life."""
        self.is_alive = False
        """True while its process is known to serve."""
        self.start_at = 0.0
        """Monotonic time from which the next one may be started."""
        self._silence = silence
        self._work = work
        self._deadline = 0.0
        self._deaths: deque[float] = deque(maxlen=2 * QUICK_DEATHS)

    def __repr__(self) -> str:
        return f"<Child {self.name}, process {self.pid}>"

    def start(self) -> None:
        """Fork the process. Call it without threads and without an event loop."""
        ours, its = socket.socketpair()
        ours.setblocking(False)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                ours.close()
                _reset_signals()
                code = self._work(its)
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 70
            finally:
                os._exit(code)
        its.close()
        self.pid, self.control = pid, ours
        self._deadline = clock.monotonic() + START_LIMIT

    def note_life(self) -> bool:
        """Read signs of life; return False if the other end is closed."""
        if self.control is None:
            return False
        try:
            signs = self.control.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            signs = b""
        if signs:
            self.has_started = self.is_alive = True
            self._deadline = clock.monotonic() + self._silence
        return bool(signs)

    @property
    def is_silent(self) -> bool:
        """True if there was no sign of life for too long."""
        return self.pid is not None and clock.monotonic() > self._deadline

    @property
    def due(self) -> bool:
        """True if a process is to be started now."""
        return self.pid is None and clock.monotonic() >= self.start_at

    def tell(self, command: bytes) -> None:
        """Send a command to the process, if there is one."""
        if self.control is not None:
            with contextlib.suppress(OSError):
                self.control.send(command)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def bury(self) -> None:
        """Note that the process has ended; the next one may start at once, but not for ever."""
        now = clock.monotonic()
        self.pid, self.is_alive = None, False
        self.drop_control()
        while self._deaths and now - self._deaths[0] > QUICK + MAX_RESTART_DELAY:
            self._deaths.popleft()
        self._deaths.append(now)
        surplus = len(self._deaths) - QUICK_DEATHS
        self.start_at = now + (min(MAX_RESTART_DELAY, 2.0**surplus) if surplus >= 0 else 0.0)

    def drop_control(self) -> None:
        """Close our end of the control socket."""
        if self.control is not None:
            self.control.close()
            self.control = None


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)  # the terminal's signals are for the supervisor alone
