"""The roles of a member for one environment, and the data that follow from them.

A leader, and a member alone, takes the data from upstream; a follower takes them from the feed.
Towards the environment this is one data source, which never goes back from one to the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from relay import clock, randomness
from relay.aio import run_in_slices
from relay.errors import ErrorKind, StoreUnavailable
from relay.fleet import FleetStatus, Role
from relay.fleet.contents import (
    Contents,
    has_equal_items,
    is_at_least_as_new,
    items_behind,
    newer_items,
)
from relay.fleet.feed import Keys, Look, Snapshot, place_order
from relay.fleet.lag import Lag
from relay.fleet.lease import Leadership, Lease
from relay.fleet.member import Member, Watch
from relay.fleet.upstream import Upstream, has_delivered
from relay.model.payload import EMPTY, ChangeSet, Payload, Selector, distance
from relay.protocol.feed import Entry, Head
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
        self.selector: Callable[[], Selector | None] = lambda: None
        """Returns the name that upstream gives to these data; set likewise."""
        self.role = Role.FOLLOWER
        self.leader: str | None = None
        """Owner of the lease when it was last seen; None if it was free."""
        self.head: Head | None = None
        """Last publication, as far as known."""
        self.leadership: Leadership | None = None
        """The present term of this member; None unless it leads."""
        self.leads = asyncio.Event()
        """Set while this member leads, or writes without a fleet."""
        self.outcomes: Callable[[], Mapping[str, int]] = dict
        """Returns the numbers of publications; set by the mirror."""
        self.is_denied = False
        """True if there is no fleet, as the database user has not the rights for it."""
        self.changes_of_role = 0
        self.snapshots = 0
        """Number of times that all data were read."""
        self._leaderless_since: float | None = None
        """Monotonic time since which nobody is seen to lead; None while somebody is."""
        self._member = member
        self._timings = member.timings
        self._upstream = Upstream(
            upstream,
            self._take_upstream,
            self._spawn,
            member.timings.doubt,
            lambda: self._state,
            log=log,
        )
        self._log = log
        self._events: deque[Event] = deque()
        self._wakeup = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lease = Lease(
            member,
            keys,
            self._spawn,
            acquired=lambda won: self._post(partial(self._on_acquired, won)),
            lost=lambda own: self._post(partial(self._on_lost, own)),
            expired=lambda own: self._post(partial(self._on_expired, own)),
        )
        self._reading = False
        self._entered = clock.monotonic()
        """Monotonic time of the last change of role."""
        self._contents: Contents | None = None
        """The held data with their address, if known."""
        self._number = 0
        """Number of the last publication that was taken."""
        self._passed: deque[str] = deque(maxlen=MAX_PASSED)
        self._waiting: list[tuple[str, Entry]] = []
        """Entries that have come while all data are read."""
        self._lag = Lag(member.timings.patience)
        """Of the feed behind the held data."""
        self._last_seen: Head | None = None
        """Head of the last look that found other data than ours."""
        self._has_delivered = False
        """True once any data have come from the fleet or from upstream."""
        self._refusing = False
        """True while another environment leads under this prefix."""

    def __repr__(self) -> str:
        return f"<FleetSource {self.keys.prefix!r} {self.role.value}>"

    @property
    def status(self) -> FleetStatus:
        """State of this member for the environment."""
        seen = self.head.number if self.head else 0
        return FleetStatus(
            self.role,
            self.leader,
            self.leadership.term.number if self.leadership else None,
            seen,
            max(0, seen - self._number) if self.role is Role.FOLLOWER else 0,
            self._leaderless,
            self.changes_of_role,
            self.snapshots,
            self.outcomes(),
        )

    @property
    def _watch(self) -> Watch:
        return self._member.watch(self.keys)

    @property
    def protocol(self) -> str:
        """Protocol by which this member follows upstream; `feed` if it follows the leader."""
        is_following = self.role is Role.FOLLOWER and not self._upstream.is_followed
        return "feed" if is_following else self._upstream.protocol

    @property
    def _state(self) -> str:
        """Upstream's name of the held data; empty for none."""
        name = self.selector()
        return name.state if name is not None else ""

    @property
    def _leaderless(self) -> float:
        """Seconds since which nobody is seen to lead; 0 while somebody is."""
        since = self._leaderless_since
        return 0.0 if since is None else clock.monotonic() - since

    @property
    def has_delivered(self) -> bool:
        """True once any data have come, from the fleet or from upstream."""
        return self._has_delivered

    @property
    def is_confirmed(self) -> bool | None:
        """True if upstream itself confirms the held data, False if it is lost; None if unknown."""
        return self._upstream.is_confirmed

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield upstream's or the feed's data, until cancelled."""
        del basis  # it may be another once upstream is asked
        self._entered = clock.monotonic()
        self._member.join(self)
        try:
            while True:
                while self._events:
                    for update in self._events.popleft()():
                        self._has_delivered |= has_delivered(update)
                        yield update
                self._wakeup.clear()
                await self._wakeup.wait()
        finally:
            self._member.leave(self)
            await self._end()

    def resync(self) -> None:
        """Ask for all data again: upstream, or the feed."""
        if self._upstream.is_followed:
            self._upstream.resync()
        else:
            self._post(self._read_again)

    def check(self, *, reconnect: bool = False) -> None:
        """Look for changes soon."""
        if self._upstream.is_followed:
            self._upstream.check(reconnect=reconnect)
        else:
            self._watch.look_soon()

    def change_upstream(self, upstream: DataSource) -> None:
        """Follow another upstream, as with a new SDK key; the present one until it has delivered.

        A follower simply has the new one from now on.
        """
        self._upstream.change(upstream)

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

    def denied(self, reason: str) -> None:
        """Be on its own for good, as without a fleet."""
        self._post(partial(self._on_denied, reason))

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

    def _take_upstream(self, source: DataSource, update: Update, handled: asyncio.Event) -> None:
        self._post(partial(self._on_upstream, source, update, handled))

    def _post(self, event: Event) -> None:
        self._events.append(event)
        self._wakeup.set()

    def _on_look(self, look: Look) -> Iterator[Update]:
        if look.sent < self._entered:
            return  # older than the role
        self.head = look.head
        self._note_leader(look.lease)
        is_free = look.lease in (None, self._member.name)
        if self.role is Role.LEADER:
            if not is_free:
                self._follow()
            else:
                self._resign_without_upstream()
            return
        if self.role is Role.ALONE and not self._watch.is_settled:
            return
        if self._is_foreign(look):
            return
        if is_free:
            self._lease.contend(self._leaderless)
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
        elif self._upstream.is_followed:
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
            yield _all_of(contents.payload, snapshot.name, snapshot.evaluated)
        elif self._is_new_name(snapshot.name):
            yield ChangeSet((), selector=snapshot.name, exact=True)
        if snapshot.head is not None:
            self._number = snapshot.head.number
        self._contents = Contents(self.held() or EMPTY, contents.total)
        yield from self._synchronised(snapshot.confirmed)
        for place, entry in waiting:
            if place_order(place) > place_order(snapshot.place) and not self._reading:
                yield from self._follow_entry(entry)

    def _on_acquired(self, leadership: Leadership) -> Iterator[Update]:
        self._lease.answered()
        if self.role is Role.LEADER or not leadership.is_valid:
            return
        self._enter(Role.LEADER)
        self._log.info("This relay leads the fleet (term %d)", leadership.term.number)
        self.leadership = leadership
        self._note_leader(self._member.name)
        self.leads.set()
        self._lease.keep(leadership)
        yield from ()

    def _on_base(
        self, leadership: Leadership, snapshot: Snapshot, adopted: asyncio.Event
    ) -> Iterator[Update]:
        adopted.set()
        if leadership is not self.leadership:
            return
        leadership.adopted = True
        if snapshot.contents is not None and self._is_ours(snapshot.head):
            yield _all_of(*self._adopted(snapshot, snapshot.contents), snapshot.evaluated)
        self._upstream.follow()

    def _on_lost(self, leadership: Leadership) -> Iterator[Update]:
        if leadership is self.leadership:
            self._follow()
        yield from ()

    def _on_expired(self, leadership: Leadership) -> Iterator[Update]:
        if leadership is self.leadership:
            self._log.warning("This relay cannot renew its lease and listens to upstream alone")
            self._enter(Role.ALONE)
            self._upstream.follow()
        yield from ()

    def _on_alone(self, entered: float) -> Iterator[Update]:
        is_same = self._entered == entered and self.role is Role.FOLLOWER
        if is_same and self._watch.is_lost:
            self._enter(Role.ALONE)
            self._upstream.follow()
        yield from ()

    def _on_denied(self, reason: str) -> Iterator[Update]:
        text = "Redis does not let this relay take part in the fleet, so it is on its own: %s"
        self._log.error(text, reason)
        self.is_denied = True
        self._enter(Role.ALONE)
        self.leads.set()
        self._upstream.follow()
        yield from ()

    def _on_upstream(
        self, upstream: DataSource, update: Update, handled: asyncio.Event
    ) -> Iterator[Update]:
        handled.set()
        known = self.held() if self._has_delivered else None
        used = self._upstream.interpret(upstream, update, known)
        if used is not None:
            yield used
        if self._upstream.is_confirmed:
            self._lease.rehabilitate()

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
            self._number = entry.number
            if entry.items:
                evaluated = entry.evaluated
                yield ChangeSet(entry.items, selector=entry.name, evaluations=evaluated, exact=True)
                self._passed.append(mine.selector)
                self._contents = Contents(self.held() or EMPTY, after.total)
            else:
                if self._is_new_name(entry.name):
                    yield ChangeSet((), selector=entry.name, exact=True)
                yield UpToDate() if entry.confirmed else LEADER_INTERRUPTED
        elif entry.after != mine.selector and entry.after not in self._passed:
            self._read()

    def _may_take(self, snapshot: Snapshot, contents: Contents, held: Payload) -> bool:
        """Return whether the feed's data may replace those that are held."""
        if not snapshot.is_intact:
            return False  # the leader repairs them
        now, state = clock.monotonic(), snapshot.state
        steps = distance(self._state, state)
        if steps is not None:
            if steps >= 0:
                return True
            is_over = self._lag.is_over_in_name(self._state, state, now)
        else:
            # Stored data may have what upstream has ceased to list while this relay was away.
            lacking = not self._has_delivered
            if is_at_least_as_new(contents.payload, held, lacking=lacking):
                return True
            newer = items_behind(contents.payload, held, lacking=lacking)
            is_over = self._lag.is_over(newer, contents.payload, now)
        if not is_over:
            return False
        text = "The fleet does not get what this relay has; its data are taken, though older"
        self._log.warning(text)
        return True

    def _is_new_name(self, name: Selector | None) -> bool:
        return name is not None and name != self.selector()

    def _adopted(self, snapshot: Snapshot, contents: Contents) -> tuple[Payload, Selector | None]:
        """Return the newer of feed and held data with their name, item by item if need be."""
        feed, held, name = contents.payload, self.held(), self.selector()
        steps = distance(self._state, snapshot.state)
        if not held or (steps is not None and steps > 0):
            return feed, snapshot.name
        if steps is not None:
            return held, name
        newer = newer_items(feed, held)
        merged = held.with_items(newer)
        if snapshot.name is not None and has_equal_items(merged, feed):
            return merged, snapshot.name
        return merged, None if newer else name

    def _is_ours(self, head: Head | None) -> bool:
        return head is not None and head.identity == self.keys.identity

    def _synchronised(self, confirmed: bool) -> Iterator[Update]:
        self._last_seen = None
        self._lag.end()
        self._upstream.leave()
        yield UpToDate() if confirmed else LEADER_INTERRUPTED

    def _knows_contents(self) -> bool:
        return self._contents is not None and self._contents.payload is self.held()

    def _compare_head(self, head: Head | None) -> None:
        """Read all data if the feed has led elsewhere, and its entries do not come."""
        if head is None:
            return
        mine = self._contents if self._knows_contents() else None
        if mine is None or self._upstream.is_followed:
            self._read()
        elif mine.selector == head.selector:
            self._last_seen = None
        elif self._last_seen == head or self._lag:
            self._read()
        else:
            self._last_seen = head

    def _read(self) -> None:
        if not self._reading:
            self._reading = True
            self._spawn(self._read_snapshot())

    async def _read_snapshot(self) -> None:
        try:
            mine = self._contents if self._knows_contents() else None
            if mine is None and (held := self.held()) is not None:
                mine = await run_in_slices(Contents.of(held))
            snapshot = await self._member.feed.snapshot(self.keys, mine.selector if mine else "")
        except StoreUnavailable:
            self._reading = False
            self._waiting.clear()
        else:
            self.snapshots += 1
            self._post(partial(self._on_snapshot, snapshot, mine))

    # Changes of role

    def _resign_without_upstream(self) -> None:
        """Let another lead, whose network may work, if upstream is away for too long."""
        since, leadership = self._upstream.lost_since, self.leadership
        if since is None or leadership is None or self._lease.abstains:
            return
        if clock.monotonic() - since >= self._timings.unhealthy:
            self._log.warning("This relay has no upstream and lets another one lead the fleet")
            self._lease.resign(leadership)
            self._follow()

    def _follow(self) -> None:
        """Become a follower. Upstream is kept until the feed has what this member has."""
        was = self.role
        self._enter(Role.FOLLOWER)
        if was is not Role.FOLLOWER:
            self._log.info("This relay follows the fleet's leader")
        self._watch.look_soon()
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
        self._last_seen = None
        self._lag.end()

    def _note_leader(self, owner: str | None) -> None:
        self.leader = owner
        if owner is not None:
            self._leaderless_since = None
        elif self._leaderless_since is None:
            self._leaderless_since = clock.monotonic()

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
            self._upstream.follow()
        return is_foreign

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
        self._upstream.leave()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lease.answered()
        self._reading = False
        self._events.clear()
        self._waiting.clear()
        if leadership is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timings.finish):
                    await self._lease.release(leadership)


def followed(mine: Contents, entry: Entry) -> Contents | None:
    """Return the data after an entry; None if it is not their next change, or has none."""
    if entry.before != mine.selector or entry.items is None:
        return None
    after = mine.with_items(entry.items)
    return after if after.selector == entry.after else None


def _all_of(payload: Payload, name: Selector | None, evaluated: int) -> ChangeSet:
    items = tuple(payload)
    return ChangeSet(items, full=True, selector=name, evaluations=evaluated, exact=True)
