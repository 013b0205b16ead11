"""Contract for the members of big segments in a database (datastore 4.9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from relay.protocol.bigsegments import Patch


class Metadata(Struct, frozen=True):
    """State of the big segments in a database.

    Args:
        cursor: version of what is stored; None if nothing was ever stored.
        synchronized_at: Unix seconds of the last time at which a relay knew that all patches are
            stored; None if there was none.
        is_readable: False if something else than a time is stored in its place.
    """

    cursor: str | None = None
    synchronized_at: float | None = None
    is_readable: bool = True


class BigSegmentStore(Protocol):
    """Members of an environment's big segments, in the layout that SDKs read.

    Every method raises `StoreUnavailable` when the database cannot be reached or refuses.
    """

    @property
    def label(self) -> str:
        """Kind and address of the database for people, without secrets."""

    @property
    def lease_lifetime(self) -> float:
        """Seconds for which a lease is kept without being claimed again."""

    async def metadata(self) -> Metadata:
        """Return the state of what is stored."""

    async def apply(self, patch: Patch, cursor: str | None) -> frozenset[str] | None:
        """Apply a patch if the stored cursor is still as given, and move the cursor to its version.

        Returns:
            The hashes of the context keys whose memberships may have changed; None if the stored
            cursor is another one: somebody else writes, or data were lost.
        """

    async def mark_synchronized(self, at: float) -> None:
        """Write the time, in Unix seconds, at which all patches were known to be stored."""

    async def memberships(self, hashes: Sequence[str]) -> list[Mapping[str, bool]]:
        """Return the memberships of context keys, in one request for all.

        Args:
            hashes: of the context keys.

        Returns:
            For each, True by reference of a segment that includes it, False for one that excludes
            it; a segment that does both includes it.
        """

    async def claim(self, owner: str) -> bool:
        """Take the lease, or keep it, for `lease_lifetime` from the moment of the call.

        It gives one relay at a time the task to synchronise. It does not guard `apply`, which is
        safe without it.

        Args:
            owner: ID that nobody else has.

        Returns:
            False if another owner has it.
        """

    async def release(self, owner: str) -> None:
        """Give the lease up, if the owner has it."""

    async def aclose(self) -> None:
        """Close all connections."""
