"""Members of big segments in a table of DynamoDB, in the layout that SDKs read (datastore 4.9).

A transaction holds at most 100 writes. Each has the condition that the cursor is still the one
before the patch, so that nothing is written once another relay has gone on, and the last one moves
it. If that never comes, the patch is applied again as a whole, which changes nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice

from botocore.exceptions import ClientError

from relay import clock
from relay.aio import run_in_slices
from relay.errors import StoreUnavailable
from relay.protocol.bigsegments import Patch
from relay.steps import Steps
from relay.stores import label_of
from relay.stores.aws.connection import Share, error_code
from relay.stores.bigsegments import Metadata
from relay.stores.dynamodb.layout import Attributes
from relay.stores.dynamodb.table import ConditionFailed, Table, pause

MAX_TRANSACTION = 100
"""Writes and conditions of one transaction, which DynamoDB limits."""

MAX_KEYS = 100
"""Items that one request reads, which DynamoDB limits."""

LEASE = 20.0
"""Seconds of the lease: renewed every seven, which costs little, and taken over within thirty."""

_Sets = tuple[str | None, str | None]
"""Verbs that change the sets of including and excluding segments; None for no change."""

_UNCHANGED = "attribute_not_exists(#v)", "#v = :before"
"""Conditions that the cursor is as expected: that there is none, and that it is this one."""


class DynamoDBBigSegmentStore:
    """Big segments of one environment in a table.

    Args:
        connection: share in the client.
        table: name of the table.
        prefix: prefix of the namespaces; may be empty.
    """

    lease_lifetime = LEASE

    def __init__(self, connection: Share, table: str, prefix: str) -> None:
        self._table = Table(connection, table)
        self._prefix = prefix
        start = f"{prefix}:" if prefix else ""
        self._users = f"{start}big_segments_user"
        self._metadata = _key(f"{start}big_segments_metadata")
        self._lease = _key(f"{start}$relay:big_segments")
        self.label = label_of("dynamodb", table)
        self._has_batches = True
        """False once the service has refused to read several items in one request."""
        self._seen: tuple[Attributes | None, float] = (None, 0.0)
        """The lease of another relay, and the monotonic time since which it has not changed."""

    def __repr__(self) -> str:
        return f"<DynamoDBBigSegmentStore {self._table.name!r} {self._prefix!r}>"

    async def metadata(self) -> Metadata:
        """Return the state of what is stored."""
        stored = await self._table.get(self._metadata) or {}
        time = stored.get("synchronizedOn")
        is_time = time is not None and time.get("N", "").isdigit()
        return Metadata(
            stored.get("lastVersion", {}).get("S"),
            int(time["N"]) / 1000 if time and is_time else None,
            is_readable=is_time or time is None,
        )

    async def apply(self, patch: Patch, cursor: str | None) -> frozenset[str] | None:
        """Apply a patch in transactions that fail once another relay has moved the cursor.

        DynamoDB does not tell which items have changed: all those of the patch may have.
        """
        changes = await run_in_slices(_changes(patch))
        room, waiting = MAX_TRANSACTION - 1, iter(changes.items())
        try:
            for start in range(0, len(changes) or 1, room):
                is_last = start + room >= len(changes)
                head = self._moving(cursor, patch.version) if is_last else self._guard(cursor)
                writes = [
                    self._update(each, sets, patch.segment_id)
                    for each, sets in islice(waiting, room)
                ]
                await self._table.call("transact_write_items", TransactItems=[head, *writes])
        except ConditionFailed:
            return None
        return frozenset(changes)

    async def mark_synchronized(self, at: float) -> None:
        """Write the time at which all patches were known to be stored."""
        await self._table.call(
            "update_item",
            Key=self._metadata,
            UpdateExpression="SET #s = :at",
            ExpressionAttributeNames={"#s": "synchronizedOn"},
            ExpressionAttributeValues={":at": {"N": str(int(at * 1000))}},
        )

    async def memberships(self, hashes: Sequence[str]) -> list[Mapping[str, bool]]:
        """Return the memberships of context keys, with one request for each hundred."""
        keys = list(dict.fromkeys(hashes))
        parts = (keys[start : start + MAX_KEYS] for start in range(0, len(keys), MAX_KEYS))
        found: dict[str, Attributes] = {}
        for items in await asyncio.gather(*map(self._items, parts)):
            found |= {each["key"]["S"]: each for each in items}
        return [_membership(found.get(each, {})) for each in hashes]

    async def claim(self, owner: str) -> bool:
        """Take the lease if it is free, or keep it.

        DynamoDB has no clock that could end a lease. So its owner writes it again and again, and it
        is free once it has stayed the same for its lifetime.
        """
        stored, now = await self._table.get(self._lease), clock.monotonic()
        holder = (stored or {}).get("owner", {}).get("S", owner)
        if holder != owner:
            if self._seen[0] != stored:
                self._seen = stored, now
            if now - self._seen[1] < LEASE:
                return False
        return await self._write_lease(stored, {"owner": {"S": owner}})

    async def release(self, owner: str) -> None:
        """Give the lease up, if the owner has it."""
        stored = await self._table.get(self._lease)
        if stored is not None and stored.get("owner") == {"S": owner}:
            await self._write_lease(stored, {})

    async def aclose(self) -> None:
        """End the share in the client."""
        await self._table.aclose()

    async def _write_lease(self, before: Attributes | None, owner: Attributes) -> bool:
        """Replace the lease that was read; return False if it is another one by now."""
        number = int((before or {}).get("number", {}).get("N", "0"))
        condition, values = "attribute_not_exists(#number)", {}
        if number:
            condition, values = "#number = :before", {":before": {"N": str(number)}}
        try:
            await self._table.call(
                "put_item",
                Item={**self._lease, "number": {"N": str(number + 1)}, **owner},
                ConditionExpression=condition,
                ExpressionAttributeNames={"#number": "number"},
                **({"ExpressionAttributeValues": values} if values else {}),
            )
        except ConditionFailed:
            return False
        return True

    def _update(self, hashed: str, sets: _Sets, reference: str) -> Attributes:
        """Return the write that changes the sets of one context."""
        expression, names = _expression(*sets)
        return {
            "Update": {
                "TableName": self._table.name,
                "Key": {"namespace": {"S": self._users}, "key": {"S": hashed}},
                "UpdateExpression": expression,
                "ExpressionAttributeNames": names,
                "ExpressionAttributeValues": {":s": {"SS": [reference]}},
            }
        }

    def _guard(self, cursor: str | None) -> Attributes:
        """Return the condition that the cursor is as it was."""
        return {"ConditionCheck": self._conditional(cursor, {})}

    def _moving(self, cursor: str | None, version: str) -> Attributes:
        """Return the write that moves the cursor if it is as it was."""
        update = self._conditional(cursor, {":after": {"S": version}})
        return {"Update": {**update, "UpdateExpression": "SET #v = :after"}}

    def _conditional(self, cursor: str | None, values: Attributes) -> Attributes:
        if cursor is not None:
            values = {**values, ":before": {"S": cursor}}
        return {
            "TableName": self._table.name,
            "Key": self._metadata,
            "ConditionExpression": _UNCHANGED[cursor is not None],
            "ExpressionAttributeNames": {"#v": "lastVersion"},
            **({"ExpressionAttributeValues": values} if values else {}),
        }

    async def _items(self, hashes: Sequence[str]) -> list[Attributes]:
        """Return the items of contexts; those that do not exist are left out."""
        keys = [{"namespace": {"S": self._users}, "key": {"S": each}} for each in hashes]
        if len(keys) > 1 and self._has_batches:
            try:
                return await self._batch(keys)
            except StoreUnavailable as e:
                # A right that ld-relay does not need.
                if not _is_denied(e):
                    raise
                self._has_batches = False
        return [each for each in await asyncio.gather(*map(self._table.get, keys)) if each]

    async def _batch(self, keys: list[Attributes]) -> list[Attributes]:
        found: list[Attributes] = []
        failures = 0
        while keys:
            request = {self._table.name: {"Keys": keys, "ConsistentRead": True}}
            answer = await self._table.call("batch_get_item", RequestItems=request)
            items = answer.get("Responses", {}).get(self._table.name, [])
            found += items
            failures = 0 if items else failures + 1
            left = (answer.get("UnprocessedKeys") or {}).get(self._table.name, {})
            keys = left.get("Keys", [])
            if keys:
                await pause(failures, "the service leaves reads undone")
        return found


def _key(name: str) -> Attributes:
    """Return the key of an item that is alone in its namespace."""
    return {"namespace": {"S": name}, "key": {"S": name}}


def _changes(patch: Patch) -> Steps[dict[str, _Sets]]:
    """Return what happens to the sets of each context; one write may change an item only once.

    As in Redis, a removal comes after an addition.
    """
    changes: dict[str, _Sets] = {}
    for verb, members in (("ADD", patch.included.add), ("DELETE", patch.included.remove)):
        for each in members or ():
            changes[each] = verb, None
            yield
    for verb, members in (("ADD", patch.excluded.add), ("DELETE", patch.excluded.remove)):
        for each in members or ():
            included, _ = changes.get(each, (None, None))
            changes[each] = included, verb
            yield
    return changes


@cache
def _expression(included: str | None, excluded: str | None) -> tuple[str, Attributes]:
    """Return the expression that changes one set or both, with its names."""
    if included == excluded:
        expression = f"{included} #i :s, #e :s"
    else:
        parts = (
            verb and f"{verb} {name} :s" for verb, name in ((included, "#i"), (excluded, "#e"))
        )
        expression = " ".join(filter(None, parts))
    names = {"#i": "included", "#e": "excluded"}
    return expression, {short: name for short, name in names.items() if short in expression}


def _membership(item: Attributes) -> Mapping[str, bool]:
    return {
        **dict.fromkeys(item.get("excluded", {}).get("SS", ()), False),
        **dict.fromkeys(item.get("included", {}).get("SS", ()), True),
    }


def _is_denied(error: StoreUnavailable) -> bool:
    cause = error.__cause__
    return isinstance(cause, ClientError) and error_code(cause) == "AccessDeniedException"
