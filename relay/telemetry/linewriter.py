"""Writes log lines behind the event loop.

A reader that stalls, a broken pipe or a full disk costs lines, which are counted, but never delays
the relay.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

WAITING_LINES = 10_000
"""Maximum number of queued lines, a few megabytes; further ones are dropped and counted."""

WRITE_LINES = 256
"""Maximum number of lines that are written at once."""

PAUSE = 0.01
"""Seconds from one wake-up of the thread to the next. Each takes the interpreter from the event
loop, so lines that come in quick succession share one; a line after a pause is written at once."""

CLOSE_LIMIT = 1.0
"""Time limit in seconds for writing the last lines at the end of the process."""


class LineWriter:
    """A thread that writes lines in order. One thread at a time may call its methods."""

    def __init__(self) -> None:
        self.lost = 0
        """Number of lines that could not be written."""
        self._waiting: deque[tuple[int, bytes]] = deque()
        """Lines with the file descriptors to write them to."""
        self._wake_up = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<LineWriter: {len(self._waiting)} lines queued, {self.lost} lost>"

    def put(self, target: int, line: bytes) -> None:
        """Queue a line for a file descriptor, or count it as lost."""
        if len(self._waiting) >= WAITING_LINES:
            self.lost += 1
            return
        self._waiting.append((target, line))
        if not self._wake_up.is_set():
            self._wake_up.set()

    def close(self) -> None:
        """Write the queued lines, within a time limit, and end the thread."""
        self._closed.set()
        self._wake_up.set()
        self._thread.join(CLOSE_LIMIT)
        self.lost += len(self._waiting)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake_up.wait()
            self._write_waiting()
            self._closed.wait(PAUSE)
            self._wake_up.clear()
            if self._waiting:  # since the last look; who comes from now on wakes it up
                self._wake_up.set()
        self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            count = min(WRITE_LINES, len(self._waiting))
            lines = [self._waiting.popleft() for _ in range(count)]
            for target, group in groupby(lines, itemgetter(0)):
                self.lost += _write(target, [line for _, line in group])


def _write(target: int, lines: Sequence[bytes]) -> int:
    """Write lines; return the number of those that could not be written."""
    left = b"".join(lines)
    try:
        while left:
            left = left[os.write(target, left) :]
    except OSError:
        written = len(b"".join(lines)) - len(left)
        for number, line in enumerate(lines):
            written -= len(line)
            if written < 0:
                return len(lines) - number
    return 0
