"""Keeps a database equal to the payload, in the background, and repairs it.

Changes are written as they come. Whenever the database may differ for another reason (at the start,
after an outage of upstream or of the database, and on a timer, because it may have been wiped,
restored or overwritten), the versions of all its items are compared with those of the payload, and
missing or older items are written again.

`reconcile` decides what to write; this module does it, in time, and logs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from msgspec.structs import replace

from relay import clock
from relay.aio import run_in_slices
from relay.backoff import Backoff
from relay.errors import StoreUnavailable
from relay.model.item import InvalidItem, Item
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.steps import finish
from relay.stores import (
    DataStore,
    Key,
    Stored,
    StoreState,
    StoreStatus,
    Version,
    Versions,
    label_of,
)
from relay.stores.conflicts import NEVER, ConflictTimings
from relay.stores.fingerprint import Fingerprint
from relay.stores.reconcile import Reconciler, Repair
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

MAX_PENDING = 1000
"""Changed items queued for a slow database; beyond that, all versions are compared instead."""

MAX_NAMED = 5
"""Maximum number of items named in one log line."""


@dataclass(frozen=True, slots=True)
class MirrorTimings:
    """Delays in seconds. Together they repair a lost database within 30 s.

    Args:
        probe: between two probes while nothing happens.
        compare: between two comparisons of all items, which find what no probe shows: single items
            that something else has damaged.
        retry: after consecutive failures.
        finish: time limit for the last write when the relay ends.
        pause: least time from one write of changes to the next, in which further changes gather.
        mark: after a write of changes; then the fingerprint is written, unless another one came: a
            change that comes soon after another does not wait for that.
        conflicts: before items that are newer in the database, or only there, are replaced.
    """

    probe: float = 10.0
    compare: float = 60.0
    retry: Backoff = Backoff(first=0.5, longest=5.0)
    finish: float = 2.0
    pause: float = 0.0
    mark: float = 0.5
    conflicts: ConflictTimings = ConflictTimings()


SINGLE_RUN = MirrorTimings(
    conflicts=ConflictTimings(second_look=0.01, refresh=2.0, newer=NEVER, extra=2.0)
)
"""Delays of a run that ends when the database is up to date. Newer items stay: such a run does not
know what earlier runs replaced. Items that only the database has are removed after the two seconds
that LaunchDarkly's guide waits for its caches (webhooks 12.3)."""


SCANNED_AT_A_PRICE = MirrorTimings(probe=30.0, compare=3600.0)
"""Delays for a database that charges for what is read: a probe reads one small item."""

TIMINGS = {"dynamodb": SCANNED_AT_A_PRICE}
"""Delays for the kinds of databases that differ from the others."""


class DatabaseMirror:
    """Mirror of an environment's payload in a database.

    Args:
        store: the database.
        database: kind of the database, as shown in `/status`.
        resync: requests all data from upstream again.
        log: a logger that names the environment.
        timings: delays.
        label: subject of log lines; by default made of the database and its server.
        table: table of the database; empty if it has none.
    """

    has_journal = False

    def __init__(
        self,
        store: DataStore,
        database: str,
        resync: Callable[[], None],
        log: Log,
        timings: MirrorTimings = MirrorTimings(),
        *,
        label: str = "",
        table: str = "",
    ) -> None:
        self._store = store
        where = table or store.server
        self._label = label or label_of(database, where)
        self._resync = resync
        self._log = log
        self._outage = OutageLog(log, begins=logging.ERROR, ends=logging.WARNING)
        self._timings = timings
        self.status = StoreStatus(
            StoreState.INITIALIZING,
            clock.unix(),
            database,
            store.server,
            store.prefix,
            table=table,
        )
        self._payload: Payload | None = None
        """The data that upstream last confirmed."""
        self._unusable: frozenset[Key] = frozenset()
        """Items whose upstream version is unusable, so unknown here."""
        self._unstorable: dict[Key, InvalidItem] = {}
        """Items that the database cannot hold; it keeps an earlier version of them, or none."""
        self._healthy = False
        """True while upstream is connected; writes are suspended otherwise."""
        self._pending: dict[Key, Item] = {}
        """Items changed since the last write; empty while a comparison is needed."""
        self._needs_compare = True
        """True if the database may differ by more than `_pending`."""
        self._wakeup = asyncio.Event()
        self._flushed = asyncio.Event()
        self._last_full_at = -NEVER
        """Monotonic time at which upstream last sent all data."""
        self._reconciler = Reconciler(timings.conflicts)
        self._recheck_at = NEVER
        """Monotonic time at which to compare again, for open conflicts or as a routine."""
        self._compare_due = False
        self._probe_at = clock.monotonic() + timings.probe
        """Monotonic time of the next probe, however much is written until then."""
        self._probe_due = False
        self._written_at = -NEVER
        """Monotonic time of the last write of items."""
        self._stored: tuple[Payload, Fingerprint] | None = None
        """Content of the database after the last write or comparison; None if others may have
        written to it."""
        self._marked: Fingerprint | None = None
        """Fingerprint that was last written or found beside the data."""
        self._mark_at = -NEVER
        """Monotonic time from which on the fingerprint may be written."""

    def __repr__(self) -> str:
        status = self.status
        return f"<DatabaseMirror {status.server} {status.prefix!r} {status.state.value}>"

    async def load(self) -> Stored | None:
        """Return the stored data. Wait for the database, but only until upstream delivers."""
        failures = 0
        while self._payload is None:
            try:
                stored = await self._store.load()
            except StoreUnavailable as e:
                self._begin_outage(e)
                await asyncio.sleep(self._timings.retry.delay(failures))
                failures += 1
                continue
            self._end_outage()
            if stored:
                self._report_invalid(stored)
            return stored
        return None

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Schedule a write; return immediately."""
        if full:
            self._last_full_at = clock.monotonic()
            # Conflicts wait for complete data.
            self._needs_compare |= self._reconciler.has_conflicts
        if not self._healthy or (change is not None and change.replace):
            self._needs_compare = True
        self._payload, self._healthy = payload, True
        self._unusable = frozenset(unusable)
        items = change.items if change is not None and not self._needs_compare else ()
        self._pending.update(((item.kind, item.key), item) for item in items)
        if len(self._pending) > MAX_PENDING:
            self._needs_compare = True
        if self._needs_compare:
            self._pending.clear()
        if self._needs_compare or self._pending:
            self._flushed.clear()
            self._wakeup.set()

    def suspend(self) -> None:
        """Stop writing until the next `update`: without upstream the data may be outdated."""
        self._healthy = False

    async def flushed(self) -> None:
        """Wait, without a timeout, until the database equals the payload."""
        await self._flushed.wait()

    async def run(self) -> None:
        """Keep the database equal until cancelled; then finish pending writes, within a limit."""
        try:
            failures = 0
            while True:
                try:
                    await self._sync()
                except StoreUnavailable as e:
                    self._begin_outage(e)
                    self._needs_compare = True  # a failed write may have arrived all the same
                    await asyncio.sleep(self._timings.retry.delay(failures))
                    failures += 1
                else:
                    failures = 0
                    await self._wait_for_work()
        finally:
            await self._finish()

    async def _wait_for_work(self) -> None:
        """Wait until there is something to write, or the next comparison is due."""
        mark_at = self._mark_at if self._healthy and self._is_unmarked else NEVER
        wait = max(0.0, min(self._probe_at, self._recheck_at, mark_at) - clock.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._wakeup.wait()
        if (now := clock.monotonic()) >= self._probe_at:
            self._probe_due, self._probe_at = True, now + self._timings.probe
        if now >= self._recheck_at:
            self._compare_due, self._recheck_at = True, NEVER
        if (rest := self._written_at + self._timings.pause - clock.monotonic()) > 0:
            await asyncio.sleep(rest)

    async def _finish(self) -> None:
        if self._healthy and not self._flushed.is_set():
            self._needs_compare = True  # an interrupted write may have arrived
            with contextlib.suppress(TimeoutError, StoreUnavailable):
                async with asyncio.timeout(self._timings.finish):
                    await self._sync()
        await self._store.aclose()

    async def _sync(self) -> None:
        """Write pending items, probe, or compare everything. Raises `StoreUnavailable`."""
        self._wakeup.clear()
        probe_due, self._probe_due = self._probe_due, False
        compare_due, self._compare_due = self._compare_due, False
        if self._payload is None or not self._healthy:
            await self._check_recovery()
            return
        compare_due |= self._needs_compare
        if compare_due or (probe_due and not await self._probe()):
            await self._compare()
        elif self._pending:
            await self._write(self._payload)
        is_time = not self._pending and clock.monotonic() >= self._mark_at
        if self._stored and self._is_unmarked and (probe_due or is_time):
            _, fingerprint = self._stored
            await self._store.mark(fingerprint)
            self._marked = fingerprint

    @property
    def _is_unmarked(self) -> bool:
        """True if the fingerprint beside the data is not theirs."""
        return self._stored is not None and self._marked != self._stored[1]

    async def _probe(self) -> bool:
        """Return whether the database seems to be as it was left, at little cost."""
        if self._stored is None or self._marked is None:
            return False
        if await self._store.holds(self._marked):
            return True
        self._marked = None
        return False

    async def _write(self, payload: Payload) -> None:
        """Write changed items, if the database can hold them and was not emptied."""
        items, self._pending = list(self._pending.values()), {}
        self._written_at = clock.monotonic()
        if any(map(self._store.problem_with, items)) or not await self._store.upsert(items):
            self._marked = None
            await self._compare()
            return
        if self._stored:
            before, fingerprint = self._stored
            after, change = before.apply(ChangeSet(tuple(items)))
            self._stored = after, fingerprint.after(before, change.items if change else ())
        self._mark_at = clock.monotonic() + self._timings.mark
        for item in items:
            self._unstorable.pop((item.kind, item.key), None)
        self._record_success(payload)

    async def _check_recovery(self) -> None:
        """Detect the end of a database outage while upstream is lost, for `/status`."""
        if self.status.state is StoreState.INTERRUPTED:
            await self._store.holds(finish(Fingerprint.of(EMPTY)))
            self._end_outage()

    async def _compare(self) -> None:
        """Compare all versions; write what differs, or ask upstream for all data."""
        if (payload := self._payload) is None:
            return
        # Read before awaiting: what arrives meanwhile is newer than `payload`, and written later.
        last_full_at = self._last_full_at
        storable = self._storable(payload)
        unusable = self._unusable | self._unstorable.keys()
        self._needs_compare, self._stored, self._mark_at = False, None, -NEVER
        pending, self._pending = self._pending, {}
        versions = await self._store.versions()
        now = clock.monotonic()
        repair = self._reconciler.decide(now, versions, storable, unusable, last_full_at)
        self._recheck_at = min(repair.verdict.recheck_at, now + self._timings.compare)
        self._log_findings(repair)
        if repair.verdict.ask:
            self._resync()
        await self._carry_out(repair, storable, pending)
        if repair.verdict.replace and versions is not None:
            text = (
                "%s held what upstream does not have, though it was asked for everything twice"
                " (%s); upstream's data have replaced it"
            )
            replaced = _versions_text(repair.verdict.replace, versions, payload)
            self._log.warning(text, self._label, replaced)
        if repair.kept <= unusable:
            kept = [_placeholder(key, (versions or {})[key]) for key in repair.kept]
            stored = Payload.of([*storable, *kept]) if kept else storable
            self._stored = stored, await run_in_slices(Fingerprint.of(stored))
        self._record_success(payload, repair)

    def _storable(self, payload: Payload) -> Payload:
        """Return the items that the database can hold; log each other one when it first appears."""
        invalid = [
            InvalidItem(item.kind, item.key, problem)
            for item in payload
            if (problem := self._store.problem_with(item))
        ]
        for bad in invalid:
            if bad not in self._unstorable.values():
                text = "%s cannot hold a %s; what it has of it stays"
                self._log.error(text, self._label, bad)
        self._unstorable = {(bad.kind, bad.key): bad for bad in invalid}
        if not invalid:
            return payload
        return Payload.of(i for i in payload if (i.kind, i.key) not in self._unstorable)

    def _log_findings(self, repair: Repair) -> None:
        verdict = repair.verdict
        if repair.lost:
            self._log.warning("%s has lost its data; they are written again", self._label)
        if verdict.returned:
            text = (
                "%s holds again what was replaced (%s): something else writes to it, maybe a relay"
                " that gets newer data than this one; it is left alone for %.0f s at least"
            )
            self._log.warning(text, self._label, _names_text(verdict.returned), verdict.wait)
        if verdict.ask:
            text = "%s holds other data than this relay (%s); asking upstream for everything"
            self._log.info(text, self._label, _names_text(verdict.ask))

    async def _carry_out(self, repair: Repair, payload: Payload, pending: Collection[Key]) -> None:
        """Write the repair; changes that were pending are none, so they are not logged."""
        if repair.replaces or repair.outdated:
            self._written_at = clock.monotonic()
        if repair.replaces:
            await self._store.init(await self._with_kept(repair.kept, payload))
        elif repair.outdated:
            await self._store.upsert(repair.outdated)
        if (repaired := len(repair.changed.difference(pending))) and not repair.fill:
            self._log.info("%s brought up to date in %d items", self._label, repaired)

    async def _with_kept(self, kept: Collection[Key], payload: Payload) -> Payload:
        """Return the payload, but with the database's version of some items."""
        stored = await self._store.load() if kept else None
        if stored is None:
            return payload
        stored_items = (stored.payload.all(kind).get(key) for kind, key in kept)
        return Payload.of([*payload, *(item for item in stored_items if item)])

    def _record_success(self, payload: Payload, repair: Repair | None = None) -> None:
        self._end_outage()
        self._reconciler.record(payload, repair)
        if self.status.invalid != (invalid := tuple(self._unstorable.values())):
            self.status = replace(self.status, invalid=invalid)
        if not self._reconciler.settled:
            self._flushed.clear()
        elif payload is self._payload and not self._needs_compare and not self._pending:
            self._flushed.set()

    def _begin_outage(self, error: StoreUnavailable) -> None:
        text = "%s is unavailable: %s; flags are served from memory meanwhile"
        if self._outage.begin(str(error), text, self._label, error):
            self._enter(StoreState.INTERRUPTED)

    def _end_outage(self) -> None:
        self._outage.end("%s is available again", self._label)
        if self.status.state is not StoreState.VALID:
            self._enter(StoreState.VALID)

    def _enter(self, state: StoreState) -> None:
        self.status = replace(self.status, state=state, since=clock.unix())

    def _report_invalid(self, stored: Stored) -> None:
        self.status = replace(self.status, invalid=stored.invalid)
        for bad in stored.invalid:
            self._log.error("%s holds an unreadable %s; it is skipped", self._label, bad)


def _placeholder(key: Key, version: Version) -> Item:
    """Return an item for a fingerprint, which needs no JSON."""
    return Item(*key, version.number, b"" if version.live else None)


def _names_text(keys: Collection[Key]) -> str:
    """Return the first few items by name, for a log line."""
    return _joined([f'{kind.noun} "{key}"' for kind, key in _first_keys(keys)], len(keys))


def _versions_text(keys: Collection[Key], versions: Versions, payload: Payload) -> str:
    """Return the first few items with their stored and upstream versions, for a log line."""
    texts = []
    for kind, key in _first_keys(keys):
        item, stored = payload.all(kind).get(key), versions[kind, key].number
        there = f"in version {stored}" if stored >= 0 else "unreadable"
        texts.append(
            f'{kind.noun} "{key}" {there}, upstream has {item.version if item else "none"}'
        )
    return _joined(texts, len(keys), "; ")


def _first_keys(keys: Collection[Key]) -> list[Key]:
    return sorted(keys, key=lambda key: (key[0].noun, key[1]))[:MAX_NAMED]


def _joined(texts: Collection[str], count: int, separator: str = ", ") -> str:
    more = count - len(texts)
    return separator.join(texts) + (f" and {more} more" if more else "")
