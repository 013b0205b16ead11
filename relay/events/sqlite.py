"""Event store on disk, an SQLite database: payloads, batches, known payload ids, quarantine.

It blocks; `spool.py` runs it in a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from isal import igzip, isal_zlib

from relay import clock
from relay.events.dedup import DedupWindow, dedup_key
from relay.events.memory import StoreContent
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
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.protocol.gzip import CORRUPT, GZIP

SHRINK_PAGES = 16_000
"""Maximum number of 4 KB pages freed at once, which takes a fraction of a second."""

LEVEL = 0
"""gzip level on disk: compression takes less time than writing the bytes that it saves."""

_ROWS = 100
"""Rows per statement: the interpreter lock is released and acquired for each statement."""

VERSION = 2
"""Version of the tables. A file with another version is left alone."""

LONGEST_ABSENCE = 300.0
"""Maximum number of seconds between two processes that count towards ages. A restart takes no
longer, and nothing tells whether the system's clock was right both times."""

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
    payload_id TEXT NOT NULL, aside INTEGER NOT NULL DEFAULT 0,
    maybe_delivered INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_of_lane ON batches (lane, first, start);
CREATE TABLE IF NOT EXISTS seen (received REAL NOT NULL, ids BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (id INTEGER PRIMARY KEY, size INTEGER NOT NULL,
    environment TEXT NOT NULL, endpoint TEXT NOT NULL, schema INTEGER NOT NULL,
    payload_id TEXT NOT NULL, received REAL NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY, now REAL NOT NULL, ours REAL NOT NULL);
"""
# The names of tables and columns are older than those in the code, and stay as they are on disk: a
# lane is a partition, a post is a payload, and a batch with `aside` > 0 is a suspect.
#
# A batch consists of the payloads of its partition from `first` to `last`, or of the elements from
# `start` to `stop` of one payload that was too large alone. So fixing a batch does not write its
# payloads again. Bodies are gzip streams, which have checksums; `length` is that of the text. The
# payload ids of a transaction share one row of `seen`: separate rows would be scattered over the
# file. `aside` numbers suspects in the order in which they were put aside. Times are by a clock of
# the file's own, which runs only while the file is open; `clock` has its time, and ours (that of
# the process) at the same moment. Files of earlier releases lack `clock` and some columns.

_log = logging.getLogger("relay.events")


class _BatchRow(NamedTuple):
    """Row of `batches`."""

    first: int
    last: int
    payload_id: str
    start: int = 0
    stop: int | None = None
    aside: int = 0
    maybe_delivered: int = 0
    id: int | None = None


_BATCH_COLUMNS = ",".join(_BatchRow._fields)


class _Member(NamedTuple):
    """Payload of a batch."""

    id: int
    received: float
    length: int
    body: bytes

    def read(self) -> bytes | None:
        """Return the decompressed body; None if the disk has damaged it."""
        try:
            return isal_zlib.decompress(self.body, GZIP, self.length)
        except CORRUPT:
            return None


class _Candidate(NamedTuple):
    """Payload that is in no batch yet."""

    id: int
    length: int
    payload_id: str


class DiskStore:
    """Event store in an SQLite file. Methods block, and raise `sqlite3.Error`.

    Args:
        path: path of the file.
        limits: limits of size and age.
    """

    def __init__(self, path: str, limits: Limits) -> None:
        self.evicted: Counter[str] = Counter()
        """Number of evicted payloads by environment, since `pop_evicted`."""
        self._capacity = limits.disk
        self._limits = limits
        self._partition_ids: dict[Partition, int] = {}
        self.recent = DedupWindow()
        self._shrinks = False
        """True if unused pages are returned to the disk after the transaction."""
        self._pending_keys: list[int] = []
        """Deduplication keys that the current transaction has added to `recent`."""
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        try:
            # A second process gets an error, and the write-ahead log needs no shared memory.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.NotSupportedError("another release wrote it")  # noqa: TRY301 - as SQLite
            for setting in _SETTINGS:
                self._db.execute(f"PRAGMA {setting}")
            with self.transaction():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                for column in {"aside", "maybe_delivered"} - self._columns("batches"):
                    self._db.execute(f"ALTER TABLE batches ADD {column} INTEGER NOT NULL DEFAULT 0")
                self._mark_earlier_batches()
                self._db.execute(f"PRAGMA user_version={VERSION}")
                now = clock.now()
                self._ahead = self._clock_ahead(now)
                self._write_clock(now)
            self._size = self._total_size()
            self._load_recent()
        except BaseException:
            self._db.close()
            raise

    def __repr__(self) -> str:
        return f"<DiskStore: {self._size} of {self._capacity} bytes>"

    def close(self) -> None:
        """Write everything into the one file and close it."""
        try:
            with self.transaction():
                self._write_clock(clock.now())
        finally:
            self._db.close()

    def _clock_ahead(self, now: float) -> float:
        """Return the seconds by which our clock is ahead of the file's; the file's resumes."""
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

    def _mark_earlier_batches(self) -> None:
        """Mark the batches that an earlier process may have been sending when it ended.

        Nothing is written when a batch is sent, but a partition sends its first one, or a suspect.
        """
        self._db.execute(
            "UPDATE batches SET maybe_delivered=1 WHERE aside>0 OR NOT EXISTS (SELECT 1 FROM"
            " batches AS b WHERE b.lane=batches.lane AND b.aside=0"
            " AND (b.first,b.start)<(batches.first,batches.start))"
        )

    def _columns(self, table: str) -> set[str]:
        return {name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")}

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything done in the block to disk, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        self._pending_keys.clear()
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._partition_ids.clear()
            self.recent.forget(self._pending_keys)
            self.evicted.clear()
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._size = self._total_size()
            raise
        if self._shrinks:
            self._shrinks = False
            with contextlib.suppress(sqlite3.Error):  # everything is safe already
                self._db.executescript(f"PRAGMA incremental_vacuum({SHRINK_PAGES})")

    def add(self, payloads: Sequence[EventPayload]) -> list[bool]:
        """Store payloads; return for each whether it is new."""
        verdicts = [self._remember(dedup_key(payload), payload.received) for payload in payloads]
        kept = [payload for payload, new in zip(payloads, verdicts, strict=True) if new]
        if kept:
            self._write_pending_keys(max(payload.received for payload in kept))
        rows = [self._row(payload) for payload in kept]
        self._insert("posts", "lane,size,length,received,payload_id,body", rows)
        self._size += sum(row[1] for row in rows)
        while self._size > self._capacity and self._evict_oldest():
            pass
        return verdicts

    def take(
        self, partition: Partition, *, suspects: bool = False
    ) -> tuple[Batch, list[bytes]] | None:
        """Return the next batch of a partition and its bodies; None if nothing is waiting."""
        partition_id = self._partition_id(partition)
        more = True
        while True:
            row = self._first_suspect(partition_id) if suspects else None
            row = row or self._first_batch(partition_id)
            if row is None and (rows := self._unbatched(partition_id, max_payloads(partition) + 1)):
                more = self._fix(partition, partition_id, rows)
                row = self._first_batch(partition_id)
            row = row or self._first_suspect(partition_id)
            if row is None:
                return None
            members = self._members(partition_id, row)
            bodies = [member.read() for member in members]
            whole = [body for body in bodies if body is not None]
            if members and len(whole) == len(members):
                oldest = members[0].received + self._ahead
                batch = Batch(
                    partition, row.payload_id, len(members), oldest, more, row.maybe_delivered > 0
                )
                return batch, [part(body, row.start, row.stop) for body in whole]
            damaged = [m.id for m, body in zip(members, bodies, strict=True) if body is None]
            # The others keep the batch's id: if upstream knows it, it has all of them already.
            _log.error("The disk has damaged %d of %d posts of a batch", len(damaged), len(members))
            self.evicted[partition.environment] += sum(
                self._delete(partition_id, member, member) for member in damaged
            )
            if len(damaged) == len(members):
                self._remove(partition_id, row)

    def finish(self, batch: Batch) -> int | None:
        """Remove a batch; return the number of payloads that are complete, None if unknown."""
        partition_id = self._partition_id(batch.partition)
        row = self._find(partition_id, batch.payload_id)
        return None if row is None else self._remove(partition_id, row)

    def split(self, batch: Batch) -> bool | None:
        """Replace a batch by its halves; return False if it cannot be split, None if unknown."""
        partition_id = self._partition_id(batch.partition)
        row = self._find(partition_id, batch.payload_id)
        if row is None:
            return None
        ids = [
            i
            for (i,) in self._db.execute(
                "SELECT id FROM posts WHERE lane=? AND id BETWEEN ? AND ? ORDER BY id",
                (partition_id, row.first, row.last),
            )
        ]
        if not ids:
            return False
        if len(ids) > 1:
            middle = len(ids) // 2
            parts = (row._replace(last=ids[middle - 1]), row._replace(first=ids[middle]))
        else:
            (member,) = self._members(partition_id, row)
            cut = halves(batch.partition, member.read() or b"", row.start, row.stop)
            if cut is None:
                return False
            start, middle, stop = cut
            parts = (row._replace(start=start, stop=middle), row._replace(start=middle, stop=stop))
        self._db.execute("DELETE FROM batches WHERE id=?", (row.id,))
        for half, half_id in zip(parts, half_ids(row.payload_id), strict=True):
            unsent = half._replace(id=None, payload_id=half_id, maybe_delivered=0)
            self._insert_batch(partition_id, unsent)
        return True

    def put_aside(self, batch: Batch) -> bool | None:
        """Make a batch a suspect; return whether anything but suspects is waiting."""
        partition_id = self._partition_id(batch.partition)
        row = self._find(partition_id, batch.payload_id)
        if row is None:
            return None
        self._db.execute(
            "UPDATE batches SET aside=(SELECT max(aside)+1 FROM batches) WHERE id=?", (row.id,)
        )
        return self._first_batch(partition_id) is not None or bool(self._unbatched(partition_id, 1))

    def mark_maybe_delivered(self, batch: Batch) -> bool | None:
        """Record that upstream may have a batch already; return True, None if unknown."""
        row = self._find(self._partition_id(batch.partition), batch.payload_id)
        if row is None:
            return None
        self._db.execute("UPDATE batches SET maybe_delivered=1 WHERE id=?", (row.id,))
        return True

    def quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None
    ) -> int | None:
        """Move payloads to the bounded quarantine; return the number that are complete."""
        partition_id = self._partition_id(batch.partition)
        row = self._find(partition_id, batch.payload_id)
        if row is None:
            return None
        members = self._members(partition_id, row)
        bad = members if only is None else [members[position] for position in only]
        for member in bad:
            self._reject(batch, reason, part(member.read() or b"", row.start, row.stop))
        self._db.execute(
            "DELETE FROM quarantine WHERE id IN (SELECT id FROM (SELECT id,"
            " sum(size) OVER (ORDER BY id DESC) AS total FROM quarantine) WHERE total>?)",
            (min(MAX_QUARANTINE, self._capacity),),
        )
        if len(bad) == len(members):
            return self._remove(partition_id, row)
        return sum(self._delete(partition_id, member.id, member.id) for member in bad)

    def expire(self, now: float) -> None:
        """Evict payloads that are too old; unused pages go back to the disk afterwards."""
        limits = self._limits
        for partition, partition_id in self._all_partitions():
            limit = now - self._ahead - limits.age_in(partition)
            while (oldest := self._oldest(partition_id)) is not None and oldest[1] < limit:
                self._evict(partition.environment, partition_id, oldest[0])
        self.recent.expire(now)
        since = next(iter(self.recent.seen.values()), now)
        self._db.execute("DELETE FROM seen WHERE received<?", (since - self._ahead,))
        self._write_clock(now)
        self._db.execute("DELETE FROM lanes WHERE id NOT IN (SELECT lane FROM posts)")
        self._partition_ids.clear()
        self._shrinks = True

    def backlog(self) -> list[Backlog]:
        """Return the backlog of each partition that is not empty."""
        backlog = []
        for partition, partition_id in self._all_partitions():
            oldest = self._oldest(partition_id)
            if oldest is not None:
                (payloads,) = self._db.execute(
                    "SELECT count(*) FROM posts WHERE lane=?", (partition_id,)
                ).fetchone()
                backlog.append(Backlog(partition, payloads, oldest[1] + self._ahead))
        return backlog

    def receive(self, content: StoreContent) -> None:
        """Take everything that another store had.

        Payloads that are here already are left out: that store did not know of them. Batches stay
        as they are, for upstream may have them.
        """
        batches = (*content.suspects, *content.batches)
        sent = {id(payload) for fixed in batches for payload in fixed.payloads}
        known = self.recent.seen.keys()
        (last,) = self._db.execute("SELECT coalesce(max(id),0) FROM posts").fetchone()
        (asides,) = self._db.execute("SELECT coalesce(max(aside),0) FROM batches").fetchone()
        row_ids: dict[int, int] = {}
        payloads = (
            payload
            for payload in content.payloads
            if id(payload) in sent or dedup_key(payload) not in known
        )
        for row_id, payload in enumerate(payloads, last + 1):
            row_ids[id(payload)] = row_id
            values = (row_id, *self._row(payload))
            self._db.execute("INSERT INTO posts VALUES (?,?,?,?,?,?,?)", values)
        numbered = [(aside, fixed) for aside, fixed in enumerate(content.suspects, asides + 1)]
        for aside, fixed in (*numbered, *((0, fixed) for fixed in content.batches)):
            row = _BatchRow(
                id=None,
                first=row_ids[id(fixed.payloads[0])],
                last=row_ids[id(fixed.payloads[-1])],
                start=fixed.start,
                stop=fixed.stop,
                payload_id=fixed.payload_id,
                aside=aside,
                maybe_delivered=int(fixed.maybe_delivered),
            )
            self._insert_batch(self._partition_id(fixed.payloads[0].partition), row)
        for key, received in content.seen.items():
            self._remember(key, received)
        self._write_pending_keys(clock.now())
        for batch, reason, body in content.rejected:
            self._reject(batch, reason, body)
        self._size = self._total_size()

    def pop_evicted(self) -> Mapping[str, int]:
        """Return the number of payloads evicted since the last call, by environment."""
        if not self.evicted:
            return NO_EVICTIONS  # as after nearly every transaction
        evicted, self.evicted = self.evicted, Counter()
        return evicted

    def _reject(self, batch: Batch, reason: str, body: bytes) -> None:
        partition = batch.partition
        self._db.execute(
            "INSERT INTO quarantine (size,environment,endpoint,schema,payload_id,received,"
            "reason,body) VALUES (?,?,?,?,?,?,?,?)",
            (
                *(len(body) + PAYLOAD_OVERHEAD, partition.environment, partition.endpoint.name),
                *(partition.schema, batch.payload_id, batch.oldest, reason, body),
            ),
        )

    def _row(self, payload: EventPayload) -> tuple[Any, ...]:
        body = igzip.compress(payload.body, LEVEL)
        return (
            *(
                self._partition_id(payload.partition),
                len(body) + PAYLOAD_OVERHEAD,
                len(payload.body),
            ),
            *(payload.received - self._ahead, payload.payload_id, body),
        )

    def _remember(self, key: int, received: float) -> bool:
        new = self.recent.add(key, received)
        if new and key:
            self._pending_keys.append(key)
        return new

    def _write_pending_keys(self, received: float) -> None:
        if self._pending_keys:
            keys = array("q", self._pending_keys).tobytes()
            self._db.execute("INSERT INTO seen VALUES (?,?)", (received - self._ahead, keys))

    def _load_recent(self) -> None:
        """Read the deduplication keys of an earlier process."""
        for received, keys in self._db.execute("SELECT received,ids FROM seen ORDER BY received"):
            for key in array("q", keys):
                self.recent.add(key, received + self._ahead)

    def _insert(self, table: str, columns: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for chunk in _chunks(rows):
            placeholders = f"({','.join('?' * len(chunk[0]))})"
            marks = ",".join([placeholders] * len(chunk))
            values = [value for row in chunk for value in row]
            self._db.execute(f"INSERT INTO {table} ({columns}) VALUES {marks}", values)  # noqa: S608 - ours

    def _insert_batch(self, partition_id: int, row: _BatchRow) -> None:
        self._db.execute(
            f"INSERT INTO batches ({_BATCH_COLUMNS},lane) VALUES (?,?,?,?,?,?,?,?,?)",  # noqa: S608 - ours
            (*row, partition_id),
        )

    def _partition_id(self, partition: Partition) -> int:
        partition_id = self._partition_ids.get(partition)
        if partition_id is None:
            values = (
                partition.environment,
                partition.endpoint.name,
                partition.schema,
                partition.tags,
                partition.wrapper,
            )
            self._db.execute(
                "INSERT OR IGNORE INTO lanes (environment,endpoint,schema,tags,wrapper)"
                " VALUES (?,?,?,?,?)",
                values,
            )
            (partition_id,) = self._db.execute(
                "SELECT id FROM lanes WHERE environment=? AND endpoint=? AND schema=? AND tags=?"
                " AND wrapper=?",
                values,
            ).fetchone()
            self._partition_ids[partition] = partition_id
        return int(partition_id)

    def _all_partitions(self) -> list[tuple[Partition, int]]:
        rows = self._db.execute("SELECT environment,endpoint,schema,tags,wrapper,id FROM lanes")
        return [
            (Partition(environment, EventsEndpoint[endpoint], schema, tags, wrapper), partition_id)
            for environment, endpoint, schema, tags, wrapper, partition_id in rows.fetchall()
        ]

    def _members(self, partition_id: int, row: _BatchRow) -> list[_Member]:
        rows = self._db.execute(
            "SELECT id,received,length,body FROM posts WHERE lane=? AND id BETWEEN ? AND ?"
            " ORDER BY id",
            (partition_id, row.first, row.last),
        )
        return [_Member(*each) for each in rows]

    def _find(self, partition_id: int, payload_id: str) -> _BatchRow | None:
        """Return the row of a partition's batch by its id."""
        return self._batch_where("payload_id=?", (partition_id, payload_id))

    def _first_batch(self, partition_id: int) -> _BatchRow | None:
        """Return the row of the first batch of a partition that is not a suspect."""
        return self._batch_where("aside=0 ORDER BY first,start", (partition_id,))

    def _first_suspect(self, partition_id: int) -> _BatchRow | None:
        """Return the row of the batch of a partition that was put aside first."""
        return self._batch_where("aside>0 ORDER BY aside,first,start", (partition_id,))

    def _batch_where(self, condition: str, values: tuple[Any, ...]) -> _BatchRow | None:
        row = self._db.execute(
            f"SELECT {_BATCH_COLUMNS} FROM batches WHERE lane=? AND {condition} LIMIT 1",  # noqa: S608 - ours
            values,
        ).fetchone()
        return None if row is None else _BatchRow(*row)

    def _unbatched(self, partition_id: int, limit: int) -> list[_Candidate]:
        """Return the oldest payloads of a partition that are in no batch."""
        (batches,) = self._db.execute(
            "SELECT count(*) FROM batches WHERE lane=?", (partition_id,)
        ).fetchone()
        rows = self._db.execute(
            "SELECT id,length,payload_id FROM posts WHERE lane=? AND (?=0 OR id>coalesce("
            "(SELECT last FROM batches WHERE lane=posts.lane AND first<=posts.id"
            " ORDER BY first DESC LIMIT 1),0)) ORDER BY id LIMIT ?",
            (partition_id, batches, limit),
        )
        return [_Candidate(*row) for row in rows]

    def _fix(self, partition: Partition, partition_id: int, oldest: Sequence[_Candidate]) -> bool:
        """Fix a batch of a partition's oldest payloads; return whether more are waiting."""
        # A batch is a range of rows, so it must end before the next suspect begins.
        suspects, end = self._db.execute(
            "SELECT count(*),min(CASE WHEN first>? THEN first END) FROM batches WHERE lane=?",
            (oldest[0].id, partition_id),
        ).fetchone()
        candidates = [
            each for each in oldest[: max_payloads(partition)] if end is None or each.id < end
        ]
        members = candidates[: fitting([each.length for each in candidates])]
        payload_id = batch_id([each.payload_id for each in members])
        row = _BatchRow(first=members[0].id, last=members[-1].id, payload_id=payload_id)
        self._insert_batch(partition_id, row)
        return suspects > 0 or len(members) < len(oldest)

    def _remove(self, partition_id: int, row: _BatchRow) -> int:
        """Remove a batch and its payloads; return how many, 0 while other parts of one wait."""
        self._db.execute("DELETE FROM batches WHERE id=?", (row.id,))
        waiting = self._db.execute(
            "SELECT 1 FROM batches WHERE lane=? AND first<=? AND last>=?",
            (partition_id, row.last, row.first),
        ).fetchone()
        return 0 if waiting else self._delete(partition_id, row.first, row.last)

    def _delete(self, partition_id: int, first: int, last: int) -> int:
        sizes = self._db.execute(
            "DELETE FROM posts WHERE lane=? AND id BETWEEN ? AND ? RETURNING size",
            (partition_id, first, last),
        ).fetchall()
        self._size -= sum(size for (size,) in sizes)
        return len(sizes)

    def _oldest(self, partition_id: int) -> tuple[int, float] | None:
        oldest: tuple[int, float] | None = self._db.execute(
            "SELECT id,received FROM posts WHERE lane=? ORDER BY id LIMIT 1", (partition_id,)
        ).fetchone()
        return oldest

    def _evict_oldest(self) -> bool:
        row = self._db.execute(
            "SELECT posts.id,lane,environment FROM posts JOIN lanes ON lanes.id=lane"
            " ORDER BY posts.id LIMIT 1"
        ).fetchone()
        if row is None:
            return False
        self._evict(row[2], row[1], row[0])
        return True

    def _evict(self, environment: str, partition_id: int, first: int) -> None:
        """Evict the oldest payload of a partition and its whole batch: a batch never changes."""
        (last,) = self._db.execute(
            "SELECT coalesce(max(last),?) FROM batches WHERE lane=? AND first<=?",
            (first, partition_id, first),
        ).fetchone()
        self._evict_range(environment, partition_id, first, last)

    def _evict_range(self, environment: str, partition_id: int, first: int, last: int) -> None:
        self._db.execute("DELETE FROM batches WHERE lane=? AND last<=?", (partition_id, last))
        self.evicted[environment] += self._delete(partition_id, first, last)

    def _total_size(self) -> int:
        (size,) = self._db.execute("SELECT coalesce(sum(size),0) FROM posts").fetchone()
        return int(size)


def _chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
