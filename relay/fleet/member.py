"""This relay as a member of a fleet: looks at Redis, reads feeds and renews leases.

What environments with one feed need is done for all of them at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from relay import clock
from relay.aio import wait_for
from relay.errors import StoreUnavailable
from relay.fleet.feed import Feed, Keys, Look, Reader, place_order
from relay.fleet.timings import FleetTimings
from relay.protocol.feed import FEED, Entry
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

RETRIES = 4
"""Attempts of a failed renewal in the time between two renewals."""


class Observer(Protocol):
    """Learns what happens in the fleet to one environment. No method may block."""

    keys: Keys

    def looked(self, look: Look) -> None:
        """Take lease and head."""

    def read(self, place: str, entry: Entry) -> None:
        """Take an entry of the feed."""

    def fell_silent(self) -> None:
        """Note that Redis has not answered for too long. Called again while that lasts."""

    def denied(self, reason: str) -> None:
        """Note that there is no fleet for this environment. Nothing more is told."""


class Renewal(Struct, frozen=True):
    """A lease that is renewed.

    Args:
        keys: of the environment.
        is_over: returns True once it needs no more renewals.
        renewed: takes the monotonic times before the command and after the answer, and whether
            this member has the lease still.
    """

    keys: Keys
    is_over: Callable[[], bool]
    renewed: Callable[[float, float, bool], None]


class Member:
    """This relay in a fleet.

    Args:
        feed: the fleet's database.
        name: of this relay, and of this start of it: no two are equal.
        log: of the process.
        timings: delays.
    """

    def __init__(
        self, feed: Feed, name: str, log: Log, timings: FleetTimings = FleetTimings()
    ) -> None:
        self.feed = feed
        self.name = name
        self.timings = timings
        self._watches: dict[str, Watch] = {}
        self._running: dict[Watch, asyncio.Task[None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._log = log
        self._outage = OutageLog(log)
        self._lost: set[Watch] = set()
        self._knows_policy = False

    def __repr__(self) -> str:
        return f"<Member {self.name!r} with {len(self._watches)} feeds>"

    def watch(self, keys: Keys) -> Watch:
        """Return what watches the feed of an environment."""
        watch = self._watches.get(keys.feed)
        if watch is None:
            watch = self._watches[keys.feed] = Watch(self, keys.feed)
        return watch

    def join(self, observer: Observer) -> None:
        """Tell an observer from now on what happens."""
        watch = self.watch(observer.keys)
        watch.join(observer)
        if watch not in self._running:
            self._start(watch)

    def leave(self, observer: Observer) -> None:
        """Tell it nothing more."""
        watch = self.watch(observer.keys)
        watch.leave(observer)
        if not watch.is_needed:
            del self._watches[observer.keys.feed]
            self.note_answers(watch)
            if task := self._running.pop(watch, None):
                task.cancel()

    async def run(self) -> None:
        """Take part until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for watch in self._watches.values():
                    self._start(watch)
                await asyncio.Event().wait()
        finally:
            self._tasks = None
            self._running.clear()
            await self.feed.aclose()

    def _start(self, watch: Watch) -> None:
        if self._tasks is not None:
            self._running[watch] = self._tasks.create_task(watch.run())

    def note_silence(self, watch: Watch, error: StoreUnavailable) -> None:
        """Log that Redis does not answer, once for all environments."""
        self._lost.add(watch)
        text = "The fleet's Redis is unavailable: %s; this relay listens to upstream itself"
        self._outage.begin(str(error), text, error)

    def note_answers(self, watch: Watch) -> None:
        """Log that Redis answers again, once it does for all environments."""
        self._lost.discard(watch)
        if not self._lost:
            self._outage.end("The fleet's Redis answers again")

    async def check_policy(self, keys: Keys) -> None:
        """Warn, once, of a server that may evict what the fleet stands on.

        Raises:
            StoreUnavailable: it does not answer.
        """
        if self._knows_policy:
            return
        policy = await self.feed.evicting_policy(keys)
        self._knows_policy = True
        if policy is not None:
            self._log.warning(EVICTS, policy)


EVICTS = (
    "The fleet's Redis may evict keys that the fleet stands on (maxmemory-policy %s): choose"
    " noeviction, or a policy volatile-…"
)
"""Warning of `Member` and `relay check`, with a place for the policy."""


class Watch:
    """Watches one feed: of all environments, or of one of them in a cluster.

    Args:
        member: this relay.
        feed: key of the feed.
    """

    def __init__(self, member: Member, feed: str) -> None:
        self.timings = member.timings
        self._member = member
        self._feed = feed
        self._observers: list[Observer] = []
        self._unchecked: list[Observer] = []
        """Observers for whose keys it is unknown what the database user may do."""
        self._answered: float | None = None
        """Monotonic time of the last answer; None before the first start."""
        self._answers_since: float | None = None
        """Monotonic time since which every command was answered; None while they are not."""
        self._place = ""
        """Place of the last entry that was read."""
        self._look_now = asyncio.Event()
        self._renewals: list[Renewal] = []
        self._renews = asyncio.Event()
        """Set while there are leases to renew."""

    def __repr__(self) -> str:
        state = "answering" if self._answers_since is not None else "silent"
        return f"<Watch of {self._feed!r}, {len(self._observers)} environments, Redis {state}>"

    @property
    def is_needed(self) -> bool:
        """True while it has observers."""
        return bool(self._observers or self._unchecked)

    @property
    def is_settled(self) -> bool:
        """True if Redis answers, and has for some time."""
        since = self._answers_since
        return since is not None and clock.monotonic() - since >= self.timings.settle

    @property
    def is_lost(self) -> bool:
        """True if Redis has not answered for too long."""
        answered = self._answered
        return answered is not None and clock.monotonic() - answered >= self.timings.lost

    def join(self, observer: Observer) -> None:
        """Tell an observer from now on what happens."""
        self._observers.append(observer)
        self._unchecked.append(observer)
        self.look_soon()

    def leave(self, observer: Observer) -> None:
        """Tell it nothing more."""
        for observers in (self._observers, self._unchecked):
            if observer in observers:
                observers.remove(observer)

    def look_soon(self) -> None:
        """Look at leases and heads now, instead of at the next turn."""
        self._look_now.set()

    async def run(self) -> None:
        """Look, read and renew until cancelled."""
        self._answered = clock.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look_forever())
            tasks.create_task(self._read_forever())
            tasks.create_task(self._renew_forever())

    def renew(self, renewal: Renewal) -> None:
        """Renew a lease from now on, together with the others."""
        self._renewals.append(renewal)
        self._renews.set()

    async def _look_forever(self) -> None:
        while True:
            self._look_now.clear()
            try:
                await self._check_rights()
                observers = tuple(self._observers)
                if observers:
                    looks = await self._member.feed.look([each.keys for each in observers])
                    self._tell(observers, looks)
            except StoreUnavailable as e:
                self._note_failure(e)
            await wait_for(self._look_now, self.timings.poll)

    async def _check_rights(self) -> None:
        """Find out at the start what would fail later, each time."""
        for observer in tuple(self._unchecked):
            problem = await self._member.feed.problem_with(observer.keys)
            if observer in self._unchecked:
                self._unchecked.remove(observer)
                if problem is not None:
                    self._observers.remove(observer)
                    observer.denied(problem)
                else:
                    await self._member.check_policy(observer.keys)

    def _tell(self, observers: Sequence[Observer], looks: Sequence[Look]) -> None:
        now = clock.monotonic()
        self._answered = now
        if self._answers_since is None:
            self._answers_since = now
        if self.is_settled:
            self._member.note_answers(self)
        for observer, look in zip(observers, looks, strict=True):
            observer.looked(look)

    def _note_failure(self, error: StoreUnavailable) -> None:
        self._answers_since = None
        if self.is_lost:
            self._member.note_silence(self, error)
            for observer in self._observers:
                observer.fell_silent()

    async def _read_forever(self) -> None:
        failures = 0
        while True:
            before = self._place
            try:
                await self._member.feed.follow(self._feed, self._read)
            except StoreUnavailable:
                failures = failures + 1 if self._place == before else 0
                await asyncio.sleep(self.timings.retry.delay(failures))

    async def _read(self, reader: Reader) -> None:
        """Read for as long as the connection lasts."""
        last = await reader.last_place()
        if not self._place or place_order(self._place) > place_order(last):
            self._place = last  # new here, or a failover has lost entries
        self.look_soon()
        timings = self.timings
        wait = timings.poll if self._feed == FEED else timings.wait
        while True:
            for place, entry in await reader.read(self._place, wait):
                self._place = place
                if entry is not None:
                    self._pass_on(place, entry)

    def _pass_on(self, place: str, entry: Entry) -> None:
        if entry.resigned:
            self.look_soon()
        for observer in self._observers:
            if observer.keys.prefix == entry.prefix:
                observer.read(place, entry)

    async def _renew_forever(self) -> None:
        delay = self.timings.renew
        while True:
            await self._renews.wait()
            await asyncio.sleep(delay)
            self._renewals = renewals = [each for each in self._renewals if not each.is_over()]
            if not renewals:
                self._renews.clear()
                continue
            sent, member = clock.monotonic(), self._member
            all_keys = [each.keys for each in renewals]
            try:
                kept = await member.feed.renew(all_keys, member.name, self.timings.ttl)
            except StoreUnavailable:
                delay = self.timings.renew / RETRIES
                continue
            delay, answered = self.timings.renew, clock.monotonic()
            for renewal, is_kept in zip(renewals, kept, strict=True):
                renewal.renewed(sent, answered, is_kept)
