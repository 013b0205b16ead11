"""For how long the feed has been behind what a member holds, item by item; pure."""

from __future__ import annotations

from collections.abc import Iterable

from relay.model.item import Item
from relay.model.payload import Payload, distance
from relay.stores import Key

LIMIT = 2
"""Times of the patience after which other items are waited for no more."""


class Lag:
    """Items in which the feed is behind.

    Each has a time of its own, for an item that has come meanwhile deserves to be waited for as
    well. A feed that always lags in one item or another is waited for no longer than twice.

    Args:
        patience: seconds for which an item is waited for.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[Key, tuple[float, int]] = {}
        """Monotonic time since which the feed is behind, and the version that it has to reach."""
        self._name: tuple[float, str] | None = None
        """The same for the name of all data, where upstream gives them names with an order."""

    def __repr__(self) -> str:
        return f"<Lag in {len(self._since)} items>"

    def __bool__(self) -> bool:
        return bool(self._since) or self._name is not None

    def end(self) -> None:
        """Note that the feed is behind no more."""
        self._since.clear()
        self._name = None

    def is_over(self, held: Iterable[Item], feed: Payload, now: float) -> bool:
        """Return whether the feed has been waited for in vain.

        Args:
            held: items that the member has, and the feed has not, or older.
            feed: its data.
            now: monotonic time.
        """
        since = {}
        for item in held:
            key = item.kind, item.key
            begun, version = self._since.get(key, (now, item.version))
            known = feed.all(item.kind).get(item.key)
            if known is not None and known.version >= version:
                begun, version = now, item.version  # it moves
            since[key] = begun, version
        self._since = since
        waits = [now - begun for begun, _ in since.values()]
        longest, shortest = max(waits, default=0.0), min(waits, default=0.0)
        return shortest >= self._patience or longest >= LIMIT * self._patience

    def is_over_in_name(self, held: str, feed: str, now: float) -> bool:
        """Return whether the feed has been waited for in vain, whose data have an older name.

        Args:
            held: state of the data that the member has.
            feed: state of the feed's data.
            now: monotonic time.
        """
        begun, state = self._name or (now, held)
        steps = distance(state, feed)
        if steps is None or steps >= 0:
            begun, state = now, held  # it moves, or has begun to count anew
        self._name = begun, state
        return now - begun >= self._patience
