"""Log of one outage: a line when it begins, and one when it ends."""

from __future__ import annotations

import logging

from relay.telemetry.log import Log


class OutageLog:
    """Logs an outage once, however often its cause is found again.

    Args:
        log: logger of the lines.
        begins: level of the first line.
        ends: level of the last line.
    """

    def __init__(self, log: Log, begins: int = logging.WARNING, ends: int = logging.INFO) -> None:
        self._log = log
        self._begins = begins
        self._ends = ends
        self.reason: str | None = None
        """Reason that was logged; None without an outage."""

    def __repr__(self) -> str:
        return f"<OutageLog: {self.reason or 'no outage'}>"

    def begin(self, reason: str, text: str, *arguments: object, again: bool = False) -> bool:
        """Record a failure.

        Args:
            reason: reason of the failure.
            text: line to log if the outage begins, with places for the arguments.
            arguments: arguments of the line.
            again: log the line even if the outage lasts already.

        Returns:
            True if the line was logged.
        """
        if self.reason is not None and not again:
            return False
        self.reason = reason
        self._log.log(self._begins, text, *arguments)
        return True

    def end(self, text: str, *arguments: object) -> bool:
        """Record a success; log the line and return True if it ends an outage."""
        if self.reason is None:
            return False
        self.reason = None
        self._log.log(self._ends, text, *arguments)
        return True
