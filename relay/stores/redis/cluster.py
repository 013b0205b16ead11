"""Redis Cluster: which of its masters has the keys of a slot.

redis-py's own client of a cluster is not used. With each new map it makes tables of all slots,
which holds the event loop for 5 ms, and closes all connections. It repeats commands that may have
been carried out, and hides what a server answers to it.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import AskError, MovedError, RedisError, TryAgainError

from relay.aio import run_in_slices
from relay.errors import StoreUnavailable
from relay.steps import Steps
from relay.stores.redis.connections import Address, Connections
from relay.stores.redis.refusals import reason_of

MOVING_DELAY = 0.1
"""Seconds before the next attempt while the keys of a command are on two servers."""


class SlotMap:
    """Master of each slot, in ranges.

    Args:
        ranges: first slot, last slot and master, without overlaps.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, Address]]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [first for first, _, _ in self._ranges]

    def __repr__(self) -> str:
        return f"<SlotMap of {len(self._ranges)} ranges, {len(self.masters)} masters>"

    def master_of(self, slot: int) -> Address | None:
        """Return the master of a slot; None if it has none."""
        index = bisect_right(self._starts, slot) - 1
        if index < 0:
            return None
        _, last, master = self._ranges[index]
        return master if slot <= last else None

    @property
    def size(self) -> int:
        """Number of slots that have a master."""
        return sum(last - first + 1 for first, last, _ in self._ranges)

    @property
    def masters(self) -> frozenset[Address]:
        """All masters."""
        return frozenset(master for _, _, master in self._ranges)

    @classmethod
    def parse(cls, reply: Sequence[Sequence[Any]], asked: Address) -> Steps[SlotMap]:
        """Return the map of an answer to CLUSTER SLOTS, with a step for each range.

        Args:
            reply: of the server.
            asked: the server; its host is meant where the answer names none.
        """
        ranges = []
        for first, last, (host, port, *_), *_ in reply:
            name = host.decode() if host else ""
            ranges.append(
                (int(first), int(last), (name if name not in ("", "?") else asked[0], int(port)))
            )
            yield
        return cls(ranges)


class Cluster:
    """Keys are divided between the masters of a cluster.

    Args:
        addresses: of servers that know the others.
        connections: to all servers.
    """

    is_cluster = True

    def __init__(self, addresses: Sequence[Address], connections: Connections) -> None:
        self._addresses = tuple(addresses)
        self._connections = connections
        self._known: tuple[Address, ...] = ()
        """Servers to ask, the one that knows best first."""
        self._map: SlotMap | None = None
        self._lock = asyncio.Lock()
        self._attempts = 0
        self._failure = ""

    def __repr__(self) -> str:
        return f"<Cluster {self._map}>"

    async def address_of(self, slot: int) -> Address:
        """Return the master of a slot; ask the servers for their map if it is not known.

        Raises:
            StoreUnavailable: no server answers, or the slot has no master.
        """
        slots = self._map or await self._refreshed()
        address = slots.master_of(slot)
        if address is None:
            self._map = None
            raise StoreUnavailable(f"no server of the cluster has slot {slot}, so some are missing")
        return address

    async def _refreshed(self) -> SlotMap:
        attempts = self._attempts
        async with self._lock:
            if self._map is not None:
                return self._map
            if self._attempts > attempts:
                raise StoreUnavailable(self._failure)  # those who wait for an attempt share it
            self._attempts += 1
            self._map = await self._read()
            return self._map

    async def _read(self) -> SlotMap:
        """Return the map of the first server that knows all slots, or else the largest map.

        A server that has left the cluster, or has not joined it yet, knows none.
        """
        failures: list[Exception] = []
        best: tuple[Address, SlotMap] | None = None
        for address in dict.fromkeys((*self._known, *self._addresses)):
            try:
                async with self._connections.lend(address) as connection:
                    reply = await connection.execute("CLUSTER", "SLOTS")
            except (RedisError, OSError, TimeoutError) as e:
                failures.append(e)
                continue
            slots = await run_in_slices(SlotMap.parse(reply, address))
            if best is None or slots.size > best[1].size:
                best = address, slots
            if slots.size == REDIS_CLUSTER_HASH_SLOTS:
                break
        if best is None:
            self._failure = reason_of(failures[0])
            raise StoreUnavailable(self._failure) from failures[0]
        address, slots = best
        self._known = (address, *slots.masters)
        await self._connections.keep({*self._known, *self._addresses})
        return slots

    async def redirected(self, error: Exception, address: Address) -> Address | None:
        """Return the server that takes a slot over, or None if there is another map.

        Raises:
            StoreUnavailable: no redirection; maybe a failover is under way, so the map is
                forgotten.
        """
        match error:
            case MovedError():
                # The new owner knows best.
                self._map, self._known = None, (_target(error, address), *self._known)
                return None
            case AskError():
                return _target(error, address)
            case TryAgainError():
                await asyncio.sleep(MOVING_DELAY)
                return None
            case _:
                self._map = None
                raise StoreUnavailable(reason_of(error)) from error

    async def aclose(self) -> None:
        """Do nothing: the connections are those of the client."""


def _target(error: AskError, asked: Address) -> Address:
    """Return the server that a redirection names; it has the same host if that is left out."""
    return error.host or asked[0], error.port
