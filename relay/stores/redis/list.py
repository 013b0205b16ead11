"""The list of environments in Redis, as late releases of ld-relay store it (newer-versions 10.2).

It is a hash with an encrypted field for each environment and payload filter.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.aio import in_thread
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList
from relay.stores.redis.client import RedisClient
from relay.stores.redis.connections import commit
from relay.stores.redis.layout import chunks, pairs_of
from relay.stores.sealing import SealedEntries


class RedisList:
    """The list of one automatic configuration key.

    Args:
        client: access to the servers.
        key: key of the hash.
        owner: the automatic configuration key; only its list is used.
        encryption_key: encrypts the fields; empty for the automatic configuration key.
    """

    def __init__(
        self, client: RedisClient, key: str, owner: AutoConfigKey, encryption_key: Secret
    ) -> None:
        self._client = client
        self._hash = key
        self._entries = SealedEntries(owner, encryption_key)
        client.join(self)

    def __repr__(self) -> str:
        return f"<RedisList {self._client.label} {self._hash!r}>"

    @property
    def label(self) -> str:
        """The place for log lines."""
        return f'key "{self._hash}" of Redis at {self._client.label}'

    async def load(self) -> EnvironmentList | None:
        """Return what is stored; None if there is nothing.

        Raises:
            InvalidData: nothing of it is usable.
            StoreUnavailable: the database does not answer.
        """
        fields = pairs_of(await self._client.execute("HGETALL", self._hash))
        return await in_thread(lambda: self._opened(fields), "list") if fields else None

    async def save(self, environments: EnvironmentList) -> None:
        """Replace what is stored, in one transaction.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        sealed = await in_thread(lambda: self._entries.close(environments), "list")
        fields = chunks(sealed.items())
        commands = [("DEL", self._hash), *(("HSET", self._hash, *chunk) for chunk in fields)]
        await self._client.run(self._hash, lambda connection: commit(connection, commands))

    async def aclose(self) -> None:
        """Close all connections, unless others use them."""
        await self._client.leave(self)

    def _opened(self, fields: Mapping[bytes, bytes]) -> EnvironmentList:
        sealed = {name.decode(errors="replace"): value for name, value in fields.items()}
        return self._entries.open(sealed)
