"""Access to Redis: work on the keys of one slot, and reads of any keys.

redis-py's exceptions are translated here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from redis.crc import key_slot
from redis.exceptions import RedisError

from relay.errors import StoreUnavailable
from relay.stores.redis.connections import Address, Command, Connections, RedisConnection
from relay.stores.redis.placement import Placement

MAX_REDIRECTS = 16
"""Attempts of a command that servers of a cluster send on, or cannot carry out at the moment."""

_IN_CIRCLES = "the servers of the cluster keep sending a key on to each other"

T = TypeVar("T")


class RedisClient:
    """Access to one server, a cluster, or the master that Sentinels name; shared by stores.

    Args:
        placement: knows which server has a key.
        connections: to the servers.
        label: address for people, without secrets.
    """

    def __init__(self, placement: Placement, connections: Connections, label: str) -> None:
        self.label = label
        self._placement = placement
        self._connections = connections
        self._users: set[object] = set()

    def __repr__(self) -> str:
        return f"<RedisClient {self.label} of {len(self._users)} users>"

    def join(self, user: object) -> None:
        """Note that somebody uses the connections from now on."""
        self._users.add(user)

    async def leave(self, user: object) -> None:
        """Note that somebody needs the connections no more; the last one closes them."""
        self._users.discard(user)
        if not self._users:
            await self._placement.aclose()
            await self._connections.aclose()

    def divides(self, keys: Iterable[str]) -> bool:
        """Return whether keys may be on different servers, so that no transaction holds them."""
        return len(set(map(self._slot, keys))) > 1

    async def run(self, key: str, work: Callable[[RedisConnection], Awaitable[T]]) -> T:
        """Return the result of work with a connection to the server that has a key.

        Args:
            key: a key; the work uses only keys of its slot.
            work: is repeated if the keys turn out to be elsewhere; whatever it has changed before
                that, it changes again.

        Raises:
            StoreUnavailable: the server cannot be reached, or refuses.
        """
        return await self._run(self._slot(key), work)

    async def _run(
        self,
        slot: int,
        work: Callable[[RedisConnection], Awaitable[T]],
        asked: Address | None = None,
    ) -> T:
        failure: Exception | None = None
        for _ in range(MAX_REDIRECTS):
            address = asked or await self._placement.address_of(slot)
            try:
                async with self._connections.lend(address, asking=bool(asked)) as connection:
                    return await work(connection)
            except (RedisError, OSError, TimeoutError) as e:
                failure = e
                asked = await self._placement.redirected(e, address)
        raise StoreUnavailable(_IN_CIRCLES) from failure

    async def execute(self, *command: str | bytes) -> Any:
        """Run one command at the server that has its key; return the reply."""
        [reply] = await self.execute_all([command])
        return reply

    async def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands, each at the server that has its key; return their replies.

        Commands for one server go in one batch, all batches at a time.

        Args:
            commands: the first argument of each is its only key, or all its keys are in one slot;
                the keys of a script follow their number.

        Raises:
            StoreUnavailable: a server cannot be reached, or refuses.
        """
        if not self._placement.is_cluster:
            return await self._run(0, lambda connection: connection.execute_all(commands))
        replies: list[Any] = [None] * len(commands)
        waiting: Sequence[int] = range(len(commands))
        for _ in range(MAX_REDIRECTS):
            addresses = await self._fill(replies, commands, waiting)
            waiting = []
            for index, reply in enumerate(replies):
                if not isinstance(reply, Exception):
                    continue
                asked = await self._placement.redirected(reply, addresses[index])
                if asked is None:
                    waiting.append(index)
                    continue
                command = commands[index]
                replies[index] = await self._run(
                    self._slot(_key_of(command)), partial(_execute, command), asked
                )
            if not waiting:
                return replies
        raise StoreUnavailable(_IN_CIRCLES)

    async def _fill(
        self, replies: list[Any], commands: Sequence[Command], indexes: Sequence[int]
    ) -> dict[int, Address]:
        """Put the replies of some commands in their places, errors of the servers among them.

        Returns:
            The server of each command.
        """
        groups: dict[Address, list[int]] = {}
        for index in indexes:
            address = await self._placement.address_of(self._slot(_key_of(commands[index])))
            groups.setdefault(address, []).append(index)

        async def fill(those: Sequence[int]) -> None:
            batch = [commands[index] for index in those]
            got = await self._run(
                self._slot(_key_of(batch[0])),
                lambda connection: connection.execute_all(batch, return_errors=True),
            )
            for index, reply in zip(those, got, strict=True):
                replies[index] = reply

        try:
            async with asyncio.TaskGroup() as tasks:
                for those in groups.values():
                    tasks.create_task(fill(those))
        except ExceptionGroup as failures:
            failure = failures.exceptions[0]
            raise failure from failure.__cause__
        return {index: address for address, those in groups.items() for index in those}

    def _slot(self, key: str | bytes) -> int:
        if not self._placement.is_cluster:
            return 0
        return key_slot(key.encode() if isinstance(key, str) else key)


def _key_of(command: Command) -> str | bytes:
    return command[3 if command[0] == "EVAL" else 1]


async def _execute(command: Command, connection: RedisConnection) -> Any:
    return await connection.execute(*command)
