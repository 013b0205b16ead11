"""Publications of one environment in a fleet: the leader's, behind everything else.

It always writes from what the feed has to what the environment has. Whether an unanswered
publication was executed is never guessed: it is read, and the guards of the next one refuse it if
the first one still comes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

from msgspec import Struct
from msgspec.structs import replace

from relay import clock
from relay.aio import run_in_slices, wait_for
from relay.errors import StoreUnavailable
from relay.fleet.contents import NOTHING, Contents, different_items, newer_items
from relay.fleet.divided import DividedHashes, Refused
from relay.fleet.feed import Outcome, Publication, Snapshot
from relay.fleet.lease import Leadership
from relay.fleet.member import Member
from relay.fleet.source import FleetSource
from relay.model.item import Item
from relay.model.payload import EMPTY, Change, Payload, Selector
from relay.protocol.feed import Entry, Head
from relay.stores import Key, Mirror, Stored, StoreState, StoreStatus, label_of
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

MAX_TOUCHED = 1000
"""Changed items that are remembered for the next publication; beyond, all are compared."""


class Base(Struct, frozen=True):
    """Content of the feed.

    Args:
        head: the last publication; None if there was none.
        contents: the data.
        name: name that upstream gives to them; None for none.
    """

    head: Head | None = None
    contents: Contents = NOTHING
    name: Selector | None = None


class FleetMirror:
    """Mirror of an environment in a fleet's Redis.

    Args:
        member: this relay.
        source: says whether it leads.
        evaluated: returns the version of the data for client-side SDKs.
        plain: makes what writes to Redis without a fleet, if there is none.
        log: a logger that names the environment.
        server: address of Redis, without secrets.
    """

    has_journal = False

    def __init__(
        self,
        member: Member,
        source: FleetSource,
        evaluated: Callable[[], int],
        plain: Callable[[], Mirror],
        log: Log,
        *,
        server: str,
    ) -> None:
        self._feed = member.feed
        self._timings = member.timings
        self._source = source
        self._keys = keys = source.keys
        self._divided: DividedHashes | None = None
        """Writes what SDKs read, where that is in other slots."""
        if keys.visible is not None:
            arguments = keys.visible, member.feed, member.timings, log
            self._divided = DividedHashes(keys, *arguments)
        self._evaluated = evaluated
        self._make_plain = plain
        self._plain: Mirror | None = None
        """Writes instead, as there is no fleet."""
        self._last: tuple[Payload, Collection[Key]] | None = None
        """Arguments of the last update while upstream is healthy."""
        self._label = label_of("redis", server)
        self._log = log
        self._outage = OutageLog(log)
        self._status = StoreStatus(
            StoreState.INITIALIZING, clock.unix(), "redis", server, self._keys.prefix
        )
        self.outcomes = dict.fromkeys(Outcome, 0)
        """Numbers of publications."""
        source.outcomes = lambda: {each.value: count for each, count in self.outcomes.items()}
        self._base: Base | None = None
        """Content of the feed; None if unknown."""
        self._touched: set[Key] | None = None
        """Items that may differ from what the feed has; None if all may."""
        self._is_damaged = False
        """True if the data in Redis are not those of the head."""
        self._compares_hashes = False
        """True if what SDKs read in other slots may differ anywhere from what the feed has."""
        self._is_behind = False
        """True if the feed has lost what SDKs read in other slots, in a failover."""
        self._confirmed: bool | None = None
        """State of upstream by the last publication of this term; None before the first."""
        self._written_at = 0.0
        """Monotonic time of the last publication."""
        self._compared_at = 0.0
        self._wakeup = asyncio.Event()
        self._flushed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<FleetMirror {self._status.server} {self._status.prefix!r}>"

    @property
    def status(self) -> StoreStatus | None:
        """Status for `/status`."""
        return self._status if self._plain is None else self._plain.status

    async def load(self) -> Stored | None:
        """Return what others than fleets have stored; what a fleet has is the source's to read."""
        while not self._source.has_delivered:
            if self._plain is not None:
                return await self._plain.load()
            try:
                [look] = await self._feed.look([self._keys])
                if look.head is not None:
                    return None  # the source reads it
                payload = await self._visible()
            except StoreUnavailable:
                await asyncio.sleep(self._timings.poll)
                continue
            return Stored(payload) if payload else None
        return None

    async def _visible(self) -> Payload | None:
        """Return what SDKs read; None if a fleet has published it by now."""
        if self._divided is not None:
            return await self._divided.load()
        snapshot = await self._feed.snapshot(self._keys)
        is_published = snapshot.head is not None
        return snapshot.contents.payload if snapshot.contents and not is_published else None

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Schedule a publication, if this relay leads; return at once."""
        self._last = payload, unusable
        self._touch(change, full=full)
        if self._plain is not None:
            self._plain.update(payload, change, full=full, unusable=unusable)
        self._wake()

    def suspend(self) -> None:
        """Tell the followers that upstream is lost."""
        self._last = None
        if self._plain is not None:
            self._plain.suspend()
        self._wake()

    async def flushed(self) -> None:
        """Wait, without a timeout, until this relay's data are published by it."""
        if self._plain is not None:
            await self._plain.flushed()
            return
        await self._flushed.wait()
        if self._divided is not None:
            await self._divided.flushed.wait()

    async def run(self) -> None:
        """Publish whenever this relay leads, until cancelled."""
        while True:
            await self._source.leads.wait()
            if self._source.is_denied:
                await self._run_plain()
            if leadership := self._source.leadership:
                self._base, self._confirmed = None, None
                try:
                    await self._lead_with_hashes(leadership)
                except asyncio.CancelledError:
                    await self._finish(leadership)
                    raise
            self._flushed.clear()

    async def _run_plain(self) -> None:
        self._plain = plain = self._make_plain()
        if self._last is not None:
            payload, unusable = self._last
            plain.update(payload, None, full=True, unusable=unusable)
        await plain.run()

    def _touch(self, change: Change | None, *, full: bool) -> None:
        """Note what may differ from now on."""
        if full or self._touched is None or (change is not None and change.replace):
            self._touched = None
        elif change is not None:
            self._touched.update((item.kind, item.key) for item in change.items)
            if len(self._touched) > MAX_TOUCHED:
                self._touched = None

    def _wake(self) -> None:
        self._flushed.clear()
        self._wakeup.set()

    async def _lead_with_hashes(self, leadership: Leadership) -> None:
        """Publish; behind that, write what SDKs read, where no transaction does both."""
        divided = self._divided
        if divided is None:
            await self._lead(leadership)
            return
        divided.begin()
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write_divided(divided, leadership))
            await self._lead(leadership)
            writing.cancel()

    async def _write_divided(self, divided: DividedHashes, leadership: Leadership) -> None:
        await divided.run(leadership)
        self._source.fenced(leadership)

    async def _lead(self, leadership: Leadership) -> None:
        failures = 0
        leadership.on_end = self._wakeup.set
        while not leadership.ended.is_set():
            probe_due = not self._wakeup.is_set()
            self._wakeup.clear()
            try:
                await self._sync(leadership, probe_due=probe_due)
            except StoreUnavailable as e:
                self._note_outage(e)
                self._base = None  # the publication may have arrived, or arrive later
                await asyncio.sleep(self._timings.retry.delay(failures))
                failures += 1
            else:
                failures = 0
                self._note_success()
                if self._base is not None and not leadership.ended.is_set():
                    await wait_for(self._wakeup, self._timings.probe)

    async def _sync(self, leadership: Leadership, *, probe_due: bool) -> None:
        """Publish what differs, if this relay may."""
        now = clock.monotonic()
        if self._base is None or now - self._compared_at >= self._timings.compare:
            await self._read_base(leadership)
        elif probe_due and not await self._is_whole():
            self._base = None
            return
        while leadership.is_valid and self._base is not None:
            publication, contents = await self._due(leadership)
            if publication is None:
                if self._compares_hashes and (self._source.is_confirmed or not self._is_behind):
                    self._write_hashes(None)
                return
            outcome = await self._feed.publish(self._keys, publication)
            self.outcomes[outcome] += 1
            if outcome is Outcome.FENCED:
                self._source.fenced(leadership)
                await leadership.ended.wait()
            elif outcome is Outcome.MOVED:
                self._base = None
            else:
                entry = publication.entry
                head = Head(entry.number, entry.after, self._keys.identity)
                self._base = Base(head, contents, entry.name)
                self._is_damaged, self._confirmed = False, entry.confirmed
                self._written_at = clock.monotonic()
                self._write_hashes(entry.items)

    async def _read_base(self, leadership: Leadership) -> None:
        """Read what the feed has, for the guards and for the difference."""
        snapshot = await self._feed.snapshot(self._keys)
        self._compared_at = clock.monotonic()
        self._touched = None
        known = snapshot
        if self._divided is not None:
            known = await self._with_hashes(self._divided, leadership, snapshot)
        if not leadership.adopted:
            await self._source.adopt(leadership, known)
        self._base = Base(snapshot.head, snapshot.contents or NOTHING, snapshot.name)
        is_foreign = snapshot.head and snapshot.head.identity != self._keys.identity
        self._is_damaged = not snapshot.is_intact or bool(is_foreign)
        if not snapshot.is_intact and snapshot.head is not None:
            self._log.warning("%s has lost or damaged data; they are written again", self._label)
        self._compares_hashes = True

    async def _with_hashes(
        self, divided: DividedHashes, leadership: Leadership, snapshot: Snapshot
    ) -> Snapshot:
        """Return what the feed has, at the beginning of a term with what only SDKs read."""
        self._is_behind = False
        with contextlib.suppress(StoreUnavailable):  # the fleet goes on without those servers
            self._is_behind = await divided.are_ahead_of(snapshot.head)
            if self._is_behind and not leadership.adopted and (found := await divided.load()):
                payload = snapshot.contents.payload if snapshot.contents else EMPTY
                lost = newer_items(found, payload)
                return replace(snapshot, contents=Contents(payload.with_items(lost), 0))
        return snapshot

    def _write_hashes(self, items: Collection[Item] | None) -> None:
        """Schedule that what SDKs read becomes what the feed has.

        Args:
            items: that have changed; None to compare all.
        """
        base = self._base or Base()
        if self._divided is None or base.head is None or self._is_damaged:
            return
        payload = base.contents.payload
        self._divided.update(base.head, payload, None if self._compares_hashes else items)
        self._compares_hashes = False

    async def _is_whole(self) -> bool:
        base = self._base or Base()
        head, payload = base.head, base.contents.payload
        return head is None or await self._feed.is_whole(self._keys, head, payload)

    async def _due(self, leadership: Leadership) -> tuple[Publication | None, Contents]:
        """Return the publication that is due, if any, and the data after it."""
        published = self._base or Base()
        head, base = published.head, published.contents
        confirmed = self._source.is_confirmed
        held, evaluated = self._source.held(), self._evaluated()
        name = self._source.selector() if confirmed else published.name
        if held is None or confirmed is None or (head is None and not confirmed):
            return None, base
        after, rewrite = base, None
        items: tuple[Item, ...] = ()
        if confirmed:
            touched, self._touched = self._touched, set()
            items = tuple(await run_in_slices(different_items(base.payload, held, touched)))
            vanished = len(base.payload) + _added(base.payload, items) > len(held)
            if head is None or self._is_damaged or vanished:
                after, rewrite = await run_in_slices(Contents.of(held)), held
            elif items:
                after = base.with_items(items)
            elif name is None:
                name = published.name  # of the same data, so it stays right
        is_renamed = name is not None and name != published.name
        is_news = rewrite is not None or items or is_renamed or confirmed is not self._confirmed
        if not is_news and clock.monotonic() - self._written_at < self._timings.confirm:
            if confirmed:
                self._flushed.set()
            return None, base
        entry = Entry(
            self._keys.prefix,
            leadership.term,
            head.number + 1 if head else 1,
            head.selector if head else "",
            after.selector,
            confirmed,
            evaluated,
            None if rewrite is not None else items,
            name=name,
        )
        return Publication(head, entry, rewrite), after

    async def _finish(self, leadership: Leadership) -> None:
        """Publish what is left, within a limit: the guards hold even if the lease is given up."""
        with contextlib.suppress(TimeoutError, StoreUnavailable, Refused):
            async with asyncio.timeout(self._timings.finish):
                if leadership.adopted and self._base is not None:
                    publication, after = await self._due(leadership)
                    if publication is not None:
                        outcome = await self._feed.publish(self._keys, publication)
                        if outcome is Outcome.PUBLISHED:
                            entry = publication.entry
                            head = Head(entry.number, entry.after, self._keys.identity)
                            self._base = Base(head, after, entry.name)
                            self._write_hashes(entry.items)
                    if self._divided is not None:
                        await self._divided.write(leadership, at_end=True)

    def _note_outage(self, error: StoreUnavailable) -> None:
        text = "%s is unavailable: %s; flags are served from memory meanwhile"
        if self._outage.begin(str(error), text, self._label, error):
            self._status = replace(self._status, state=StoreState.INTERRUPTED, since=clock.unix())

    def _note_success(self) -> None:
        self._outage.end("%s is available again", self._label)
        if self._status.state is not StoreState.VALID:
            self._status = replace(self._status, state=StoreState.VALID, since=clock.unix())


def _added(before: Payload, items: tuple[Item, ...]) -> int:
    return sum(item.key not in before.all(item.kind) for item in items)
