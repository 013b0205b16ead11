"""Contracts for an environment's data outside this process.

A *data store* is a database in the layout that SDKs read. A *mirror* is kept equal to the payload
of an environment: `mirror.DatabaseMirror` in any data store, `snapshot.SnapshotMirror` on disk.
A published document is a data store, too: `documents`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from msgspec import Struct

from relay.model.item import InvalidItem, Item, Kind
from relay.model.journal import SavedJournal
from relay.model.payload import Change, Payload
from relay.stores.fingerprint import Fingerprint


class Stored(Struct, frozen=True):
    """Content of a store.

    Args:
        payload: all readable items.
        invalid: the unreadable items.
        age: seconds since upstream last confirmed the data; None if the store does not know.
        journal: of the data; None if the store has none.
    """

    payload: Payload
    invalid: tuple[InvalidItem, ...] = ()
    age: float | None = None
    journal: SavedJournal | None = None

    @property
    def versions(self) -> Versions:
        """Versions of all items, tombstones and unreadable ones included."""
        versions = {
            (item.kind, item.key): Version(item.version, live=not item.deleted)
            for item in self.payload
        }
        return versions | {(bad.kind, bad.key): UNREADABLE for bad in self.invalid}


class Version(NamedTuple):
    """Version of a stored item; `live` is False for a tombstone."""

    number: int
    live: bool


UNREADABLE = Version(-1, live=False)
"""Version of an unreadable item: every other version is newer."""

Key = tuple[Kind, str]

Versions = Mapping[Key, Version]


class DataStore(Protocol):
    """A database in the layout that SDKs in daemon mode read (datastore 4).

    Readers come at any time. The marker that says "initialised" is written last. Between two
    complete states a reader sees each item in its old or its new version, and never fewer items
    than both states have in common. While the marker stands, no version goes back, except by
    `init`. Databases with transactions keep this by one transaction, others by the order of writes:
    items, then removals, then the marker.

    Every method but `problem_with` raises `StoreUnavailable` when the database cannot be reached or
    refuses.
    """

    @property
    def server(self) -> str:
        """Address of the database, without secrets; empty for the service of a cloud."""

    @property
    def prefix(self) -> str:
        """Prefix of the database keys."""

    def problem_with(self, item: Item) -> str | None:
        """Return why the database cannot hold an item; None if it can."""

    async def load(self) -> Stored | None:
        """Return everything stored; None if the store was never initialised."""

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and mark the store as initialised."""

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise nothing is written that readers see.
        """

    async def versions(self) -> Versions | None:
        """Return the versions of all stored items, tombstones included; None if not initialised.

        The version of an unreadable item is `UNREADABLE`.
        """

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint of the stored items beside them, where no SDK reads."""

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker and fingerprint are there: a cheap probe.

        False is a reason to compare, not a proof of a difference.
        """

    async def aclose(self) -> None:
        """Close all connections."""


class StoreState(Enum):
    """State of the database, named as in `/status` (status 8.1)."""

    INITIALIZING = "INITIALIZING"
    VALID = "VALID"
    INTERRUPTED = "INTERRUPTED"


DATABASES = {"redis": "Redis", "consul": "Consul", "dynamodb": "DynamoDB"}
"""Names of the kinds of databases for people."""

DOCUMENT = "document"
"""Kind of a published document, which is no database."""


def label_of(database: str, where: str) -> str:
    """Return a database for log lines.

    Args:
        database: kind of database.
        where: its server or table.
    """
    return f"{DATABASES.get(database, database)} data store {where}"


class StoreStatus(Struct, frozen=True):
    """Status of a database, as shown in `/status`.

    Args:
        state: whether the database can be reached and written.
        since: time of the last change of `state`, in Unix seconds.
        database: kind of database, a key of `DATABASES`; `DOCUMENT` for a published document.
        server: URL with the password masked; empty for the service of a cloud.
        prefix: prefix of the database keys, or name of the document.
        invalid: unreadable items found in the database.
        table: table of the database; empty if it has none.
    """

    state: StoreState
    since: float
    database: str
    server: str
    prefix: str
    invalid: tuple[InvalidItem, ...] = ()
    table: str = ""

    @property
    def is_document(self) -> bool:
        """True for a published document, False for a database."""
        return self.database == DOCUMENT


class Mirror(Protocol):
    """Data kept equal to an environment's payload. No method raises because of an outage."""

    @property
    def has_journal(self) -> bool:
        """True if it keeps the journal of the data, too: then it is loaded before all else."""

    @property
    def status(self) -> StoreStatus | None:
        """Status for `dataStoreStatus` in `/status`; None if this mirror is not shown there."""

    async def load(self) -> Stored | None:
        """Return the stored data; None if there is none. Waits while the store is unavailable."""

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Schedule a write: upstream has confirmed `payload`. Return immediately.

        Args:
            payload: all data of upstream.
            change: difference from the previous call; None if upstream only confirmed its data,
                which is reported once a minute at most while upstream stays healthy.
            full: True if upstream has just sent all data.
            unusable: items whose latest upstream version is unusable; `payload` has an earlier
                version of them, or none.
        """

    def suspend(self) -> None:
        """Stop writing until the next `update`, because upstream is lost."""

    async def flushed(self) -> None:
        """Wait, without a timeout, until all updates are stored."""

    async def run(self) -> None:
        """Write updates until cancelled; then write what must not be lost."""


def statuses_of(mirrors: Iterable[Mirror], *, documents: bool = False) -> Iterator[StoreStatus]:
    """Yield the statuses of the databases, or of the published documents, among mirrors."""
    for mirror in mirrors:
        status = mirror.status
        if status is not None and status.is_document is documents:
            yield status
