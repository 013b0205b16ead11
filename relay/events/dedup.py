"""Window of recently accepted payload ids, which recognises an SDK's retries."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

from relay.model.event import EventPayload, EventsEndpoint

REMEMBERED = 600.0
"""Seconds for which payload ids are remembered, so that an SDK's own retry is not counted twice."""


MAX_REMEMBERED = 250_000
"""Maximum number of remembered payload ids: 400 payloads a second for the whole window, or 20 MB.
SDKs retry after a second, so even at a hundred times that rate their retries are recognised."""


ID_BYTES = 7
"""Size of a deduplication key. Longer integers take half as much memory again; the probability
that two keys collide in a full window is 1 in 300,000,000,000 payloads."""


def dedup_key(payload: EventPayload) -> int:
    """Return the deduplication key of a payload; 0 if it has no id.

    The environment and the endpoint are part of the key: ids are unique only within them.
    """
    if not payload.payload_id:
        return 0
    text = (
        _scope(payload.partition.environment, payload.partition.endpoint)
        + payload.payload_id.encode()
    )
    return int.from_bytes(blake2b(text, digest_size=ID_BYTES).digest(), "big")


@lru_cache(maxsize=1024)
def _scope(environment: str, endpoint: EventsEndpoint) -> bytes:
    return f"{environment}\0{endpoint.name}\0".encode()


class DedupWindow:
    """Deduplication keys of the payloads of the last `REMEMBERED` seconds."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        """Second of arrival by deduplication key, oldest first."""
        # Keys of one second share one integer object, which saves much memory.
        self._second = 0

    def __repr__(self) -> str:
        return f"<DedupWindow: {len(self.seen)} keys>"

    def add(self, key: int, received: float) -> bool:
        """Record a key, unless it is 0; return whether it is new."""
        if not key:
            return True
        if key in self.seen:
            return False
        second = int(received)
        if second != self._second:
            self._second = second
        self.seen[key] = self._second
        if len(self.seen) > MAX_REMEMBERED:
            self._forget_oldest(MAX_REMEMBERED // 16 + 1)
        return True

    def expire(self, now: float) -> None:
        """Forget the keys that are older than the window."""
        limit = now - REMEMBERED
        self._forget_oldest(
            next((n for n, at in enumerate(self.seen.values()) if at >= limit), None)
        )

    def forget(self, keys: Iterable[int]) -> None:
        """Forget the given keys."""
        for key in keys:
            self.seen.pop(key, None)

    def _forget_oldest(self, count: int | None) -> None:
        self.forget(list(islice(self.seen, count)))
