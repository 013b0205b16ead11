"""The list of environments in DynamoDB, in the form of late ld-relays (newer-versions 10.2).

It is an item for each environment and payload filter, in a namespace of its own. DynamoDB cannot
replace all of them at once, so each is the former or the new one if a relay is killed in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from relay.aio import in_thread
from relay.errors import InvalidData
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList, entries_of, is_name
from relay.stores.aws.connection import Share
from relay.stores.dynamodb.layout import Attributes
from relay.stores.dynamodb.table import Table
from relay.stores.sealing import SealedEntries


class DynamoDBList:
    """The list of one automatic configuration key.

    Args:
        connection: share in the client.
        table: name of the table.
        key: partition key of the items.
        owner: the automatic configuration key; only its list is used.
        encryption_key: encrypts the items; empty for the automatic configuration key.
    """

    def __init__(
        self, connection: Share, table: str, key: str, owner: AutoConfigKey, encryption_key: Secret
    ) -> None:
        self._table = Table(connection, table)
        self._namespace = key
        self._entries = SealedEntries(owner, encryption_key)
        # Apart, so that ld-relay does not find it, and that a list that stays the same costs one
        # write each minute.
        self._confirmed: Attributes = {
            "namespace": {"S": f"{key}:relayConfirmed"},
            "key": {"S": "confirmed"},
        }

    def __repr__(self) -> str:
        return f"<DynamoDBList {self._table.name!r} {self._namespace!r}>"

    @property
    def label(self) -> str:
        """The place for log lines."""
        return f'key "{self._namespace}" of table "{self._table.name}" in DynamoDB'

    async def load(self) -> EnvironmentList | None:
        """Return what is stored; None if there is nothing.

        Raises:
            InvalidData: nothing of it is usable.
            StoreUnavailable: the service does not answer, or refuses.
        """
        sealed = await self._stored()
        if not sealed:
            return None
        confirmed = await self._table.get(self._confirmed) or {}
        return await in_thread(lambda: self._opened(sealed, _content(confirmed)), "list")

    async def save(self, environments: EnvironmentList) -> None:
        """Make what is stored equal to a list: what differs is written, then the rest is removed.

        Raises:
            StoreUnavailable: the service does not answer, or refuses; some items may be written.
        """
        sealed = await self._stored()
        puts = await in_thread(lambda: self._differing(sealed, environments), "list")
        names = entries_of(environments)
        await self._table.write({"PutRequest": {"Item": each}} for each in puts)
        await self._table.write(
            {"DeleteRequest": {"Key": self._key(name)}} for name in sealed if name not in names
        )
        if environments.confirmed is not None:
            time = b"%d" % round(environments.confirmed * 1000)
            content = self._entries.seal.close(time, self._entries.owner.encode())
            await self._table.call("put_item", Item={**self._confirmed, "item": {"B": content}})

    async def aclose(self) -> None:
        """End the share in the client."""
        await self._table.aclose()

    async def _stored(self) -> Mapping[str, bytes]:
        """Return the encrypted entries by name; what else is in the namespace is left alone."""
        items = await self._table.query(self._namespace)
        return {each["key"]["S"]: _content(each) for each in items if is_name(each["key"]["S"])}

    def _key(self, name: str) -> Attributes:
        return {"namespace": {"S": self._namespace}, "key": {"S": name}}

    def _opened(self, sealed: Mapping[str, bytes], confirmed: bytes) -> EnvironmentList:
        result = self._entries.open(sealed)
        try:
            time = self._entries.seal.open(confirmed, self._entries.owner.encode())
        except InvalidData:
            return result  # ld-relay has stored it, which tells no time
        return replace(result, confirmed=int(time) / 1000)

    def _differing(
        self, sealed: Mapping[str, bytes], environments: EnvironmentList
    ) -> list[Attributes]:
        """Return the items of the entries that are not stored as they are."""
        entries, seal = self._entries, self._entries.seal
        items: list[dict[str, Any]] = []
        for name, content in entries_of(
            replace(environments, confirmed=None), entries.owner
        ).items():
            try:
                is_stored = seal.open(sealed.get(name, b"")) == content
            except InvalidData:
                is_stored = False
            if not is_stored:
                items.append({**self._key(name), "item": {"B": seal.close(content)}})
        return items


def _content(item: Attributes) -> bytes:
    """Return the encrypted content of an item; empty if it has none."""
    content: bytes = item.get("item", {}).get("B", b"")
    return content
