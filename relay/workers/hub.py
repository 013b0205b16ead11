"""Hubs of one environment, in the feeder and in a worker."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from relay.model.item import Item
from relay.model.journal import Journal, SavedJournal
from relay.model.payload import Change, Payload
from relay.programs import ProgramCache
from relay.protocol.workers import Data, FromWorker, Memberships, Refused, Settled, frame
from relay.streams.admission import Admission
from relay.streams.channel import Channel, StreamFormat
from relay.streams.evaluated import PINGS
from relay.streams.hub import Hub, StreamLimits
from relay.streams.ping import PingChannel
from relay.workers.connection import Connection

PART = 256 * 1024
"""Bytes of items from which on a message ends and another one follows, so that neither side is
held up for long."""

SETTLED_WITHIN = 0.25
"""Seconds that clients which have to poll wait for all workers: the one that they ask must have
what another has announced."""

Worker = Connection[FromWorker]


class WorkersHub(Hub):
    """Passes each change to all workers, encoded once.

    Args:
        number: of the environment in messages.
        programs: know the version of the data.
        journal: knows their name, and what new workers have to know of their clients.
    """

    def __init__(self, number: int, programs: ProgramCache, journal: Journal) -> None:
        super().__init__({})
        self._journal = journal
        self.number = number
        self._programs = programs
        self._workers: set[Worker] = set()
        """Workers that have the environment."""
        self._waiting: set[Worker] = set()
        """Those that keep their own data until upstream has confirmed the feeder's."""
        self._streams: dict[Worker, Mapping[str, int]] = {}
        self._confirmed = False
        self._refused = False
        self._change = 0
        """Number of the last change."""
        self._unsettled: dict[int, set[Worker]] = {}
        """By number, changes that some workers do not serve yet."""

    def __repr__(self) -> str:
        return f"<WorkersHub of {len(self._workers)} workers, {len(self)} streams>"

    def __len__(self) -> int:
        """Return the number of open streams."""
        return sum(self.streams.values())

    @property
    def streams(self) -> Mapping[str, int]:
        """The number of open streams by name."""
        return sum(map(Counter, self._streams.values()), Counter[str]())

    def report(self, worker: Worker, streams: Mapping[str, int]) -> None:
        """Take the number of streams that a worker has."""
        if worker in self._workers:
            self._streams[worker] = streams

    def add(self, worker: Worker, payload: Payload | None, *, has_data: bool) -> None:
        """Pass changes to a worker that knows the environment now.

        Args:
            worker: the new worker.
            payload: the data, if there are any.
            has_data: True if the worker has served data: it gets no others before upstream has
                confirmed them, because stored data could be older than its own.
        """
        self._workers.add(worker)
        if has_data and not self._confirmed:
            self._waiting.add(worker)
        elif payload is not None:
            self._write({worker}, self._all(payload))
        elif self._refused:
            worker.send(Refused(self.number))

    def discard(self, worker: Worker) -> None:
        """Forget a worker."""
        self._workers.discard(worker)
        self._waiting.discard(worker)
        self.note_applied(worker, self._change)
        self._streams.pop(worker, None)

    def publish(self, payload: Payload | None, change: Change, _since: float | None = None) -> None:
        """Pass a change to the workers."""
        workers = self._workers - self._waiting
        if not workers:
            return
        self._change += 1
        self._unsettled[self._change] = set(workers)
        asyncio.get_running_loop().call_later(SETTLED_WITHIN, self._settle, self._change)
        if change.replace and payload is not None:
            self._write(workers, self._parts(payload, full=True, change=self._change))
        else:
            self._write(workers, self._parts(change.items, full=False, change=self._change))

    def note_applied(self, worker: Worker, change: int) -> None:
        """Note that a worker serves a change, and those before it."""
        for number in [number for number in self._unsettled if number <= change]:
            self._unsettled[number].discard(worker)
            if not self._unsettled[number]:
                self._settle(number)

    def _settle(self, change: int) -> None:
        """Let the workers know that all of them serve a change, or that one is too slow."""
        if self._unsettled.pop(change, None) is not None:
            self._write(self._workers, [frame(Settled(self.number, change))])

    def confirm(self, payload: Payload) -> None:
        """Pass confirmed data to workers that have waited for them."""
        self._confirmed, self._refused = True, False
        if self._waiting:
            self._write(self._waiting, self._all(payload))
            self._waiting.clear()

    def interrupt(self, *, refused: bool) -> None:
        """Let the workers know why they get no data."""
        if refused and not self._refused:
            self._write(self._workers, [frame(Refused(self.number))])
        self._refused = refused

    def publish_memberships(self, hashes: frozenset[str] | None) -> None:
        """Let the workers know that memberships in big segments have changed."""
        self._write(self._workers, [frame(Memberships(self.number, hashes))])

    def publish_memberships_status(self) -> None:
        """Let the workers know that memberships in big segments have another status."""
        self.publish_memberships(frozenset())

    def _all(self, payload: Payload) -> Iterator[bytes]:
        return self._parts(payload, full=True, journal=self._journal.saved(payload))

    def _parts(
        self,
        items: Payload | tuple[Item, ...],
        *,
        full: bool,
        change: int = 0,
        journal: SavedJournal | None = None,
    ) -> Iterator[bytes]:
        version = self._programs.version
        part: list[Item] = []
        size = 0
        for item in items:
            if size >= PART:
                yield frame(Data(self.number, tuple(part), full, False, version))
                part, size = [], 0
            part.append(item)
            size += len(item.json or b"")
        selector = self._journal.client_selector
        last = Data(self.number, tuple(part), full, True, version, change, selector, journal)
        yield frame(last)

    @staticmethod
    def _write(workers: set[Worker], frames: Iterator[bytes] | list[bytes]) -> None:
        for data in frames:
            for worker in workers:
                worker.write(data)


class SettledPings(PingChannel):
    """Stream that tells clients of a worker to poll, once all workers serve the change.

    Their polls may go to another worker, and they would not ask again.

    Args:
        jitter: maximum delay of a ping in seconds, besides.
    """

    def __init__(self, jitter: float) -> None:
        super().__init__(jitter)
        self.change: Callable[[], int] = lambda: 0
        """Returns the number of the change that is published; 0 for what is no change to others."""
        self._held: deque[tuple[int, Payload | None, Change, float]] = deque()

    def publish(self, payload: Payload | None, change: Change, since: float) -> None:
        """Ping all clients as soon as all workers serve the change."""
        number = self.change()
        if number:
            self._held.append((number, payload, change, since))
        else:
            super().publish(payload, change, since)

    def settle(self, number: int) -> None:
        """Ping for a change, and for those before it: all workers serve them."""
        while self._held and self._held[0][0] <= number:
            _, payload, change, since = self._held.popleft()
            super().publish(payload, change, since)


class WorkerHub(Hub):
    """Hub of a worker.

    Args:
        formats: as of any hub.
        limits: as of any hub.
        channels: as of any hub, without that of pings.
        pings: the channel of pings.
        admission: of the process.
    """

    def __init__(
        self,
        formats: Mapping[str, StreamFormat],
        limits: StreamLimits,
        channels: Mapping[str, Channel[Any]],
        pings: SettledPings,
        admission: Admission,
    ) -> None:
        super().__init__(formats, limits, {**channels, PINGS: pings}, admission)
        self.pings = pings
