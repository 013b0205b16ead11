"""Data store in a table of DynamoDB, in the layout that SDKs in daemon mode read (datastore 4.4).

A request writes 25 items, in no order. Readers rely on the order of the requests: items, each after
those that it refers to, then removals, then the marker. A throttled write goes on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from relay.aio import meanwhile, run_in_slices
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores import Stored, Versions
from relay.stores.aws.connection import Share
from relay.stores.dynamodb.layout import (
    FINGERPRINT,
    Attributes,
    Layout,
    parse_stored,
    parse_versions,
    stored_version,
)
from relay.stores.dynamodb.table import ConditionFailed, Table
from relay.stores.fingerprint import Fingerprint
from relay.stores.items import in_order, in_waves

MAX_RACES = 100
"""Attempts of a write that other writers interrupt, before it fails."""

WRITERS = 4
"""Conditional writes of one store at a time. Each keeps the event loop busy for up to two
milliseconds."""

_NEWER = "attribute_not_exists(#key) or (:version > #version and #version <> :none)"
"""The condition of most writes. An attribute that is 0 or missing says nothing of the version."""

_EXISTS = "attribute_exists(#namespace)"


class DynamoDBStore:
    """Data store for one environment in a table.

    Args:
        connection: share in the client.
        table: name of the table.
        prefix: prefix of the namespaces; may be empty.
    """

    def __init__(self, connection: Share, table: str, prefix: str) -> None:
        self._table = Table(connection, table)
        self._layout = Layout(prefix)
        self.table = table
        self.prefix = prefix
        self.server = connection.server

    def __repr__(self) -> str:
        return f"<DynamoDBStore {self.table!r} {self.prefix!r}>"

    def problem_with(self, item: Item) -> str | None:
        """Return why a table cannot hold an item; None if it can."""
        return self._layout.problem_with(item)

    async def load(self) -> Stored | None:
        """Return everything stored; None if the store was never initialised.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        if await self._marker() is None:
            return None
        return await run_in_slices(parse_stored(await self._all_items()))

    async def versions(self) -> Versions | None:
        """Return the versions of all stored items; None if the store was never initialised.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        if await self._marker() is None:
            return None
        return await run_in_slices(parse_versions(await self._all_items()))

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and set the marker. What is equal is not written again.

        Raises:
            StoreUnavailable: the service does not answer, or refuses; some items may be written.
        """
        layout = self._layout
        stored = await self._all_items()
        items = await run_in_slices(in_order(payload))
        puts, removals = await run_in_slices(layout.writes(items, stored))
        await self._table.write(puts)
        await self._table.write(removals)
        await self._table.call("put_item", Item=layout.marker)

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise a few may be written, which readers do not
            see without a marker: it is looked at meanwhile.

        Raises:
            StoreUnavailable: the service does not answer, or refuses; some items may be written.
        """
        with meanwhile(self._marker()) as marker:
            for wave in await run_in_slices(in_waves(items)):
                await self._upsert_all(wave)
                if await marker is None:
                    return False
            return await marker is not None

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint of the stored items beside the marker, if that stands.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        # The marker has no other attributes, so that all is put, which needs no further right.
        marker = {**self._layout.marker, FINGERPRINT: {"S": str(fingerprint)}}
        await self._put(marker, _EXISTS, ("namespace",))

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker and fingerprint are there: one read of one small item.

        Raises:
            StoreUnavailable: the service does not answer, or refuses.
        """
        marker = await self._marker()
        return marker is not None and marker.get(FINGERPRINT) == {"S": str(fingerprint)}

    async def aclose(self) -> None:
        """End the share in the client."""
        await self._table.aclose()

    async def _marker(self) -> Attributes | None:
        return await self._table.get(self._layout.marker)

    async def _all_items(self) -> list[tuple[Kind, Attributes]]:
        """Return all items of all kinds, segments first."""
        return [
            (kind, each)
            for kind in (Kind.SEGMENT, Kind.FLAG)
            for each in await self._table.query(self._layout.namespace(kind))
        ]

    async def _upsert_all(self, items: Iterable[Item]) -> None:
        """Upsert items in any order."""
        remaining = iter(items)

        async def write() -> None:
            for item in remaining:
                await self._upsert_one(item)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(WRITERS):
                    tasks.create_task(write())
        except* StoreUnavailable as failures:
            raise failures.exceptions[0] from None

    async def _upsert_one(self, item: Item) -> None:
        attributes = self._layout.attributes(item)
        values = {":version": attributes["version"], ":none": {"N": "0"}}
        before = await self._put(attributes, _NEWER, ("key", "version"), values)
        for _ in range(MAX_RACES):
            # The condition cannot tell that the attribute is missing, or the JSON unreadable.
            if before is None or item.version <= stored_version(before).number:
                return
            before = await self._put(attributes, *_unchanged(before))
        raise StoreUnavailable("other writers leave no room")

    async def _put(
        self,
        attributes: Attributes,
        condition: str,
        names: Iterable[str],
        values: Attributes | None = None,
    ) -> Attributes | None:
        """Put an item on a condition; return what is stored if that does not hold, else None."""
        try:
            await self._table.call(
                "put_item",
                Item=attributes,
                ConditionExpression=condition,
                ExpressionAttributeNames={f"#{name}": name for name in names},
                **({"ExpressionAttributeValues": values} if values else {}),
            )
        except ConditionFailed:
            return await self._table.get({name: attributes[name] for name in ("namespace", "key")})
        return None


def _unchanged(before: Attributes) -> tuple[str, tuple[str, ...], Attributes]:
    """Return the condition that an item is as it was read, with its names and values."""
    parts, values = [], {}
    for name in ("version", "item"):
        if name in before:
            parts.append(f"#{name} = :{name}")
            values[f":{name}"] = before[name]
        else:
            parts.append(f"attribute_not_exists(#{name})")
    return " and ".join(parts), ("version", "item"), values
