"""Bases: the states of their data that clients name, as far as these can be relied on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from weakref import WeakKeyDictionary

from relay import clock
from relay.environment import Environment
from relay.lru import LRUMap
from relay.model.journal import UNRELIABLE
from relay.web.requests import MAX_BASIS, basis_in

MAX_WAIT = 1.0
"""Seconds for which a poll waits whose client seems to be ahead of this relay: .NET's SDK gives a
poll two."""

MAX_HANDED = 4096
"""Instances of an environment that may be between their poll and their stream at a time."""

FRESH = 0.4
"""Seconds within which a stream after a poll is an SDK's first one: it waits for at least half a
second before it reconnects. A later one may follow a stream of another replica, which this relay
has not seen, and whose data may be newer than the state that it names."""

_STALE = b"NodeJSClient/"
"""Beginning of the user agent of SDKs that name the state of their first connection each time they
reconnect, and ignore items that are not newer than theirs (fdv2 13.8.6)."""

_STALE_CLIENT_SIDE = _STALE, b"NodeClient/"
"""The same for client-side SDKs, which compare no versions."""

_INSTANCE = b"x-launchdarkly-instance-id"

Headers = Mapping[bytes, bytes]


class Bases:
    """Reads the bases of requests; remembers which polls have just been answered.

    Node's server SDK polls, and opens a stream that names the state of the answer. Only this once
    its data are those of the state.
    """

    def __init__(self) -> None:
        self._handed: WeakKeyDictionary[Environment, LRUMap[bytes, tuple[str, float]]] = (
            WeakKeyDictionary()
        )
        """State that each instance was given by its first poll, and the monotonic time."""

    def __repr__(self) -> str:
        return f"<Bases [{sum(map(len, self._handed.values()))} handed]>"

    def of_stream(self, environment: Environment, headers: Headers, query: bytes) -> str:
        """Return the basis of a request for a stream.

        Args:
            environment: of the request.
            headers: of the request, by name in lower case.
            query: as received.
        """
        basis = basis_in(query)
        if not _is_stale(headers):
            return basis
        handed = self._take(environment, headers)
        return basis if basis in ("", handed) else UNRELIABLE

    def of_poll(self, environment: Environment, headers: Headers, query: bytes) -> str:
        """Return the basis of a poll.

        An SDK that compares versions names the present state of its data there. But it may remember
        deletions that this relay has never seen, so it gets all data or nothing.
        """
        basis = basis_in(query)
        if basis and _is_stale(headers) and basis != environment.journal.state:
            return UNRELIABLE
        return basis

    def is_noted(self, headers: Headers, basis: str) -> bool:
        """Return whether the answer to a poll has to be noted, each time."""
        return not basis and _is_stale(headers) and _INSTANCE in headers

    def note(self, environment: Environment, headers: Headers) -> None:
        """Remember that an instance was given all data by a poll."""
        handed = self._handed.get(environment)
        if handed is None:
            handed = self._handed[environment] = LRUMap(MAX_HANDED)
        handed.put(headers[_INSTANCE][:MAX_BASIS], (environment.journal.state, clock.monotonic()))

    def _take(self, environment: Environment, headers: Headers) -> str:
        """Return the state that an instance has just been given; it counts only once."""
        handed, instance = self._handed.get(environment), headers.get(_INSTANCE, b"")[:MAX_BASIS]
        known = None if handed is None else handed.get(instance)
        if handed is None or known is None:
            return ""
        handed.forget(instance)
        state, at = known
        return state if clock.monotonic() - at <= FRESH else ""


def client_side_basis(headers: Headers, query: bytes) -> str:
    """Return the basis of a request for an evaluated stream."""
    basis = basis_in(query)
    stale = headers.get(b"user-agent", b"").startswith(_STALE_CLIENT_SIDE)
    return UNRELIABLE if basis and stale else basis


def is_cacheable(headers: Headers) -> bool:
    """Return whether the basis of a stream depends on the request alone."""
    return not (_is_stale(headers) and _INSTANCE in headers)


def is_behind(environment: Environment, basis: str) -> bool:
    """Return whether the data may have yet to reach a state, as on a replica that lags."""
    return environment.payload is not None and environment.journal.is_behind(basis)


async def wait_until_reached(environment: Environment, basis: str) -> None:
    """Let a poll wait for the change that its client's state has already, but not for long."""
    if is_behind(environment, basis):
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_WAIT):
                while is_behind(environment, basis):
                    await environment.next_change()


def _is_stale(headers: Headers) -> bool:
    return headers.get(b"user-agent", b"").startswith(_STALE)
