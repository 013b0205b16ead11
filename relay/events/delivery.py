"""Delivery of one partition: its batches, one after another, until upstream has them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

from msgspec import Struct, field

from relay import randomness
from relay.aio import wait_for
from relay.events.backpressure import AckGate
from relay.events.blame import Evidence
from relay.events.policy import (
    BAD_REQUEST,
    ForwarderTimings,
    Step,
    delay_after,
    may_have_arrived,
    next_step,
    step_if_bad,
)
from relay.events.reports import EventReports
from relay.events.sender import Attempt, BatchSender
from relay.events.spool import Spool
from relay.events.store import MAX_BATCH, Batch, half_ids
from relay.model.event import EventPayload, EventsEndpoint, Partition

MAX_REQUESTS = 4
"""Maximum number of concurrent requests for one environment."""

RESTART_DELAY = 10.0
"""Seconds before a partition is served again after an unexpected error."""

REJECTIONS_BEFORE_WARNING = 3
"""Consecutive rejections of a payload that has no other to compare it with, before a warning. Most
payloads are convicted earlier."""

MALFORMED = "no well-formed JSON array"
"""Reason for a quarantine without an attempt to deliver the payload."""

_log = logging.getLogger("relay.events")


class DeliveryResources(Struct, frozen=True):
    """Resources that the deliveries of all partitions share."""

    spool: Spool
    sender: BatchSender
    reports: EventReports
    gate: AckGate
    timings: ForwarderTimings
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the relay shuts down."""
    evidence: defaultdict[tuple[str, EventsEndpoint], Evidence] = field(
        default_factory=lambda: defaultdict(Evidence)
    )
    """Evidence by environment and endpoint."""
    slots: defaultdict[str, asyncio.Semaphore] = field(
        default_factory=lambda: defaultdict(lambda: asyncio.Semaphore(MAX_REQUESTS))
    )
    """Slots for requests, by environment."""

    def forget(self, environment: str) -> None:
        """Forget an environment that has no deliveries."""
        self.slots.pop(environment, None)
        for key in [key for key in self.evidence if key[0] == environment]:
            del self.evidence[key]


class PartitionDelivery:
    """Delivers a partition that is not empty.

    Args:
        partition: the partition.
        oldest: time of arrival of its oldest payload, in Unix seconds.
        shared: resources that all deliveries share.
    """

    def __init__(self, partition: Partition, oldest: float, shared: DeliveryResources) -> None:
        self.partition = partition
        self._oldest = oldest
        self._size = 0
        """Bytes received since the last batch was taken."""
        self._has_new = True
        """True if a payload was received since then."""
        self._new_since = 0.0
        """Time of arrival of the first of those, in Unix seconds."""
        self._due = asyncio.Event()
        """Set when the next batch should be sent without gathering any longer."""
        self._arrived = asyncio.Event()
        """Set when a payload is received, or the relay shuts down."""
        self._suspects: dict[str, float] = {}
        """Times of arrival of the oldest payloads of suspects, by the suspects' payload ids."""
        self._spool = shared.spool
        self._sender = shared.sender
        self._reports = shared.reports
        self._gate = shared.gate
        self._timings = shared.timings
        self._ending = shared.ending
        self._slots = shared.slots[partition.environment]
        self._evidence = shared.evidence[partition.environment, partition.endpoint]

    def __repr__(self) -> str:
        environment, endpoint = self.partition.environment, self.partition.endpoint.value
        return f"<PartitionDelivery {environment} {endpoint}: {len(self._suspects)} suspects>"

    @property
    def oldest(self) -> float:
        """Time of arrival of the oldest waiting payload, in Unix seconds."""
        return min([self._oldest, *self._suspects.values()])

    def note(self, payload: EventPayload) -> None:
        """Note that a new payload is in the spool."""
        if not self._has_new:
            self._has_new, self._new_since = True, payload.received
        self._size += len(payload.body)
        self._arrived.set()
        if self._size >= MAX_BATCH or self._ending.is_set():
            self._due.set()

    def note_backlog(self) -> None:
        """Note that there may be payloads in the spool that have not been noted."""
        self._has_new = True

    def flush(self) -> None:
        """Send the next batch without gathering any longer."""
        self._due.set()
        self._arrived.set()

    async def run(self, delay: float) -> None:
        """Deliver until the partition is empty; unexpected errors are logged and retried.

        Args:
            delay: seconds before the first batch, unless it is due earlier.
        """
        while True:
            try:
                await self._deliver(delay)
            except Exception:  # noqa: BLE001 - one partition must not stop the others
                text = 'Events of "%s" failed and are tried again'
                _log.exception(text, self.partition.environment)
                if not self._ending.is_set():
                    await wait_for(self._ending, RESTART_DELAY)
                    continue
            return

    async def _deliver(self, delay: float) -> None:
        failed: Counter[Step] = Counter()  # in a row
        await wait_for(self._due, delay)
        while True:
            async with self._slots:
                taken = await self._take()
                if taken is None:
                    failed.clear()
                else:
                    batch, bodies = taken
                    step, delay = await self._attempt(batch, bodies, failed)
            if failed:
                if self._ending.is_set() and step not in (Step.SPLIT, Step.SUSPECT):
                    return  # the payloads stay in the spool
                await self._recover(step, delay)
            elif taken is not None and batch.more:
                await wait_for(self._gate.delaying, delay)
            elif self._has_new:
                self._oldest = self._new_since or self._oldest
                await wait_for(
                    self._due, 0 if self._ending.is_set() else self._timings.flush_interval
                )
            else:
                return

    async def _take(self) -> tuple[Batch, list[bytes]] | None:
        self._due.clear()
        self._arrived.clear()
        self._has_new, self._size = False, 0
        # If upstream has just accepted a batch, a rejection now is evidence against a suspect.
        suspects = bool(self._suspects) and self._evidence.accepting
        return await self._spool.do(lambda store: store.take(self.partition, suspects=suspects))

    async def _attempt(
        self, batch: Batch, bodies: Sequence[bytes], failed: Counter[Step]
    ) -> tuple[Step, float]:
        """Try to deliver a batch; return the step and the seconds until the next attempt."""
        self._oldest = batch.oldest
        if self._evidence.accepting:
            del failed[Step.WAIT]  # another partition has delivered a batch
        try:
            attempt = await self._sender.send(batch, bodies)
        except Exception:
            await self._mark_maybe_delivered(batch)
            raise
        step = await self._settle(batch, attempt)
        delay = delay_after(
            step,
            self._timings,
            failures=failed[step],
            chance=randomness.fraction(),
            took=attempt.took,
            retry_after=attempt.retry_after,
        )
        failed[step] += 1
        if step in (Step.DONE, Step.QUARANTINE):
            failed.clear()
        elif step is Step.WAIT and (
            self._evidence.outage or failed[step] >= REJECTIONS_BEFORE_WARNING
        ):
            self._begin_outage(attempt.reason)
        return step, delay

    async def _recover(self, step: Step, delay: float) -> None:
        """Wait after a failure."""
        if step is not Step.WAIT or self._evidence.outage:
            await wait_for(self._ending, delay)
            return
        await wait_for(self._arrived, delay)  # another payload to compare with
        await wait_for(self._due, self._timings.flush_interval if self._has_new else 0)

    async def _settle(self, batch: Batch, attempt: Attempt) -> Step:
        """Carry out the next step after an attempt, and return it."""
        if attempt.malformed:
            await self._quarantine(batch, MALFORMED, attempt.malformed)
            return Step.SPLIT
        if attempt.unclear:
            split = await self._spool.do(lambda store: store.split(batch))
            if split:
                return Step.SPLIT
        step = next_step(
            attempt.status,
            batch.payloads,
            int(self._evidence.knows(batch.payload_id)),
            maybe_delivered=batch.maybe_delivered,
        )
        if step is Step.DONE:
            await self._finish(batch)
        elif step in (Step.RETRY, Step.REFUSED):
            await self._note_failure(batch, attempt)
        elif step is Step.REJECT or not await self._split(batch):
            step = await self._judge(batch, attempt)
        return step

    async def _finish(self, batch: Batch) -> None:
        environment = self.partition.environment
        done = await self._spool.do(lambda store: store.finish(batch))
        if done is None:  # evicted during the request, but it has arrived
            done = batch.payloads
            self._reports.count_evicted(environment, -done)
        self._reports.count_delivered(environment, done)
        self._gate.release()
        self._evidence.accept(batch.payload_id)
        self._suspects.pop(batch.payload_id, None)
        self._reports.end_outage(self.partition)

    async def _note_failure(self, batch: Batch, attempt: Attempt) -> None:
        if may_have_arrived(attempt.status):
            await self._mark_maybe_delivered(batch)
        self._reports.counts[self.partition.environment].retried += 1
        if attempt.status == BAD_REQUEST:  # no outage yet: a payload may be bad
            self._evidence.doubt(batch.payload_id)
        else:
            self._begin_outage(attempt.reason)

    async def _mark_maybe_delivered(self, batch: Batch) -> None:
        if not batch.maybe_delivered:
            await self._spool.do(lambda store: store.mark_maybe_delivered(batch))

    async def _split(self, batch: Batch) -> bool:
        """Split a rejected batch; return False if it cannot be split."""
        if not await self._spool.do(lambda store: store.split(batch)):
            return False
        ids = half_ids(batch.payload_id)
        self._evidence.split(batch.payload_id, ids)
        if self._suspects.pop(batch.payload_id, None) is not None:
            self._suspects.update(dict.fromkeys(ids, batch.oldest))
        return True

    async def _judge(self, batch: Batch, attempt: Attempt) -> Step:
        """Decide on a batch that is rejected as a whole: it is bad, or put aside as a suspect."""
        if self._evidence.reject(batch.payload_id, maybe_delivered=batch.maybe_delivered):
            bad = step_if_bad(attempt.status, batch.payloads)
            if bad is Step.SPLIT and await self._split(batch):
                return Step.SPLIT
            self._suspects.pop(batch.payload_id, None)
            await self._quarantine(batch, attempt.reason)
            return Step.QUARANTINE
        others = await self._spool.do(lambda store: store.put_aside(batch))
        self._suspects[batch.payload_id] = batch.oldest
        return Step.SUSPECT if others and not self._evidence.outage else Step.WAIT

    async def _quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None
    ) -> None:
        complete = await self._spool.do(lambda store: store.quarantine(batch, reason, only))
        payloads = batch.payloads if only is None else len(only)
        why = "upstream rejects them" if only is None else "they are no well-formed JSON"
        self._reports.count_quarantined(self.partition.environment, payloads, complete or 0, why)

    def _begin_outage(self, reason: str) -> None:
        if self._reports.begin_outage(self.partition, reason):
            self._gate.release(everything=True)
