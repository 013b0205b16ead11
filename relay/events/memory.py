"""Events that wait in memory, where there is no disk, or while it does not work."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count, islice
from typing import NamedTuple

from relay.events.dedup import DedupWindow, dedup_key
from relay.events.store import (
    MAX_QUARANTINE,
    POST_OVERHEAD,
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


class _FixedBatch(NamedTuple):
    """A batch: posts, or of a post that was too large alone its elements from `start` to `stop`."""

    payload_id: str
    posts: Sequence[EventPayload]
    start: int = 0
    stop: int | None = None


class RejectedBatch(NamedTuple):
    """A post that upstream rejects, or a part of one."""

    batch: Batch
    reason: str
    body: bytes


@dataclass(slots=True)
class _Queue:
    """What waits in a lane, in order; the batches come before the other posts."""

    partition: Partition
    number: int
    batches: deque[_FixedBatch] = field(default_factory=deque)
    posts: deque[EventPayload] = field(default_factory=deque)
    suspects: deque[_FixedBatch] = field(default_factory=deque)
    """Batches that were put aside, in that order. They came before all the others."""

    @property
    def fixed(self) -> list[_FixedBatch]:
        """All batches, those with the oldest posts first."""
        suspects = sorted(self.suspects, key=lambda fixed: (fixed.posts[0].received, fixed.start))
        return [*suspects, *self.batches]

    @property
    def oldest(self) -> float:
        """When the first post came."""
        if self.suspects:
            return min(fixed.posts[0].received for fixed in self.suspects)
        return (self.batches[0].posts if self.batches else self.posts)[0].received

    @property
    def waiting(self) -> list[EventPayload]:
        """All posts, each once."""
        parts = {id(fixed.posts): fixed.posts for fixed in self.fixed}
        return [post for posts in (*parts.values(), self.posts) for post in posts]


class MemoryStore:
    """A store without a file; it is gone with the process.

    Args:
        limits: how much may wait, and how long.
    """

    def __init__(self, limits: Limits) -> None:
        self.evicted: Counter[str] = Counter()
        """Posts that were given up, by environment, until somebody takes note."""
        self.sizes: Counter[str] = Counter()
        """Bytes that wait, by environment."""
        self.size = 0
        """Bytes of all."""
        self.capacity = limits.memory
        self.recent = DedupWindow()
        self.rejected: deque[RejectedBatch] = deque()
        self._limits = limits
        self._queues: dict[Partition, _Queue] = {}
        self._numbers = count()
        self._order: list[tuple[float, int, _Queue]] = []
        """A heap of all lines. The time is that of a line's oldest post, or of an earlier one."""

    @property
    def queues(self) -> Iterable[_Queue]:
        """All lanes in which something waits."""
        return self._queues.values()

    def add(self, posts: Sequence[EventPayload], /) -> list[bool]:
        """Take posts; return of each whether it is new."""
        return [self.append(post) for post in posts]

    def append(self, post: EventPayload) -> bool:
        """Take a post; return whether it is new."""
        if not self.recent.add(dedup_key(post), post.received):
            return False
        lane = post.partition
        line = self._queues.get(lane)
        if line is None:
            line = self._queues[lane] = _Queue(lane, next(self._numbers))
            heappush(self._order, (post.received, line.number, line))
        line.posts.append(post)
        size = len(post.body) + POST_OVERHEAD
        self.size += size
        self.sizes[lane.environment] += size
        while self.size > self.capacity:
            self._evict(self._oldest())
        return True

    def take(
        self, partition: Partition, /, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a lane and its bodies, fixed now or before; None without."""
        line = self._queues.get(partition)
        if line is None:
            return None
        more = True
        if line.suspects and (suspects or not (line.batches or line.posts)):
            fixed = line.suspects[0]
        else:
            if not line.batches:
                _fix(line)
                more = bool(line.posts or line.suspects)
            fixed = line.batches[0]
        batch = Batch(partition, fixed.payload_id, len(fixed.posts), fixed.posts[0].received, more)
        return batch, [part(post.body, fixed.start, fixed.stop) for post in fixed.posts]

    def finish(self, batch: Batch, /) -> int | None:
        """Forget a batch; return the posts that are done with, None if it is not known."""
        fixed = self._find(batch)
        return None if fixed is None else self._remove(self._queues[batch.partition], fixed)

    def split(self, batch: Batch, /) -> bool | None:
        """Fix two halves in place of a batch; return whether it has two, None if not known."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        one, other = half_ids(fixed.payload_id)
        posts, middle = fixed.posts, len(fixed.posts) // 2
        if middle:
            parts = [_FixedBatch(one, posts[:middle]), _FixedBatch(other, posts[middle:])]
        else:
            cut = halves(batch.partition, posts[0].body, fixed.start, fixed.stop)
            if cut is None:
                return False
            parts = [
                _FixedBatch(one, posts, cut[0], cut[1]),
                _FixedBatch(other, posts, cut[1], cut[2]),
            ]
        batches = _queue_of(self._queues[batch.partition], fixed)
        place = batches.index(fixed)
        batches[place] = parts[0]
        batches.insert(place + 1, parts[1])
        return True

    def put_aside(self, batch: Batch, /) -> bool | None:
        """Let the others go before a batch; return whether others than suspects wait."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        line = self._queues[batch.partition]
        _queue_of(line, fixed).remove(fixed)
        line.suspects.append(fixed)
        return bool(line.batches or line.posts)

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None, /
    ) -> int | None:
        """Keep posts of a batch for people, while there is room; return how many are done with."""
        fixed = self._find(batch)
        if fixed is None:
            return None
        bad = fixed.posts if only is None else [fixed.posts[place] for place in only]
        for post in bad:
            body = part(post.body, fixed.start, fixed.stop)
            self.rejected.append(RejectedBatch(batch, reason, body))
        size = sum(len(rejected.body) + POST_OVERHEAD for rejected in self.rejected)
        while size > min(MAX_QUARANTINE, self.capacity):
            size -= len(self.rejected.popleft().body) + POST_OVERHEAD
        line = self._queues[batch.partition]
        if len(bad) == len(fixed.posts):
            return self._remove(line, fixed)
        left = [post for place, post in enumerate(fixed.posts) if place not in set(only or ())]
        queue = _queue_of(line, fixed)
        queue[queue.index(fixed)] = fixed._replace(posts=left)
        return self._forget(line, bad)

    def expire(self, now: float, /) -> None:
        """Remove what is too old."""
        for line in list(self.queues):
            limit = now - self._limits.age_in(line.partition)
            while line.partition in self._queues and line.oldest < limit:
                self._evict(line)
        self.recent.expire(now)

    def backlog(self) -> list[Backlog]:
        """Return the lanes in which something waits."""
        return [Backlog(line.partition, len(line.waiting), line.oldest) for line in self.queues]

    def _find(self, batch: Batch) -> _FixedBatch | None:
        line = self._queues.get(batch.partition)
        batches = () if line is None else (*line.batches, *line.suspects)
        return next((fixed for fixed in batches if fixed.payload_id == batch.payload_id), None)

    def _remove(self, line: _Queue, fixed: _FixedBatch) -> int:
        """Remove a batch, and its posts unless parts of them wait still; return how many."""
        _queue_of(line, fixed).remove(fixed)
        posts: Sequence[EventPayload] = fixed.posts
        if fixed.stop is not None and any(other.posts is posts for other in line.fixed):
            posts = ()
        return self._forget(line, posts)

    def _evict(self, line: _Queue) -> None:
        """Give up the oldest post of a lane, and its whole batch: a batch never changes."""
        batches = line.fixed
        if not batches:
            posts: Sequence[EventPayload] = (line.posts.popleft(),)
        else:
            posts = batches[0].posts
            for fixed in batches:
                if fixed.posts is posts:
                    _queue_of(line, fixed).remove(fixed)
        self.evicted[line.partition.environment] += self._forget(line, posts)

    def _forget(self, line: _Queue, posts: Sequence[EventPayload]) -> int:
        """Take note that posts have left a lane; return how many."""
        size = sum(len(post.body) + POST_OVERHEAD for post in posts)
        self.size -= size
        self.sizes[line.partition.environment] -= size
        if not line.posts and not line.batches and not line.suspects:
            del self._queues[line.partition]
            if len(self._order) > 2 * len(self._queues) + 8:
                self._order = [entry for entry in self._order if self._waits(entry[2])]
                heapify(self._order)
        return len(posts)

    def _oldest(self) -> _Queue:
        """Return the line with the oldest post."""
        while True:
            came, number, line = self._order[0]
            if not self._waits(line):
                heappop(self._order)
            elif came < line.oldest:
                heapreplace(self._order, (line.oldest, number, line))
            else:
                return line

    def _waits(self, line: _Queue) -> bool:
        return self._queues.get(line.partition) is line


def _fix(line: _Queue) -> None:
    """Make a batch of the oldest posts of a lane without one."""
    first = list(islice(line.posts, max_payloads(line.partition)))
    members = first[: fitting([len(post.body) for post in first])]
    for _ in members:
        line.posts.popleft()
    payload_id = batch_id([post.payload_id for post in members])
    line.batches.append(_FixedBatch(payload_id, members))


def _queue_of(line: _Queue, fixed: _FixedBatch) -> deque[_FixedBatch]:
    """Return where a batch of a lane waits: among the suspects, or the others."""
    return line.suspects if fixed in line.suspects else line.batches
