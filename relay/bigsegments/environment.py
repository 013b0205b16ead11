"""Everything about the big segments of one environment: who is a member, and how recent that is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from relay import clock
from relay.bigsegments.memberships import KnownMembership, Memberships
from relay.errors import StoreUnavailable
from relay.evaluation.data import Membership
from relay.evaluation.results import BigSegmentsStatus
from relay.lru import LRUMap
from relay.protocol.bigsegments import context_hash
from relay.stores.bigsegments import BigSegmentStore, Metadata
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

MAX_KNOWN = 1000
"""Context keys whose memberships are remembered, as SDKs do (datastore 4.9)."""

MAX_BATCH = 128
"""Context keys that are read in one request: a millisecond of unpacking."""

MAX_CHANGED = 10_000
"""Hashes of changed memberships that are gathered, and sent to workers; beyond that, all count as
changed."""


STALE = 120.0
"""Seconds after the last synchronisation from which memberships are stale (datastore 4.9)."""


class BigSegmentTimings(Struct, frozen=True):
    """Times in seconds (datastore 4.9).

    Args:
        lifetime: time for which a membership is used once it was read.
        poll: between two looks at the state of the database.
        retry: the same while the database is away.
        stale: age of the last synchronisation from which evaluations say `STALE`.
        reported: the same for `/status`.
        notice: minimum between two notices of changes to clients.
        read: maximum for one read; evaluations wait for it.
    """

    lifetime: float = 5.0
    poll: float = 5.0
    retry: float = 1.0
    stale: float = STALE
    reported: float = 300.0
    notice: float = 1.0
    read: float = 1.0


class Synchronising(Protocol):
    """Contract of a `relay.bigsegments.synchroniser.Synchroniser`."""

    applied: int

    @property
    def has_lease(self) -> bool:
        """True while this relay is the one that synchronises."""

    async def run(self) -> None:
        """Apply patches until cancelled."""

    async def confirm(self) -> None:
        """Write the time of the synchronisation again, if it is due."""

    def check(self) -> None:
        """Try again soon if disconnected."""


class BigSegmentStatus(Struct, frozen=True):
    """State of the big segments of an environment, as shown in `/status` (status 8.1).

    Args:
        available: False if the database cannot be read.
        potentially_stale: True if the last synchronisation is long ago, or there was none.
        synchronized_at: Unix seconds of the last synchronisation; None if there was none.
    """

    available: bool
    potentially_stale: bool = False
    synchronized_at: float | None = None


def status_of(metadata: Metadata, stale: float = STALE) -> BigSegmentsStatus:
    """Return the status of memberships that are read now.

    Args:
        metadata: state of the database.
        stale: seconds after the last synchronisation from which they are stale.
    """
    at = metadata.synchronized_at
    fresh = at is not None and clock.unix() - at < stale
    return BigSegmentsStatus.HEALTHY if fresh else BigSegmentsStatus.STALE


class BigSegments:
    """Big segments of one environment.

    Nothing is read from the database before the environment has a big segment.

    Args:
        store: the database.
        log: a logger that names the environment.
        timings: times and limits.
    """

    def __init__(
        self, store: BigSegmentStore, log: Log, timings: BigSegmentTimings = BigSegmentTimings()
    ) -> None:
        self.store = store
        self.synchroniser: Synchronising | None = None
        """Set by the one who builds it; None if nothing may be asked of upstream."""
        self.on_change: Callable[[frozenset[str] | None], None] = lambda _hashes: None
        """Called with the hashes of context keys whose memberships have changed; None for all."""
        self.on_status: Callable[[], None] = lambda: None
        """Called when memberships that are read from now on have another status."""
        self.watches_cursor = True
        """True if memberships have changed when the cursor moves; False if somebody else tells
        which ones."""
        self.reads = 0
        """Number of context keys whose memberships were read."""
        self.failed_reads = 0
        """Number of context keys whose memberships could not be read."""
        self._log = log
        self._timings = timings
        self._outage = OutageLog(log, begins=logging.ERROR, ends=logging.WARNING)
        self._odd_time = OutageLog(log)
        self._known: LRUMap[str, KnownMembership] = LRUMap(MAX_KNOWN)
        self._metadata: Metadata | None = None
        """State of the database; None if it was never read or is away."""
        self._status: BigSegmentsStatus | None = None
        """Status of all memberships that are known; None before the first look."""
        self._needed = asyncio.Event()
        self._synchronised = asyncio.Event()
        """Set once there is something to synchronise."""
        self._look_now = asyncio.Event()
        self._wanted: dict[str, asyncio.Future[KnownMembership]] = {}
        """Context keys to read."""
        self._reading: dict[str, asyncio.Future[KnownMembership]] = {}
        """Context keys that are being read."""
        self._reader: asyncio.Task[None] | None = None
        self._dropped: set[str] | None = None
        """Hashes whose memberships have changed during the present read; None for all of them, and
        between reads."""
        self._changed: set[str] | None = set()
        """Hashes that the next notice names; None for all."""
        self._noticed_at = -timings.notice
        self._notice: asyncio.TimerHandle | None = None
        self._former: list[BigSegmentStore] = []
        """Databases that were read before, and are still open."""
        self._moved = asyncio.Event()
        """Set by `move` until it has taken effect."""
        self._applied = 0
        """Patches that this relay had applied when the cursor was last seen to move."""

    def __repr__(self) -> str:
        status = self._status.value if self._status else "not in use"
        return f"<BigSegments {self.store.label} {status}, {len(self._known)} known>"

    # Running

    def start(self, *, synchronise: bool) -> None:
        """Begin to look at the database: the environment has a big segment.

        Args:
            synchronise: it comes from upstream, so that its members are to be fetched from there.
        """
        self._needed.set()
        if synchronise:
            self._synchronised.set()

    @property
    def in_use(self) -> bool:
        """True once the environment has had a big segment."""
        return self._needed.is_set()

    async def run(self) -> None:
        """Keep the state of the database and its content current, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._moved.clear()
                    tasks.create_task(self._close_former())
                    working = tasks.create_task(self._work())
                    await self._moved.wait()
                    working.cancel()
        finally:
            await self._close()

    async def _work(self) -> None:
        await self._needed.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._synchronise())
            await self._watch()

    def move(self, store: BigSegmentStore, synchroniser: Synchronising | None) -> None:
        """Read from another database from now on, and fill that.

        Args:
            store: the database.
            synchroniser: brings patches into it.
        """
        self._former.append(self.store)
        self.store, self.synchroniser = store, synchroniser
        self._metadata, self._status, self._applied = None, None, 0
        self._moved.set()
        if self.in_use:
            self.changed(None)

    async def _close_former(self) -> None:
        """Close the databases that were read before, once the last read has ended."""
        if self._former:
            await asyncio.sleep(self._timings.read)
        while self._former:
            await self._former.pop().aclose()

    def check(self) -> None:
        """Try again soon if patches cannot be fetched: there may be another SDK key."""
        if self.synchroniser is not None:
            self.synchroniser.check()

    async def _synchronise(self) -> None:
        await self._synchronised.wait()
        if self.synchroniser is not None:
            await self.synchroniser.run()

    async def _watch(self) -> None:
        """Look at the state of the database again and again."""
        while True:
            self._look_now.clear()
            await self._look()
            timings = self._timings
            try:
                async with asyncio.timeout(timings.poll if self._metadata else timings.retry):
                    await self._look_now.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        """Read the state of the database."""
        before = self._metadata
        try:
            if self.synchroniser is not None and before is not None:
                await self.synchroniser.confirm()
            async with asyncio.timeout(self._timings.read):
                metadata = await self.store.metadata()
        except TimeoutError:
            self._lose("no answer in time")
        except StoreUnavailable as e:
            self._lose(str(e))
        else:
            self._metadata = metadata
            if self._outage.end("Big segments can be read from %s again", self.store.label):
                self.changed(None)  # clients were answered without them
            self._set_status(status_of(metadata, self._timings.stale))
            if metadata.is_readable:
                self._odd_time.end("The time of the last synchronization is readable again")
            else:
                text = "The time of the last synchronization in %s is no number; members are stale"
                self._odd_time.begin("no number", text, self.store.label)
            is_moved = before is not None and metadata.cursor != before.cursor
            if is_moved and self.watches_cursor:
                self._note_move()

    def _note_move(self) -> None:
        """Note that the cursor has moved: by this relay, which has said so, or by another one."""
        applied = self.synchroniser.applied if self.synchroniser else 0
        if applied == self._applied:
            self.changed(None)
        self._applied = applied

    async def _close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        if self._notice is not None:
            self._notice.cancel()
        self._status = BigSegmentsStatus.STORE_ERROR  # nothing is read from now on
        self._give_up(self._wanted)
        self._wanted.clear()
        for store in (self.store, *self._former):
            await store.aclose()

    # Status

    @property
    def status(self) -> BigSegmentStatus | None:
        """State for `/status`; None while there is no big segment."""
        if not self.in_use:
            return None
        metadata = self._metadata or Metadata()
        if self._status is BigSegmentsStatus.STORE_ERROR or not metadata.is_readable:
            return BigSegmentStatus(available=False)
        age, at = self.age, metadata.synchronized_at
        return BigSegmentStatus(True, age is None or age >= self._timings.reported, at)

    @property
    def age(self) -> float | None:
        """Seconds since the last synchronisation; None if there was none, or it is unknown."""
        at = self._metadata.synchronized_at if self._metadata else None
        return None if at is None else max(0.0, clock.unix() - at)

    def look(self) -> None:
        """Look at the state of the database now: it was synchronised."""
        self._look_now.set()

    def _lose(self, reason: str) -> None:
        """Note that the database cannot be read."""
        self._metadata = None
        text = "Big segments cannot be read from %s: %s; flags are evaluated without them"
        self._outage.begin(reason, text, self.store.label, reason)
        self._set_status(BigSegmentsStatus.STORE_ERROR)

    def _set_status(self, status: BigSegmentsStatus) -> None:
        """Let all memberships that are read from now on have a status; others are forgotten."""
        if status is not self._status:
            self._status = status
            self._drop(None)
            self.on_status()

    # Memberships

    def known(self, keys: Sequence[str]) -> Memberships | None:
        """Return the memberships of context keys; None if they have to be read."""
        now, found = clock.monotonic(), {}
        for key in keys:
            known = self._known.get(key)
            if known is None or known.expires_at <= now:
                if self._status is not BigSegmentsStatus.STORE_ERROR:
                    return None
                known = self._unreadable(key)
            found[key] = known
        return Memberships.of(found)

    async def memberships(self, keys: Collection[str]) -> Memberships:
        """Return the memberships of context keys, read together with those that others want."""
        now = clock.monotonic()
        found: dict[str, KnownMembership] = {}
        pending: dict[str, asyncio.Future[KnownMembership]] = {}
        for key in keys:
            known = self._known.get(key)
            if known is not None and known.expires_at > now:
                found[key] = known
            elif self._status is BigSegmentsStatus.STORE_ERROR:
                found[key] = self._unreadable(key)
            else:
                pending[key] = self._want(key)
        for key, future in pending.items():
            found[key] = await asyncio.shield(future)
        return Memberships.of(found)

    def read(self, keys: Sequence[str]) -> asyncio.Future[Any]:
        """Read the memberships of context keys that are not known.

        Returns:
            A future that is done when `known` has them.
        """
        if len(keys) == 1:
            return self._want(keys[0])
        return asyncio.gather(*map(self._want, keys))

    def _unreadable(self, key: str) -> KnownMembership:
        """Return the membership while the database is away: none, until it is back."""
        self.failed_reads += 1
        membership = Membership(BigSegmentsStatus.STORE_ERROR)
        known = KnownMembership(membership, "", clock.monotonic() + self._timings.lifetime)
        self._known.put(key, known)
        return known

    def _want(self, key: str) -> asyncio.Future[KnownMembership]:
        future = self._reading.get(key) or self._wanted.get(key)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._wanted[key] = loop.create_future()
            if self._reader is None:
                self._reader = loop.create_task(self._read_wanted())
        return future

    async def _read_wanted(self) -> None:
        """Read what is wanted, in batches: what comes during one is in the next."""
        try:
            while self._wanted:
                keys = list(self._wanted)[:MAX_BATCH]
                self._reading = {key: self._wanted.pop(key) for key in keys}
                known = await self._read(keys)
                for key, future in self._reading.items():
                    if not future.done():
                        future.set_result(known[key])
        finally:
            self._give_up(self._reading)
            self._reading, self._reader = {}, None

    def _give_up(self, waiting: Mapping[str, asyncio.Future[KnownMembership]]) -> None:
        """Let those who still wait go on without memberships."""
        for key, future in waiting.items():
            if not future.done():
                future.set_result(self._unreadable(key))

    async def _read(self, keys: Sequence[str]) -> Mapping[str, KnownMembership]:
        hashes, store = list(map(context_hash, keys)), self.store
        try:
            async with asyncio.timeout(self._timings.read):
                if self._metadata is None:
                    self._metadata = await store.metadata()
                    self._set_status(status_of(self._metadata, self._timings.stale))
                self._dropped = set()
                found = await store.memberships(hashes)
        except (TimeoutError, StoreUnavailable) as e:
            if store is not self.store:
                return await self._read(keys)  # they have moved meanwhile
            self._lose(str(e) or "no answer in time")
            return {key: self._unreadable(key) for key in keys}
        self.reads += len(keys)
        known = {
            key: self._remember(key, hashed, segments)
            for key, hashed, segments in zip(keys, hashes, found, strict=True)
        }
        self._dropped = None
        return known

    def _remember(self, key: str, hashed: str, segments: Mapping[str, bool]) -> KnownMembership:
        status = self._status or BigSegmentsStatus.STALE
        known = self._known.get(key)
        membership = Membership(status, segments)
        if known is None or known.membership != membership or known.expires_at < 0:
            known = KnownMembership(membership, hashed, 0.0)
            self._known.put(key, known)
        if self._dropped is None or hashed in self._dropped:
            known.expires_at = 0.0  # it changed while it was read
        else:
            known.expires_at = clock.monotonic() + self._timings.lifetime
        return known

    # Changes

    def changed(self, hashes: frozenset[str] | None) -> None:
        """Forget memberships that have changed, and let clients know soon.

        Args:
            hashes: of the context keys; None if they are unknown.
        """
        self._drop(hashes)
        self._changed = _joined(self._changed, hashes)
        if self._notice is None:
            delay = self._noticed_at + self._timings.notice - clock.monotonic()
            self._notice = asyncio.get_running_loop().call_later(max(0.0, delay), self._send)

    def _send(self) -> None:
        changed, self._changed = self._changed, set()
        self._notice, self._noticed_at = None, clock.monotonic()
        self.on_change(None if changed is None else frozenset(changed))

    def _drop(self, hashes: frozenset[str] | None) -> None:
        self._dropped = _joined(self._dropped, hashes)
        for key in list(self._known):
            known = self._known.get(key)
            if known is not None and (hashes is None or known.hash in hashes):
                known.drop()
                self._known.forget(key)


def _joined(gathered: set[str] | None, hashes: frozenset[str] | None) -> set[str] | None:
    """Return hashes that were gathered with others; None if these are all, or too many."""
    if gathered is None or hashes is None or len(gathered) + len(hashes) > MAX_CHANGED:
        return None
    gathered |= hashes
    return gathered
