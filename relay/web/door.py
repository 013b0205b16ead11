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
from relay.web.answers import Answer
from relay.web.posting import Posts
from relay.web.prepared import Given, Told
from relay.web.traffic import Traffic
from relay.web.turns import Turns

DATE_LASTS = 1.0
"""Seconds for which a date is used."""

MIN_LOOK = 0.1
"""Seconds between two looks at connections, at least, whatever is configured."""


class Poll(Protocol):
    """Answers polls."""

    def __call__(
        self, environment: Environment, path: str, if_none_match: bytes, accept_encoding: bytes
    ) -> Answer | None:
        """Return the prepared answer; None if the path is no poll, or there is none yet."""


class Questions(Protocol):
    """Answers contexts that ask for their flags; `relay.web.questions` does."""

    def known(self, head: bytes, /) -> Told | None:
        """Return the answer to a request that differs from an earlier one in its context only."""

    def answer(
        self, head: bytes, url: bytes, headers: Mapping[bytes, bytes], /, *, closes: bool
    ) -> Told | None:
        """Return the answer to a GET; None if it is the application's."""


class Connection(ABC):
    """A connection that is looked after."""

    @abstractmethod
    def check(self, now: float) -> None:
        """Close it if its client has kept us waiting for too long."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
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
    def look(self) -> float:
        """Seconds between two looks at connections: to wake up costs more than to look."""
        return max(MIN_LOOK, min(self.keep_alive, self.head_timeout, self.stall_timeout) / 2)


class Door:
    """What the connections of a server share.

    Args:
        relay: whose environments are served.
        poll: answers polls; None leaves them to the application.
        limits: what a connection may cost.
        traffic: counts requests; the application has the same.
        posts: takes posts of events; None leaves them to the application.
        questions: answers contexts that ask for flags; None leaves them to the application.
    """

    def __init__(
        self,
        relay: Relay,
        poll: Poll | None = None,
        limits: DoorLimits | None = None,
        traffic: Traffic | None = None,
        posts: Posts | None = None,
        *,
        questions: Questions | None = None,
    ) -> None:
        self.relay = relay
        self.poll = poll
        self.posts = posts
        self.questions = questions
        self.limits = limits or DoorLimits()
        self.traffic = traffic or Traffic()
        self.date = b"\r\n"
        """The `Date` header and the blank line that ends a head."""
        self.stale_at = 0.0
        """When the date is to be renewed, by the monotonic clock."""
        self.given = Given()
        self.turns = Turns()

    def renew_date(self, state: ServerState, now: float) -> None:
        """Say what time it is; to be called before an answer whenever the date is stale.

        Args:
            state: the server's; uvicorn begins the application's answers with its headers.
            now: by the monotonic clock.
        """
        date = formatdate(usegmt=True).encode()
        state.default_headers = [(b"date", date)]
        self.date = b"date: %b\r\n\r\n" % date
        self.stale_at = now + DATE_LASTS

    def look_after(self, state: ServerState) -> None:
        """Close connections whose clients are too slow."""
        now = time.monotonic()
        if state.connections:  # some may be told why
            self.renew_date(state, now)
        for connection in list(state.connections):
            if isinstance(connection, Connection):
                connection.check(now)
