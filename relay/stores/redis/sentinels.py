"""Redis Sentinels name the master of the moment."""

from __future__ import annotations

from collections.abc import Sequence

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoPermissionError, ReadOnlyError, RedisError

from relay.errors import StoreUnavailable
from relay.stores.redis.connections import Address, Connections
from relay.stores.redis.refusals import reason_of


class Sentinels:
    """Everything is on one master, which may become another one.

    Args:
        addresses: of the Sentinels.
        master: name under which they know the servers.
        connections: to the Sentinels.
    """

    is_cluster = False

    def __init__(self, addresses: Sequence[Address], master: str, connections: Connections) -> None:
        self._addresses = list(addresses)
        self._name = master
        self._connections = connections
        self._master: Address | None = None

    def __repr__(self) -> str:
        return f"<Sentinels of {self._name!r}: {self._master}>"

    async def address_of(self, slot: int) -> Address:  # noqa: ARG002 - the contract's
        """Return the master; ask the Sentinels one after the other if it is not known.

        Raises:
            StoreUnavailable: no Sentinel can name it.
        """
        if self._master is not None:
            return self._master
        failure = f'no Sentinel knows a master "{self._name}" (check REDIS_SENTINEL_MASTER)'
        for address in self._addresses:
            try:
                async with self._connections.lend(address) as connection:
                    reply = await connection.execute(
                        "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name
                    )
            except (RedisError, OSError, TimeoutError) as e:
                failure = f"no Sentinel answers: {reason_of(e, 'REDIS_SENTINEL')}"
                continue
            if reply is not None:
                host, port = reply
                self._master = host.decode(), int(port)
                # The one that knows is asked first from now on.
                self._addresses.remove(address)
                self._addresses.insert(0, address)
                return self._master
        raise StoreUnavailable(failure)

    async def redirected(
        self,
        error: Exception,
        address: Address,  # noqa: ARG002 - the contract's
    ) -> Address | None:
        """Forget the master, and raise: after a failover there is another one."""
        self._master = None
        raise StoreUnavailable(reason_of(error)) from error

    async def aclose(self) -> None:
        """Close the connections to the Sentinels."""
        await self._connections.aclose()


async def require_master(connection: AbstractConnection) -> None:
    """Make sure that a server is a master: a Sentinel may not know yet that it is none.

    Raises:
        ReadOnlyError: it is a replica.
    """
    await connection.send_command("ROLE")
    try:
        role = await connection.read_response()
    except NoPermissionError:
        return  # writes show it
    if role[0] != b"master":
        raise ReadOnlyError(
            "the Sentinels still name a server that is a replica", status_code="READONLY"
        )
