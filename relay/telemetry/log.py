"""Format and destination of log lines (status 8.3)."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Final

from relay.model.text import one_line
from relay.telemetry.linewriter import LineWriter
from relay.telemetry.masking import SecretMask

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "none": logging.CRITICAL + 1,
}
"""Levels of `logging` by their names in the configuration."""

STDOUT, STDERR = 1, 2

_PARENT = logging.getLogger("relay.env")
"""Parent of the environments' loggers: without it, `logging` would keep a list of them for ever."""

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
"""Logger of the process or of an environment."""


class EnvironmentLog(logging.LoggerAdapter[logging.Logger]):
    """Log of one environment: its records have its name and its masked SDK key.

    Args:
        name: display name of the environment.
        masked_key: masked SDK key, such as `...abcd`.
    """

    def __init__(self, name: str, masked_key: str) -> None:
        super().__init__(logging.getLogger(), {})
        self.describe(name, masked_key)

    def describe(self, name: str, masked_key: str) -> None:
        """Change name and key, for all who hold this log."""
        self.logger = logging.getLogger(f"relay.env.{name}")
        self.extra = {"environment": name, "masked_key": masked_key}

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the environment to the record's extra attributes."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **(kwargs.get("extra") or {})}}


def environment_log(name: str, masked_key: str) -> EnvironmentLog:
    """Return the log of an environment.

    Args:
        name: display name of the environment.
        masked_key: masked SDK key, such as `...abcd`.
    """
    return EnvironmentLog(name, masked_key)


class TextFormatter(logging.Formatter):
    """Formats text lines exactly like ld-relay."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        key = getattr(record, "masked_key", "")
        prefix = f"[env: {key}] " if key else ""
        message = one_line(prefix + record.getMessage())
        line = f"{local_time(record.created)} {_level_name(record)}: {message}"
        if not record.exc_info:
            return line
        # Indented, so that no exception's text can look like a log line.
        traceback = self.formatException(record.exc_info).split("\n")
        return "\n    ".join((line, *map(one_line, traceback)))


class JSONFormatter(logging.Formatter):
    """Formats one JSON object per line, for log collectors; `time` is UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of the object."""
        micros = int(record.created % 1 * 1e6)
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{utc}.{micros:06d}Z",
            "level": _level_name(record).lower(),
            "logger": record.name,
            "environment": getattr(record, "environment", None),
            "message": record.getMessage(),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None})


def local_time(created: float) -> str:
    """Return a time in Unix seconds as text lines show it."""
    return f"{_local_second(int(created))}.{int(created % 1 * 1e6):06d}"


@lru_cache(maxsize=1)  # lines come in bursts
def _local_second(created: int) -> str:
    return time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(created))


def _level_name(record: logging.LogRecord) -> str:
    if record.levelno >= logging.ERROR:
        return "ERROR"
    return "WARN" if record.levelno == logging.WARNING else record.levelname


class LogHandler(logging.Handler):
    """Handler of all records: masks secrets and leaves the lines to a thread that writes them.

    Args:
        secrets: texts to mask wherever they appear, as the last line of defence.
        stdout: file descriptor for lines up to WARN.
        stderr: file descriptor for ERROR.
    """

    def __init__(
        self, secrets: Iterable[str] = (), stdout: int = STDOUT, stderr: int = STDERR
    ) -> None:
        super().__init__()
        self._mask = SecretMask()
        self._configured: frozenset[str] = frozenset()
        """Masked texts that are secrets of the configuration."""
        self.mask_secrets(frozenset(secrets))
        self._stdout, self._stderr = stdout, stderr
        self._writer = LineWriter()

    def __repr__(self) -> str:
        return f"<LogHandler: {self._writer!r}>"

    @property
    def lost(self) -> int:
        """Number of lines that could not be written."""
        return self._writer.lost

    @property
    def masked_keys(self) -> frozenset[str]:
        """Texts that are masked besides the secrets."""
        return frozenset(self._mask.secrets - self._configured)

    def mask(self, keys: frozenset[str]) -> None:
        """Mask further texts."""
        with self._no_line():
            self._mask.add(keys)

    def unmask(self, keys: frozenset[str]) -> None:
        """Stop masking texts, unless they are secrets."""
        if dropped := keys & self.masked_keys:
            with self._no_line():
                self._mask.drop(dropped)

    def mask_secrets(self, secrets: frozenset[str]) -> None:
        """Mask other secrets from now on; the former ones become `masked_keys`."""
        self.mask(secrets)
        self._configured = secrets & self._mask.secrets

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or count it as lost."""
        target = self._stderr if record.levelno >= logging.ERROR else self._stdout
        try:
            line = f"{self._mask.mask(self.format(record))}\n".encode(errors="replace")
        except Exception:  # noqa: BLE001 - a bad record must not raise in its caller
            self._writer.lost += 1
        else:
            self._writer.put(target, line)

    @contextmanager
    def _no_line(self) -> Iterator[None]:
        """Keep other threads from logging a line meanwhile."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def close(self) -> None:
        """Write the queued lines, within a time limit."""
        self._writer.close()
        super().close()


class WorkerFilter(logging.Filter):
    """Leaves to the feeder what all processes of a relay would log alike."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a worker logs a record."""
        if logging.getLogger("relay").isEnabledFor(logging.DEBUG):
            return True
        return record.levelno >= logging.WARNING and record.name != "relay.reload"


def direct_handler() -> logging.Handler:
    """Return a handler for a process that may have no threads: it writes each line at once."""
    return logging.StreamHandler(sys.stdout)


def lost_lines() -> int:
    """Return the number of lines that the current handlers could not write."""
    return sum(handler.lost for handler in _handlers())


def set_up(level: str, line_format: str, output: logging.Handler) -> None:
    """Send all records to `output`, and to no other handler.

    Libraries are logged from WARN on, and never below the relay's own level.

    Args:
        level: level of the relay's own records, a key of `LEVELS`.
        line_format: `text` or `json`.
        output: handler of the records; the caller closes it.
    """
    output.setFormatter(JSONFormatter() if line_format == "json" else TextFormatter())
    logging.getLogger().handlers[:] = [output]
    set_level(level)


def set_level(level: str) -> None:
    """Set the level of the relay's own records, a key of `LEVELS`; see `set_up`."""
    logging.getLogger().setLevel(max(logging.WARNING, LEVELS[level]))
    logging.getLogger("relay").setLevel(LEVELS[level])


def set_environment_level(name: str, level: str | None) -> None:
    """Set the level of one environment's log; None for the relay's."""
    logger, number = logging.getLogger(f"relay.env.{name}"), LEVELS[level] if level else 0
    if logger.level != number:  # setting it visits all loggers
        logger.setLevel(number)


def forget_environment(name: str) -> None:
    """Forget the level of an environment that is gone, and free its logger."""
    logging.Logger.manager.loggerDict.pop(f"relay.env.{name}", None)


def mask_secrets(secrets: Iterable[str]) -> None:
    """Mask the secrets of a configuration that was read again, in place of the former ones."""
    secrets = frozenset(secrets)
    for handler in _handlers():
        handler.mask_secrets(secrets)


def mask_keys(keys: Iterable[str]) -> None:
    """Mask keys wherever they appear in log lines, besides the secrets of the configuration."""
    keys = frozenset(keys)
    for handler in _handlers():
        handler.mask(keys)


def unmask_keys(keys: Iterable[str]) -> None:
    """Stop masking keys that are no secrets of the configuration."""
    keys = frozenset(keys)
    for handler in _handlers():
        handler.unmask(keys)


def masked_keys() -> frozenset[str]:
    """Return the keys that `unmask_keys` would unmask."""
    return frozenset[str]().union(*(handler.masked_keys for handler in _handlers()))


def _handlers() -> list[LogHandler]:
    return [each for each in logging.getLogger().handlers if isinstance(each, LogHandler)]
