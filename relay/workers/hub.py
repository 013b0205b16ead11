"""Hub of the feeder: the streams of one environment are open in workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from relay.model.item import Item
from relay.model.payload import Change, Payload
from relay.programs import ProgramCache
from relay.protocol.workers import Data, FromWorker, Memberships, Refused, frame
from relay.streams.hub import Hub
from relay.workers.connection import Connection

PART = 256 * 1024
"""Bytes of items from which on a message ends and another one follows, so that neither side is
held up for long."""

Worker = Connection[FromWorker]


class WorkersHub(Hub):
    """Passes each change to all workers, encoded once.

    Args:
        number: of the environment in messages.
        programs: know the version of the data.
    """

    def __init__(self, number: int, programs: ProgramCache) -> None:
        super().__init__({})
        self.number = number
        self._programs = programs
        self._workers: set[Worker] = set()
        """Workers that have the environment."""
        self._waiting: set[Worker] = set()
        """Those that keep their own data until upstream has confirmed the feeder's."""
        self._streams: dict[Worker, Mapping[str, int]] = {}
        self._confirmed = False
        self._refused = False

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
        self._streams.pop(worker, None)

    def publish(self, payload: Payload | None, change: Change, _since: float | None = None) -> None:
        """Pass a change to the workers."""
        workers = self._workers - self._waiting
        if not workers:
            return
        if change.replace and payload is not None:
            self._write(workers, self._all(payload))
        else:
            self._write(workers, self._parts(change.items, full=False))

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

    def _all(self, payload: Payload) -> Iterator[bytes]:
        return self._parts(payload, full=True)

    def _parts(self, items: Payload | tuple[Item, ...], *, full: bool) -> Iterator[bytes]:
        version = self._programs.version
        part: list[Item] = []
        size = 0
        for item in items:
            if size >= PART:
                yield frame(Data(self.number, tuple(part), full, False, version))
                part, size = [], 0
            part.append(item)
            size += len(item.json or b"")
        yield frame(Data(self.number, tuple(part), full, True, version))

    @staticmethod
    def _write(workers: set[Worker], frames: Iterator[bytes] | list[bytes]) -> None:
        for data in frames:
            for worker in workers:
                worker.write(data)
