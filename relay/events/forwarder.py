"""Forwarder of analytics events: every payload is accepted once and delivered once.

Each partition that is not empty has a task. The spool fixes batches; the task sends the oldest one
until upstream has it. So events arrive in order, and a failing partition delays no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from isal import igzip

from relay import clock, randomness
from relay.aio import wait_for
from relay.errors import UpstreamUnavailable
from relay.events.blame import Evidence
from relay.events.policy import BAD_REQUEST, ForwarderTimings, Step, headers, next_step, target
from relay.events.spool import Spool
from relay.events.store import MAX_BATCH, PAYLOAD_OVERHEAD, Backlog, Batch, half_ids
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition, Receipt
from relay.protocol.events import is_well_formed, join_arrays
from relay.protocol.urls import join
from relay.telemetry.log import Log, environment_log
from relay.telemetry.throttle import Throttle

MAX_REQUESTS = 4
"""Maximum number of concurrent requests for one environment."""

REPORT_EVERY = 60.0
"""Seconds between two log lines about losses of the same kind."""

MAX_ACK_DELAY = 1.0
"""Maximum delay in seconds of the acknowledgement of a payload while memory fills up."""

RESTART_DELAY = 10.0
"""Seconds before a partition is served again after an unexpected error."""

REJECTIONS_BEFORE_WARNING = 3
"""Consecutive rejections of a payload that has no other to compare it with, before a warning. Most
payloads are convicted earlier."""

MALFORMED = "no well-formed JSON array"
"""Reason for a quarantine without an attempt to deliver the payload."""

SMALL = 32 * 1024
"""Size in bytes up to which bodies are compressed in the event loop: a thread would take longer."""

LEVEL = 1
"""gzip level: level 2 takes twice as long for a few bytes less."""

_log = logging.getLogger("relay.events")


@dataclass(slots=True)
class EventCounts:
    """Numbers of payloads of one environment since the start.

    Args:
        received: accepted, duplicates included.
        duplicates: dropped because their payload id was known.
        forwarded: accepted by upstream.
        retried: requests (not payloads) that had to be repeated.
        quarantined: not well-formed, or rejected while upstream accepts others; kept for
            inspection.
        evicted: lost for want of space, or because they were too old.
        waiting: not delivered yet.
    """

    received: int = 0
    duplicates: int = 0
    forwarded: int = 0
    retried: int = 0
    quarantined: int = 0
    evicted: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Result of an attempt to deliver a batch."""

    status: int | None
    reason: str
    retry_after: float | None = None
    took: float = 0.0
    """Seconds until the response."""
    malformed: Sequence[int] = ()
    """Positions of payloads that are not well-formed; nothing was sent."""
    unclear: bool = False
    """True if a payload is nested too deeply to check, so that it must be sent alone; nothing was
    sent."""


@dataclass(slots=True)
class _PartitionState:
    """State of a partition that is not empty."""

    oldest: float
    """Time of arrival of its oldest payload, in Unix seconds."""
    size: int = 0
    """Bytes received since its last batch was taken."""
    has_new: bool = True
    """True if a payload was received since then."""
    new_since: float = 0.0
    """Time of arrival of the first of those, in Unix seconds."""
    due: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the next batch should be sent without gathering any longer."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a payload is received, or the relay shuts down."""
    suspects: dict[str, float] = field(default_factory=dict)
    """Times of arrival of the oldest payloads of suspects, by the suspects' payload ids."""
    task: asyncio.Task[None] | None = None


class Upstream(Protocol):
    """Contract of the HTTP session, so that importing this module does not load the client."""

    async def post(
        self, url: str, body: bytes, *, headers: dict[str, str], within: float
    ) -> Receipt:
        """Send a body within so many seconds.

        Raises:
            UpstreamUnavailable: there is no response.
        """


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
        spec_of: Callable[[str], EnvironmentSpec | None],
        timings: ForwarderTimings = ForwarderTimings(),
    ) -> None:
        self.spool = spool
        self._upstream = upstream
        self._base = base
        self._spec_of = spec_of
        self._timings = timings
        self._counts: defaultdict[str, EventCounts] = defaultdict(EventCounts)
        self._partitions: dict[Partition, _PartitionState] = {}
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MAX_REQUESTS)
        )
        self._evidence: defaultdict[tuple[str, EventsEndpoint], Evidence] = defaultdict(Evidence)
        self._failing: set[tuple[str, EventsEndpoint]] = set()
        """Environments and endpoints whose last attempt failed."""
        self._server_times: dict[str, float] = {}
        self._losses: defaultdict[tuple[str, str], Throttle] = defaultdict(
            lambda: Throttle(REPORT_EVERY)
        )
        """Losses to report, by fate and environment."""
        self._ending = asyncio.Event()
        self._delayed_acks: deque[tuple[asyncio.Future[bool], bool, int, float]] = deque()
        """Delayed acknowledgements: future, whether the payload was new, its size, latest time."""
        self._release_timer: asyncio.TimerHandle | None = None
        self._skip_pacing = asyncio.Event()
        """Set while acknowledgements are delayed, or the relay shuts down: batches follow without a
        pause."""
        spool.on_evicted = self._handle_evicted
        spool.on_backlog = self._handle_backlog
        spool.on_stored = self._handle_stored

    def __repr__(self) -> str:
        waiting = sum(counts.waiting for counts in self._counts.values())
        return (
            f"<Forwarder: {waiting} payloads waiting in {len(self._partitions)} partitions,"
            f" {len(self._failing)} endpoints failing>"
        )

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        """Accept a payload; it is delivered even if the result is not awaited.

        Returns:
            Future of whether the payload was new; resolves when it is safe.

        Raises:
            StoreUnavailable: the disk hangs and too many payloads wait for it.
        """
        ack = self.spool.append(payload)
        if self._is_crowded() and ack.done() and not self._is_failing(payload.partition):
            return self._delay_ack(ack.result(), len(payload.body))
        return ack

    # Back-pressure: while upstream accepts events, a client that sends faster than it is delayed,
    # instead of evicting the events of other clients. A disk has space enough.

    def _is_crowded(self) -> bool:
        """Return whether payloads that upstream will accept soon fill over half of the memory."""
        memory = self.spool.memory
        if 2 * memory.size <= memory.capacity:
            return False
        stuck = sum(memory.sizes[name] for name in {name for name, _ in self._failing})
        return 2 * (memory.size - stuck) > memory.capacity and not self._ending.is_set()

    def _is_failing(self, partition: Partition) -> bool:
        return (partition.environment, partition.endpoint) in self._failing

    def _delay_ack(self, new: bool, size: int) -> asyncio.Future[bool]:
        """Return an acknowledgement that resolves when there is space, or after a time limit."""
        loop = asyncio.get_running_loop()
        ack: asyncio.Future[bool] = loop.create_future()
        if not self._delayed_acks:
            self._flush_all()
            self._skip_pacing.set()
            self._release_timer = loop.call_later(MAX_ACK_DELAY, self._release_acks)
        self._delayed_acks.append((ack, new, size, clock.monotonic() + MAX_ACK_DELAY))
        return ack

    def _release_acks(self, *, everything: bool = False) -> None:
        """Resolve the acknowledgements for which there is space, and those that are due."""
        if self._release_timer is not None:
            self._release_timer.cancel()
        loop = asyncio.get_running_loop()
        memory, now = self.spool.memory, clock.monotonic()
        free = memory.capacity // 2 - memory.size
        while self._delayed_acks:
            ack, new, size, until = self._delayed_acks[0]
            free -= size + PAYLOAD_OVERHEAD
            if free < 0 and until > now and not everything:
                self._release_timer = loop.call_later(until - now, self._release_acks)
                break
            self._delayed_acks.popleft()
            if not ack.done():
                ack.set_result(new)
        if not self._delayed_acks and not self._ending.is_set():
            self._skip_pacing.clear()

    def counts(self, environment: str) -> EventCounts:
        """Return the counts of an environment."""
        return self._counts[environment]

    def oldest(self, environment: str) -> float | None:
        """Return the time of arrival of the oldest waiting payload, by `clock`; None without."""
        states = [s for p, s in self._partitions.items() if p.environment == environment]
        return min((min([s.oldest, *s.suspects.values()]) for s in states), default=None)

    def server_time(self, environment: str) -> float:
        """Return upstream's clock at its last response, in Unix seconds; 0 before the first."""
        return self._server_times.get(environment, 0.0)

    def forget(self, environment: str) -> bool:
        """Forget an environment that is gone; return False while payloads of it are waiting."""
        if any(partition.environment == environment for partition in self._partitions):
            return False
        for by_name in (self._counts, self._slots, self._server_times):
            by_name.pop(environment, None)
        for key in [key for key in self._evidence if key[0] == environment]:
            del self._evidence[key]
        self._failing = {key for key in self._failing if key[0] != environment}
        return True

    def flush(self) -> None:
        """Send all waiting payloads now, as the relay shuts down."""
        self._ending.set()
        self._skip_pacing.set()
        self._release_acks(everything=True)
        self._flush_all()

    async def run(self) -> None:
        """Deliver until cancelled; then drain for a limited time. The rest stays in the spool."""
        try:
            await self.spool.open()
            await asyncio.Event().wait()
        finally:
            await self._drain()
            await self.spool.close()
            self._report_all()

    def _handle_backlog(self, backlog: Sequence[Backlog]) -> None:
        """Serve the backlog of an earlier process, or of a disk that works again."""
        for counts in self._counts.values():
            counts.waiting = 0
        for partition, payloads, oldest in backlog:
            self._counts[partition.environment].waiting += payloads
            if partition not in self._partitions:
                # Spread the partitions: upstream should not get the whole backlog at once.
                delay = randomness.fraction() * self._timings.flush_interval
                self._begin(partition, oldest, delay)
            self._partitions[partition].has_new = True

    async def _drain(self) -> None:
        self.flush()
        deadline = clock.monotonic() + self._timings.drain
        while (tasks := self._flush_all()) and (left := deadline - clock.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _flush_all(self) -> list[asyncio.Task[None]]:
        for state in self._partitions.values():
            state.due.set()
            state.arrived.set()
        return [state.task for state in self._partitions.values() if state.task is not None]

    def _begin(self, partition: Partition, oldest: float, delay: float) -> _PartitionState:
        state = self._partitions[partition] = _PartitionState(oldest)
        state.task = asyncio.create_task(self._keep_serving(partition, state, delay))
        return state

    def _handle_stored(self, payload: EventPayload, new: bool) -> None:
        """Count a payload, and start serving its partition."""
        counts = self._counts[payload.partition.environment]
        counts.received += 1
        if not new:
            counts.duplicates += 1
            return
        counts.waiting += 1
        state = self._partitions.get(payload.partition)
        if state is None:
            state = self._begin(payload.partition, payload.received, self._timings.flush_interval)
        if not state.has_new:
            state.has_new, state.new_since = True, payload.received
        state.size += len(payload.body)
        state.arrived.set()
        if state.size >= MAX_BATCH or self._ending.is_set():
            state.due.set()

    async def _keep_serving(
        self, partition: Partition, state: _PartitionState, delay: float
    ) -> None:
        """Deliver a partition until it is empty; unexpected errors are logged and retried."""
        while self._partitions.get(partition) is state:
            try:
                await self._serve(partition, state, delay)
                self._partitions.pop(partition)
            except Exception:  # noqa: BLE001 - one partition must not stop the others
                _log.exception('Events of "%s" failed and are tried again', partition.environment)
                if self._ending.is_set():
                    self._partitions.pop(partition)
                await wait_for(self._ending, RESTART_DELAY)

    async def _serve(self, partition: Partition, state: _PartitionState, delay: float) -> None:
        failed: Counter[Step] = Counter()  # in a row
        await wait_for(state.due, delay)
        while True:
            async with self._slots[partition.environment]:
                taken = await self._take(partition, state)
                if taken is None:
                    failed.clear()
                else:
                    batch, bodies = taken
                    step, delay = await self._attempt(batch, bodies, state, failed)
            if failed:
                if self._ending.is_set() and step not in (Step.SPLIT, Step.SUSPECT):
                    return  # the payloads stay in the spool
                await self._recover(step, partition, state, delay)
            elif taken is not None and batch.more:
                await wait_for(self._skip_pacing, delay)
            elif state.has_new:
                state.oldest = state.new_since or state.oldest
                await wait_for(
                    state.due, 0 if self._ending.is_set() else self._timings.flush_interval
                )
            else:
                return

    async def _take(
        self, partition: Partition, state: _PartitionState
    ) -> tuple[Batch, list[bytes]] | None:
        state.due.clear()
        state.arrived.clear()
        state.has_new, state.size = False, 0
        if state.suspects and self._evidence_of(partition).accepting:
            # Upstream has just accepted a batch, so a rejection now is evidence against a suspect.
            return await self.spool.take(partition, suspects=True)
        return await self.spool.take(partition)

    async def _attempt(
        self, batch: Batch, bodies: Sequence[bytes], state: _PartitionState, failed: Counter[Step]
    ) -> tuple[Step, float]:
        """Try to deliver a batch; return the step and the seconds until the next attempt."""
        state.oldest = batch.oldest
        if self._evidence_of(batch.partition).accepting:
            del failed[Step.WAIT]  # another partition has delivered a batch
        attempt = await self._send(batch, bodies)
        step = await self._settle(batch, attempt, state)
        delay = self._delay(step, attempt, failed[step])
        failed[step] += 1
        if step in (Step.DONE, Step.QUARANTINE):
            failed.clear()
        elif step is Step.WAIT:
            outage = self._evidence_of(batch.partition).outage
            if outage or failed[step] >= REJECTIONS_BEFORE_WARNING:
                self._begin_outage(batch.partition, attempt.reason)
        return step, delay

    async def _recover(
        self, step: Step, partition: Partition, state: _PartitionState, delay: float
    ) -> None:
        """Wait after a failure."""
        if step is not Step.WAIT or self._evidence_of(partition).outage:
            await wait_for(self._ending, delay)
            return
        await wait_for(state.arrived, delay)  # another payload to compare with
        await wait_for(state.due, self._timings.flush_interval if state.has_new else 0)

    def _evidence_of(self, partition: Partition) -> Evidence:
        return self._evidence[partition.environment, partition.endpoint]

    async def _send(self, batch: Batch, bodies: Sequence[bytes]) -> _Attempt:
        partition = batch.partition
        destination = target(partition, self._spec_of(partition.environment))
        if destination is None:
            return _Attempt(
                401, f"the environment has no credential for them{_missing_setting(partition)}"
            )
        path, key = destination
        checked = not partition.endpoint.diagnostic  # diagnostics are forwarded as they are
        if sum(map(len, bodies)) > SMALL:
            packed = await asyncio.to_thread(_pack, bodies, checked=checked)
        else:
            packed = _pack(bodies, checked=checked)
        if isinstance(packed, _Attempt):
            return packed
        del bodies  # free the memory during the request
        fields = headers(partition, batch.payload_id) | key
        url = join(self._base, path)
        began = clock.monotonic()
        try:
            receipt = await self._upstream.post(
                url, packed, headers=fields, within=self._timings.timeout
            )
        except UpstreamUnavailable as e:
            return _Attempt(None, e.reason)
        if receipt.date is not None:
            self._server_times[partition.environment] = receipt.date
        took = clock.monotonic() - began
        reason = f"HTTP error {receipt.status}"
        return _Attempt(receipt.status, reason, receipt.retry_after, took)

    async def _settle(self, batch: Batch, attempt: _Attempt, state: _PartitionState) -> Step:
        """Carry out the next step after an attempt, and return it."""
        evidence = self._evidence_of(batch.partition)
        if attempt.malformed:
            await self._quarantine(batch, MALFORMED, attempt.malformed)
            return Step.SPLIT
        if attempt.unclear and await self.spool.split(batch):
            return Step.SPLIT
        batch_id = batch.payload_id
        step = next_step(attempt.status, batch.payloads, int(evidence.knows(batch_id)))
        if step is Step.DONE:
            await self._finish(batch)
            evidence.accept(batch_id)
            state.suspects.pop(batch_id, None)
            self._end_outage(batch.partition)
        elif step in (Step.RETRY, Step.REFUSED):
            self._counts[batch.partition.environment].retried += 1
            if attempt.status == BAD_REQUEST:  # no outage yet: a payload may be bad
                evidence.doubt(batch_id)
            else:
                self._begin_outage(batch.partition, attempt.reason)
        elif step is Step.SPLIT:
            if await self.spool.split(batch):
                evidence.split(batch_id, half_ids(batch_id))
            else:
                step = Step.REJECT
        if step is Step.REJECT:
            step = await self._judge(batch, attempt, state)
        return step

    async def _judge(self, batch: Batch, attempt: _Attempt, state: _PartitionState) -> Step:
        """Quarantine a payload that was rejected alone, or put it aside if it may be good."""
        evidence = self._evidence_of(batch.partition)
        if evidence.reject(batch.payload_id):
            state.suspects.pop(batch.payload_id, None)
            await self._quarantine(batch, attempt.reason)
            return Step.QUARANTINE
        others = await self.spool.put_aside(batch)
        state.suspects[batch.payload_id] = batch.oldest
        return Step.SUSPECT if others and not evidence.outage else Step.WAIT

    async def _finish(self, batch: Batch) -> None:
        counts = self._counts[batch.partition.environment]
        done = await self.spool.finish(batch)
        if done is None:  # evicted during the request, but it has arrived
            done = batch.payloads
            self._count_evicted(batch.partition.environment, -done)
        counts.forwarded += done
        counts.waiting -= done
        if self._delayed_acks:
            self._release_acks()

    async def _quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None
    ) -> None:
        counts = self._counts[batch.partition.environment]
        payloads = batch.payloads if only is None else len(only)
        counts.waiting -= await self.spool.quarantine(batch, reason, only)
        counts.quarantined += payloads
        fate = "upstream rejects them" if only is None else "they are no well-formed JSON"
        self._report(f"set aside, as {fate}", batch.partition.environment, payloads)

    def _delay(self, step: Step, attempt: _Attempt, failures: int) -> float:
        """Return the seconds to wait after a step, given the number of equal steps before it."""
        if step is Step.DONE:
            return min(self._timings.between, attempt.took)
        if step is Step.SPLIT:
            return 0.0
        if step in (Step.QUARANTINE, Step.SUSPECT):
            return self._timings.between
        timings = self._timings
        backoff = timings.refused if step is Step.REFUSED else timings.backoff
        delay = backoff.delay(failures, randomness.fraction())
        return max(delay, min(attempt.retry_after or 0.0, timings.backoff.longest))

    def _begin_outage(self, partition: Partition, reason: str) -> None:
        if not self._is_failing(partition):
            self._failing.add((partition.environment, partition.endpoint))
            self._release_acks(everything=True)
            text = "Events for %s cannot be delivered: %s; they are kept and tried again"
            self._log_of(partition.environment).warning(text, partition.endpoint.value, reason)

    def _end_outage(self, partition: Partition) -> None:
        if self._is_failing(partition):
            self._failing.remove((partition.environment, partition.endpoint))
            text = "Events for %s are delivered again"
            self._log_of(partition.environment).info(text, partition.endpoint.value)

    def _handle_evicted(self, evicted: Counter[str]) -> None:
        for environment, payloads in evicted.items():
            self._count_evicted(environment, payloads)

    def _count_evicted(self, environment: str, payloads: int) -> None:
        counts = self._counts[environment]
        counts.evicted += payloads
        counts.waiting -= payloads
        self._report("given up, as there is no room or they are too old", environment, payloads)

    def _report(self, fate: str, environment: str, payloads: int) -> None:
        """Count losses, and log their sum at most every `REPORT_EVERY` seconds."""
        self._log_losses(fate, environment, self._losses[fate, environment].count(payloads))

    def _report_all(self) -> None:
        for (fate, environment), throttle in self._losses.items():
            self._log_losses(fate, environment, throttle.take())

    def _log_losses(self, fate: str, environment: str, payloads: int) -> None:
        if payloads:
            self._log_of(environment).warning("%d posts of events were %s", payloads, fate)

    def _log_of(self, environment: str) -> Log:
        spec = self._spec_of(environment)
        return environment_log(environment, "" if spec is None else spec.sdk_key.masked)


def _missing_setting(partition: Partition) -> str:
    """Return the hint to the option that a partition needs for its delivery."""
    if partition.endpoint.mobile:
        return f": set mobileKey (LD_MOBILE_KEY_{partition.environment})"
    if partition.endpoint.client_side:
        return f": set envId (LD_CLIENT_SIDE_ID_{partition.environment})"
    return f": set sdkKey (LD_ENV_{partition.environment})"


def _pack(bodies: Sequence[bytes], *, checked: bool) -> bytes | _Attempt:
    """Return the compressed body of a request, or why it cannot be sent; one body stays as it is.

    Args:
        bodies: bodies of a batch.
        checked: check that each is well-formed, as a malformed one would spoil the others.
    """
    verdicts = [is_well_formed(body) for body in bodies] if checked else []
    malformed = [position for position, verdict in enumerate(verdicts) if verdict is False]
    unclear = None in verdicts and len(bodies) > 1
    if malformed or unclear:
        return _Attempt(None, "", malformed=malformed, unclear=unclear)
    return igzip.compress(bodies[0] if len(bodies) == 1 else join_arrays(bodies), LEVEL)
