"""Counts that outlive a feeder: they lie in memory that the next one has, too."""

from __future__ import annotations

import asyncio
import mmap
import zlib
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from relay.environment import Environment
from relay.model.metrics import MetricValue
from relay.protocol.workers import Series
from relay.relay import Relay
from relay.telemetry.traffic import RequestLabels, RequestMetrics
from relay.telemetry.workers import WorkerStatus

SIZE = 8 * 1024 * 1024
"""Bytes of the shared memory: two states of more environments than a relay has. What is not used
costs nothing."""

INTERVAL = 1.0
"""Seconds between two states; so much is lost with a feeder that is killed."""

_HEAD = 16
"""Bytes of number, length and checksum before a state."""


class _OfEnvironment(Struct, frozen=True, array_like=True):
    changes: int
    rejected: int
    delay: float
    delays: tuple[int, ...]
    events: dict[str, int]
    answers: tuple[tuple[str, str, str, int], ...]
    saved: dict[str, int]
    barriers: int


class _State(Struct, frozen=True, array_like=True):
    requests: tuple[tuple[Series, int], ...] = ()
    new_streams: tuple[tuple[Series, int], ...] = ()
    unusable: dict[str, int] = {}
    discarded: dict[str, int] = {}
    environments: dict[str, _OfEnvironment] = {}
    workers: tuple[WorkerStatus, ...] = ()


def shared_memory() -> mmap.mmap:
    """Return memory that processes share which are forked from this one."""
    return mmap.mmap(-1, SIZE)


class SharedCounts:
    """Writes the counts of a feeder to shared memory, and begins with those of the last one.

    There are two places, written in turn, so that one of them is always whole.

    Args:
        memory: from `shared_memory`.
        relay: whose environments are counted.
        traffic: counts requests.
    """

    def __init__(self, memory: mmap.mmap, relay: Relay, traffic: RequestMetrics) -> None:
        self._memory = memory
        self._relay = relay
        self._traffic = traffic
        self._number, state = _newest(memory)
        self._last = b""
        self._to_come = dict(state.environments)
        """Counts of environments that do not exist yet."""
        for counts, former in (
            (traffic.requests, state.requests),
            (traffic.new_streams, state.new_streams),
        ):
            for series, count in former:
                counts[RequestLabels(*series)].value += count
        traffic.unusable.update(state.unusable)
        traffic.discarded.update(state.discarded)
        for worker in state.workers:
            relay.workers[worker.number] = replace(
                worker, connected=False, streams=0, delayed=0, unread=0
            )

    def __repr__(self) -> str:
        return f"<SharedCounts, state {self._number}>"

    async def run(self) -> None:
        """Write at intervals, until cancelled."""
        while True:
            self.write()
            await asyncio.sleep(INTERVAL)

    def write(self) -> None:
        """Write the counts now, if they have changed and there is room for them."""
        for name, environment in self._relay.environments.items():
            if (former := self._to_come.pop(name, None)) is not None:
                self._add(environment, former)
        content = msgspec.msgpack.encode(self._state())
        if content == self._last or _HEAD + len(content) > SIZE // 2:
            return
        self._last = content
        self._number += 1
        start = self._number % 2 * (SIZE // 2)
        end = start + _HEAD + len(content)
        self._memory[start : start + _HEAD] = bytes(_HEAD)  # while it is written it counts for none
        self._memory[start + _HEAD : end] = content
        self._memory[start : start + _HEAD] = b"".join(
            number.to_bytes(size)
            for number, size in ((self._number, 8), (len(content), 4), (zlib.crc32(content), 4))
        )

    def _state(self) -> _State:
        environments = {
            name: self._counts_of(name, environment)
            for name, environment in self._relay.environments.items()
        }
        return _State(
            _series(self._traffic.requests),
            _series(self._traffic.new_streams),
            dict(self._traffic.unusable),
            dict(self._traffic.discarded),
            {**self._to_come, **environments},
            tuple(self._relay.workers.values()),
        )

    def _counts_of(self, name: str, environment: Environment) -> _OfEnvironment:
        delays = environment.hub.delays
        events, answers = self._relay.events, environment.answers
        return _OfEnvironment(
            environment.changes,
            environment.rejected,
            delays.total,
            delays.counts,
            events.counts(name).totals if events else {},
            tuple(
                (side, kind, reason, number.value)
                for side, counts in answers.items()
                for (kind, reason), number in counts.numbers.items()
            ),
            {side: counts.saved.value for side, counts in answers.items()},
            environment.journal.barriers,
        )

    def _add(self, environment: Environment, former: _OfEnvironment) -> None:
        environment.changes += former.changes
        environment.rejected += former.rejected
        environment.hub.delays.merge(former.delay, former.delays)
        answers = environment.answers
        for side, kind, reason, number in former.answers:
            answers[side].numbers[kind, reason].value += number
        for side, saved in former.saved.items():
            answers[side].saved.value += saved
        environment.journal.barriers += former.barriers
        if self._relay.events is not None:
            self._relay.events.counts(environment.spec.name).add(former.events)


def _series(counts: Mapping[RequestLabels, MetricValue]) -> tuple[tuple[Series, int], ...]:
    return tuple((labels, count.value) for labels, count in counts.items())


def _newest(memory: mmap.mmap) -> tuple[int, _State]:
    """Return number and content of the newest whole state; an empty one if there is none."""
    newest, state = 0, _State()
    for start in (0, SIZE // 2):
        head = memory[start : start + _HEAD]
        number, length = int.from_bytes(head[:8]), int.from_bytes(head[8:12])
        content = memory[start + _HEAD : start + _HEAD + length]
        if number > newest and zlib.crc32(content) == int.from_bytes(head[12:]):
            newest, state = number, msgspec.msgpack.decode(content, type=_State)
    return newest, state
