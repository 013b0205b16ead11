"""Snapshots on disk: the data that upstream last confirmed, for a start without upstream.

The journal is written with the data, so that clients of before a restart get what they miss.

There is one file per environment, in the format of `protocol/snapshot.py`. Files are replaced
atomically; only the time of the last confirmation is updated in place, by a single write within the
first block.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from relay import clock
from relay.aio import SLICE, in_thread, run_for
from relay.errors import InvalidData
from relay.files import make_directory, remove_unfinished, replacing
from relay.model.credential import Credential
from relay.model.journal import Journal, SavedJournal
from relay.model.payload import EMPTY, Change, Payload
from relay.protocol import snapshot as snapshot_format
from relay.protocol.snapshot import HEADER_SIZE, Header, UnknownFormat
from relay.reasons import describe
from relay.stores import Key, Stored, StoreStatus
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

MAX_SIZE = 512 * 1024 * 1024
"""Maximum size of a file in bytes: several times the largest upstream message."""

_IO_LOCK = threading.Lock()
"""Serialises reads and writes: environments share the disk and the interpreter."""


@dataclass(frozen=True, slots=True)
class SnapshotTimings:
    """Delays and limits for writing, in seconds.

    Args:
        gather: time within which changes are written together.
        bytes_per_second: maximum average write rate of an environment that changes all the time:
            20 GB a day, which no disk minds. 50 MB are written at most every three minutes, 500 KB
            every 2 seconds.
        retry: delay between attempts while the disk fails.
        finish: time limit for the last write when the relay ends.
    """

    gather: float = 2.0
    bytes_per_second: float = 256 * 1024
    retry: float = 10.0
    finish: float = 4.0


class SnapshotMirror:
    """Mirror of an environment's payload in a file.

    Args:
        directory: directory of the file; created with private permissions if missing.
        owner: SDK key of the environment, or its ID if that outlives its keys. The file is bound to
            its hash and does not contain it.
        log: a logger that names the environment.
        timings: delays and limits for writing.
        payload_filter: key of the payload filter whose part of the data is kept; empty for all.
        journal: of the data; None to keep none.
    """

    status: StoreStatus | None = None
    has_journal = True

    def __init__(
        self,
        directory: Path,
        owner: Credential,
        log: Log,
        timings: SnapshotTimings = SnapshotTimings(),
        *,
        payload_filter: str = "",
        journal: Journal | None = None,
    ) -> None:
        filter_digest = _digest(payload_filter) if payload_filter else ""
        self._file = _SnapshotFile(directory, _digest(owner.value), filter_digest)
        self._journal = journal
        self._log = log
        self._timings = timings
        self._confirmed: tuple[Payload, float] = (EMPTY, 0.0)
        """The data that upstream last confirmed, and the time in Unix seconds."""
        self._dirty = asyncio.Event()
        """Set while an update waits to be written."""
        self._flushed = asyncio.Event()
        """Set while the file contains the last update."""
        self._flushed.set()
        self._flush_requested = asyncio.Event()
        self._writing: asyncio.Future[None] | None = None
        self._last_full_write = -float("inf")
        """Monotonic start time of the last write of the whole file."""
        self._outage = OutageLog(log)

    def __repr__(self) -> str:
        state = "flushed" if self._flushed.is_set() else "pending"
        return f"<SnapshotMirror {self._file.path} {'failing' if self._outage.reason else state}>"

    async def load(self) -> Stored | None:
        """Return the content of the file; None if there is no file, or it is unusable (logged)."""
        try:
            return await in_thread(self._file.load, "snapshot")
        except FileNotFoundError:
            pass
        except OSError as e:
            self._begin_outage("read", e)
        except UnknownFormat as e:
            self._log.warning("Snapshot %s is not used: %s", self._file.path, e)
        except InvalidData as e:
            self._log.error("Snapshot %s: %s; it is set aside", self._file.path, e)
        return None

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Schedule a write: upstream has just confirmed `payload`."""
        del change, full, unusable  # the file is written as a whole
        self._confirmed = (payload, clock.unix())
        self._flushed.clear()
        self._dirty.set()

    def suspend(self) -> None:
        """Do nothing: data that upstream confirmed earlier is worth keeping during an outage."""

    async def flushed(self) -> None:
        """Wait, without a timeout, until the last update is stored."""
        self._flush_requested.set()
        await self._flushed.wait()

    async def run(self) -> None:
        """Write updates until cancelled; then write the last state, within a time limit."""
        try:
            while True:
                await self._dirty.wait()
                await self._wait_until_due()
                await self._wait_for_name()
                writing = self._write()
                await asyncio.wait({writing})
                if isinstance(writing.exception(), OSError):
                    self._dirty.set()
                    await asyncio.sleep(self._timings.retry)
                else:
                    writing.result()
        finally:
            await self._finish()

    async def _wait_until_due(self) -> None:
        """Wait, to batch changes and limit the write rate, or until `flushed` is called."""
        updated_at = clock.monotonic()
        while (delay := self._due_at(updated_at) - clock.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._flush_requested.wait()
                    return

    async def _wait_for_name(self) -> None:
        """Wait until the state of the data has a name: else the journal cannot be written."""
        while self._journal is not None and (naming := self._journal.naming) is not None:
            run_for(SLICE, naming)
            await asyncio.sleep(0)
        if self._journal is not None:
            self._journal.finish_naming()

    def _due_at(self, updated_at: float) -> float:
        """Return the monotonic time at which to write an update that came at `updated_at`."""
        payload, _ = self._confirmed
        earliest = updated_at + self._timings.gather
        if self._file.contains(payload):
            return earliest  # only the time is renewed
        size = payload.size + self._file.journal_size
        return max(earliest, self._last_full_write + size / self._timings.bytes_per_second)

    def _write(self) -> asyncio.Future[None]:
        """Start writing the confirmed data."""
        snapshot = self._confirmed
        payload, confirmed = snapshot
        self._dirty.clear()
        self._flush_requested.clear()
        if not self._file.contains(payload):
            self._last_full_write = clock.monotonic()
        journal = self._journal.saved(payload) if self._journal else None
        self._writing = in_thread(lambda: self._file.store(payload, confirmed, journal), "snapshot")
        self._writing.add_done_callback(lambda future: self._write_done(future, snapshot))
        return self._writing

    def _write_done(self, future: asyncio.Future[None], snapshot: tuple[Payload, float]) -> None:
        error = future.exception()
        if isinstance(error, OSError):
            self._begin_outage("written", error)
        elif error is None:
            self._outage.end("Snapshot %s is written again", self._file.path)
            if snapshot is self._confirmed:
                self._flushed.set()

    async def _finish(self) -> None:
        """Write the last update, but do not keep the process from ending."""
        deadline = clock.monotonic() + self._timings.finish
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=self._timings.finish)
        if not self._flushed.is_set() and (self._writing is None or self._writing.done()):
            if self._journal is not None:
                self._journal.finish_naming()
            await asyncio.wait({self._write()}, timeout=max(0.0, deadline - clock.monotonic()))
        if not self._flushed.is_set() and self._outage.reason is None:
            text = "Snapshot %s: the last state could not be written within %g s"
            self._log.warning(text, self._file.path, self._timings.finish)

    def _begin_outage(self, operation: str, error: OSError) -> None:
        reason, retry = describe(error), self._timings.retry
        text = "Snapshot %s cannot be %s: %s; trying again every %g s"
        self._outage.begin(reason, text, self._file.path, operation, reason, retry)


class _SnapshotFile:
    """The snapshot file. Its methods block and raise `OSError`."""

    def __init__(self, directory: Path, environment: str, payload_filter: str) -> None:
        self._directory = directory
        self._identity = environment, payload_filter
        # A part of each digest suffices to distinguish environments; the header has all of it.
        self._stem = "-".join(["environment", *(each[:16] for each in self._identity if each)])
        self.path = directory / f"{self._stem}.snapshot"
        self._written: tuple[Payload, Header] | None = None

    def load(self) -> Stored | None:
        """Return the content of the file; remove unfinished files of killed processes first.

        Raises:
            InvalidData: the file is damaged; it has been renamed.
            UnknownFormat: the file belongs to another release or environment.
            OSError: the file cannot be read; `FileNotFoundError` if there is none.
        """
        with _IO_LOCK:
            remove_unfinished(self.path)
            try:
                stored = self._read()
            except InvalidData:
                with contextlib.suppress(OSError):
                    self.path.replace(self._directory / f"{self._stem}.damaged")
                raise
        return stored

    @property
    def journal_size(self) -> int:
        """Size of the journal that was written last, in bytes."""
        return self._written[1].journal if self._written else 0

    def contains(self, payload: Payload) -> bool:
        """Return whether this object has written `payload` into the file."""
        return self._written is not None and self._written[0] is payload

    def store(self, payload: Payload, confirmed: float, journal: SavedJournal | None) -> None:
        """Write the payload, or only the time if the file holds the payload already."""
        with _IO_LOCK:
            header = None
            if self._written is not None and self._written[0] is payload:
                header = self._renew_time(self._written[1], confirmed)
            self._written = payload, header or self._replace_file(payload, confirmed, journal)

    def _read(self) -> Stored:
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_SIZE:
                raise snapshot_format.damaged(f"longer than {MAX_SIZE} bytes")
            first_line = file.read(HEADER_SIZE)
            body = file.read()
        header = snapshot_format.header(first_line)
        if (header.environment, header.filter) != self._identity:
            raise UnknownFormat("it belongs to another environment")
        payload = snapshot_format.payload(header, body)
        age = snapshot_format.age(header, clock.unix())
        return Stored(payload, age=age, journal=snapshot_format.journal(header, body))

    def _renew_time(self, old_header: Header, confirmed: float) -> Header | None:
        """Update the time in place; return None if another process has changed the file."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                if file.read(HEADER_SIZE) != snapshot_format.first_line(old_header):
                    return None
                new_header = msgspec.structs.replace(old_header, confirmed=confirmed)
                os.pwrite(file.fileno(), snapshot_format.first_line(new_header), 0)
        except FileNotFoundError:
            return None
        return new_header

    def _replace_file(
        self, payload: Payload, confirmed: float, journal: SavedJournal | None
    ) -> Header:
        """Replace the file atomically."""
        make_directory(self._directory)
        with replacing(self.path) as file:
            header = self._write_body(file.write, payload, confirmed, journal)
            file.flush()
            os.pwrite(file.fileno(), snapshot_format.first_line(header), 0)
        return header

    def _write_body(
        self,
        write: Callable[[bytes], object],
        payload: Payload,
        confirmed: float,
        journal: SavedJournal | None,
    ) -> Header:
        """Write blanks in place of the header, then items and journal; return the header."""
        write(b" " * HEADER_SIZE)
        size, checksum = 0, hashlib.sha256()
        for chunk in snapshot_format.chunks(payload):
            write(chunk)
            checksum.update(chunk)
            size += len(chunk)
        line = snapshot_format.journal_line(journal)
        write(line)
        checksum.update(line)
        digest = checksum.hexdigest()
        return Header(*self._identity, confirmed, len(payload), size, digest, len(line))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
