"""The forwarder of analytics events: accepted once, delivered once.

Each lane has a task while something waits in it. The spool fixes batches; the task sends the oldest
one until upstream has it, so events arrive in order, and no lane waits for another one's trouble.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from isal import igzip

from relay.aio import wait_for
from relay.errors import UpstreamUnavailable
from relay.events.blame import Evidence
from relay.events.policy import BAD_REQUEST, ForwarderTimings, Step, headers, next_step, target
from relay.events.spool import Spool
from relay.events.store import MAX_BATCH, POST_OVERHEAD, Backlog, Batch, half_ids
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition, Receipt
from relay.protocol.events import is_well_formed, joined
from relay.protocol.urls import join
from relay.telemetry.log import Log, environment_log

SENDING = 4
"""Requests at a time for one environment."""

REPORT_EVERY = 60.0
"""Seconds between two lines about events that are given up."""

MAX_ACK_DELAY = 1.0
"""Seconds for which the answer to a post is held back at most, while memory fills up."""

RESTART_DELAY = 10.0
"""Seconds before a lane that failed by a defect of ours is served again."""

REJECTIONS_BEFORE_WARNING = 3
"""How often a post is rejected alone, while there is no other to compare it with, until that is
told: most are convicted before."""

MALFORMED = "no well-formed JSON array"
"""Why a post is in quarantine that upstream has not seen."""

SMALL = 32 * 1024
"""Bytes up to which a body is compressed at once: a thread would take longer."""

LEVEL = 1
"""Of compression: half the time of the next one, for a few bytes more."""

_log = logging.getLogger("relay.events")


@dataclass(slots=True)
class EventCounts:
    """What happened to the posts of an environment since the start.

    Args:
        received: accepted, duplicates among them.
        duplicates: whose payload id was known, so that nothing was to be done.
        forwarded: that upstream has taken.
        retried: requests that had to be repeated.
        quarantined: that are not well-formed, or that upstream rejects while it takes others; kept
            aside.
        evicted: given up for want of room, or too old.
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
    """What came of an attempt."""

    status: int | None
    reason: str
    retry_after: float | None = None
    took: float = 0.0
    """Seconds until the answer."""
    malformed: Sequence[int] = ()
    """Nothing was sent, as the posts at these places are not well-formed."""
    unclear: bool = False
    """Nothing was sent, as of a post nobody can tell: it has to go alone."""


@dataclass(slots=True)
class _PartitionState:
    """What is going on in a lane in which something waits."""

    oldest: float
    """When its first post came, in Unix seconds."""
    size: int = 0
    """Bytes that came since its last batch was taken."""
    news: bool = True
    """Whether something came since then."""
    since: float = 0.0
    """When the first of that came, in Unix seconds."""
    due: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is no reason to gather any longer."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when something comes, or the relay ends."""
    suspects: dict[str, float] = field(default_factory=dict)
    """Payload ids of batches that were put aside, and when their first post came."""
    task: asyncio.Task[None] | None = None


class Upstream(Protocol):
    """What sends; a contract, so that whoever imports this does not load the HTTP client."""

    async def post(
        self, url: str, body: bytes, *, headers: dict[str, str], within: float
    ) -> Receipt:
        """Send `body`; raises `UpstreamUnavailable` if there is no answer."""


class Forwarder:
    """Accepts posts and sees to their delivery while `run` runs.

    Args:
        spool: where they wait.
        upstream: the session.
        base: URL of LaunchDarkly's events service.
        spec_of: tells the present description of an environment, by its name.
        timings: when things are done.
    """

    def __init__(
        self,
        spool: Spool,
        upstream: Upstream,
        base: str,
        spec_of: Callable[[str], EnvironmentSpec | None],
        timings: ForwarderTimings = ForwarderTimings(),  # noqa: B008 - frozen
    ) -> None:
        self.spool = spool
        self._upstream = upstream
        self._base = base
        self._spec_of = spec_of
        self._timings = timings
        self._counts: defaultdict[str, EventCounts] = defaultdict(EventCounts)
        self._partitions: dict[Partition, _PartitionState] = {}
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(SENDING)
        )
        self._evidence: defaultdict[tuple[str, EventsEndpoint], Evidence] = defaultdict(Evidence)
        self._failing: set[tuple[str, EventsEndpoint]] = set()
        """Where the last attempt failed."""
        self._dates: dict[str, float] = {}
        self._unreported: Counter[tuple[str, str]] = Counter()
        self._report_at = 0.0
        self._ending = asyncio.Event()
        self._delayed_acks: deque[tuple[asyncio.Future[bool], bool, int, float]] = deque()
        """Answers that are held back: what they say, the bytes of their posts, and until when."""
        self._release_timer: asyncio.TimerHandle | None = None
        self._skip_pacing = asyncio.Event()
        """Set while somebody waits for upstream, or the relay ends: no pause between batches."""
        spool.on_evicted = self._note_evicted
        spool.on_backlog = self._note_backlog
        spool.on_stored = self._note_stored

    def accept(self, post: EventPayload) -> asyncio.Future[bool]:
        """Take a post; it will be delivered although nobody awaits the result.

        Returns:
            Resolves when the post is safe, with whether it was new.

        Raises:
            StoreUnavailable: the disk hangs and too much waits for it.
        """
        kept = self.spool.append(post)
        if self._is_crowded() and kept.done() and not self._is_failing(post.partition):
            return self._delay_ack(kept.result(), len(post.body))
        return kept

    # While upstream takes what comes, whoever posts faster than that waits for it, instead of
    # pushing out what others have posted. Of a disk there is enough.

    def _is_crowded(self) -> bool:
        """Whether more than half of the memory is full of what upstream will take soon."""
        memory = self.spool.memory
        if 2 * memory.size <= memory.capacity:
            return False
        stuck = sum(memory.sizes[name] for name in {name for name, _ in self._failing})
        return 2 * (memory.size - stuck) > memory.capacity and not self._ending.is_set()

    def _is_failing(self, partition: Partition) -> bool:
        return (partition.environment, partition.endpoint) in self._failing

    def _delay_ack(self, new: bool, size: int) -> asyncio.Future[bool]:
        """Return what will be said of a post when there is room again, or after a while."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bool] = loop.create_future()
        if not self._delayed_acks:
            self._flush_all()
            self._skip_pacing.set()
            self._release_timer = loop.call_later(MAX_ACK_DELAY, self._release_acks)
        self._delayed_acks.append((answer, new, size, loop.time() + MAX_ACK_DELAY))
        return answer

    def _release_acks(self, *, everything: bool = False) -> None:
        """Answer as many as may post again, and whoever has waited for long enough."""
        if self._release_timer is not None:
            self._release_timer.cancel()
        loop = asyncio.get_running_loop()
        memory, now = self.spool.memory, loop.time()
        room = memory.capacity // 2 - memory.size
        while self._delayed_acks:
            answer, new, size, until = self._delayed_acks[0]
            room -= size + POST_OVERHEAD
            if room < 0 and until > now and not everything:
                self._release_timer = loop.call_at(until, self._release_acks)
                break
            self._delayed_acks.popleft()
            if not answer.done():
                answer.set_result(new)
        if not self._delayed_acks and not self._ending.is_set():
            self._skip_pacing.clear()

    def counts(self, environment: str) -> EventCounts:
        """Return what happened to the posts of an environment."""
        return self._counts[environment]

    def oldest(self, environment: str) -> float | None:
        """Return when the oldest post came that waits, by `clock`; None if none does."""
        mine = [t for lane, t in self._partitions.items() if lane.environment == environment]
        return min((min([t.oldest, *t.suspects.values()]) for t in mine), default=None)

    def server_time(self, environment: str) -> float:
        """Return upstream's clock at its last answer, in Unix seconds; 0 before the first."""
        return self._dates.get(environment, 0.0)

    def flush(self) -> None:
        """Gather no longer: the relay ends, and what waits shall go out."""
        self._ending.set()
        self._skip_pacing.set()
        self._release_acks(everything=True)
        self._flush_all()

    async def run(self) -> None:
        """Deliver until cancelled; then what can be within the drain time. The rest is kept."""
        try:
            await self.spool.open()
            await asyncio.Event().wait()
        finally:
            await self._drain()
            await self.spool.close()
            self._report_all()

    def _note_backlog(self, backlog: Sequence[Backlog]) -> None:
        """Serve what an earlier process has left, or what a disk that works again has."""
        for figures in self._counts.values():
            figures.waiting = 0
        for lane, posts, oldest in backlog:
            self._counts[lane.environment].waiting += posts
            if lane not in self._partitions:
                # Not all lanes at once: upstream has been without us.
                delay = random.random() * self._timings.flush_interval  # noqa: S311 - no secret
                self._begin(lane, oldest, delay)
            self._partitions[lane].news = True

    async def _drain(self) -> None:
        self.flush()
        deadline = time.monotonic() + self._timings.drain
        while (tasks := self._flush_all()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _flush_all(self) -> list[asyncio.Task[None]]:
        for traffic in self._partitions.values():
            traffic.due.set()
            traffic.arrived.set()
        return [traffic.task for traffic in self._partitions.values() if traffic.task is not None]

    def _begin(self, partition: Partition, oldest: float, delay: float) -> _PartitionState:
        traffic = self._partitions[partition] = _PartitionState(oldest)
        traffic.task = asyncio.create_task(self._keep_serving(partition, traffic, delay))
        return traffic

    def _note_stored(self, post: EventPayload, new: bool) -> None:
        """Count a post, and see to it that its lane is served."""
        figures = self._counts[post.partition.environment]
        figures.received += 1
        if not new:
            figures.duplicates += 1
            return
        figures.waiting += 1
        traffic = self._partitions.get(post.partition)
        if traffic is None:
            traffic = self._begin(post.partition, post.received, self._timings.flush_interval)
        if not traffic.news:
            traffic.news, traffic.since = True, post.received
        traffic.size += len(post.body)
        traffic.arrived.set()
        if traffic.size >= MAX_BATCH or self._ending.is_set():
            traffic.due.set()

    async def _keep_serving(
        self, partition: Partition, traffic: _PartitionState, delay: float
    ) -> None:
        """Serve a lane until nothing waits in it; a defect of ours cannot end that."""
        while self._partitions.get(partition) is traffic:
            try:
                await self._serve(partition, traffic, delay)
                self._partitions.pop(partition)
            except Exception:  # noqa: BLE001 - the one boundary between lanes
                _log.exception('Events of "%s" failed and are tried again', partition.environment)
                if self._ending.is_set():
                    self._partitions.pop(partition)
                await wait_for(self._ending, RESTART_DELAY)

    async def _serve(self, partition: Partition, traffic: _PartitionState, delay: float) -> None:
        failed: Counter[Step] = Counter()  # in a row
        await wait_for(traffic.due, delay)
        while True:
            async with self._slots[partition.environment]:
                taken = await self._take(partition, traffic)
                if taken is None:
                    failed.clear()
                else:
                    batch, bodies = taken
                    step, delay = await self._attempt(batch, bodies, traffic, failed)
            if failed:
                if self._ending.is_set() and step not in (Step.SPLIT, Step.SUSPECT):
                    return  # what waits stays in the spool
                await self._recover(step, partition, traffic, delay)
            elif taken is not None and batch.more:
                await wait_for(self._skip_pacing, delay)
            elif traffic.news:
                traffic.oldest = traffic.since or traffic.oldest
                await wait_for(
                    traffic.due, 0 if self._ending.is_set() else self._timings.flush_interval
                )
            else:
                return

    async def _take(
        self, lane: Partition, traffic: _PartitionState
    ) -> tuple[Batch, list[bytes]] | None:
        traffic.due.clear()
        traffic.arrived.clear()
        traffic.news, traffic.size = False, 0
        if traffic.suspects and self._evidence_of(lane).accepting:
            # Upstream has just taken something: now it is seen whose fault it was.
            return await self.spool.take(lane, suspects=True)
        return await self.spool.take(lane)

    async def _attempt(
        self, batch: Batch, bodies: Sequence[bytes], traffic: _PartitionState, failed: Counter[Step]
    ) -> tuple[Step, float]:
        """Try to deliver a batch; return what was done, and the seconds until the next attempt."""
        traffic.oldest = batch.oldest
        if self._evidence_of(batch.partition).accepting:
            del failed[Step.WAIT]  # another lane has delivered something meanwhile
        outcome = await self._send(batch, bodies)
        step = await self._settle(batch, outcome, traffic)
        delay = self._delay(step, outcome, failed[step])
        failed[step] += 1
        if step in (Step.DONE, Step.QUARANTINE):
            failed.clear()
        elif step is Step.WAIT:
            outage = self._evidence_of(batch.partition).outage
            if outage or failed[step] >= REJECTIONS_BEFORE_WARNING:
                self._begin_outage(batch.partition, outcome.reason)
        return step, delay

    async def _recover(
        self, step: Step, lane: Partition, traffic: _PartitionState, delay: float
    ) -> None:
        """Wait after something went wrong."""
        if step is not Step.WAIT or self._evidence_of(lane).outage:
            await wait_for(self._ending, delay)
            return
        await wait_for(traffic.arrived, delay)  # something else to compare with
        await wait_for(traffic.due, self._timings.flush_interval if traffic.news else 0)

    def _evidence_of(self, lane: Partition) -> Evidence:
        return self._evidence[lane.environment, lane.endpoint]

    async def _send(self, batch: Batch, bodies: Sequence[bytes]) -> _Attempt:
        lane = batch.partition
        where = target(lane, self._spec_of(lane.environment))
        if where is None:
            return _Attempt(401, f"the environment has no credential for them{_setting(lane)}")
        path, key = where
        checked = not lane.endpoint.diagnostic  # what is in those is nobody's business
        if sum(map(len, bodies)) > SMALL:
            parcel = await asyncio.to_thread(_packed, bodies, checked=checked)
        else:
            parcel = _packed(bodies, checked=checked)
        if isinstance(parcel, _Attempt):
            return parcel
        del bodies  # memory is for those who need it
        said = headers(lane, batch.payload_id) | key
        url = join(self._base, path)
        began = time.monotonic()
        try:
            receipt = await self._upstream.post(
                url, parcel, headers=said, within=self._timings.timeout
            )
        except UpstreamUnavailable as e:
            return _Attempt(None, e.reason)
        if receipt.date is not None:
            self._dates[lane.environment] = receipt.date
        took = time.monotonic() - began
        reason = f"HTTP error {receipt.status}"
        return _Attempt(receipt.status, reason, receipt.retry_after, took)

    async def _settle(self, batch: Batch, outcome: _Attempt, traffic: _PartitionState) -> Step:
        """Do what follows an attempt; return it."""
        evidence = self._evidence_of(batch.partition)
        if outcome.malformed:
            await self._quarantine(batch, MALFORMED, outcome.malformed)
            return Step.SPLIT
        if outcome.unclear and await self.spool.split(batch):
            return Step.SPLIT
        name = batch.payload_id
        step = next_step(outcome.status, batch.posts, int(evidence.knows(name)))
        if step is Step.DONE:
            await self._finish(batch)
            evidence.take(name)
            traffic.suspects.pop(name, None)
            self._end_outage(batch.partition)
        elif step in (Step.AGAIN, Step.REFUSED):
            self._counts[batch.partition.environment].retried += 1
            if outcome.status == BAD_REQUEST:  # a batch's trouble, and told when that is clear
                evidence.doubt(name)
            else:
                self._begin_outage(batch.partition, outcome.reason)
        elif step is Step.SPLIT:
            if await self.spool.split(batch):
                evidence.split(name, half_ids(name))
            else:
                step = Step.REJECT
        if step is Step.REJECT:
            step = await self._judge(batch, outcome, traffic)
        return step

    async def _judge(self, batch: Batch, outcome: _Attempt, traffic: _PartitionState) -> Step:
        """Set a post aside that is rejected alone: for good if it is to blame."""
        evidence = self._evidence_of(batch.partition)
        if evidence.reject(batch.payload_id):
            traffic.suspects.pop(batch.payload_id, None)
            await self._quarantine(batch, outcome.reason)
            return Step.QUARANTINE
        others = await self.spool.put_aside(batch)
        traffic.suspects[batch.payload_id] = batch.oldest
        return Step.SUSPECT if others and not evidence.outage else Step.WAIT

    async def _finish(self, batch: Batch) -> None:
        figures = self._counts[batch.partition.environment]
        done = await self.spool.finish(batch)
        if done is None:  # given up while it was on its way, but it has arrived
            done = batch.posts
            self._count_evicted(batch.partition.environment, -done)
        figures.forwarded += done
        figures.waiting -= done
        if self._delayed_acks:
            self._release_acks()

    async def _quarantine(
        self, batch: Batch, reason: str, only: Sequence[int] | None = None
    ) -> None:
        figures = self._counts[batch.partition.environment]
        posts = batch.posts if only is None else len(only)
        figures.waiting -= await self.spool.quarantine(batch, reason, only)
        figures.quarantined += posts
        fate = "upstream rejects them" if only is None else "they are no well-formed JSON"
        self._report(f"set aside, as {fate}", batch.partition.environment, posts)

    def _delay(self, step: Step, outcome: _Attempt, failures: int) -> float:
        """Return the seconds to wait after an attempt, before which were so many like it."""
        if step is Step.DONE:
            return min(self._timings.between, outcome.took)
        if step is Step.SPLIT:
            return 0.0
        if step in (Step.QUARANTINE, Step.SUSPECT):
            return self._timings.between
        retries, chance = self._timings.backoff, random.random()  # noqa: S311 - jitter
        delay = retries.delay(failures, chance, refused=step is Step.REFUSED)
        return max(delay, min(outcome.retry_after or 0.0, retries.longest))

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

    def _note_evicted(self, evicted: Counter[str]) -> None:
        for environment, posts in evicted.items():
            self._count_evicted(environment, posts)

    def _count_evicted(self, environment: str, posts: int) -> None:
        figures = self._counts[environment]
        figures.evicted += posts
        figures.waiting -= posts
        self._report("given up, as there is no room or they are too old", environment, posts)

    def _report(self, fate: str, environment: str, posts: int) -> None:
        """Count losses, and say what has gathered, once a minute at most."""
        self._unreported[fate, environment] += posts
        if time.monotonic() >= self._report_at:
            self._report_all()

    def _report_all(self) -> None:
        self._report_at = time.monotonic() + REPORT_EVERY
        for (fate, environment), posts in self._unreported.items():
            if posts > 0:
                self._log_of(environment).warning("%d posts of events were %s", posts, fate)
        self._unreported.clear()

    def _log_of(self, environment: str) -> Log:
        spec = self._spec_of(environment)
        return environment_log(environment, "" if spec is None else spec.sdk_key.masked)


def _setting(lane: Partition) -> str:
    """Return the setting without which the posts of a lane cannot be sent."""
    if lane.endpoint.mobile:
        return f": set mobileKey (LD_MOBILE_KEY_{lane.environment})"
    if lane.endpoint.client_side:
        return f": set envId (LD_CLIENT_SIDE_ID_{lane.environment})"
    return f": set sdkKey (LD_ENV_{lane.environment})"


def _packed(bodies: Sequence[bytes], *, checked: bool) -> bytes | _Attempt:
    """Return what goes upstream; a body alone stays as it is.

    Args:
        bodies: of a batch.
        checked: see first that each is a JSON array, as one that is not would spoil the others.
    """
    verdicts = [is_well_formed(body) for body in bodies] if checked else []
    malformed = [place for place, verdict in enumerate(verdicts) if verdict is False]
    unclear = None in verdicts and len(bodies) > 1
    if malformed or unclear:
        return _Attempt(None, "", malformed=malformed, unclear=unclear)
    return igzip.compress(bodies[0] if len(bodies) == 1 else joined(bodies), LEVEL)
