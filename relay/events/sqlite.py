"""The database of events that wait: posts, the batches made of them, what was seen, the rejected.

Blocking and without a thread, which is the business of `spool.py`.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import merge
from operator import attrgetter
from typing import Any

from isal import igzip, isal_zlib

from relay import clock
from relay.events.dedup import DedupWindow, dedup_key
from relay.events.memory import MemoryStore
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
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.protocol.gzip import CORRUPT, GZIP

SHRINK_PAGES = 16_000
"""Pages of 4 KB that are given back at once: a fraction of a second."""

LEVEL = 0
"""Of compression on disk: writing what it saves takes longer than compressing it."""

_ROWS = 100
"""Rows of one statement: with each statement the interpreter changes hands."""

VERSION = 2
"""Of the tables. A file with another one is left alone."""

LONGEST_ABSENCE = 300.0
"""Seconds that pass between two processes at most, as far as ages are concerned: a restart takes no
longer, and whether the clock was right, both times, nobody knows."""

_SETTINGS = (
    "auto_vacuum=INCREMENTAL",
    "journal_mode=WAL",
    "synchronous=FULL",
    "journal_size_limit=16777216",
    "temp_store=MEMORY",
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lanes (id INTEGER PRIMARY KEY, environment TEXT NOT NULL,
    endpoint TEXT NOT NULL, schema INTEGER NOT NULL, tags TEXT NOT NULL, wrapper TEXT NOT NULL,
    UNIQUE (environment, endpoint, schema, tags, wrapper));
CREATE TABLE IF NOT EXISTS posts (id INTEGER PRIMARY KEY, lane INTEGER NOT NULL,
    size INTEGER NOT NULL, length INTEGER NOT NULL, received REAL NOT NULL,
    payload_id TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS posts_of_lane ON posts (lane);
CREATE TABLE IF NOT EXISTS batches (id INTEGER PRIMARY KEY, lane INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER,
    payload_id TEXT NOT NULL, aside INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_of_lane ON batches (lane, first, start);
CREATE TABLE IF NOT EXISTS seen (received REAL NOT NULL, ids BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (id INTEGER PRIMARY KEY, size INTEGER NOT NULL,
    environment TEXT NOT NULL, endpoint TEXT NOT NULL, schema INTEGER NOT NULL,
    payload_id TEXT NOT NULL, received REAL NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY, now REAL NOT NULL, ours REAL NOT NULL);
"""
# A batch is the posts of its lane from `first` to `last`; of a post that was too large alone, its
# elements from `start` to `stop`. So fixing a batch does not write its posts again. Bodies are gzip
# streams, which have checksums; `length` is that of what is in them. The payload ids of a
# transaction are one row of `seen`: rows of their own would be all over the file. Batches that were
# put aside are numbered in that order. Times are by a clock of the file's own, which goes while it
# is open; its row, and beside it our clock, is written now and then. Files of earlier releases lack
# `aside` and `clock`.

_log = logging.getLogger("relay.events")


class DiskStore:
    """The database. Its methods block, and raise `sqlite3.Error`.

    Args:
        path: of the file.
        limits: how much may wait, and how long.
    """

    def __init__(self, path: str, limits: Limits) -> None:
        self.evicted: Counter[str] = Counter()
        """Posts that were given up, by environment, until somebody takes note."""
        self._capacity = limits.disk
        self._limits = limits
        self._partitions: dict[Partition, int] = {}
        self.recent = DedupWindow()
        self._pending_ids: list[int] = []
        """Identities that the transaction adds to them."""
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        try:
            # We are alone: a second process is told, and readers need no shared memory.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.NotSupportedError("another release wrote it")  # noqa: TRY301 - as SQLite
            for setting in _SETTINGS:
                self._db.execute(f"PRAGMA {setting}")
            with self.transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                if "aside" not in self._columns("batches"):
                    self._db.execute("ALTER TABLE batches ADD aside INTEGER NOT NULL DEFAULT 0")
                self._db.execute(f"PRAGMA user_version={VERSION}")
                now = clock.now()
                self._ahead = self._distance(now)
                self._write_clock(now)
            self._size = self._sum()
            self._recall()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Write everything into the one file and let go of it."""
        try:
            with self.transaction():
                self._write_clock(clock.now())
        finally:
            self._db.close()

    def _distance(self, now: float) -> float:
        """Return by how much our clock is ahead of the file's, which goes on where it was."""
        (last,) = self._db.execute(
            "SELECT max(at) FROM (SELECT now AS at FROM clock UNION ALL SELECT received FROM seen"
            " UNION ALL SELECT received FROM posts WHERE id=(SELECT max(id) FROM posts))"
        ).fetchone()
        if last is None:
            return 0.0
        row = self._db.execute("SELECT ours-now FROM clock").fetchone()
        was_ahead = row[0] if row else 0.0
        absence = now - (last + was_ahead)
        passed = min(max(absence, 0.0), LONGEST_ABSENCE)
        return float(now - (last + passed))

    def _write_clock(self, now: float) -> None:
        self._db.execute("INSERT OR REPLACE INTO clock VALUES (0,?,?)", (now - self._ahead, now))

    def _columns(self, table: str) -> set[str]:
        return {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Do everything inside, and make it safe; or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        self._pending_ids.clear()
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._partitions.clear()
            self.recent.forget(self._pending_ids)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._size = self._sum()
            raise

    def add(self, posts: Sequence[EventPayload]) -> list[bool]:
        """Take posts; return of each whether it is new. Its payload id may be known already."""
        verdicts = [self._note(dedup_key(post), post.received) for post in posts]
        kept = [post for post, new in zip(posts, verdicts, strict=True) if new]
        if kept:
            self._write_noted(max(post.received for post in kept))
        rows = [self._row(post) for post in kept]
        self._insert("posts", "lane,size,length,received,payload_id,body", rows)
        self._size += sum(row[1] for row in rows)
        while self._size > self._capacity and self._evict_oldest():
            pass
        return verdicts

    def take(
        self, partition: Partition, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a lane and its bodies, fixed now or before; None without."""
        number = self._partition(partition)
        more = True
        while True:
            found = self._suspect(number) if suspects else None
            found = found or self._fixed(number)
            if found is None and (posts := self._unfixed(number, max_payloads(partition) + 1)):
                more = self._fix(partition, number, posts)
                found = self._fixed(number)
            found = found or self._suspect(number)
            if found is None:
                return None
            rows = self._members(number, found)
            bodies = [_read(body, length) for _, _, length, body in rows]
            whole = [body for body in bodies if body is not None]
            if rows and len(whole) == len(rows):
                batch = Batch(partition, found[5], len(rows), rows[0][1] + self._ahead, more)
                return batch, [part(body, found[3], found[4]) for body in whole]
            damaged = [row[0] for row, body in zip(rows, bodies, strict=True) if body is None]
            # The others keep the id: if upstream knows it, it has all of them already.
            _log.error("The disk has damaged %d of %d posts of a batch", len(damaged), len(rows))
            for post in damaged:
                self.evicted[partition.environment] += self._delete(number, post, post)
            if len(damaged) == len(rows):
                self._remove(number, found)

    def finish(self, batch: Batch) -> int | None:
        """Forget a batch; return the posts that are done with, None if it is not known."""
        number = self._partition(batch.partition)
        found = self._find(number, batch.payload_id)
        return None if found is None else self._remove(number, found)

    def split(self, batch: Batch) -> bool | None:
        """Fix two halves in place of a batch.

        Returns:
            Whether it has two halves; None if it is not known.
        """
        number = self._partition(batch.partition)
        found = self._find(number, batch.payload_id)
        if found is None:
            return None
        row, first, last, start, stop, payload_id, aside = found
        ids = [
            i
            for (i,) in self._db.execute(
                "SELECT id FROM posts WHERE lane=? AND id BETWEEN ? AND ? ORDER BY id",
                (number, first, last),
            )
        ]
        if not ids:
            return False
        parts: list[tuple[int, int, int, int | None]]
        if len(ids) > 1:
            middle = len(ids) // 2
            parts = [(first, ids[middle - 1], 0, None), (ids[middle], last, 0, None)]
        else:
            ((_, _, length, body),) = self._members(number, found)
            cut = halves(batch.partition, _read(body, length) or b"", start, stop)
            if cut is None:
                return False
            parts = [(first, last, cut[0], cut[1]), (first, last, cut[1], cut[2])]
        self._db.execute("DELETE FROM batches WHERE id=?", (row,))
        for half, its_id in zip(parts, half_ids(payload_id), strict=True):
            self._insert_batch(number, half, its_id, aside)
        return True

    def put_aside(self, batch: Batch) -> bool | None:
        """Let the others go before a batch; return whether others than suspects wait."""
        number = self._partition(batch.partition)
        found = self._find(number, batch.payload_id)
        if found is None:
            return None
        self._db.execute(
            "UPDATE batches SET aside=(SELECT max(aside)+1 FROM batches) WHERE id=?", (found[0],)
        )
        return self._fixed(number) is not None or bool(self._unfixed(number, 1))

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None
    ) -> int | None:
        """Keep posts of a batch for people to look at; return how many are done with."""
        number = self._partition(batch.partition)
        found = self._find(number, batch.payload_id)
        if found is None:
            return None
        members = self._members(number, found)
        bad = members if only is None else [members[place] for place in only]
        for _, _, length, body in bad:
            self._reject(batch, reason, part(_read(body, length) or b"", found[3], found[4]))
        self._db.execute(
            "DELETE FROM quarantine WHERE id IN (SELECT id FROM (SELECT id,"
            " sum(size) OVER (ORDER BY id DESC) AS total FROM quarantine) WHERE total>?)",
            (min(MAX_QUARANTINE, self._capacity),),
        )
        if len(bad) == len(members):
            return self._remove(number, found)
        return sum(self._delete(number, row, row) for row, *_ in bad)

    def expire(self, now: float) -> None:
        """Remove what is too old."""
        limits = self._limits
        for lane, number in self._all_partitions():
            limit = now - self._ahead - limits.age_in(lane)
            while (oldest := self._oldest(number)) is not None and oldest[1] < limit:
                self._evict(lane.environment, number, oldest[0])
        self.recent.expire(now)
        since = next(iter(self.recent.seen.values()), now)
        self._db.execute("DELETE FROM seen WHERE received<?", (since - self._ahead,))
        self._write_clock(now)
        self._db.execute("DELETE FROM lanes WHERE id NOT IN (SELECT lane FROM posts)")
        self._partitions.clear()

    def shrink(self) -> None:
        """Give unused pages back to the disk, some at a time; not within a transaction."""
        self._db.executescript(f"PRAGMA incremental_vacuum({SHRINK_PAGES})")

    def backlog(self) -> list[Backlog]:
        """Return the lanes in which something waits."""
        found = []
        for lane, number in self._all_partitions():
            oldest = self._oldest(number)
            if oldest is not None:
                (posts,) = self._db.execute(
                    "SELECT count(*) FROM posts WHERE lane=?", (number,)
                ).fetchone()
                found.append(Backlog(lane, posts, oldest[1] + self._ahead))
        return found

    def receive(self, memory: MemoryStore) -> None:
        """Take all that another store has: posts, batches, what was seen, what is set aside."""
        (last,) = self._db.execute("SELECT coalesce(max(id),0) FROM posts").fetchone()
        rows: dict[int, int] = {}
        waiting = [line.waiting for line in memory.queues]
        for row, post in enumerate(merge(*waiting, key=attrgetter("received")), last + 1):
            rows[id(post)] = row
            values = (row, *self._row(post))
            self._db.execute("INSERT INTO posts VALUES (?,?,?,?,?,?,?)", values)
        for line in memory.queues:
            number = self._partition(line.partition)
            for fixed in (*line.suspects, *line.batches):
                first, last = rows[id(fixed.posts[0])], rows[id(fixed.posts[-1])]
                members = (first, last, fixed.start, fixed.stop)
                self._insert_batch(number, members, fixed.payload_id)
            for suspect in line.suspects:
                self.put_aside(Batch(line.partition, suspect.payload_id, 0, 0.0))
        for number, received in memory.recent.seen.items():
            self._note(number, received)
        self._write_noted(clock.now())
        for batch, reason, body in memory.rejected:
            self._reject(batch, reason, body)
        self._size = self._sum()

    def _reject(self, batch: Batch, reason: str, body: bytes) -> None:
        lane = batch.partition
        self._db.execute(
            "INSERT INTO quarantine (size,environment,endpoint,schema,payload_id,received,"
            "reason,body) VALUES (?,?,?,?,?,?,?,?)",
            (
                *(len(body) + POST_OVERHEAD, lane.environment, lane.endpoint.name),
                *(lane.schema, batch.payload_id, batch.oldest, reason, body),
            ),
        )

    def _row(self, post: EventPayload) -> tuple[Any, ...]:
        body = igzip.compress(post.body, LEVEL)
        return (
            *(self._partition(post.partition), len(body) + POST_OVERHEAD, len(post.body)),
            *(post.received - self._ahead, post.payload_id, body),
        )

    def _note(self, number: int, received: float) -> bool:
        new = self.recent.add(number, received)
        if new and number:
            self._pending_ids.append(number)
        return new

    def _write_noted(self, received: float) -> None:
        if self._pending_ids:
            ids = array("q", self._pending_ids).tobytes()
            self._db.execute("INSERT INTO seen VALUES (?,?)", (received - self._ahead, ids))

    def _recall(self) -> None:
        """Read which payload ids an earlier process has seen."""
        for received, ids in self._db.execute("SELECT received,ids FROM seen ORDER BY received"):
            for number in array("q", ids):
                self.recent.add(number, received + self._ahead)

    def _insert(self, table: str, columns: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for chunk in _chunks(rows):
            one = f"({','.join('?' * len(chunk[0]))})"
            marks = ",".join([one] * len(chunk))
            values = [value for row in chunk for value in row]
            self._db.execute(f"INSERT INTO {table} ({columns}) VALUES {marks}", values)  # noqa: S608 - ours

    def _insert_batch(
        self,
        number: int,
        members: tuple[int, int, int, int | None],
        payload_id: str,
        aside: int = 0,
    ) -> None:
        self._db.execute(
            "INSERT INTO batches (lane,first,last,start,stop,payload_id,aside)"
            " VALUES (?,?,?,?,?,?,?)",
            (number, *members, payload_id, aside),
        )

    def _partition(self, lane: Partition) -> int:
        number = self._partitions.get(lane)
        if number is None:
            key = (lane.environment, lane.endpoint.name, lane.schema, lane.tags, lane.wrapper)
            self._db.execute(
                "INSERT OR IGNORE INTO lanes (environment,endpoint,schema,tags,wrapper)"
                " VALUES (?,?,?,?,?)",
                key,
            )
            (number,) = self._db.execute(
                "SELECT id FROM lanes WHERE environment=? AND endpoint=? AND schema=? AND tags=?"
                " AND wrapper=?",
                key,
            ).fetchone()
            self._partitions[lane] = number
        return int(number)

    def _all_partitions(self) -> list[tuple[Partition, int]]:
        rows = self._db.execute("SELECT environment,endpoint,schema,tags,wrapper,id FROM lanes")
        return [
            (Partition(environment, EventsEndpoint[endpoint], schema, tags, wrapper), number)
            for environment, endpoint, schema, tags, wrapper, number in rows.fetchall()
        ]

    def _members(self, number: int, batch: Any) -> list[Any]:
        return self._db.execute(
            "SELECT id,received,length,body FROM posts WHERE lane=? AND id BETWEEN ? AND ?"
            " ORDER BY id",
            (number, batch[1], batch[2]),
        ).fetchall()

    def _find(self, number: int, payload_id: str) -> Any:
        """Return the batch of a lane with this id."""
        return self._batch("payload_id=?", (number, payload_id))

    def _fixed(self, number: int) -> Any:
        """Return the first batch of a lane that was not put aside."""
        return self._batch("aside=0 ORDER BY first,start", (number,))

    def _suspect(self, number: int) -> Any:
        """Return the batch of a lane that was put aside first."""
        return self._batch("aside>0 ORDER BY aside,first,start", (number,))

    def _batch(self, which: str, values: tuple[Any, ...]) -> Any:
        return self._db.execute(
            "SELECT id,first,last,start,stop,payload_id,aside FROM batches"  # noqa: S608 - ours
            f" WHERE lane=? AND {which} LIMIT 1",
            values,
        ).fetchone()

    def _unfixed(self, number: int, most: int) -> list[Any]:
        """Return the oldest posts of a lane that are in no batch."""
        (batches,) = self._db.execute(
            "SELECT count(*) FROM batches WHERE lane=?", (number,)
        ).fetchone()
        return self._db.execute(
            "SELECT id,length,payload_id FROM posts WHERE lane=? AND (?=0 OR NOT EXISTS (SELECT 1"
            " FROM batches WHERE lane=posts.lane AND posts.id BETWEEN first AND last))"
            " ORDER BY id LIMIT ?",
            (number, batches, most),
        ).fetchall()

    def _fix(self, lane: Partition, number: int, posts: Sequence[Any]) -> bool:
        """Make a batch of the oldest posts of a lane without one; return whether it has more."""
        # The posts of a batch are all those between its first and its last: none that is aside.
        suspects, end = self._db.execute(
            "SELECT count(*),min(CASE WHEN first>? THEN first END) FROM batches WHERE lane=?",
            (posts[0][0], number),
        ).fetchone()
        candidates = [post for post in posts[: max_payloads(lane)] if end is None or post[0] < end]
        members = candidates[: fitting([size for _, size, _ in candidates])]
        payload_id = batch_id([own for _, _, own in members])
        self._insert_batch(number, (members[0][0], members[-1][0], 0, None), payload_id)
        return suspects > 0 or len(members) < len(posts)

    def _remove(self, number: int, batch: Any) -> int:
        """Remove a batch, and its posts unless parts of them wait still; return how many."""
        row, first, last, *_ = batch
        self._db.execute("DELETE FROM batches WHERE id=?", (row,))
        waiting = self._db.execute(
            "SELECT 1 FROM batches WHERE lane=? AND first<=? AND last>=?", (number, last, first)
        ).fetchone()
        return 0 if waiting else self._delete(number, first, last)

    def _delete(self, number: int, first: int, last: int) -> int:
        sizes = self._db.execute(
            "DELETE FROM posts WHERE lane=? AND id BETWEEN ? AND ? RETURNING size",
            (number, first, last),
        ).fetchall()
        self._size -= sum(size for (size,) in sizes)
        return len(sizes)

    def _oldest(self, number: int) -> tuple[int, float] | None:
        found: tuple[int, float] | None = self._db.execute(
            "SELECT id,received FROM posts WHERE lane=? ORDER BY id LIMIT 1", (number,)
        ).fetchone()
        return found

    def _evict_oldest(self) -> bool:
        found = self._db.execute(
            "SELECT posts.id,lane,environment FROM posts JOIN lanes ON lanes.id=lane"
            " ORDER BY posts.id LIMIT 1"
        ).fetchone()
        if found is None:
            return False
        self._evict(found[2], found[1], found[0])
        return True

    def _evict(self, environment: str, number: int, post: int) -> None:
        """Give up the oldest post of a lane, and its whole batch: a batch never changes."""
        (last,) = self._db.execute(
            "SELECT coalesce(max(last),?) FROM batches WHERE lane=? AND first<=?",
            (post, number, post),
        ).fetchone()
        self._give_up(environment, number, post, last)

    def _give_up(self, environment: str, number: int, first: int, last: int) -> None:
        self._db.execute("DELETE FROM batches WHERE lane=? AND last<=?", (number, last))
        self.evicted[environment] += self._delete(number, first, last)

    def _sum(self) -> int:
        (size,) = self._db.execute("SELECT coalesce(sum(size),0) FROM posts").fetchone()
        return int(size)


def _read(body: bytes, length: int) -> bytes | None:
    """Return a body as it came; None if the disk has damaged it."""
    try:
        return isal_zlib.decompress(body, GZIP, length)
    except CORRUPT:
        return None


def _chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
