"""One environment: follow its data source, publish to its subscribers, keep its mirrors current.

Memory comes first, then subscribers, then mirrors: a slow or broken database never delays an SDK.
Stored data is served immediately; data from upstream always takes precedence over it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum

from relay import clock
from relay.aio import SLICE, run_for, wait_for
from relay.bigsegments.environment import BigSegments
from relay.errors import ErrorKind
from relay.fleet import Participant
from relay.model.answers import AnswerCounts
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Kind
from relay.model.journal import Journal, SavedJournal
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.programs import ProgramCache
from relay.protocol.bigsegments import include_big_segment
from relay.sources import DataSource, Interrupted, Update, UpToDate
from relay.stores import Mirror, Stored
from relay.streams.hub import Hub
from relay.telemetry.log import EnvironmentLog, Log, set_environment_level
from relay.telemetry.outage import OutageLog

RECALL_TIMEOUT = 5.0
"""Seconds to wait for the journal on disk, which takes milliseconds unless the disk hangs. Without
it, clients of before the restart get all data once."""

CONFIRM_EVERY = 60.0
"""Seconds between the confirmations that mirrors get while nothing changes, so that the age of
stored data is accurate to a minute after a restart."""

NAMING_DELAY = 0.01
"""Seconds in which changes gather, of which only the last one has its state named."""


class ConnectionState(Enum):
    """State of the upstream connection, named as in `/status` (status 8.1)."""

    INITIALIZING = "INITIALIZING"
    VALID = "VALID"
    INTERRUPTED = "INTERRUPTED"
    OFF = "OFF"


@dataclass(slots=True)
class UpstreamConnection:
    """State of the upstream connection.

    Times shown to people are Unix seconds. Durations are measured with the monotonic clock, because
    the wall clock may be corrected at any moment.
    """

    state: ConnectionState = ConnectionState.INITIALIZING
    since: float = field(default_factory=clock.unix)
    """Time of the last state change, in Unix seconds."""
    entered: float = field(default_factory=clock.monotonic)
    """Time of the last state change, by the monotonic clock."""
    last_error: tuple[ErrorKind, float] | None = None
    """Class of the last failure and its time in Unix seconds; never cleared."""
    last_status: int | None = None
    """HTTP status of the response that was the last failure, if there was one."""
    has_data: bool = False
    """True once upstream has delivered data to this process."""
    last_confirmed: float | None = None
    """Monotonic time at which upstream last confirmed the data; None if unknown."""

    @property
    def lasts(self) -> float:
        """Seconds since the state was entered."""
        return clock.monotonic() - self.entered

    @property
    def data_age(self) -> float | None:
        """Seconds since upstream last confirmed the data; None if unknown."""
        return (
            None
            if self.last_confirmed is None
            else max(0.0, clock.monotonic() - self.last_confirmed)
        )

    def enter(self, state: ConnectionState) -> bool:
        """Change to `state`; return False if that is the current state already."""
        if state is self.state:
            return False
        self.state, self.since, self.entered = state, clock.unix(), clock.monotonic()
        return True


class Environment:
    """One environment. `run` keeps it current, `payload` is the data it serves.

    Args:
        spec: name, credentials and settings.
        source: the data source to follow.
        hub: receives every change.
        log: a logger that names this environment.
        mirrors: the database and the snapshot, as configured.
        programs: compiled flags, shared with the evaluated streams of the hub; created if omitted.
        journal: of the data, shared with the streams that send deltas; created if omitted.
        big_segments: memberships in big segments; None without a database that has them.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        source: DataSource,
        hub: Hub,
        log: Log,
        mirrors: Sequence[Mirror] = (),
        *,
        programs: ProgramCache | None = None,
        journal: Journal | None = None,
        big_segments: BigSegments | None = None,
    ) -> None:
        self.spec = spec
        self.hub = hub
        self.mirrors = tuple(mirrors)
        self.connection = UpstreamConnection()
        self.payload: Payload | None = None
        """The data being served; None until a mirror or upstream has delivered."""
        self.journal = journal or Journal(spec.lineage)
        """Items that the last changes of `payload` have touched."""
        self.programs = programs or ProgramCache(self.journal)
        """The flags of `payload`, compiled for client-side evaluation."""
        self.fleet: Participant | None = None
        """Part that this relay takes in a fleet; None without one."""
        self.big_segments = big_segments
        """Memberships in big segments; None without a database that has them."""
        if big_segments is not None:
            big_segments.on_change = hub.publish_memberships
        self._has_big_segments = False
        """True once the data have had a big segment."""
        self.invalid: dict[tuple[Kind, str], InvalidItem] = {}
        """Items whose latest version is unusable."""
        self.changes = 0
        """Number of upstream changes applied since the start; counts messages, not items."""
        self.rejected = 0
        """Number of unusable upstream messages and items since the start."""
        self.init_done = asyncio.Event()
        """Set once upstream has delivered data or refused the key."""
        self._naming: asyncio.Task[None] | None = None
        """Names the state of the data."""
        self._next_change: asyncio.Event | None = None
        """Set at the next change of `payload`; None if nobody waits for that."""
        self._recalled = asyncio.Event()
        """Set once the journal has been loaded, or there is none."""
        self._mirrors_updated_at = -float("inf")
        """Monotonic time of the last `update` of the mirrors."""
        self._outage = OutageLog(log)
        self.created = clock.unix()
        """Creation time in Unix seconds."""
        self._source = source
        self._successor: DataSource | None = None
        """Source that takes the place of `_source` once it has delivered all data."""
        self._successor_outage = OutageLog(log)
        self._workers: dict[DataSource | Mirror, asyncio.Task[None]] = {}
        """Tasks that follow a source or keep a mirror, while the environment runs."""
        self._tasks: asyncio.TaskGroup | None = None
        self._log = log

    @property
    def log(self) -> Log:
        """Logger that names this environment."""
        return self._log

    @property
    def protocol(self) -> str:
        """Protocol by which upstream is followed; empty without upstream."""
        return self._source.protocol

    @property
    def answers(self) -> Mapping[str, AnswerCounts]:
        """Counts of the answers to SDKs of FDv2, by their side: `server` or `client`."""
        return {"server": self.journal.answers, "client": self.programs.client_journal.answers}

    def __repr__(self) -> str:
        items = "no data" if self.payload is None else f"{len(self.payload)} items"
        return f"<Environment {self.spec.name!r} {self.connection.state.value} {items}>"

    async def run(self) -> None:
        """Keep the environment current until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                if not any(mirror.has_journal for mirror in self.mirrors):
                    self._recalled.set()
                for mirror in self.mirrors:
                    self._keep(mirror)
                if self.big_segments is not None:
                    self._tasks.create_task(self.big_segments.run())
                self._follow(self._source)
                self._follow(self._successor)
        finally:
            self._tasks, self._workers = None, {}

    def change(
        self,
        spec: EnvironmentSpec,
        source: DataSource | None = None,
        mirrors: Sequence[Mirror] | None = None,
    ) -> None:
        """Replace the spec, which takes effect at once; data and streams stay.

        Args:
            spec: the new name, credentials and settings.
            source: follows upstream with a new SDK key; the present source is followed until this
                one has delivered all data. None keeps the present source.
            mirrors: mirrors from now on, as for a new prefix; new ones among them are filled. None
                keeps the present mirrors.
        """
        self.spec = spec
        if isinstance(self._log, EnvironmentLog):
            self._log.describe(spec.name, spec.sdk_key.masked)
            set_environment_level(spec.name, spec.log_level)
        if self.big_segments is not None:
            self.big_segments.check()
        if source is not None and self.fleet is not None:
            self.fleet.change_upstream(source)
        elif source is not None:
            self._dismiss(self._successor)
            self._successor, self._successor_outage = source, OutageLog(self._log)
            self._follow(source)
        if mirrors is not None:
            self._replace_mirrors(mirrors)

    def resync(self) -> None:
        """Request all data from upstream again."""
        self._source.resync()

    def check(self, *, reconnect: bool = False) -> None:
        """Check upstream for changes soon.

        Args:
            reconnect: an expected change is overdue; replace a connection that looks healthy, too.
        """
        self._source.check(reconnect=reconnect)

    def fail(self) -> None:
        """Record that `run` ended with an unexpected error. Call it from the exception handler."""
        self._log.exception("The environment failed and is started again; its data stay served")
        self.connection.last_error = (ErrorKind.UNKNOWN, clock.unix())
        if self.connection.has_data:
            self.connection.enter(ConnectionState.INTERRUPTED)

    async def next_change(self) -> None:
        """Wait for the next change of `payload`."""
        self._next_change = self._next_change or asyncio.Event()
        await self._next_change.wait()

    async def _load_stored(self, mirror: Mirror) -> None:
        """Serve a mirror's stored data until upstream delivers; the newer of two mirrors wins."""
        stored = await mirror.load()
        if not mirror.has_journal:
            await self._wait_for_journal()
        if stored is not None and not self.connection.has_data:
            self._serve_stored(stored)
        if mirror.has_journal:
            self._recalled.set()

    async def _wait_for_journal(self) -> None:
        """Wait until the journal has been loaded: it belongs to the first data that are served."""
        await wait_for(self._recalled, RECALL_TIMEOUT)
        self._recalled.set()

    def _serve_stored(self, stored: Stored) -> None:
        if self.payload is None or stored.payload.is_newer_than(self.payload):
            self._log.info(
                "Serving stored data (%d items) until upstream delivers", len(stored.payload)
            )
            if self.payload is None and stored.journal is not None:
                self._restore(stored.payload, stored.journal)
            else:
                self._apply(ChangeSet(tuple(stored.payload), full=True))
            self.connection.last_confirmed = _clock_before(stored.age)
        elif self.connection.last_confirmed is None and not self.payload.is_newer_than(
            stored.payload
        ):
            # The same data, from a mirror that knows its age.
            self.connection.last_confirmed = _clock_before(stored.age)

    def _follow(self, source: DataSource | None) -> None:
        if source is not None and self._tasks is not None:
            self._workers[source] = self._tasks.create_task(self._handle_updates(source))

    def _keep(self, mirror: Mirror) -> None:
        if self._tasks is not None:
            self._workers[mirror] = self._tasks.create_task(self._run_mirror(mirror))

    def _dismiss(self, worker: DataSource | Mirror | None) -> None:
        if worker is not None and (task := self._workers.pop(worker, None)):
            task.cancel()

    async def _run_mirror(self, mirror: Mirror) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._load_stored(mirror))
            tasks.create_task(mirror.run())

    def _replace_mirrors(self, mirrors: Sequence[Mirror]) -> None:
        before, self.mirrors = self.mirrors, tuple(mirrors)
        for mirror in before:
            if mirror not in self.mirrors:
                self._dismiss(mirror)
        for mirror in self.mirrors:
            if mirror not in before:
                self._keep(mirror)
                if self.payload is not None and self.connection.state is ConnectionState.VALID:
                    mirror.update(self.payload, None, full=True, unusable=self.invalid)

    async def _handle_updates(self, source: DataSource) -> None:
        await self._wait_for_journal()
        # A new key may see other data than the former one, so its source begins with everything.
        basis = self.journal.upstream if source is self._source else ""
        async with aclosing(source.updates(basis)) as updates:
            async for update in updates:
                if source is self._successor and not self._takes_over(source, update):
                    continue
                self._handle(update)

    def _takes_over(self, source: DataSource, update: Update) -> bool:
        """Let a new source take over with its first complete data; return False before."""
        if not (isinstance(update, ChangeSet) and update.full):
            if isinstance(update, Interrupted):
                text = "The former SDK key is still used upstream. With the new one: %s"
                self._successor_outage.begin(update.reason, text, update.reason)
            return False
        self._dismiss(self._source)
        self._source, self._successor = source, None
        self._log.info("The new SDK key is used upstream")
        return True

    def _handle(self, update: Update) -> None:
        match update:
            case ChangeSet():
                self._handle_changes(update, clock.monotonic())
            case UpToDate():
                self._handle_confirmation(update)
            case Interrupted():
                self._handle_interruption(update)

    def _handle_changes(self, changes: ChangeSet, since: float) -> None:
        if changes.since and changes.since != self.journal.upstream:
            self._source.resync()  # they are a change of other data
            return
        self._track_invalid(changes)
        if changes.full or changes.since or self.connection.has_data:
            change = self._apply(changes, since)
            self.changes += change is not None
            self._note_delivery()
            self._confirm(change, full=changes.full)
        else:
            # A patch before the first put: subscribers get it (streams 2.2), but a single item is
            # not the data of an environment.
            _, change = EMPTY.apply(changes)
            if change is not None:
                self.hub.publish(self.payload, change, since)

    def _handle_confirmation(self, confirmation: UpToDate) -> None:
        if confirmation.since:
            if confirmation.since != self.journal.upstream:
                self._source.resync()  # upstream has confirmed other data
                return
            self._note_delivery()
        self._confirm()

    def _note_delivery(self) -> None:
        """Record that upstream has said what its data are."""
        self.connection.has_data = True
        if self.big_segments is not None and self._has_big_segments:
            self.big_segments.start(synchronise=True)

    def _apply(self, changes: ChangeSet, since: float | None = None) -> Change | None:
        """Build the next payload and publish the change to subscribers."""
        first, is_all = self.payload is None, changes.full or changes.exact
        self.payload, change = (self.payload or EMPTY).apply(changes)
        if change is None and first:
            change = Change((), (), replace=True)
        if change is not None:
            # First, because publishing makes streams use programs and journal immediately.
            self.journal.record(self.payload, change, full=is_all, selector=changes.selector)
            self._publish(self.payload, change, since, changes.evaluations)
        else:
            self.journal.rename(changes.selector, full=is_all)
        return change

    def _restore(self, payload: Payload, journal: SavedJournal) -> None:
        """Serve data of before a restart, with what is known of the clients of then."""
        self.payload = payload
        self.journal.restore(journal, payload)
        live = tuple(item for item in payload if not item.deleted)
        self._publish(payload, Change(tuple(payload), live, replace=True), None)

    def _publish(
        self, payload: Payload, change: Change, since: float | None, evaluations: int = 0
    ) -> None:
        self.programs.update(payload, evaluations)
        self._look_for_big_segments(change)
        self.hub.publish(payload, change, since)
        if self._next_change is not None:
            self._next_change.set()
            self._next_change = None
        if self._tasks is not None and self._naming is None:
            self._naming = self._tasks.create_task(self._name_states())

    async def _name_states(self) -> None:
        """Name the states of the data, behind everything else: what is new has to be hashed."""
        try:
            while not self.journal.is_named:
                while (naming := self.journal.naming) is not None:
                    run_for(SLICE, naming)
                    await asyncio.sleep(0)
                await asyncio.sleep(NAMING_DELAY)
                if self.journal.naming is None:
                    self.journal.finish_naming()
        finally:
            self._naming = None

    def _look_for_big_segments(self, change: Change) -> None:
        if self.big_segments is not None and not self._has_big_segments:
            self._has_big_segments = include_big_segment(change.items)
            if self._has_big_segments:
                self.big_segments.start(synchronise=False)

    def _confirm(self, change: Change | None = None, *, full: bool = False) -> None:
        """Record that upstream is healthy and `payload` is current; update the mirrors."""
        if not self.connection.has_data or self.payload is None:
            return
        now = clock.monotonic()
        entered = self.connection.enter(ConnectionState.VALID)
        self.connection.last_confirmed = now
        self.init_done.set()
        self.hub.confirm(self.payload)
        if entered:
            text = "Upstream is connected, data are current (%d items)"
            if not self._outage.end(text, len(self.payload)):  # it is the first connection
                self._log.info(text, len(self.payload))
        if entered or full or change is not None or now - self._mirrors_updated_at >= CONFIRM_EVERY:
            self._mirrors_updated_at = now
            for mirror in self.mirrors:
                mirror.update(self.payload, change, full=full, unusable=self.invalid)

    def _handle_interruption(self, outage: Interrupted) -> None:
        connection = self.connection
        if outage.kind is ErrorKind.INVALID_DATA:
            self.rejected += 1
        if outage.refused:
            state = ConnectionState.OFF
            self.init_done.set()
        elif connection.has_data:
            state = ConnectionState.INTERRUPTED
        else:
            state = ConnectionState.INITIALIZING
        connection.last_error = (outage.kind, clock.unix())
        self.hub.interrupt(refused=outage.refused)
        # Log each new reason for unusable data once: a file is often fixed in steps.
        new_reason = outage.kind is ErrorKind.INVALID_DATA and outage.reason != self._outage.reason
        again = connection.enter(state) or new_reason
        self._outage.begin(outage.reason, "%s", outage.reason, again=again)
        for mirror in self.mirrors:
            mirror.suspend()

    def _track_invalid(self, changes: ChangeSet) -> None:
        """Keep `invalid` up to date; log each unusable item when it first appears."""
        if changes.full:
            known, self.invalid = self.invalid, {}
        else:
            known = self.invalid
            for item in changes.items:
                self.invalid.pop((item.kind, item.key), None)
        for bad in changes.invalid:
            self.rejected += 1
            if known.get((bad.kind, bad.key)) != bad:
                self._log.error("Upstream sent an unusable %s; its previous version stays", bad)
            self.invalid[bad.kind, bad.key] = bad


def _clock_before(age: float | None) -> float | None:
    """Return the monotonic time `age` seconds ago; None if the age is unknown."""
    return None if age is None else clock.monotonic() - age
