"""Connections to Redis servers for exclusive use, each command within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import (
    AbstractConnection,
    BlockingConnectionPool,
    UnixDomainSocketConnection,
)
from redis.exceptions import RedisError, ResponseError

BATCH = 64
"""Small commands or replies after which other tasks can run: less than a millisecond."""

LARGE = 64 * 1024
"""Bytes of commands that are sent at a time."""

MAX_CONNECTIONS = 64
"""Connections to one server. All environments share them, and wait for each other beyond that."""

Command = Sequence[str | bytes]

Address = tuple[str, int]
"""Host and port of a server; the path of a Unix socket and 0."""


class RedisConnection:
    """A connection for exclusive use, for as long as `Connections.lend` lends it.

    Args:
        connection: of the library.
        read_timeout: seconds for each batch.
        asking: True to tell a server of a cluster that it is asked for a key on its way to it.
    """

    def __init__(
        self, connection: AbstractConnection, read_timeout: float, *, asking: bool = False
    ) -> None:
        self._connection = connection
        self._read_timeout = read_timeout
        self._preface: tuple[Command, ...] = (("ASKING",),) if asking else ()

    async def execute(self, *command: str | bytes) -> Any:
        """Send one command; return its reply."""
        [reply] = await self.execute_all([command])
        return reply

    async def execute_all(
        self, commands: Sequence[Command], *, return_errors: bool = False
    ) -> list[Any]:
        """Send commands in one batch; return their replies.

        Args:
            commands: none of them part of a transaction.
            return_errors: True to return an error of the server in place of the reply.
        """
        preface = self._preface
        await self._send([each for command in commands for each in (*preface, command)])
        step = len(preface) + 1
        replies = await self._replies(step * len(commands), return_errors=return_errors)
        return replies[step - 1 :: step]

    async def transaction(self, commands: Iterable[Command]) -> list[Any] | None:
        """Run commands as one transaction: a small one in one round trip, others in two.

        Returns:
            The replies, errors among them; None if another writer has changed a watched key.
        """
        batch: list[Command] = [*self._preface, ("MULTI",)]
        unread, size, is_first = 0, 0, True
        for command in commands:
            batch.append(command)
            size += sum(map(len, command))
            if size < LARGE and len(batch) < BATCH:
                continue
            await self._send(batch)
            unread += len(batch)
            if is_first:
                # A server that refuses the client closes the connection: read why, before the next.
                await self._replies(unread)
                unread, is_first = 0, False
            await asyncio.sleep(0)
            batch, size = [], 0
        await self._send([*batch, ("EXEC",)])
        await self._replies(unread + len(batch))
        [replies] = await self._replies(1)
        return None if replies is None else list(replies)

    async def _send(self, commands: Iterable[Command]) -> None:
        """Send commands. The library's own timeout can swallow a cancellation on Python 3.11."""
        async with asyncio.timeout(self._read_timeout):
            await self._connection.send_packed_command(_packed(commands))

    async def _replies(self, count: int, *, return_errors: bool = False) -> list[Any]:
        """Read replies; let other tasks run between batches."""
        replies: list[Any] = []
        while True:
            async with asyncio.timeout(self._read_timeout):
                for _ in range(min(BATCH, count - len(replies))):
                    try:
                        replies.append(await self._connection.read_response())
                    except ResponseError as e:
                        if not return_errors:
                            raise
                        replies.append(e)
            if len(replies) == count:
                return replies
            await asyncio.sleep(0)


class Connections:
    """Connections to any number of servers, all made alike.

    Args:
        arguments: of the library, for each connection.
        connect_timeout: seconds for a new connection.
        read_timeout: seconds for each batch of commands.
        limit: number of connections to one server.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        connect_timeout: float,
        read_timeout: float,
        limit: int = MAX_CONNECTIONS,
    ) -> None:
        self._arguments = arguments
        self._limit = limit
        self._is_local = arguments["connection_class"] is UnixDomainSocketConnection
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._pools: dict[Address, BlockingConnectionPool] = {}

    def __repr__(self) -> str:
        return f"<Connections to {len(self._pools)} servers>"

    @asynccontextmanager
    async def lend(
        self, address: Address, *, asking: bool = False
    ) -> AsyncIterator[RedisConnection]:
        """Acquire a connection for exclusive use; close all idle ones after a failure.

        Closing a connection discards its unfinished transaction. After a failover, new connections
        resolve the server's name again.
        """
        pool = self._pool(address)
        try:
            async with asyncio.timeout(self._connect_timeout + self._read_timeout):
                connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                yield RedisConnection(connection, self._read_timeout, asking=asking)
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            finally:
                await pool.release(connection)
                if self._pools.get(address) is not pool:
                    await pool.disconnect(inuse_connections=False)
        except (RedisError, OSError, TimeoutError):
            await pool.disconnect(inuse_connections=False)
            raise

    def _pool(self, address: Address) -> BlockingConnectionPool:
        pool = self._pools.get(address)
        if pool is None:
            host, port = address
            place = {"path": host} if self._is_local else {"host": host, "port": port}
            pool = self._pools[address] = BlockingConnectionPool(
                max_connections=self._limit, timeout=None, **self._arguments, **place
            )
        return pool

    async def keep(self, addresses: Collection[Address]) -> None:
        """Close the connections to all other servers, and forget these."""
        gone = [self._pools.pop(each) for each in self._pools.keys() - set(addresses)]
        for pool in gone:
            await pool.disconnect(inuse_connections=False)

    async def aclose(self) -> None:
        """Close all connections."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            await pool.aclose()


def _packed(commands: Iterable[Command]) -> bytes:
    """Return commands as sent; redis-py's own packing takes four times as long for small ones."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument.encode() if isinstance(argument, str) else argument
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


def raise_failure(replies: list[Any]) -> list[Any]:
    """Return the replies of a transaction; raise the error of a failed command."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


async def commit(connection: RedisConnection, commands: Iterable[Command]) -> bool:
    """Write in one transaction; return False if another writer has changed a watched key."""
    replies = await connection.transaction(commands)
    if replies is None:
        return False
    raise_failure(replies)
    return True
