"""This relay as a member of a fleet: looks at Redis and reads the feed for all environments."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from relay import clock
from relay.aio import wait_for
from relay.errors import StoreUnavailable
from relay.fleet.feed import Feed, Keys, Look, Reader, place_order
from relay.fleet.timings import FleetTimings
from relay.protocol.feed import Entry
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog


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


class Member:
    """Member of a fleet.

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
        self._outage = OutageLog(log)

    def __repr__(self) -> str:
        state = "answering" if self._answers_since is not None else "silent"
        return f"<Member of {len(self._observers)} environments, Redis {state}>"

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
        """Look and read until cancelled."""
        self._answered = clock.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look_forever())
                tasks.create_task(self._read_forever())
        finally:
            await self.feed.aclose()

    async def _look_forever(self) -> None:
        while True:
            self._look_now.clear()
            try:
                await self._check_rights()
                observers = tuple(self._observers)
                if observers:
                    self._tell(observers, await self.feed.look([each.keys for each in observers]))
            except StoreUnavailable as e:
                self._note_failure(e)
            await wait_for(self._look_now, self.timings.poll)

    async def _check_rights(self) -> None:
        """Find out at the start what would fail later, each time."""
        for observer in tuple(self._unchecked):
            problem = await self.feed.problem_with(observer.keys)
            if observer in self._unchecked:
                self._unchecked.remove(observer)
                if problem is not None:
                    self._observers.remove(observer)
                    observer.denied(problem)

    def _tell(self, observers: Sequence[Observer], looks: Sequence[Look]) -> None:
        now = clock.monotonic()
        self._answered = now
        if self._answers_since is None:
            self._answers_since = now
        if self._outage.reason is not None and self.is_settled:
            self._outage.end("The fleet's Redis answers again")
        for observer, look in zip(observers, looks, strict=True):
            observer.looked(look)

    def _note_failure(self, error: StoreUnavailable) -> None:
        self._answers_since = None
        if self.is_lost:
            text = "The fleet's Redis is unavailable: %s; this relay listens to upstream itself"
            self._outage.begin(str(error), text, error)
            for observer in self._observers:
                observer.fell_silent()

    async def _read_forever(self) -> None:
        failures = 0
        while True:
            before = self._place
            try:
                await self.feed.follow(self._read)
            except StoreUnavailable:
                failures = failures + 1 if self._place == before else 0
                await asyncio.sleep(self.timings.retry.delay(failures))

    async def _read(self, reader: Reader) -> None:
        """Read for as long as the connection lasts."""
        last = await reader.last_place()
        if not self._place or place_order(self._place) > place_order(last):
            self._place = last  # new here, or a failover has lost entries
        self.look_soon()
        while True:
            for place, entry in await reader.read(self._place, self.timings.poll):
                self._place = place
                if entry is not None:
                    self._pass_on(place, entry)

    def _pass_on(self, place: str, entry: Entry) -> None:
        if entry.resigned:
            self.look_soon()
        for observer in self._observers:
            if observer.keys.prefix == entry.prefix:
                observer.read(place, entry)
