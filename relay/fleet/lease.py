"""The lease of one environment: taken, renewed, given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from relay import clock, randomness
from relay.errors import StoreUnavailable
from relay.fleet.feed import Keys
from relay.fleet.member import Member, Renewal
from relay.protocol.feed import Entry, Term

SHORTEST_WAIT = 0.001
"""Seconds; a shorter wait might not let any time pass."""


class Leadership:
    """A term of this member.

    Args:
        term: its number and owner.
        until: monotonic time until which the lease is certain.
    """

    def __init__(self, term: Term, until: float) -> None:
        self.term = term
        self.until = until
        self.adopted = False
        """True once what the feed has was read and adopted."""
        self.ended = asyncio.Event()
        """Set at its end, whatever the cause."""
        self.on_end: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<Leadership {self.term.number}{' ended' if self.ended.is_set() else ''}>"

    @property
    def is_valid(self) -> bool:
        """True while the lease is certain; ask before each write."""
        return clock.monotonic() < self.until and not self.ended.is_set()

    def end(self) -> None:
        """End it."""
        self.ended.set()
        self.on_end()


class Lease:
    """Takes the lease of an environment for this member.

    Args:
        member: this relay.
        keys: of the environment.
        spawn: starts a task.
        acquired: takes a new leadership.
        lost: takes one whose lease is known to be another's, or nobody's.
        expired: takes one whose lease could not be renewed in time.
    """

    def __init__(
        self,
        member: Member,
        keys: Keys,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        *,
        acquired: Callable[[Leadership], None],
        lost: Callable[[Leadership], None],
        expired: Callable[[Leadership], None],
    ) -> None:
        self._member = member
        self._keys = keys
        self._spawn = spawn
        self._acquired, self._lost, self._expired = acquired, lost, expired
        self._timings = member.timings
        self._acquiring = False
        self._resignations = 0
        """Number of times that this member has resigned in a row, without upstream."""
        self._abstains_until = 0.0

    def __repr__(self) -> str:
        return f"<Lease {self._keys.lease!r}>"

    @property
    def abstains(self) -> bool:
        """True if this member has resigned and lets others lead."""
        return clock.monotonic() < self._abstains_until

    def contend(self, leaderless: float) -> None:
        """Try to take the lease, which is free.

        Args:
            leaderless: seconds since which nobody leads.
        """
        if self._acquiring or (self.abstains and leaderless < self._timings.unwanted):
            return
        self._acquiring = True
        self._spawn(self._acquire())

    def answered(self) -> None:
        """Note that a leadership has been taken or declined: until then there is no further try."""
        self._acquiring = False

    def keep(self, leadership: Leadership) -> None:
        """Renew the lease until the leadership ends, and tell if that fails."""
        ended, renewed = leadership.ended, partial(self._renewed, leadership)
        self._member.watch(self._keys).renew(Renewal(self._keys, ended.is_set, renewed))
        self._spawn(self._watch(leadership))

    def resign(self, leadership: Leadership) -> None:
        """Give the lease up, and abstain for a time that grows."""
        self._abstains_until = clock.monotonic() + self._timings.abstain.delay(self._resignations)
        self._resignations += 1
        self._spawn(self.release(leadership))

    def rehabilitate(self) -> None:
        """Forget resignations: upstream works."""
        self._resignations = 0

    async def release(self, leadership: Leadership) -> None:
        """Give the lease up; if Redis does not answer, it expires."""
        entry = Entry(self._keys.prefix, leadership.term, 0, "", "", resigned=True)
        try:
            await self._member.feed.release(self._keys, self._member.name, entry)
        except StoreUnavailable:
            return

    async def _acquire(self) -> None:
        await asyncio.sleep(self._timings.jitter * randomness.fraction())
        sent = clock.monotonic()
        try:
            term = await self._member.feed.acquire(self._keys, self._member.name, self._timings.ttl)
        except StoreUnavailable:
            term = None
        if term is None:
            self._acquiring = False
        else:
            until = lease_end(sent, clock.monotonic(), self._timings.lease)
            self._acquired(Leadership(term, until))

    def _renewed(self, leadership: Leadership, sent: float, answered: float, is_kept: bool) -> None:
        if is_kept:
            until = lease_end(sent, answered, self._timings.lease)
            leadership.until = max(leadership.until, until)
        elif not leadership.ended.is_set():
            self._lost(leadership)

    async def _watch(self, leadership: Leadership) -> None:
        while leadership.is_valid:  # noqa: ASYNC110 - renewals make it longer
            await asyncio.sleep(max(SHORTEST_WAIT, leadership.until - clock.monotonic()))
        if not leadership.ended.is_set():
            self._expired(leadership)


def lease_end(sent: float, answered: float, lease: float) -> float:  # noqa: ARG001 - see below
    """Return until when a lease is certain.

    It counts from before the command was sent: Redis may have executed it at once, however late the
    answer has come.
    """
    return sent + lease
