"""Forwarder of analytics events: every payload is accepted once and delivered once.

Each partition that is not empty has a task. The spool fixes batches; the task sends the oldest one
until upstream has it. So events arrive in order, and a failing partition delays no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from relay import clock, randomness
from relay.events.backpressure import AckGate
from relay.events.delivery import DeliveryResources, PartitionDelivery
from relay.events.policy import ForwarderTimings, SpecOf
from relay.events.reports import EventCounts, EventReports
from relay.events.sender import BatchSender, Upstream
from relay.events.spool import Spool
from relay.events.store import Backlog
from relay.model.event import EventPayload, Partition


class Forwarder:
    """Accepts payloads, and delivers them while `run` runs.

    Args:
        spool: store of the payloads.
        upstream: HTTP session.
        base: URL of LaunchDarkly's events service.
        spec_of: returns the current description of an environment by its name.
        timings: intervals and timeouts.
    """

    def __init__(
        self,
        spool: Spool,
        upstream: Upstream,
        base: str,
        spec_of: SpecOf,
        timings: ForwarderTimings = ForwarderTimings(),
    ) -> None:
        self.spool = spool
        self._timings = timings
        self._reports = EventReports(spec_of)
        self._gate = AckGate(spool.memory, self._reports)
        self._sender = BatchSender(upstream, base, spec_of, timings.timeout)
        self._shared = DeliveryResources(spool, self._sender, self._reports, self._gate, timings)
        self._deliveries: dict[Partition, PartitionDelivery] = {}
        """Deliveries of the partitions that are not empty."""
        self._tasks: dict[Partition, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        waiting = sum(counts.waiting for counts in self._reports.counts.values())
        return (
            f"<Forwarder: {waiting} payloads waiting in {len(self._deliveries)} partitions,"
            f" {len(self._reports.failing)} endpoints failing>"
        )

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Accept a payload; it is delivered even if the result is not awaited.

        Returns:
            Future of whether the payload was new; resolves when it is safe.

        Raises:
            StoreUnavailable: the disk hangs and too many payloads wait for it.
        """
        stored = self.spool.append(payload)
        if isinstance(stored, asyncio.Future):
            return stored  # its transaction is recorded
        self._record_stored(payload, stored)
        memory = self.spool.memory
        if memory is not None and memory.evicted:
            self._record_evicted(memory.pop_evicted())
        ack = self._gate.acknowledge(payload, stored)
        if not ack.done() and len(self._gate) == 1:
            self._flush_all()
        return ack

    def counts(self, environment: str) -> EventCounts:
        """Return the counts of an environment."""
        return self._reports.counts[environment]

    def oldest(self, environment: str) -> float | None:
        """Return the time of arrival of the oldest waiting payload, by `clock`; None without."""
        deliveries = (d for p, d in self._deliveries.items() if p.environment == environment)
        return min((delivery.oldest for delivery in deliveries), default=None)

    def server_time(self, environment: str) -> float:
        """Return upstream's clock at its last response, in Unix seconds; 0 before the first."""
        return self._sender.server_times.get(environment, 0.0)

    def forget(self, environment: str) -> bool:
        """Forget an environment that is gone; return False while payloads of it are waiting."""
        if any(partition.environment == environment for partition in self._deliveries):
            return False
        self._reports.forget(environment)
        self._sender.server_times.pop(environment, None)
        self._shared.forget(environment)
        return True

    def flush(self) -> None:
        """Send all waiting payloads now, as the relay shuts down."""
        self._shared.ending.set()
        self._gate.open()
        self._flush_all()

    async def run(self) -> None:
        """Deliver until cancelled; then drain for a limited time. The rest stays in the spool."""
        recording = asyncio.create_task(self._record_results())
        try:
            await asyncio.wait({recording})
        finally:
            await self._drain()
            await self.spool.close()
            recording.cancel()
            await asyncio.wait({recording})
            self._reports.log_losses()
        recording.result()  # raises the unexpected error that has ended it

    async def _drain(self) -> None:
        self.flush()
        deadline = clock.monotonic() + self._timings.drain
        while self._tasks and (left := deadline - clock.monotonic()) > 0:
            self._flush_all()
            await asyncio.wait(self._tasks.values(), timeout=left)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _record_results(self) -> None:
        async for result in self.spool.results():
            if result.backlog is not None:
                self._record_backlog(result.backlog)
            for payload, new in zip(result.payloads, result.new, strict=True):
                self._record_stored(payload, new)
            self._record_evicted(result.evicted)

    def _record_stored(self, payload: EventPayload, new: bool) -> None:
        """Count a payload, and start its delivery."""
        counts = self._reports.counts[payload.partition.environment]
        counts.received += 1
        if not new:
            counts.duplicates += 1
            return
        counts.waiting += 1
        delivery = self._deliveries.get(payload.partition)
        if delivery is None:
            interval = self._timings.flush_interval
            delivery = self._begin(payload.partition, payload.received, interval)
        delivery.note(payload)

    def _record_backlog(self, backlog: Sequence[Backlog]) -> None:
        """Deliver the backlog of an earlier process, or of a disk that works again."""
        for counts in self._reports.counts.values():
            counts.waiting = 0
        for partition, payloads, oldest in backlog:
            self._reports.counts[partition.environment].waiting += payloads
            delivery = self._deliveries.get(partition)
            if delivery is None:
                # Spread the partitions: upstream should not get the whole backlog at once.
                delay = randomness.fraction() * self._timings.flush_interval
                delivery = self._begin(partition, oldest, delay)
            delivery.note_backlog()

    def _record_evicted(self, evicted: Mapping[str, int]) -> None:
        for environment, payloads in evicted.items():
            self._reports.count_evicted(environment, payloads)

    def _begin(self, partition: Partition, oldest: float, delay: float) -> PartitionDelivery:
        delivery = PartitionDelivery(partition, oldest, self._shared)
        self._deliveries[partition] = delivery
        self._tasks[partition] = asyncio.create_task(self._deliver(delivery, delay))
        return delivery

    async def _deliver(self, delivery: PartitionDelivery, delay: float) -> None:
        await delivery.run(delay)
        del self._deliveries[delivery.partition], self._tasks[delivery.partition]

    def _flush_all(self) -> None:
        for delivery in self._deliveries.values():
            delivery.flush()
