"""What the connections at the front door share, and what it wants of those who answer there."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Protocol

from uvicorn.server import ServerState

from relay.environment import Environment
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.fastpath.cache import EvaluationResponse, ResponseCache
from relay.web.fastpath.events import EventsFastPath
from relay.web.fastpath.scheduler import EvaluationScheduler
from relay.web.responses import PreparedResponse

DATE_LIFETIME = 1.0
"""Seconds for which a date is used."""

MIN_SWEEP_INTERVAL = 0.1
"""Seconds between two looks at connections, at least, whatever is configured."""


class PollResponder(Protocol):
    """Answers polls."""

    def __call__(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> PreparedResponse | None:
        """Return the prepared answer; None if the path is no poll, or there is none yet."""


class EvaluationResponder(Protocol):
    """Answers contexts that ask for their flags; `relay.web.questions` does."""

    def answer_known(self, head: bytes, /) -> EvaluationResponse | None:
        """Return the answer to a request that differs from an earlier one in its context only."""

    def answer(
        self, head: bytes, url: bytes, headers: Mapping[bytes, bytes], /, *, closes: bool
    ) -> EvaluationResponse | None:
        """Return the answer to a GET; None if it is the application's."""


class SweptConnection(ABC):
    """A connection that is looked after."""

    @abstractmethod
    def check(self, now: float) -> None:
        """Close it if its client has kept us waiting for too long."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may cost. Times in seconds, sizes in bytes.

    Args:
        keep_alive: a connection may rest between two requests. Longer than the minute that load
            balancers and pollers use, so that they are the ones who close.
        head_timeout: from the first byte of a request to the end of its head.
        max_head_size: of a request.
        stall_timeout: a client may leave its response untouched.
    """

    keep_alive: float = 75.0
    head_timeout: float = 10.0
    max_head_size: int = 64 * 1024
    stall_timeout: float = 60.0

    @property
    def sweep_interval(self) -> float:
        """Seconds between two looks at connections: to wake up costs more than to look."""
        return max(
            MIN_SWEEP_INTERVAL, min(self.keep_alive, self.head_timeout, self.stall_timeout) / 2
        )


class FastPath:
    """What the connections of a server share.

    Args:
        relay: whose environments are served.
        poll: answers polls; None leaves them to the application.
        limits: what a connection may cost.
        traffic: counts requests; the application has the same.
        events: takes posts of events; None leaves them to the application.
        evaluation: answers contexts that ask for flags; None leaves them to the application.
    """

    def __init__(
        self,
        relay: Relay,
        poll: PollResponder | None = None,
        limits: ConnectionLimits | None = None,
        traffic: RequestMetrics | None = None,
        events: EventsFastPath | None = None,
        *,
        evaluation: EvaluationResponder | None = None,
    ) -> None:
        self.relay = relay
        self.poll = poll
        self.events = events
        self.evaluation = evaluation
        self.limits = limits or ConnectionLimits()
        self.traffic = traffic or RequestMetrics()
        self.date = b"\r\n"
        """The `Date` header and the blank line that ends a head."""
        self.date_expires_at = 0.0
        """When the date is to be renewed, by the monotonic clock."""
        self.cache = ResponseCache()
        self.scheduler = EvaluationScheduler()

    def renew_date(self, state: ServerState, now: float) -> None:
        """Say what time it is; to be called before an answer whenever the date is stale.

        Args:
            state: the server's; uvicorn begins the application's answers with its headers.
            now: by the monotonic clock.
        """
        date = formatdate(usegmt=True).encode()
        state.default_headers = [(b"date", date)]
        self.date = b"date: %b\r\n\r\n" % date
        self.date_expires_at = now + DATE_LIFETIME

    def sweep(self, state: ServerState) -> None:
        """Close connections whose clients are too slow."""
        now = time.monotonic()
        if state.connections:  # some may be told why
            self.renew_date(state, now)
        for connection in list(state.connections):
            if isinstance(connection, SweptConnection):
                connection.check(now)
