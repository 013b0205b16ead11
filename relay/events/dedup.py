"""The window of payload ids that were accepted lately."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from itertools import islice

from relay.model.event import EventPayload, EventsEndpoint

REMEMBERED = 600.0
"""Seconds for which payload ids are known, so that an SDK's own retry is not counted twice."""


MAX_REMEMBERED = 250_000
"""Payload ids that are known: those of 400 posts a second for all that time, or 20 MB. SDKs repeat
a post after a second, so at a hundred times that rate their retries are known still."""


ID_BYTES = 7
"""Of what is remembered of a payload id. As numbers, longer ones take half as much memory again;
that two of as many as are known are the same happens once in 300,000,000,000 posts."""


def dedup_key(post: EventPayload) -> int:
    """Return what is remembered of a payload id, 0 for none.

    SDKs of two environments do not share ids.
    """
    if not post.payload_id:
        return 0
    text = _scope(post.partition.environment, post.partition.endpoint) + post.payload_id.encode()
    return int.from_bytes(blake2b(text, digest_size=ID_BYTES).digest(), "big")


@lru_cache(maxsize=1024)
def _scope(environment: str, endpoint: EventsEndpoint) -> bytes:
    return f"{environment}\0{endpoint.name}\0".encode()


class DedupWindow:
    """The identities of posts of the last minutes."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        """The second in which each came; the first one comes first."""
        self._second = 0
        """That of the last one: the same object for many saves much memory."""

    def add(self, number: int, received: float) -> bool:
        """Note an identity, unless it is 0, that of none; return whether it is new."""
        if not number:
            return True
        if number in self.seen:
            return False
        second = int(received)
        if second != self._second:
            self._second = second
        self.seen[number] = self._second
        if len(self.seen) > MAX_REMEMBERED:
            self._forget(MAX_REMEMBERED // 16 + 1)
        return True

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        limit = now - REMEMBERED
        self._forget(next((n for n, at in enumerate(self.seen.values()) if at >= limit), None))

    def forget(self, numbers: Iterable[int]) -> None:
        """Forget these."""
        for number in numbers:
            self.seen.pop(number, None)

    def _forget(self, number: int | None) -> None:
        self.forget(list(islice(self.seen, number)))
