"""Event store in memory, for a relay without a spool directory or while the disk fails."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace, merge
from itertools import count, islice
from operator import attrgetter
from typing import NamedTuple

from relay.events.dedup import DedupWindow, dedup_key
from relay.events.store import (
    MAX_QUARANTINE,
    NO_EVICTIONS,
    PAYLOAD_OVERHEAD,
    Backlog,
    Batch,
    Limits,
    batch_id,
    fitting,
    half_ids,
    halves,
    max_payloads,
    part,
)
from relay.model.event import EventPayload, Partition

_log = logging.getLogger("relay.events")


class FixedBatch(NamedTuple):
    """A fixed batch: payloads, or elements `start` to `stop` of one that was too large alone."""

    payload_id: str
    payloads: Sequence[EventPayload]
    start: int = 0
    stop: int | None = None
    maybe_delivered: bool = False


class RejectedBatch(NamedTuple):
    """A quarantined payload, or a part of one."""

    batch: Batch
    reason: str
    body: bytes


class StoreContent(NamedTuple):
    """Everything in a store in memory, to be moved to a disk.

    Args:
        payloads: waiting payloads in the order of their arrival.
        batches: batches of these payloads that are not suspects, in order.
        suspects: batches that were put aside, in that order.
        seen: second of arrival by deduplication key, oldest first.
        rejected: the quarantine, oldest first.
    """

    payloads: Sequence[EventPayload]
    batches: Sequence[FixedBatch]
    suspects: Sequence[FixedBatch]
    seen: Mapping[int, int]
    rejected: Sequence[RejectedBatch]


@dataclass(slots=True)
class _Queue:
    """Queue of one partition, in order; the batches are older than the other payloads."""

    partition: Partition
    number: int
    batches: deque[FixedBatch] = field(default_factory=deque)
    payloads: deque[EventPayload] = field(default_factory=deque)
    """Payloads that are not in a batch yet."""
    suspects: deque[FixedBatch] = field(default_factory=deque)
    """Batches that were put aside, in that order. They are older than all others."""

    @property
    def fixed(self) -> list[FixedBatch]:
        """All batches, those with the oldest payloads first."""
        suspects = sorted(
            self.suspects, key=lambda fixed: (fixed.payloads[0].received, fixed.start)
        )
        return [*suspects, *self.batches]

    @property
    def oldest(self) -> float:
        """Time of arrival of the oldest payload."""
        if self.suspects:
            return min(fixed.payloads[0].received for fixed in self.suspects)
        return (self.batches[0].payloads if self.batches else self.payloads)[0].received

    @property
    def waiting(self) -> list[EventPayload]:
        """All payloads, each once."""
        # Parts of one payload share its list.
        lists = {id(fixed.payloads): fixed.payloads for fixed in self.fixed}
        return [payload for each in (*lists.values(), self.payloads) for payload in each]


class MemoryStore:
    """Event store without a file; it is lost with the process.

    Args:
        limits: limits of size and age.
    """

    def __init__(self, limits: Limits) -> None:
        self.evicted: Counter[str] = Counter()
        """Number of evicted payloads by environment, since `pop_evicted`."""
        self.sizes: Counter[str] = Counter()
        """Size in bytes of the waiting payloads, by environment."""
        self.size = 0
        """Their total size in bytes."""
        self.capacity = limits.memory
        self.recent = DedupWindow()
        self.rejected: deque[RejectedBatch] = deque()
        self._limits = limits
        self._queues: dict[Partition, _Queue] = {}
        self._numbers = count()
        self._order: list[tuple[float, int, _Queue]] = []
        """Heap of queues by age. Entries are lazy: a queue may be gone, or its oldest payload be
        younger than the entry says."""

    def __repr__(self) -> str:
        return f"<MemoryStore: {self.size} of {self.capacity} bytes, {len(self._queues)} queues>"

    def add(self, payloads: Sequence[EventPayload], /) -> list[bool]:
        """Store payloads; return for each whether it is new."""
        return [self.append(payload) for payload in payloads]

    def append(self, payload: EventPayload) -> bool:
        """Store a payload; return whether it is new."""
        if not self.recent.add(dedup_key(payload), payload.received):
            return False
        partition = payload.partition
        queue = self._queues.get(partition)
        if queue is None:
            queue = self._queues[partition] = _Queue(partition, next(self._numbers))
            heappush(self._order, (payload.received, queue.number, queue))
        queue.payloads.append(payload)
        size = len(payload.body) + PAYLOAD_OVERHEAD
        self.size += size
        self.sizes[partition.environment] += size
        while self.size > self.capacity:
            self._evict(self._oldest())
        return True

    def take(
        self, partition: Partition, /, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a partition and its bodies; None if nothing is waiting."""
        queue = self._queues.get(partition)
        if queue is None:
            return None
        more = True
        if queue.suspects and (suspects or not (queue.batches or queue.payloads)):
            fixed = queue.suspects[0]
        else:
            if not queue.batches:
                _fix(queue)
                more = bool(queue.payloads or queue.suspects)
            fixed = queue.batches[0]
        batch = Batch(
            partition,
            fixed.payload_id,
            len(fixed.payloads),
            fixed.payloads[0].received,
            more,
            fixed.maybe_delivered,
        )
        return batch, [part(payload.body, fixed.start, fixed.stop) for payload in fixed.payloads]

    def finish(self, batch: Batch, /) -> int | None:
        """Remove a batch; return the number of payloads that are complete, None if unknown."""
        fixed = self._find(batch)
        return None if fixed is None else self._remove(self._queues[batch.partition], fixed)

    def split(self, batch: Batch, /) -> bool | None:
        """Replace a batch by its halves; return False if it cannot be split, None if unknown."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        one, other = half_ids(fixed.payload_id)
        payloads, middle = fixed.payloads, len(fixed.payloads) // 2
        if middle:
            parts = [FixedBatch(one, payloads[:middle]), FixedBatch(other, payloads[middle:])]
        else:
            cut = halves(batch.partition, payloads[0].body, fixed.start, fixed.stop)
            if cut is None:
                return False
            parts = [
                FixedBatch(one, payloads, cut[0], cut[1]),
                FixedBatch(other, payloads, cut[1], cut[2]),
            ]
        batches = _list_of(self._queues[batch.partition], fixed)
        position = batches.index(fixed)
        batches[position] = parts[0]
        batches.insert(position + 1, parts[1])
        return True

    def put_aside(self, batch: Batch, /) -> bool | None:
        """Make a batch a suspect; return whether anything but suspects is waiting."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        queue = self._queues[batch.partition]
        _list_of(queue, fixed).remove(fixed)
        queue.suspects.append(fixed)
        return bool(queue.batches or queue.payloads)

    def mark_maybe_delivered(self, batch: Batch, /) -> bool | None:
        """Record that upstream may have a batch already; return True, None if unknown."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        batches = _list_of(self._queues[batch.partition], fixed)
        batches[batches.index(fixed)] = fixed._replace(maybe_delivered=True)
        return True

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None, /
    ) -> int | None:
        """Move payloads to the bounded quarantine; return the number that are complete."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        bad = fixed.payloads if only is None else [fixed.payloads[position] for position in only]
        for payload in bad:
            body = part(payload.body, fixed.start, fixed.stop)
            self.rejected.append(RejectedBatch(batch, reason, body))
        size = sum(len(rejected.body) + PAYLOAD_OVERHEAD for rejected in self.rejected)
        while size > min(MAX_QUARANTINE, self.capacity):
            size -= len(self.rejected.popleft().body) + PAYLOAD_OVERHEAD
        queue = self._queues[batch.partition]
        if len(bad) == len(fixed.payloads):
            return self._remove(queue, fixed)
        left = [
            payload
            for position, payload in enumerate(fixed.payloads)
            if position not in set(only or ())
        ]
        batches = _list_of(queue, fixed)
        batches[batches.index(fixed)] = fixed._replace(payloads=left)
        return self._forget(queue, bad)

    def expire(self, now: float, /) -> None:
        """Evict payloads that are too old."""
        for queue in list(self._queues.values()):
            limit = now - self._limits.age_in(queue.partition)
            while queue.partition in self._queues and queue.oldest < limit:
                self._evict(queue)
        self.recent.expire(now)

    def backlog(self) -> list[Backlog]:
        """Return the backlog of each partition that is not empty."""
        return [
            Backlog(queue.partition, len(queue.waiting), queue.oldest)
            for queue in self._queues.values()
        ]

    def pop_evicted(self) -> Mapping[str, int]:
        """Return the number of payloads evicted since the last call, by environment."""
        if not self.evicted:
            return NO_EVICTIONS  # as after nearly every transaction
        evicted, self.evicted = self.evicted, Counter()
        return evicted

    def export(self) -> StoreContent:
        """Return everything, for another store."""
        queues = self._queues.values()
        return StoreContent(
            list(merge(*(queue.waiting for queue in queues), key=attrgetter("received"))),
            [fixed for queue in queues for fixed in _with_first_marked(queue.batches)],
            [fixed for queue in queues for fixed in queue.suspects],
            self.recent.seen,
            self.rejected,
        )

    def close(self) -> None:
        """Log the payloads that are lost with the store."""
        lost = sum(len(queue.waiting) for queue in self._queues.values())
        if lost:
            _log.warning("%d posts of events could not be delivered and are lost", lost)

    def _find(self, batch: Batch) -> FixedBatch | None:
        queue = self._queues.get(batch.partition)
        batches = () if queue is None else (*queue.batches, *queue.suspects)
        return next((fixed for fixed in batches if fixed.payload_id == batch.payload_id), None)

    def _remove(self, queue: _Queue, fixed: FixedBatch) -> int:
        """Remove a batch and its payloads; return how many, 0 while other parts of one wait."""
        _list_of(queue, fixed).remove(fixed)
        payloads: Sequence[EventPayload] = fixed.payloads
        if fixed.stop is not None and any(other.payloads is payloads for other in queue.fixed):
            payloads = ()
        return self._forget(queue, payloads)

    def _evict(self, queue: _Queue) -> None:
        """Evict the oldest payload of a queue, and its whole batch: a batch never changes."""
        batches = queue.fixed
        if not batches:
            payloads: Sequence[EventPayload] = (queue.payloads.popleft(),)
        else:
            payloads = batches[0].payloads
            for fixed in batches:
                if fixed.payloads is payloads:
                    _list_of(queue, fixed).remove(fixed)
        self.evicted[queue.partition.environment] += self._forget(queue, payloads)

    def _forget(self, queue: _Queue, payloads: Sequence[EventPayload]) -> int:
        """Subtract payloads that have left a queue; return how many."""
        size = sum(len(payload.body) + PAYLOAD_OVERHEAD for payload in payloads)
        self.size -= size
        self.sizes[queue.partition.environment] -= size
        if not queue.payloads and not queue.batches and not queue.suspects:
            del self._queues[queue.partition]
            if len(self._order) > 2 * len(self._queues) + 8:
                self._order = [entry for entry in self._order if self._is_current(entry[2])]
                heapify(self._order)
        return len(payloads)

    def _oldest(self) -> _Queue:
        """Return the queue with the oldest payload."""
        while True:
            came, number, queue = self._order[0]
            if not self._is_current(queue):
                heappop(self._order)
            elif came < queue.oldest:
                heapreplace(self._order, (queue.oldest, number, queue))
            else:
                return queue

    def _is_current(self, queue: _Queue) -> bool:
        return self._queues.get(queue.partition) is queue


def _fix(queue: _Queue) -> None:
    """Fix a batch of the oldest payloads of a queue that has no other."""
    first = list(islice(queue.payloads, max_payloads(queue.partition)))
    members = first[: fitting([len(payload.body) for payload in first])]
    for _ in members:
        queue.payloads.popleft()
    payload_id = batch_id([payload.payload_id for payload in members])
    queue.batches.append(FixedBatch(payload_id, members))


def _with_first_marked(batches: Sequence[FixedBatch]) -> list[FixedBatch]:
    """Return batches of a partition; the first one may be on its way upstream at this moment."""
    return [
        each._replace(maybe_delivered=True) if not n else each for n, each in enumerate(batches)
    ]


def _list_of(queue: _Queue, fixed: FixedBatch) -> deque[FixedBatch]:
    """Return the list in which a batch is waiting: the suspects or the others."""
    return queue.suspects if fixed in queue.suspects else queue.batches
