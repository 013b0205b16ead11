"""State shared by all fast-path connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from email.utils import formatdate

from msgspec import Struct
from uvicorn.server import ServerState

from relay import clock
from relay.web.fastpath.cache import HeadCache
from relay.web.fastpath.evaluation import EvaluationFastPath
from relay.web.fastpath.events import EventsFastPath
from relay.web.fastpath.scheduler import EvaluationScheduler
from relay.web.fastpath.streams import StreamsFastPath
from relay.web.handlers import Handlers

DATE_LIFETIME = 1.0
"""Seconds until the `Date` header is renewed."""

MIN_SWEEP_INTERVAL = 0.1
"""Minimum seconds between two sweeps over connections, whatever is configured."""


class SweptConnection(ABC):
    """Connection that is swept for slow clients."""

    __slots__ = ()

    @abstractmethod
    def check(self, now: float) -> None:
        """Close the connection if its client has exceeded a time limit."""


class ConnectionLimits(Struct, frozen=True):
    """Limits of one connection. Times in seconds, sizes in bytes.

    Args:
        keep_alive: maximum idle time between two requests. Longer than the minute that load
            balancers and pollers use, so that they close first.
        head_timeout: maximum time from the first byte of a request to the end of its head.
        max_head_size: maximum size of the head of a request.
        stall_timeout: maximum time in which a client takes no byte of its response.
    """

    keep_alive: float = 75.0
    head_timeout: float = 10.0
    max_head_size: int = 64 * 1024
    stall_timeout: float = 60.0

    @property
    def sweep_interval(self) -> float:
        """Seconds between two sweeps over connections: waking up costs more than the sweep."""
        return max(
            MIN_SWEEP_INTERVAL, min(self.keep_alive, self.head_timeout, self.stall_timeout) / 2
        )


class FastPath:
    """State shared by the connections of a server.

    Args:
        handlers: of the endpoints, shared with the application.
        limits: limits of each connection.
    """

    def __init__(self, handlers: Handlers, limits: ConnectionLimits | None = None) -> None:
        relay, traffic = handlers.relay, handlers.traffic
        self.relay = relay
        self.traffic = traffic
        self.limits = limits or ConnectionLimits()
        self.polling = handlers.polling
        self.events = EventsFastPath(relay.registry, handlers.events, traffic)
        self.evaluation = EvaluationFastPath(relay.registry, handlers.evaluation, traffic)
        self.streams = StreamsFastPath(relay.registry, traffic, handlers.polling.bases)
        self.date = b"\r\n"
        """The `Date` header and the blank line that ends a head."""
        self.date_expires_at = 0.0
        """Monotonic time at which the date has to be renewed."""
        self.cache = HeadCache(relay.registry)
        self.scheduler = EvaluationScheduler()

    def renew_date(self, state: ServerState, now: float) -> None:
        """Renew the `Date` header; call before a response whenever it has expired.

        Args:
            state: state of the server; uvicorn adds its headers to the application's responses.
            now: monotonic time.
        """
        date = formatdate(clock.unix(), usegmt=True).encode()
        state.default_headers = [(b"date", date)]
        self.date = b"date: %b\r\n\r\n" % date
        self.date_expires_at = now + DATE_LIFETIME

    def sweep(self, state: ServerState) -> None:
        """Close connections whose clients are too slow."""
        now = clock.monotonic()
        if state.connections:  # some get a response before they are closed
            self.renew_date(state, now)
        for connection in list(state.connections):
            if isinstance(connection, SweptConnection):
                connection.check(now)
