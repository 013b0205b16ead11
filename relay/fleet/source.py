"""The roles of a member for one environment, and the data that follow from them.

A leader, and a member alone, takes the data from upstream; a follower takes them from the feed.
Towards the environment this is one data source, which never goes back from one to the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

from relay import clock, randomness
from relay.aio import run_in_slices
from relay.errors import ErrorKind, StoreUnavailable
from relay.fleet import Role
from relay.fleet.contents import Contents, is_at_least_as_new, newer_items
from relay.fleet.doubts import Doubts
from relay.fleet.feed import Keys, Look, Snapshot, place_order
from relay.fleet.member import Member
from relay.model.item import Item
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.protocol.feed import Entry, Head, Term
from relay.sources import DataSource, Interrupted, Update, UpToDate
from relay.telemetry.log import Log

MAX_PASSED = 256
"""Addresses of past data that are remembered, to recognise entries that come late."""

MAX_WAITING = 1000
"""Entries that wait while all data are read; beyond, they are read once more."""

LEADER_INTERRUPTED = Interrupted(
    ErrorKind.NETWORK_ERROR, "The leader of the fleet has lost upstream"
)

Event = Callable[[], Iterator[Update]]


class Leadership:
    """A term of this member.

    Args:
        term: its number and owner.
        until: monotonic time until which the lease is certain.
    """

    def __init__(self, term: Term, until: float) -> None:
        self.term = term
        self.until = until
        self.adopted = False
        """True once what the feed has was read and adopted."""
        self.ended = asyncio.Event()
        """Set at its end, whatever the cause."""
        self.on_end: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<Leadership {self.term.number}{' ended' if self.ended.is_set() else ''}>"

    @property
    def is_valid(self) -> bool:
        """True while the lease is certain; ask before each write."""
        return clock.monotonic() < self.until and not self.ended.is_set()

    def end(self) -> None:
        """End it."""
        self.ended.set()
        self.on_end()


class FleetSource:
    """Data source of one environment in a fleet.

    Args:
        member: this relay.
        keys: of the environment.
        upstream: followed by leaders, and by members alone.
        log: a logger that names the environment.
    """

    def __init__(self, member: Member, keys: Keys, upstream: DataSource, log: Log) -> None:
        self.keys = keys
        self.held: Callable[[], Payload | None] = lambda: None
        """Returns the data of the environment; set by whoever makes both."""
        self.role = Role.FOLLOWER
        self.leader: str | None = None
        """Owner of the lease when it was last seen; None if it was free."""
        self.head: Head | None = None
        """Last publication, as far as known."""
        self.leadership: Leadership | None = None
        """The present term of this member; None unless it leads."""
        self.leads = asyncio.Event()
        """Set while this member leads."""
        self.changes_of_role = 0
        self.snapshots = 0
        """Number of times that all data were read."""
        self.leaderless_since: float | None = None
        """Monotonic time since which nobody is seen to lead; None while somebody is."""
        self._member = member
        self._feed = member.feed
        self._timings = member.timings
        self._upstream = upstream
        self._log = log
        self._owner = randomness.new_id()
        self._events: deque[Event] = deque()
        self._wakeup = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._following_upstream: asyncio.Task[None] | None = None
        self._acquiring = self._reading = self._rechecking = False
        self._entered = clock.monotonic()
        """Monotonic time of the last change of role."""
        self._contents: Contents | None = None
        """The held data with their address, if known."""
        self._passed: deque[str] = deque(maxlen=MAX_PASSED)
        self._waiting: list[tuple[str, Entry]] = []
        """Entries that have come while all data are read."""
        self._older_since: float | None = None
        """Monotonic time since which the feed is behind the held data; None if it is not."""
        self._last_seen: Head | None = None
        """Head of the last look that found other data than ours."""
        self._has_delivered = False
        """True once any data have come from the fleet or from upstream."""
        self._doubts = Doubts(self._timings.doubt)
        self._refusing = False
        """True while another environment leads under this prefix."""
        self._unhealthy_since: float | None = None
        """Monotonic time since which upstream is followed without success; None if it works."""
        self._is_confirmed: bool | None = None
        """True if upstream is healthy, False if it is lost; None before and without it."""
        self._resignations = 0
        self._abstains_until = 0.0

    def __repr__(self) -> str:
        return f"<FleetSource {self.keys.prefix!r} {self.role.value}>"

    @property
    def owner(self) -> str:
        """Name of this member in leases and terms."""
        return self._owner

    @property
    def has_delivered(self) -> bool:
        """True once any data have come, from the fleet or from upstream."""
        return self._has_delivered

    @property
    def is_confirmed(self) -> bool | None:
        """True if upstream itself confirms the held data, False if it is lost; None if unknown."""
        return self._is_confirmed

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield upstream's or the feed's data, until cancelled."""
        self._entered = clock.monotonic()
        self._member.join(self)
        try:
            while True:
                while self._events:
                    for update in self._events.popleft()():
                        self._has_delivered |= isinstance(update, ChangeSet)
                        yield update
                self._wakeup.clear()
                await self._wakeup.wait()
        finally:
            self._member.leave(self)
            await self._end()

    def resync(self) -> None:
        """Ask for all data again: upstream, or the feed."""
        if self._following_upstream is None:
            self._post(self._read_again)
        else:
            self._upstream.resync()

    def check(self, *, reconnect: bool = False) -> None:
        """Look for changes soon."""
        if self._following_upstream is None:
            self._member.look_soon()
        else:
            self._upstream.check(reconnect=reconnect)

    # What the member tells

    def looked(self, look: Look) -> None:
        """Take lease and head."""
        self._post(partial(self._on_look, look))

    def read(self, place: str, entry: Entry) -> None:
        """Take an entry of the feed."""
        self._post(partial(self._on_entry, place, entry))

    def fell_silent(self) -> None:
        """Begin to be alone, unless this member leads: then its lease decides."""
        if self.role is Role.FOLLOWER:
            self._spawn(self._be_alone_soon(self._entered))

    # What the mirror tells

    async def adopt(self, leadership: Leadership, snapshot: Snapshot) -> None:
        """Take what is newer in the feed, at the beginning of a term; then follow upstream."""
        adopted = asyncio.Event()
        self._post(partial(self._on_base, leadership, snapshot, adopted))
        await adopted.wait()

    def fenced(self, leadership: Leadership) -> None:
        """Note that another was elected."""
        self._post(partial(self._on_lost, leadership))

    # Events. One is handled after the other, and the environment has applied what each yields
    # before the next; so what `held` returns is exact.

    def _post(self, event: Event) -> None:
        self._events.append(event)
        self._wakeup.set()

    def _on_look(self, look: Look) -> Iterator[Update]:
        if look.sent < self._entered:
            return  # older than the role
        self.head = look.head
        self._note_leader(look.lease)
        is_free = look.lease in (None, self._owner)
        if self.role is Role.LEADER:
            if not is_free:
                self._follow()
            elif self._should_resign():
                self._resign()
            return
        if self.role is Role.ALONE and not self._member.is_settled:
            return
        if self._is_foreign(look):
            return
        if is_free:
            self._contend()
        elif self.role is Role.ALONE:
            self._follow()
        if self.role is Role.FOLLOWER:
            self._compare_head(look.head)
        yield from ()

    def _on_entry(self, place: str, entry: Entry) -> Iterator[Update]:
        if self.role is not Role.FOLLOWER or entry.resigned:
            return
        if self._reading:
            self._waiting.append((place, entry))
            del self._waiting[:-MAX_WAITING]
        elif self._following_upstream is not None:
            self._read()
        else:
            yield from self._follow_entry(entry)

    def _on_snapshot(self, snapshot: Snapshot, mine: Contents | None) -> Iterator[Update]:
        self._reading = False
        waiting, self._waiting = self._waiting, []
        if self.role is not Role.FOLLOWER or not self._is_ours(snapshot.head):
            return
        self.head = snapshot.head
        held, contents = self.held(), snapshot.contents
        if contents is None:
            if mine is None or held is not mine.payload:
                return
            contents = mine
        elif held is not None and not self._may_take(snapshot, contents, held):
            return
        if contents is not mine or not self._has_delivered:
            yield ChangeSet(tuple(contents.payload), full=True)
        self._contents = Contents(self.held() or EMPTY, contents.total)
        yield from self._synchronised(snapshot.confirmed)
        for place, entry in waiting:
            if place_order(place) > place_order(snapshot.place) and not self._reading:
                yield from self._follow_entry(entry)

    def _on_acquired(self, term: Term, until: float) -> Iterator[Update]:
        self._acquiring = False
        if self.role is Role.LEADER or clock.monotonic() >= until:
            return
        leadership = Leadership(term, until)
        self._enter(Role.LEADER)
        self._log.info("This relay leads the fleet (term %d)", term.number)
        self.leadership = leadership
        self._note_leader(self._owner)
        self.leads.set()
        self._spawn(self._renew(leadership))
        self._spawn(self._watch_lease(leadership))
        yield from ()

    def _on_base(
        self, leadership: Leadership, snapshot: Snapshot, adopted: asyncio.Event
    ) -> Iterator[Update]:
        adopted.set()
        if leadership is not self.leadership:
            return
        leadership.adopted = True
        if snapshot.contents is not None and self._is_ours(snapshot.head):
            held = self.held() or EMPTY
            if newer := newer_items(snapshot.contents.payload, held):
                yield ChangeSet(tuple(held.with_items(newer)), full=True)
            self._has_delivered = True
        self._follow_upstream()

    def _on_lost(self, leadership: Leadership) -> Iterator[Update]:
        if leadership is self.leadership:
            self._follow()
        yield from ()

    def _on_lease_over(self, leadership: Leadership) -> Iterator[Update]:
        if leadership is self.leadership:
            self._log.warning("This relay cannot renew its lease and listens to upstream alone")
            self._enter(Role.ALONE)
            self._follow_upstream()
        yield from ()

    def _on_alone(self, entered: float) -> Iterator[Update]:
        is_same = self._entered == entered and self.role is Role.FOLLOWER
        if is_same and self._member.is_lost:
            self._enter(Role.ALONE)
            self._follow_upstream()
        yield from ()

    def _on_upstream(self, update: Update, taken: asyncio.Event) -> Iterator[Update]:
        taken.set()
        if self._following_upstream is None:
            return
        self._is_confirmed = not isinstance(update, Interrupted)
        if isinstance(update, Interrupted):
            self._unhealthy_since = self._unhealthy_since or clock.monotonic()
        else:
            self._unhealthy_since = None
            self._resignations = 0
        if isinstance(update, ChangeSet):
            held = self.held()
            if not update.full:
                self._doubts.settle(update.items)
            elif held is not None and self._has_delivered:
                update = self._doubts.resolve(held, update, clock.monotonic())
                self._recheck()
        yield update

    def _read_again(self) -> Iterator[Update]:
        self._contents = None
        self._read()
        yield from ()

    def _on_failure(self, error: BaseException) -> Iterator[Update]:
        yield from ()
        raise error

    # Following the feed

    def _follow_entry(self, entry: Entry) -> Iterator[Update]:
        mine = self._contents if self._knows_contents() else None
        if mine is None:
            self._read()
        elif (after := followed(mine, entry)) is not None:
            self.head = Head(entry.number, entry.after, self.keys.identity)
            if entry.items:
                yield _change_set(mine.payload, after.payload, entry.items)
                self._passed.append(mine.selector)
                self._contents = Contents(self.held() or EMPTY, after.total)
            else:
                yield UpToDate() if entry.confirmed else LEADER_INTERRUPTED
        elif entry.after != mine.selector and entry.after not in self._passed:
            self._read()

    def _may_take(self, snapshot: Snapshot, contents: Contents, held: Payload) -> bool:
        """Return whether the feed's data may replace those that are held."""
        if not snapshot.is_intact:
            return False  # the leader repairs them
        if is_at_least_as_new(contents.payload, held):
            return True
        if not self._has_waited():
            return False
        text = "The fleet does not get what this relay has; its data are taken, though older"
        self._log.warning(text)
        return True

    def _is_ours(self, head: Head | None) -> bool:
        return head is not None and head.identity == self.keys.identity

    def _synchronised(self, confirmed: bool) -> Iterator[Update]:
        self._older_since = self._last_seen = None
        self._leave_upstream()
        yield UpToDate() if confirmed else LEADER_INTERRUPTED

    def _knows_contents(self) -> bool:
        return self._contents is not None and self._contents.payload is self.held()

    def _compare_head(self, head: Head | None) -> None:
        """Read all data if the feed has led elsewhere, and its entries do not come."""
        if head is None:
            return
        mine = self._contents if self._knows_contents() else None
        if mine is None or self._following_upstream is not None:
            self._read()
        elif mine.selector == head.selector:
            self._last_seen = None
        elif self._last_seen == head or self._older_since is not None:
            self._read()
        else:
            self._last_seen = head

    def _has_waited(self) -> bool:
        """Return whether the feed has been behind for so long that its data are taken."""
        now = clock.monotonic()
        self._older_since = self._older_since or now
        return now - self._older_since >= self._timings.patience

    def _read(self) -> None:
        if not self._reading:
            self._reading = True
            self._spawn(self._read_snapshot())

    async def _read_snapshot(self) -> None:
        try:
            mine = self._contents if self._knows_contents() else None
            if mine is None and (held := self.held()) is not None:
                mine = await run_in_slices(Contents.of(held))
            snapshot = await self._feed.snapshot(self.keys, mine.selector if mine else "")
        except StoreUnavailable:
            self._reading = False
            self._waiting.clear()
        else:
            self.snapshots += 1
            self._post(partial(self._on_snapshot, snapshot, mine))

    # Leading

    def _contend(self) -> None:
        abstains = clock.monotonic() < self._abstains_until and not self._is_unwanted()
        if self._acquiring or abstains:
            return
        self._acquiring = True
        self._spawn(self._acquire())

    def _is_unwanted(self) -> bool:
        since = self.leaderless_since
        return since is not None and clock.monotonic() - since >= self._timings.unwanted

    async def _acquire(self) -> None:
        await asyncio.sleep(self._timings.jitter * randomness.fraction())
        sent = clock.monotonic()
        try:
            term = await self._feed.acquire(self.keys, self._owner, self._timings.ttl)
        except StoreUnavailable:
            term = None
        if term is None:
            self._acquiring = False
        else:
            until = lease_end(sent, clock.monotonic(), self._timings.lease)
            self._post(partial(self._on_acquired, term, until))

    async def _renew(self, leadership: Leadership) -> None:
        delay = self._timings.renew
        while not leadership.ended.is_set():
            await asyncio.sleep(delay)
            sent = clock.monotonic()
            try:
                kept = await self._feed.renew(self.keys, self._owner, self._timings.ttl)
            except StoreUnavailable:
                delay = self._timings.renew / 4
                continue
            if not kept:
                self._post(partial(self._on_lost, leadership))
                return
            delay = self._timings.renew
            until = lease_end(sent, clock.monotonic(), self._timings.lease)
            leadership.until = max(leadership.until, until)

    async def _watch_lease(self, leadership: Leadership) -> None:
        while leadership.is_valid:  # noqa: ASYNC110 - renewals make it longer
            await asyncio.sleep(max(0.001, leadership.until - clock.monotonic()))
        self._post(partial(self._on_lease_over, leadership))

    def _should_resign(self) -> bool:
        since, now = self._unhealthy_since, clock.monotonic()
        is_unhealthy = since is not None and now - since >= self._timings.unhealthy
        return is_unhealthy and now >= self._abstains_until

    def _resign(self) -> None:
        """Let another lead, whose network may work."""
        self._log.warning("This relay has no upstream and lets another one lead the fleet")
        self._abstains_until = clock.monotonic() + self._timings.abstain.delay(self._resignations)
        self._resignations += 1
        if leadership := self.leadership:
            self._spawn(self._release(leadership))
        self._follow()

    async def _release(self, leadership: Leadership) -> None:
        entry = Entry(self.keys.prefix, leadership.term, 0, "", "", resigned=True)
        try:
            await self._feed.release(self.keys, self._owner, entry)
        except StoreUnavailable:
            return  # it expires

    # Changes of role

    def _follow(self) -> None:
        """Become a follower. Upstream is kept until the feed has what this member has."""
        was = self.role
        self._enter(Role.FOLLOWER)
        if was is not Role.FOLLOWER:
            self._log.info("This relay follows the fleet's leader")
        self._member.look_soon()
        self._read()

    async def _be_alone_soon(self, entered: float) -> None:
        await asyncio.sleep(self._timings.spread * randomness.fraction())
        self._post(partial(self._on_alone, entered))

    def _enter(self, role: Role) -> None:
        if self.leadership is not None:
            self.leadership.end()
        self.leadership = None
        self.leads.clear()
        self.changes_of_role += role is not self.role
        self.role = role
        self._entered = clock.monotonic()
        self._older_since = self._last_seen = None

    def _note_leader(self, owner: str | None) -> None:
        self.leader = owner
        if owner is not None:
            self.leaderless_since = None
        elif self.leaderless_since is None:
            self.leaderless_since = clock.monotonic()

    def _is_foreign(self, look: Look) -> bool:
        """Return whether another environment leads under this prefix; be alone then."""
        head = look.head
        is_foreign = (
            look.lease is not None and head is not None and head.identity != self.keys.identity
        )
        if is_foreign and not self._refusing:
            text = (
                "Another environment is in the fleet's Redis under prefix %s: this relay listens"
                " to upstream itself and writes nothing until that ends"
            )
            self._log.error(text, self.keys.prefix)
        self._refusing = is_foreign
        if is_foreign and self.role is not Role.ALONE:
            self._enter(Role.ALONE)
            self._follow_upstream()
        return is_foreign

    # Upstream

    def _follow_upstream(self) -> None:
        if self._following_upstream is None:
            self._doubts.forget()
            self._unhealthy_since = clock.monotonic()
            self._following_upstream = self._spawn(self._pump_upstream())

    def _leave_upstream(self) -> None:
        if self._following_upstream is not None:
            self._following_upstream.cancel()
            self._following_upstream = None
            self._is_confirmed = self._unhealthy_since = None

    async def _pump_upstream(self) -> None:
        async with aclosing(self._upstream.updates()) as updates:
            async for update in updates:
                taken = asyncio.Event()
                self._post(partial(self._on_upstream, update, taken))
                await taken.wait()

    def _recheck(self) -> None:
        if self._doubts.recheck_at is not None and not self._rechecking:
            self._rechecking = True
            self._spawn(self._ask_again())

    async def _ask_again(self) -> None:
        """Ask upstream for everything once more, to settle doubts."""
        try:
            while (at := self._doubts.recheck_at) is not None:
                await asyncio.sleep(max(1.0, at - clock.monotonic()))
                if self._following_upstream is not None:
                    self._upstream.resync()
        finally:
            self._rechecking = False

    # Tasks

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._post(partial(self._on_failure, error))

    async def _end(self) -> None:
        leadership = self.leadership
        self._enter(Role.FOLLOWER)
        self._leave_upstream()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._acquiring = self._reading = self._rechecking = False
        self._events.clear()
        self._waiting.clear()
        if leadership is not None:
            await self._release(leadership)


def lease_end(sent: float, answered: float, lease: float) -> float:  # noqa: ARG001 - see below
    """Return until when a lease is certain.

    It counts from before the command was sent: Redis may have executed it at once, however late the
    answer has come.
    """
    return sent + lease


def followed(mine: Contents, entry: Entry) -> Contents | None:
    """Return the data after an entry; None if it is not their next change, or has none."""
    if entry.before != mine.selector or entry.items is None:
        return None
    after = mine.with_items(entry.items)
    return after if after.selector == entry.after else None


def _change_set(before: Payload, after: Payload, items: tuple[Item, ...]) -> ChangeSet:
    """Return what leads from a payload to the next: alone the items, if all of them are newer."""
    for item in items:
        known = before.all(item.kind).get(item.key)
        if known is not None and known.version >= item.version:
            return ChangeSet(tuple(after), full=True)
    return ChangeSet(items)
