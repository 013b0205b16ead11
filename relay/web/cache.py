"""Response cache: what requests were answered with, until what it was made of changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from msgspec import Struct

from relay.bigsegments.memberships import Memberships
from relay.environment import Environment
from relay.model.payload import Payload
from relay.registry import Registry

ANY_PAYLOAD = Payload.of(())
"""Stands for the payload of an entry that does not depend on the environment's data."""


class _Sized(Struct, kw_only=True, eq=False):
    size: int = 0
    """Bytes that the entry takes with its key, but without what is kept elsewhere anyway."""
    memberships: Memberships | None = None
    """Memberships in big segments of which the entry was made; None if they do not matter."""


class CacheEntry(_Sized, eq=False):
    """Base of cached values: made of an environment, and perhaps of its data."""

    environment: Environment
    payload: Payload | None
    """The environment's data of which it was made, or `ANY_PAYLOAD`."""

    def __repr__(self) -> str:
        # Without the values: they can be large, and hold data of customers.
        state = "fresh" if self.is_fresh else "stale"
        return f"<{type(self).__name__} [{state}, {self.size} bytes]>"

    @property
    def is_fresh(self) -> bool:
        """True if the environment's data is still that of which the entry was made."""
        payload, memberships = self.payload, self.memberships
        is_fresh = payload is self.environment.payload or payload is ANY_PAYLOAD
        return is_fresh and (memberships is None or memberships.is_current)


EntryT = TypeVar("EntryT", bound=CacheEntry)


class ResponseCache(Generic[EntryT]):
    """LRU cache whose entries die with what they were made of.

    Any change of environments and credentials empties it: it may revoke the credential, or replace
    the settings, with which an entry was made. New data of an environment makes its entries stale.

    Args:
        registry: says when environments and credentials have changed.
        max_size: bytes of all entries.
    """

    def __init__(self, registry: Registry[Environment], max_size: int) -> None:
        self.size = 0
        """Bytes of all entries."""
        self._registry = registry
        self._generation = registry.generation
        self._max_size = max_size
        self._entries: OrderedDict[Hashable, EntryT] = OrderedDict()
        """Least recently used first."""
        self._payloads: dict[Environment, Payload | None] = {}
        """Payloads of the newest entries of each environment."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{len(self._entries)} entries, {self.size} bytes]>"

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> EntryT | None:
        """Return a fresh entry; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._registry.generation != self._generation:
            self._clear()
            return None
        payload = entry.payload  # as `is_fresh`, without its call: this is the hottest path
        if payload is entry.environment.payload or payload is ANY_PAYLOAD:
            self._entries.move_to_end(key)
            memberships = entry.memberships
            if memberships is None or memberships.is_current:
                return entry
            return None  # it may be fresh again when the memberships have been read again
        self._remove(key)
        return None

    def put(self, key: Hashable, entry: EntryT) -> None:
        """Keep an entry, and evict the least recently used ones if there are too many.

        Args:
            key: replaces the entry of an equal one.
            entry: made since the last change of environments and credentials.
        """
        if self._registry.generation != self._generation:
            self._clear()
        environment, payload = entry.environment, entry.payload
        if payload is not ANY_PAYLOAD and self._payloads.get(environment) is not payload:
            self._release(environment)
            self._payloads[environment] = payload
        if key in self._entries:
            self._remove(key)
        self._entries[key] = entry
        self.size += entry.size
        while self.size > self._max_size:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: Hashable) -> None:
        self.size -= self._entries.pop(key).size

    def _release(self, environment: Environment) -> None:
        """Remove the stale entries of an environment: each would keep its former data alive."""
        entries = self._entries.items()
        current = environment.payload
        stale = [
            key
            for key, entry in entries
            if entry.environment is environment
            and entry.payload is not current
            and entry.payload is not ANY_PAYLOAD
        ]
        for key in stale:
            self._remove(key)

    def _clear(self) -> None:
        self._entries.clear()
        self._payloads.clear()
        self.size = 0
        self._generation = self._registry.generation
