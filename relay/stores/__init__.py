"""Copies of an environment's data outside this process: the contracts.

A *data store* is a database in the layout that SDKs read. A *copy* is what the environment keeps
equal to its payload: `mirror.Mirror` around any data store, and `snapshot.Snapshot` on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import Change, Payload


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds.

    Args:
        payload: all items that it could read.
        invalid: those that it could not.
        age: seconds since upstream last vouched for the data; None if the store does not know.
    """

    payload: Payload
    invalid: tuple[InvalidItem, ...] = ()
    age: float | None = None


class Version(NamedTuple):
    """The version of a stored item, and whether it is an item or a tombstone."""

    number: int
    live: bool


UNREADABLE = Version(-1, live=False)
"""Of a stored item that cannot be read: any other is newer."""

Key = tuple[Kind, str]

Versions = Mapping[Key, Version]


class DataStore(Protocol):
    """A database in the layout that SDKs in daemon mode read (datastore 4).

    Every method raises `StoreUnavailable` when the database cannot be reached or refuses.
    """

    @property
    def server(self) -> str:
        """Where it is, without secrets."""

    @property
    def prefix(self) -> str:
        """Of its keys."""

    async def load(self) -> Stored | None:
        """Return everything that is stored; None if the store was never initialised."""

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and mark the store as initialised, in one step."""

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write each item unless the store holds the same or a greater version of it, in one step.

        Returns:
            Whether the store was initialised; if not, nothing is written.
        """

    async def versions(self) -> Versions | None:
        """Return the version of each stored item, tombstones included; None if not initialised.

        An item that cannot be read is `UNREADABLE`.
        """

    async def aclose(self) -> None:
        """Give connections back."""


class StoreState(Enum):
    """How it stands with the database, in the words of `/status` (status 8.1)."""

    INITIALIZING = "INITIALIZING"
    VALID = "VALID"
    INTERRUPTED = "INTERRUPTED"


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What `/status` says of a database.

    Args:
        state: whether it can be reached and written.
        since: Unix seconds of the last change of `state`.
        database: `redis`.
        server: its URL, the password masked.
        prefix: of its keys.
        invalid: items found there that could not be read.
    """

    state: StoreState
    since: float
    database: str
    server: str
    prefix: str
    invalid: tuple[InvalidItem, ...] = ()


class Mirror(Protocol):
    """Data kept equal to an environment's payload. None of its methods raises for an outage."""

    @property
    def status(self) -> StoreStatus | None:
        """What `/status` shows under `dataStoreStatus`; None if it shows nothing of this copy."""

    async def load(self) -> Stored | None:
        """Return what was stored; None if nothing was. Waits while the store cannot be reached."""

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Note that upstream vouches for `payload`, and what changed since the last call.

        Returns at once.

        Args:
            payload: all that upstream has.
            change: None when nothing changed: upstream is still, or again, healthy; that is said
                once a minute at most while it stays so.
            full: whether upstream has just sent everything.
            unusable: items of which upstream's last version cannot be used: `payload` has them as
                they were before, or not at all.
        """

    def suspend(self) -> None:
        """Note that upstream is lost: write nothing before the next `update`."""

    async def flushed(self) -> None:
        """Return once all that `update` has noted is stored; waits as long as that takes."""

    async def run(self) -> None:
        """Write what `update` noted until cancelled; then finish what must not be lost."""
