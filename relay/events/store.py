"""Posts that wait and the batches made of them: what the stores in memory and on disk share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from relay.model.event import EventPayload, Partition

MAX_BATCH = 1024 * 1024
"""Bytes of the posts of one batch, unless it is one post: what upstream surely takes at once, as
SDKs send as much when they are busy, and little to send again."""

MAX_POSTS = 1000
"""Posts of one batch."""


MAX_QUARANTINE = 16 * 1024 * 1024
"""Bytes of posts that upstream rejects and that are kept for people to look at."""

POST_OVERHEAD = 256
"""Bytes that a post needs beside its body."""

_SPLITS = uuid.UUID("6b0f5f0e-3c56-4d0e-9c1e-6a1f8f2f7a54")
"""Names of halves are derived below it: the same halves have the same ids, whoever splits."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Posts of one lane that go upstream in one request; once fixed, it never changes.

    Args:
        partition: whose posts.
        payload_id: tells upstream that it has the batch already.
        posts: how many.
        oldest: when the first of them came, in Unix seconds.
        more: whether others may wait behind it since before it was fixed.
    """

    partition: Partition
    payload_id: str
    posts: int
    oldest: float
    more: bool = field(default=True, compare=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait, and how long; the oldest goes first.

    Args:
        disk: bytes on disk.
        memory: bytes while there is no disk.
        age: seconds that events are worth delivering.
        diagnostic_age: the same of diagnostics.
    """

    disk: int = 1024**3
    memory: int = 8 * 1024 * 1024
    age: float = 7 * 86400.0
    diagnostic_age: float = 3600.0

    def age_in(self, lane: Partition) -> float:
        """Return the seconds that the posts of a lane are worth delivering."""
        return self.diagnostic_age if lane.endpoint.diagnostic else self.age


class Backlog(NamedTuple):
    """What waits in a lane."""

    partition: Partition
    posts: int
    oldest: float


class EventStore(Protocol):
    """Where posts wait. What is done to a batch gives None if the store does not know it."""

    # Suspects are batches that were put aside: the others go before them.

    def add(self, posts: Sequence[EventPayload], /) -> list[bool]:
        """Take posts; return of each whether it is new. Its payload id may be known already."""

    def take(
        self, lane: Partition, /, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a lane and its bodies, fixed now or before; None without.

        Args:
            lane: whose.
            suspects: prefer those that were put aside; of them the one put aside first.
        """

    def finish(self, batch: Batch, /) -> int | None:
        """Forget a batch; return the posts that are done with."""

    def split(self, batch: Batch, /) -> bool | None:
        """Fix two halves in place of a batch; return whether it has two."""

    def put_aside(self, batch: Batch, /) -> bool | None:
        """Let the others go before a batch; return whether others than suspects wait."""

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None, /
    ) -> int | None:
        """Keep posts of a batch for people to look at; return how many are done with.

        Args:
            batch: whose posts.
            reason: for people.
            only: places in the batch; None for all. The others keep its id.
        """

    def expire(self, now: float, /) -> None:
        """Remove what is too old."""

    def backlog(self) -> list[Backlog]:
        """Return the lanes in which something waits."""


def fitting(sizes: Sequence[int]) -> int:
    """Return how many of the first posts go into one batch: at least one."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > MAX_BATCH:
            return max(count, 1)
    return len(sizes)


def max_payloads(partition: Partition) -> int:
    """Return how many posts of a lane may go together; diagnostics never do."""
    return 1 if partition.endpoint.diagnostic else MAX_POSTS


def batch_id(payload_ids: Sequence[str]) -> str:
    """Return the id of a new batch, from those of its members: one alone keeps its own."""
    return (len(payload_ids) == 1 and payload_ids[0]) or str(uuid.uuid4())


def half_ids(payload_id: str) -> tuple[str, str]:
    """Return the ids of the halves of a batch."""
    return str(uuid.uuid5(_SPLITS, f"{payload_id}/0")), str(uuid.uuid5(_SPLITS, f"{payload_id}/1"))


def elements(body: bytes) -> list[bytes] | None:
    """Return the texts of the elements of an array; None if it is not one."""
    try:
        return [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def part(body: bytes, start: int, stop: int | None) -> bytes:
    """Return an array with the elements of a post from `start` to `stop`; all of it without."""
    if stop is None:
        return body
    return b"[" + b",".join((elements(body) or [])[start:stop]) + b"]"


def halves(
    partition: Partition, body: bytes, start: int, stop: int | None
) -> tuple[int, int, int] | None:
    """Return where the two halves of a part of a post begin and end; None if it has no two."""
    found = None if partition.endpoint.diagnostic else elements(body)
    if found is None:
        return None
    end = len(found) if stop is None else stop
    return None if end - start < 2 else (start, (start + end) // 2, end)  # noqa: PLR2004 - halves
