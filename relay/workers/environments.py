"""Environments of a worker: those of the feeder, with the data that it sends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from typing import Protocol

from relay.environment import ConnectionState, Environment
from relay.model.environment import EnvironmentSpec
from relay.model.item import Item
from relay.model.payload import Change, ChangeSet, Payload
from relay.protocol.workers import Applied, Check, Data, FromWorker, Memberships
from relay.relay import Relay
from relay.sources import DataSource, Update, UpToDate
from relay.stores import Key, Stored
from relay.workers.hub import WorkerHub

Send = Callable[[FromWorker], object]
"""Sends a message to the feeder; it is lost while there is none."""


class Parts(Protocol):
    """Contract of what makes the environments of a worker."""

    def environment(self, spec: EnvironmentSpec, source: DataSource) -> Environment:
        """Return a new environment with a source."""

    def change(self, environment: Environment, spec: EnvironmentSpec) -> None:
        """Prepare an environment for another spec: big segments may be elsewhere then."""


class FeederSource:
    """Data of one environment, as the feeder passes them on.

    Args:
        send: sends a message to the feeder.
        number: of the environment in messages.
    """

    protocol = ""

    def __init__(self, send: Send, number: int) -> None:
        self.number = number
        self.has_data = False
        """True once there were complete data."""
        self._send = send
        self._items: list[Item] = []
        """Items of a change that is still to be completed."""
        self._change = 0
        self._updates: deque[tuple[Update, int]] = deque()
        self._arrived = asyncio.Event()
        self.idle = asyncio.Event()
        """Set while the environment has taken everything."""
        self._first: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<FeederSource {self.number}>"

    def receive(self, data: Data) -> None:
        """Take items."""
        self._items += data.items
        if not data.last:
            return
        items, self._items = tuple(self._items), []
        changes = ChangeSet(
            items,
            data.full,
            selector=data.selector,
            evaluations=data.evaluations,
            exact=data.selector is not None,
        )
        if data.full and not self._first.done():
            stored = Stored(Payload.of(items), journal=data.journal) if data.journal else None
            self._first.set_result(stored)
        self.has_data |= data.full
        self._add(changes, data.change)

    async def first(self) -> Stored | None:
        """Wait for the first complete data; return them if they have a journal."""
        stored = await asyncio.shield(self._first)
        self._first = asyncio.get_running_loop().create_future()
        self._first.set_result(None)  # they are needed once
        return stored

    def latest_change(self) -> int:
        """Return the number of the change that the environment takes; 0 for what is no change."""
        return self._change

    def begin(self, number: int) -> None:
        """Go on, with another feeder perhaps, which has not sent anything yet."""
        if number != self.number:
            self.number = number
            self._items = []
        self._add(UpToDate())

    def _add(self, update: Update, change: int = 0) -> None:
        self._updates.append((update, change))
        self.idle.clear()
        self._arrived.set()

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield changes; outages of upstream are the feeder's business."""
        del basis  # the feeder sends everything first
        while True:
            while self._updates:
                update, self._change = self._updates.popleft()
                yield update
                if self._change:
                    self._send(Applied(self.number, self._change))
            self.idle.set()
            self._arrived.clear()
            await self._arrived.wait()

    def resync(self) -> None:
        """Do nothing: the feeder asks upstream again when it has to."""

    def check(self, *, reconnect: bool = False) -> None:
        """Let the feeder check upstream."""
        self._send(Check(self.number, reconnect))


class FedJournal:
    """Mirror from which a worker has the journal of the feeder's data; it keeps nothing.

    Args:
        source: of the data.
    """

    has_journal = True
    status = None

    def __init__(self, source: FeederSource) -> None:
        self._source = source

    def __repr__(self) -> str:
        return f"<FedJournal of {self._source}>"

    async def load(self) -> Stored | None:
        """Return the first data with their journal; the source has them, too."""
        return await self._source.first()

    def update(
        self,
        payload: Payload,
        change: Change | None,
        *,
        full: bool = False,
        unusable: Collection[Key] = (),
    ) -> None:
        """Write nothing."""

    def suspend(self) -> None:
        """Do nothing."""

    async def flushed(self) -> None:
        """Return at once: nothing is ever to be written."""

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()


_Fed = tuple[Environment, FeederSource]


class FedEnvironments:
    """Keeps the environments of a worker equal to those of the feeder.

    Args:
        relay: of the worker.
        parts: makes its environments.
        send: sends a message to the feeder.
    """

    def __init__(
        self,
        relay: Relay,
        parts: Parts,
        send: Send,
    ) -> None:
        self._relay = relay
        self._parts = parts
        self._send = send
        self._put: dict[int, EnvironmentSpec] = {}
        self._gone: list[int] = []
        self._present: dict[int, _Fed] = {}
        self._former: dict[str, _Fed] = {}
        """By name, environments of the former feeder that this one has not named yet."""

    def __repr__(self) -> str:
        return f"<FedEnvironments: {len(self._present)}, {len(self._former)} unconfirmed>"

    def interrupt(self) -> None:
        """Note that there is no feeder: the data stay, but may be old."""
        for environment, _ in self._present.values():
            environment.connection.enter(ConnectionState.INTERRUPTED)

    def begin(self) -> frozenset[str]:
        """Prepare for another feeder; return the names of the environments that have data."""
        self._former |= {each[0].spec.name: each for each in self._present.values()}
        self._present, self._put, self._gone = {}, {}, []
        return frozenset(name for name, (_, source) in self._former.items() if source.has_data)

    def put(self, number: int, spec: EnvironmentSpec) -> None:
        """Note that there is an environment, or that it has changed; `carry_out` does it."""
        self._put[number] = spec

    def remove(self, number: int) -> None:
        """Note that there is no such environment any more; `carry_out` does it."""
        self._gone.append(number)

    def carry_out(self, sharing: Iterable[int]) -> None:
        """Let the environments be those of the feeder, in one turn.

        So a credential that moves from one to another is refused at no time.

        Args:
            sharing: environments that have a credential of another one; the last one takes it.
        """
        for number in self._gone:
            self._remove(number)
        for number, spec in self._put.items():
            self._change(number, spec)
        self._gone, self._put = [], {}
        for number in sharing:
            environment, _ = self._present[number]
            self._relay.change(environment, environment.spec)
        for environment, _ in self._former.values():  # which this feeder has not named
            self._relay.remove(environment)
        self._former = {}

    def _change(self, number: int, spec: EnvironmentSpec) -> None:
        known = self._present.get(number) or self._former.pop(spec.name, None)
        if known is None:
            source = FeederSource(self._send, number)
            environment = self._parts.environment(spec, source)
            if isinstance(environment.hub, WorkerHub):
                environment.hub.pings.change = source.latest_change
            self._relay.put(environment)
        else:
            environment, source = known
            source.begin(number)
            if number not in self._present:
                _forget_memberships(environment)
            if environment.spec != spec:
                self._parts.change(environment, spec)
                self._relay.change(environment, spec)
        self._present[number] = environment, source

    def _remove(self, number: int) -> None:
        environment, _ = self._present.pop(number)
        self._relay.remove(environment)

    async def current(self) -> None:
        """Wait until they have taken all data that the feeder has sent."""
        for _, source in tuple(self._present.values()):
            await source.idle.wait()

    def receive(self, data: Data) -> None:
        """Take data of an environment."""
        self._present[data.number][1].receive(data)

    def settle(self, number: int, change: int) -> None:
        """Let clients poll for a change, and for those before it: all workers serve them."""
        hub = self._present[number][0].hub
        if isinstance(hub, WorkerHub):
            hub.pings.settle(change)

    def refuse(self, number: int) -> None:
        """Note that LaunchDarkly refuses the key of an environment."""
        self._present[number][0].connection.enter(ConnectionState.OFF)

    def forget_memberships(self, message: Memberships) -> None:
        """Let memberships in big segments that have changed be read again, and their status."""
        big_segments = self._present[message.number][0].big_segments
        if big_segments is None:
            return
        big_segments.look()
        if message.hashes is None or message.hashes:
            big_segments.changed(message.hashes)


def _forget_memberships(environment: Environment) -> None:
    """Let memberships be read again: the former feeder may not have told of the last changes."""
    big_segments = environment.big_segments
    if big_segments is not None and big_segments.in_use:
        big_segments.changed(None)
