"""Memberships that were read recently, as evaluations look them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from msgspec import Struct

from relay import clock
from relay.evaluation.data import Membership


class KnownMembership(Struct, eq=False):
    """The membership of a context key, as it was read.

    Results of evaluations are cached with it. When it is read again and has not changed, this
    object lives on, and the results with it.
    """

    membership: Membership
    hash: str
    expires_at: float
    """Monotonic time until which it is used; in the past once it has changed."""

    def drop(self) -> None:
        """Use it no longer, because it has changed."""
        self.expires_at = -inf


class Memberships(Struct, frozen=True, eq=False):
    """The memberships that one evaluation needs.

    Args:
        by_key: memberships by context key.
        known: what they were taken of.
    """

    by_key: Mapping[str, Membership]
    known: tuple[KnownMembership, ...]

    @classmethod
    def of(cls, known: Mapping[str, KnownMembership]) -> Memberships:
        """Return memberships by context key."""
        return cls({key: each.membership for key, each in known.items()}, tuple(known.values()))

    def hold(self, keys: Sequence[str]) -> bool:
        """Return whether the memberships of all these context keys are among them."""
        return all(key in self.by_key for key in keys)

    @property
    def is_current(self) -> bool:
        """True as long as none has expired or changed."""
        now = clock.monotonic()
        return all(each.expires_at > now for each in self.known)


NO_MEMBERSHIPS = Memberships({}, ())
"""Memberships of a context that needs none."""
