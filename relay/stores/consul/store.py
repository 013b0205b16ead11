"""Data store in Consul, in the layout that SDKs in daemon mode read (datastore 4.1, 4.5).

A transaction of Consul holds 64 operations and 512 KiB. Where one is not enough, readers rely on
the order: items, each after those that it refers to, then removals, then the marker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from msgspec import Raw

from relay.aio import run_in_slices
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import Steps
from relay.stores import Stored, Versions
from relay.stores.consul.client import ConsulClient, translated
from relay.stores.consul.connect import Connection
from relay.stores.consul.layout import (
    MAX_OPERATIONS,
    Failure,
    Layout,
    Operation,
    Pair,
    delete,
    get,
    get_all,
    pair_of,
    put,
    put_if,
    writes,
)
from relay.stores.fingerprint import Fingerprint
from relay.stores.items import in_order, parse_items, parse_versions, stored_json, version_of

T = TypeVar("T")

MAX_RACES = 100
"""Attempts of a write that other writers interrupt, before it fails."""

MAX_TOGETHER = MAX_OPERATIONS - 1
"""Items that are compared and written in one transaction, beside the check of the marker."""


class ConsulStore:
    """Data store for one environment in Consul.

    Args:
        connection: how the server is reached.
        prefix: prefix of the keys; empty for `launchdarkly`.
        max_value: maximum size of an item in bytes, as the server has it.
    """

    def __init__(self, connection: Connection, prefix: str, max_value: int) -> None:
        self._layout = Layout(prefix)
        self.prefix = self._layout.prefix
        self.server = connection.address
        self._max_value = max_value
        self._client = ConsulClient(connection, self._layout.prefix)
        self._may_note = True
        """False once the token may not write the relays' own key."""

    def __repr__(self) -> str:
        return f"<ConsulStore {self.server} {self.prefix!r}>"

    def problem_with(self, item: Item) -> str | None:
        """Return why Consul cannot hold an item; None if it can."""
        size = len(stored_json(item))
        if size <= self._max_value:
            return None
        return (
            f"it has {size} bytes, and Consul takes {self._max_value} (limits.kv_max_value_size of"
            " the server, which [Consul] maxValueSize follows)"
        )

    async def load(self) -> Stored | None:
        """Return everything stored; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer, or refuses.
        """
        results = await self._read_all()
        if results is None:
            return None
        return await _parsed(parse_items(self._layout.entries(results)))

    async def versions(self) -> Versions | None:
        """Return the versions of all stored items; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer, or refuses.
        """
        results = await self._read_all()
        if results is None:
            return None
        return await _parsed(parse_versions(self._layout.entries(results)))

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and set the marker.

        Raises:
            StoreUnavailable: the database does not answer, or refuses; some items may be written.
        """
        reply = await self._client.transact(self._all_items())
        self._raise(reply.failures)
        stored = await _parsed(parse_versions(self._layout.entries(reply.results or ())))
        items = await run_in_slices(in_order(payload))

        def operations() -> Iterator[Operation]:
            for item in items:
                yield put(self._layout.key(item.kind, item.key), stored_json(item))
            for kind, key in stored:
                if key not in payload.all(kind):
                    yield delete(self._layout.key(kind, key))
            yield put(self._layout.marker, b"")

        await self._write(operations())

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise nothing is written.

        Raises:
            StoreUnavailable: the database does not answer, or refuses; some items may be written.
        """
        ordered = await run_in_slices(in_order(items))
        for start in range(0, max(len(ordered), 1), MAX_TOGETHER):
            if not await self._upsert_together(ordered[start : start + MAX_TOGETHER]):
                return False
        return True

    async def _upsert_together(self, items: Sequence[Item]) -> bool:
        keys = [self._layout.key(item.kind, item.key) for item in items]
        guards = [get(self._layout.marker)]
        for _ in range(MAX_RACES):
            stored = await self._read([self._layout.marker, *keys])
            if self._layout.marker not in stored:
                return False
            operations = [
                put_if(key, stored_json(item), stored[key].index if key in stored else 0)
                for key, item in zip(keys, items, strict=True)
                if key not in stored or item.version > version_of(stored[key].value).number
            ]
            if await self._write(operations, guards):
                return True
        raise StoreUnavailable("other writers leave no room")

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint of the stored items, if the token may.

        Raises:
            StoreUnavailable: the database does not answer, or refuses.
        """
        if self._may_note:
            note = put(self._layout.notes, str(fingerprint).encode())
            failures = (await self._client.transact([note])).failures or []
            if any(each.is_denied for each in failures):
                self._may_note = False  # the policy may name the keys that SDKs read, and no other
            else:
                self._raise(failures)

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker and fingerprint are there.

        Raises:
            StoreUnavailable: the database does not answer, or refuses.
        """
        notes = [self._layout.notes] if self._may_note else []
        stored = await self._read([self._layout.marker, *notes])
        note = stored.get(self._layout.notes)
        marked = self._layout.marker in stored
        return marked and note is not None and note.value == str(fingerprint).encode()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _all_items(self) -> list[Operation]:
        return [get_all(self._layout.folder(kind)) for kind in Kind]

    async def _read_all(self) -> list[Raw] | None:
        """Return marker and items, as they were at one moment; None without the marker."""
        reply = await self._client.transact([get(self._layout.marker), *self._all_items()])
        if reply.failures and all(each.is_missing for each in reply.failures):
            return None
        self._raise(reply.failures)
        results = reply.results or []
        if self._layout.marker not in _pairs(results[:1]):
            raise self._unreadable(self._layout.marker)
        return results

    async def _read(self, keys: Sequence[str]) -> dict[str, Pair]:
        """Return those of the keys that exist, as they were at one moment."""
        wanted = list(keys)
        while wanted:
            reply = await self._client.transact([get(key) for key in wanted])
            if reply.failures and all(each.is_missing for each in reply.failures):
                missing = {each.operation for each in reply.failures}
                wanted = [key for n, key in enumerate(wanted) if n not in missing]
                continue
            self._raise(reply.failures)
            pairs = _pairs(reply.results or ())
            # Consul leaves out what the token may not read. SDKs need the relays' own key least.
            for key in wanted:
                if key not in pairs and key != self._layout.notes:
                    raise self._unreadable(key)
            return pairs
        return {}

    async def _write(
        self, operations: Iterable[Operation], guards: Sequence[Operation] = ()
    ) -> bool:
        """Carry out operations in order; return False once another writer has come in between."""
        for write in writes(operations, self._client.scope, guards):
            failures = await self._client.carry_out(write)
            if failures and all(each.is_stale or each.is_missing for each in failures):
                return False
            self._raise(failures)
        return True

    def _raise(self, failures: Sequence[Failure] | None) -> None:
        for failure in failures or ():
            raise self._client.refusal(failure.reason)

    def _unreadable(self, key: str) -> StoreUnavailable:
        return self._client.refusal(f'Permission denied: the token may not read "{key}"')


def _pairs(results: Iterable[Raw]) -> dict[str, Pair]:
    with translated():
        return {pair.key: pair for pair in map(pair_of, results)}


async def _parsed(steps: Steps[T]) -> T:
    with translated():
        return await run_in_slices(steps)
