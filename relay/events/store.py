"""Batches, limits and the contract of event stores: the parts shared by memory and disk."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec
from msgspec import Struct

from relay import randomness
from relay.model.event import EventPayload, Partition

MAX_BATCH = 1024 * 1024
"""Maximum size in bytes of the payloads of one batch; a larger payload is a batch of its own.
Upstream certainly accepts as much, as busy SDKs send as much, and it is cheap to send again."""

MAX_PAYLOADS = 1000
"""Maximum number of payloads in one batch."""


MAX_QUARANTINE = 16 * 1024 * 1024
"""Maximum size in bytes of the quarantine: rejected payloads, kept for inspection."""

PAYLOAD_OVERHEAD = 256
"""Bytes that a payload needs beside its body."""

NO_EVICTIONS: Mapping[str, int] = MappingProxyType({})

_SPLITS = uuid.UUID("6b0f5f0e-3c56-4d0e-9c1e-6a1f8f2f7a54")
"""Namespace of the ids of halves: the same halves get the same ids, even after a restart."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Payloads of one partition that go upstream in one request; once fixed, it never changes.

    Args:
        partition: partition of all its payloads.
        payload_id: id by which upstream recognises a repeated batch.
        payloads: number of payloads.
        oldest: time of arrival of the first one, in Unix seconds.
        more: True if other payloads may have been waiting when it was fixed.
        maybe_delivered: True if upstream may have it already: an attempt has ended without an
            answer, or a process may have ended during one.
    """

    partition: Partition
    payload_id: str
    payloads: int
    oldest: float
    more: bool = field(default=True, compare=False)
    maybe_delivered: bool = field(default=False, compare=False)


class Limits(Struct, frozen=True):
    """Limits of size and age; beyond them the oldest payloads are evicted.

    Args:
        disk: maximum size on disk, in bytes.
        memory: maximum size while there is no disk, in bytes.
        age: seconds for which events are worth delivering.
        diagnostic_age: the same for diagnostics.
    """

    disk: int = 1024**3
    memory: int = 8 * 1024 * 1024
    age: float = 7 * 86400.0
    diagnostic_age: float = 3600.0

    def age_in(self, partition: Partition) -> float:
        """Return the seconds for which payloads of a partition are worth delivering."""
        return self.diagnostic_age if partition.endpoint.diagnostic else self.age


class Backlog(NamedTuple):
    """Number of payloads waiting in a partition, and the time of arrival of the oldest."""

    partition: Partition
    payloads: int
    oldest: float


class EventStore(Protocol):
    """Queues of payloads, one for each partition.

    Operations on a batch return None if the store does not have it.
    """

    # Suspects are batches that were put aside: the others are delivered before them.

    def add(self, payloads: Sequence[EventPayload], /) -> list[bool]:
        """Store payloads; return for each whether it is new, that is, not a known id."""

    def take(
        self, partition: Partition, /, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a partition and its bodies; None if nothing is waiting.

        The batch stays in the store: until it is finished, split, put aside or quarantined, it is
        returned again, unchanged.

        Args:
            partition: partition to deliver.
            suspects: prefer suspects, the one first that was put aside first.
        """

    def finish(self, batch: Batch, /) -> int | None:
        """Remove a batch; return the number of payloads that are complete."""

    def split(self, batch: Batch, /) -> bool | None:
        """Replace a batch by its halves; return False if it cannot be split."""

    def put_aside(self, batch: Batch, /) -> bool | None:
        """Make a batch a suspect; return whether anything but suspects is waiting."""

    def mark_maybe_delivered(self, batch: Batch, /) -> bool | None:
        """Record that upstream may have a batch already; return True."""

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None, /
    ) -> int | None:
        """Move payloads of a batch to the quarantine; return the number that are complete.

        Args:
            batch: batch of the payloads.
            reason: explanation for people.
            only: positions in the batch; None for all. The others keep the batch's id.
        """

    def expire(self, now: float, /) -> None:
        """Evict payloads that are too old."""

    def backlog(self) -> list[Backlog]:
        """Return the backlog of each partition that is not empty."""

    def pop_evicted(self) -> Mapping[str, int]:
        """Return the number of payloads evicted since the last call, by environment."""


def fitting(sizes: Sequence[int]) -> int:
    """Return how many of the first payloads fit into one batch: at least one."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > MAX_BATCH:
            return max(count, 1)
    return len(sizes)


def max_payloads(partition: Partition) -> int:
    """Return the maximum number of payloads in a batch; diagnostics are never joined."""
    return 1 if partition.endpoint.diagnostic else MAX_PAYLOADS


def batch_id(payload_ids: Sequence[str]) -> str:
    """Return the id of a new batch; a payload alone keeps its own."""
    return (len(payload_ids) == 1 and payload_ids[0]) or randomness.new_id()


def half_ids(payload_id: str) -> tuple[str, str]:
    """Return the ids of the halves of a batch."""
    return str(uuid.uuid5(_SPLITS, f"{payload_id}/0")), str(uuid.uuid5(_SPLITS, f"{payload_id}/1"))


def elements(body: bytes) -> list[bytes] | None:
    """Return the texts of the elements of a JSON array; None if the body is not one."""
    try:
        return [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def part(body: bytes, start: int, stop: int | None) -> bytes:
    """Return an array of the elements from `start` to `stop`; the whole body without a stop."""
    if stop is None:
        return body
    return b"[" + b",".join((elements(body) or [])[start:stop]) + b"]"


def halves(
    partition: Partition, body: bytes, start: int, stop: int | None
) -> tuple[int, int, int] | None:
    """Return start, middle and end of a part of a payload; None if it cannot be split."""
    texts = None if partition.endpoint.diagnostic else elements(body)
    if texts is None:
        return None
    end = len(texts) if stop is None else stop
    return None if end - start < 2 else (start, (start + end) // 2, end)  # noqa: PLR2004 - halves
