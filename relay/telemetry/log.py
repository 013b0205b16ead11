"""Where log lines go and how they look (status 8.3). What is logged is decided where it happens.

Lines are written by a thread of their own from a bounded queue: a reader of our output that stalls,
a broken pipe or a full disk costs lines, which are counted, and never the relay.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, Final

from relay.model.text import one_line

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "none": logging.CRITICAL + 1,
}
"""The levels of the configuration."""

WAITING_LINES = 10_000
"""Lines that may wait for a slow reader: a few megabytes; further ones are dropped and counted."""

CLOSE_LIMIT = 1.0
"""Seconds that the last lines have at the end of the process."""

SHORTEST_SECRET = 6
"""Characters from which a secret is looked for in lines: shorter ones would mask ordinary words."""

STDOUT, STDERR = 1, 2

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
"""What lines are given to."""


class EnvironmentLog(logging.LoggerAdapter[logging.Logger]):
    """The log of one environment: its lines carry its name, and the mask of its SDK key."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the environment to what the caller passes."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **(kwargs.get("extra") or {})}}


def environment_log(name: str, masked_key: str) -> EnvironmentLog:
    """Return the log of an environment.

    Args:
        name: its display name.
        masked_key: the mask of its SDK key, such as `...abcd`.
    """
    logger = logging.getLogger(f"relay.env.{name}")
    return EnvironmentLog(logger, {"environment": name, "masked_key": masked_key})


class TextFormatter(logging.Formatter):
    """Lines for people, exactly as the reference writes them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and below it the traceback if there is one."""
        key = getattr(record, "masked_key", "")
        prefix = f"[env: {key}] " if key else ""
        message = one_line(prefix + record.getMessage())
        line = f"{_local_time(record.created)} {_level(record)}: {message}"
        if not record.exc_info:
            return line
        # Indented: no text of an exception looks like a line of its own.
        traceback = self.formatException(record.exc_info).split("\n")
        return "\n    ".join((line, *map(one_line, traceback)))


class JSONFormatter(logging.Formatter):
    """One object per line, for log collectors. `time` is UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        micros = int(record.created % 1 * 1e6)
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{utc}.{micros:06d}Z",
            "level": _level(record).lower(),
            "logger": record.name,
            "environment": getattr(record, "environment", None),
            "message": record.getMessage(),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


def _local_time(created: float) -> str:
    text = time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(created))
    return f"{text}.{int(created % 1 * 1e6):06d}"


def _level(record: logging.LogRecord) -> str:
    if record.levelno >= logging.ERROR:
        return "ERROR"
    return "WARN" if record.levelno == logging.WARNING else record.levelname


class LogHandler(logging.Handler):
    """The end of all logs: masks secrets, and hands lines to the thread that writes them.

    Args:
        secrets: texts that must not appear; the last line of defence.
        stdout: descriptor for lines up to WARN.
        stderr: descriptor for ERROR.
    """

    def __init__(
        self, secrets: Iterable[str] = (), stdout: int = STDOUT, stderr: int = STDERR
    ) -> None:
        super().__init__()
        self.lost = 0
        """Lines that nobody could be given."""
        known = {s for s in secrets if len(s) >= SHORTEST_SECRET}
        shown = {form for secret in known for form in _forms(secret)}
        # Longest first: one secret may be the beginning of another.
        self._secrets = sorted(shown, key=len)[::-1]
        self._stdout, self._stderr = stdout, stderr
        self._waiting: queue.Queue[tuple[int, bytes] | None] = queue.Queue(WAITING_LINES)
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line in the queue, or count it as lost."""
        target = self._stderr if record.levelno >= logging.ERROR else self._stdout
        try:
            line = self._masked(self.format(record))
            self._waiting.put_nowait((target, f"{line}\n".encode(errors="replace")))
        except queue.Full:
            self.lost += 1
        except Exception:  # noqa: BLE001 - a line that cannot be formatted must not stop its author
            self.lost += 1

    def close(self) -> None:
        """Write what waits, for a bounded time, and end the thread."""
        try:
            self._waiting.put(None, timeout=CLOSE_LIMIT)
            self._writer.join(CLOSE_LIMIT)
        except queue.Full:
            self.lost += self._waiting.qsize()
        super().close()

    def _masked(self, line: str) -> str:
        for secret in self._secrets:
            line = line.replace(secret, f"...{secret[-4:]}")
        return line

    def _write_all(self) -> None:
        while (entry := self._waiting.get()) is not None:
            try:
                _write(*entry)
            except OSError:
                self.lost += 1


def _forms(secret: str) -> Iterator[str]:
    """Yield how a secret may stand in a line: as it is, and as texts and objects are written."""
    for form in (secret, repr(secret)[1:-1]):
        yield from (form, one_line(form), json.dumps(form)[1:-1])


def _write(target: int, line: bytes) -> None:
    while line:
        line = line[os.write(target, line) :]


def lost_lines() -> int:
    """Return the number of lines that the outputs in use could not give to anybody."""
    handlers = logging.getLogger().handlers
    return sum(handler.lost for handler in handlers if isinstance(handler, LogHandler))


def set_up(level: str, line_format: str, output: LogHandler) -> None:
    """Send all logs to `output`, in place of where they went.

    Libraries' lines appear from WARN on, and never below the relay's own level.

    Args:
        level: of the relay's lines: a key of `LEVELS`.
        line_format: `text` or `json`.
        output: where lines go; the caller closes it.
    """
    output.setFormatter(JSONFormatter() if line_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [output]
    root.setLevel(max(logging.WARNING, LEVELS[level]))
    logging.getLogger("relay").setLevel(LEVELS[level])


def set_environment_level(name: str, level: str) -> None:
    """Give the lines of an environment a level of their own."""
    logging.getLogger(f"relay.env.{name}").setLevel(LEVELS[level])
