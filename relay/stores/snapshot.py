"""The snapshot on disk: what upstream last vouched for, for a start while everything else is away.

One file per environment, in the form of `protocol/snapshot.py`. A new file takes the place of the
old one in one step; only the time at which upstream last vouched for the data is renewed in place,
by a single write within the first block.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from relay.errors import InvalidData
from relay.files import make_directory, open_private
from relay.model.credential import SDKKey
from relay.model.payload import EMPTY, Change, Payload
from relay.protocol import snapshot as grammar
from relay.protocol.snapshot import HEADER_SIZE, Header, UnknownFormat
from relay.reasons import describe
from relay.stores import Key, Stored, StoreStatus
from relay.telemetry.log import Log

MAX_SIZE = 512 * 1024 * 1024
"""Bytes of a file that is read: several times what upstream may send at once; more is damage."""

_WRITING = threading.Lock()
"""Held while a file is read or written: environments share the disk and the interpreter."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SnapshotTimings:
    """How often and how long a snapshot is written, in seconds.

    Args:
        gather: changes within this time are written together.
        bytes_per_second: an environment that never rests is written at this rate on average, and
            no faster: 20 GB a day, which no disk minds. So one of 50 MB is written every three
            minutes at most, one of 500 KB every 2 seconds.
        retry: between attempts while the disk does not work.
        finish: for the last state, when the relay ends.
    """

    gather: float = 2.0
    bytes_per_second: float = 256 * 1024
    retry: float = 10.0
    finish: float = 4.0


class SnapshotMirror:
    """The copy of an environment's payload in a file.

    Args:
        directory: where it is; made for us alone if it does not exist.
        sdk_key: the environment's. The file is bound to it and does not hold it.
        log: a logger that names the environment.
        timings: how often it is written.
    """

    status: StoreStatus | None = None

    def __init__(
        self,
        directory: Path,
        sdk_key: SDKKey,
        log: Log,
        timings: SnapshotTimings = SnapshotTimings(),
    ) -> None:
        self._file = _SnapshotFile(directory, hashlib.sha256(sdk_key.value.encode()).hexdigest())
        self._log = log
        self._pace = timings
        self._vouched: tuple[Payload, float] = (EMPTY, 0.0)
        """What upstream last vouched for, and when, in Unix seconds: another process reads it."""
        self._latest = asyncio.Event()
        """Set while there is something to write."""
        self._complete = asyncio.Event()
        """Set while the file holds everything."""
        self._complete.set()
        self._flush = asyncio.Event()
        self._writing: asyncio.Future[None] | None = None
        self._begun = -float("inf")
        """The clock when the file was last begun to be written as a whole."""
        self._failing = False

    async def load(self) -> Stored | None:
        """Return what the file holds; None without a file that can be used, which is said."""
        try:
            return await _in_thread(self._file.load)
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
        """Note that upstream vouches for `payload` now."""
        del change, full, unusable  # the file is written as a whole
        self._vouched = (payload, time.time())
        self._complete.clear()
        self._latest.set()

    def suspend(self) -> None:
        """Note that upstream is lost. What it vouched for before stays worth keeping."""

    async def flushed(self) -> None:
        """Return once all that `update` has noted is stored; waits as long as that takes."""
        self._flush.set()
        await self._complete.wait()

    async def run(self) -> None:
        """Write what `update` noted until cancelled; then the last state, for a bounded time."""
        try:
            while True:
                await self._latest.wait()
                await self._until_due()
                writing = self._write()
                await asyncio.wait({writing})
                if isinstance(writing.exception(), OSError):
                    self._latest.set()
                    await asyncio.sleep(self._pace.retry)
                else:
                    writing.result()
        finally:
            await self._finish()

    async def _until_due(self) -> None:
        """Wait, so that changes gather and the disk has rest; or until `flushed` is awaited."""
        noted = time.monotonic()
        while (delay := self._due(noted) - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._flush.wait()
                    return

    def _due(self, noted: float) -> float:
        """Return the clock at which to write what was noted at `noted`."""
        payload, _ = self._vouched
        soon = noted + self._pace.gather
        if self._file.contains(payload):
            return soon  # only the time is renewed
        return max(soon, self._begun + payload.size / self._pace.bytes_per_second)

    def _write(self) -> asyncio.Future[None]:
        """Begin to write what upstream vouched for."""
        vouched = self._vouched
        payload, confirmed = vouched
        self._latest.clear()
        self._flush.clear()
        if not self._file.contains(payload):
            self._begun = time.monotonic()
        self._writing = _in_thread(lambda: self._file.store(payload, confirmed))
        self._writing.add_done_callback(lambda done: self._note_written(done, vouched))
        return self._writing

    def _note_written(self, done: asyncio.Future[None], vouched: tuple[Payload, float]) -> None:
        error = done.exception()
        if isinstance(error, OSError):
            self._begin_outage("written", error)
        elif error is None:
            self._end_outage()
            if vouched is self._vouched:
                self._complete.set()

    async def _finish(self) -> None:
        """Write what is not stored yet, but do not keep the process from ending."""
        deadline = time.monotonic() + self._pace.finish
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=self._pace.finish)
        if not self._complete.is_set() and (self._writing is None or self._writing.done()):
            await asyncio.wait({self._write()}, timeout=max(0.0, deadline - time.monotonic()))
        if not self._complete.is_set() and not self._failing:
            text = "Snapshot %s: the last state could not be written within %g s"
            self._log.warning(text, self._file.path, self._pace.finish)

    def _begin_outage(self, what: str, error: OSError) -> None:
        if not self._failing:
            self._failing = True
            text = "Snapshot %s cannot be %s: %s; trying again every %g s"
            self._log.warning(text, self._file.path, what, describe(error), self._pace.retry)

    def _end_outage(self) -> None:
        if self._failing:
            self._failing = False
            self._log.info("Snapshot %s is written again", self._file.path)


class _SnapshotFile:
    """The file itself. Its methods block and raise `OSError`."""

    def __init__(self, directory: Path, environment: str) -> None:
        self._directory = directory
        self._environment = environment
        # Part of the digest suffices to tell environments apart; the header has all of it.
        self._stem = f"environment-{environment[:16]}"
        self.path = directory / f"{self._stem}.snapshot"
        self._written: tuple[Payload, Header] | None = None

    def load(self) -> Stored | None:
        """Return what the file holds, after clearing away what earlier processes left half done.

        Raises:
            InvalidData: it is damaged. It has been set aside.
            UnknownFormat: it is of another release or environment.
            OSError: it cannot be read; `FileNotFoundError` if there is none.
        """
        with _WRITING:
            self._clean()
            try:
                payload, header = self._read()
            except InvalidData:
                with contextlib.suppress(OSError):
                    self.path.replace(self._directory / f"{self._stem}.damaged")
                raise
        return Stored(payload, age=grammar.age(header, time.time()))

    def contains(self, payload: Payload) -> bool:
        """Whether we have written this payload into the file."""
        return self._written is not None and self._written[0] is payload

    def store(self, payload: Payload, confirmed: float) -> None:
        """Make the file hold this: all of it, or only the time if it holds the payload already."""
        with _WRITING:
            header = None
            if self._written is not None and self._written[0] is payload:
                header = self._renewed(self._written[1], confirmed)
            self._written = payload, header or self._replaced(payload, confirmed)

    def _read(self) -> tuple[Payload, Header]:
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_SIZE:
                raise grammar.damaged(f"longer than {MAX_SIZE} bytes")
            first = file.read(HEADER_SIZE)
            body = file.read()
        header = grammar.header(first)
        if (header.environment, header.filter) != (self._environment, ""):
            raise UnknownFormat("it belongs to another environment")
        return grammar.payload(header, body), header

    def _renewed(self, before: Header, confirmed: float) -> Header | None:
        """Write the time in place; return None if the file is no longer the one that we wrote."""
        try:
            with self.path.open("r+b", buffering=0) as file:
                if file.read(HEADER_SIZE) != grammar.first_line(before):
                    return None
                after = msgspec.structs.replace(before, confirmed=confirmed)
                os.pwrite(file.fileno(), grammar.first_line(after), 0)
        except FileNotFoundError:
            return None
        return after

    def _replaced(self, payload: Payload, confirmed: float) -> Header:
        """Put a new file in the place of the old one, in one step."""
        make_directory(self._directory)
        temporary = self._directory / f"{self._stem}.{secrets.token_hex(8)}.tmp"
        descriptor = open_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells `_clean` that we are alive
                header = self._fill(file.write, payload, confirmed)
                file.flush()
                os.pwrite(descriptor, grammar.first_line(header), 0)
                os.fsync(descriptor)
                temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self._directory)
        return header

    def _fill(self, write: Callable[[bytes], object], payload: Payload, confirmed: float) -> Header:
        """Write all items behind room for the header, and return the header."""
        write(b" " * HEADER_SIZE)
        size, checksum = 0, hashlib.sha256()
        for chunk in grammar.chunks(payload):
            write(chunk)
            checksum.update(chunk)
            size += len(chunk)
        digest = checksum.hexdigest()
        return Header(self._environment, "", confirmed, len(payload), size, digest)

    def _clean(self) -> None:
        """Remove what a killed process left half written; what a living one writes is locked."""
        for leftover in self._directory.glob(f"{self._stem}.*.tmp"):
            with contextlib.suppress(OSError), leftover.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a new name last. Where directories cannot be synchronised, the system sees to it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Do work in a thread that, unlike those of the loop's executor, cannot hold up the end.

    A disk that hangs would.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Callable[[], None]) -> None:
        if not done.cancelled():
            result()

    def run() -> None:
        try:
            value = work()
        except BaseException as e:  # noqa: BLE001 - raised again where the result is awaited
            error = e
            result = lambda: done.set_exception(error)  # noqa: E731
        else:
            result = lambda: done.set_result(value)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop has ended without us
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=run, name="snapshot", daemon=True).start()
    return done
