"""One environment of the relay: from its source to its payload, its subscribers and its copies.

Memory first, then subscribers, then database: a slow or broken database never delays an SDK.
Stored data are served at once; what upstream says stands above them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum

from relay.errors import ErrorKind
from relay.model.environment import EnvironmentSpec
from relay.model.item import InvalidItem, Kind
from relay.model.payload import EMPTY, Change, ChangeSet, Payload
from relay.programs import ProgramCache
from relay.sources import DataSource, Interrupted, Update, UpToDate
from relay.stores import Mirror
from relay.streams.hub import Hub
from relay.telemetry.log import Log

CONFIRM_EVERY = 60.0
"""Seconds after which copies are told again that the data are current, though nothing changed: the
age of the data after a restart is right to a minute."""


class ConnectionState(Enum):
    """How it stands with upstream, in the words of `/status` (status 8.1)."""

    INITIALIZING = "INITIALIZING"
    VALID = "VALID"
    INTERRUPTED = "INTERRUPTED"
    OFF = "OFF"


@dataclass(slots=True)
class UpstreamConnection:
    """How it stands with upstream, and since when.

    Times that people read are Unix seconds. How long something lasts is measured by the monotonic
    clock: the other one may be corrected at any moment.
    """

    state: ConnectionState = ConnectionState.INITIALIZING
    since: float = field(default_factory=time.time)
    """When the state was entered, in Unix seconds."""
    entered: float = field(default_factory=time.monotonic)
    """The same by the monotonic clock."""
    last_error: tuple[ErrorKind, float] | None = None
    """The class and the time of the last failure, in Unix seconds; never cleared."""
    has_data: bool = False
    """Whether upstream has ever delivered data to this process."""
    last_confirmed: float | None = None
    """When upstream last showed that the data are current, by the monotonic clock; None if that is
    not known."""

    @property
    def lasts(self) -> float:
        """The seconds since the state was entered."""
        return time.monotonic() - self.entered

    @property
    def data_age(self) -> float | None:
        """The seconds since upstream last showed that the data are current; None if not known."""
        return (
            None
            if self.last_confirmed is None
            else max(0.0, time.monotonic() - self.last_confirmed)
        )

    def enter(self, state: ConnectionState) -> bool:
        """Take the state on; return whether it is another one than before."""
        if state is self.state:
            return False
        self.state, self.since, self.entered = state, time.time(), time.monotonic()
        return True


class Environment:
    """One environment: `run` keeps it current; `payload` is what it serves.

    Args:
        spec: what it is.
        source: where its data come from.
        hub: who is told.
        log: a logger that names this environment.
        mirrors: the database and the snapshot, where there are such.
        programs: of its flags, if the hub has streams that need them.
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
    ) -> None:
        self.spec = spec
        self.hub = hub
        self.mirrors = tuple(mirrors)
        self.connection = UpstreamConnection()
        self.payload: Payload | None = None
        """What is served; None until there are data from anywhere."""
        self.programs = programs or ProgramCache()
        """The same, evaluated for client-side SDKs."""
        self.invalid: dict[tuple[Kind, str], InvalidItem] = {}
        """Items whose last version could not be used."""
        self.changes = 0
        """Changes of upstream that were applied, since the start: messages, not items."""
        self.rejected = 0
        """Messages and items of upstream that could not be used, since the start."""
        self.init_done = asyncio.Event()
        """Set when upstream has delivered, or has refused the key."""
        self._mirrors_updated_at = -float("inf")
        """When the copies were last told that the data are current, by the monotonic clock."""
        self._last_warning = ""
        """What was last logged of upstream."""
        self.created = time.time()
        """Unix seconds."""
        self._source = source
        self._log = log

    async def run(self) -> None:
        """Keep the environment current until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for copy in self.mirrors:
                tasks.create_task(self._begin_with(copy))
                tasks.create_task(copy.run())
            tasks.create_task(self._follow_source())

    def check(self, *, reconnect: bool = False) -> None:
        """See soon whether upstream has news.

        Args:
            reconnect: they should have come long ago.
        """
        self._source.check(reconnect=reconnect)

    def fail(self) -> None:
        """Note that `run` has ended by a defect of ours; called while the exception is handled."""
        self._log.exception("The environment failed and is started again; its data stay served")
        self.connection.last_error = (ErrorKind.UNKNOWN, time.time())
        if self.connection.has_data:
            self.connection.enter(ConnectionState.INTERRUPTED)

    async def _begin_with(self, copy: Mirror) -> None:
        """Serve stored data until upstream has delivered; the newer of two copies wins."""
        stored = await copy.load()
        if stored is None or self.connection.has_data:
            return
        if self.payload is None or stored.payload.is_newer_than(self.payload):
            self._log.info(
                "Serving stored data (%d items) until upstream delivers", len(stored.payload)
            )
            self._apply(ChangeSet(tuple(stored.payload), full=True))
            self.connection.last_confirmed = _before_now(stored.age)
        elif self.connection.last_confirmed is None and not self.payload.is_newer_than(
            stored.payload
        ):
            # The same data from a copy that knows how old they are.
            self.connection.last_confirmed = _before_now(stored.age)

    async def _follow_source(self) -> None:
        async with aclosing(self._source.updates()) as updates:
            async for update in updates:
                self._take(update)

    def _take(self, update: Update) -> None:
        match update:
            case ChangeSet():
                self._take_changes(update, time.monotonic())
            case UpToDate():
                self._confirm()
            case Interrupted():
                self._interrupt(update)

    def _take_changes(self, changes: ChangeSet, since: float) -> None:
        self._note_invalid(changes)
        if changes.full or self.connection.has_data:
            change = self._apply(changes, since)
            self.changes += change is not None
            self.connection.has_data = True
            self._confirm(change, full=changes.full)
        else:
            # A patch before the first put: those who listen may know it (streams 2.2), but it is
            # not the data of an environment.
            _, change = EMPTY.apply(changes)
            if change is not None:
                self.hub.publish(self.payload, change, since)

    def _apply(self, changes: ChangeSet, since: float | None = None) -> Change | None:
        """Make the next payload and tell subscribers."""
        first = self.payload is None
        self.payload, change = (self.payload or EMPTY).apply(changes)
        if change is None and first:
            change = Change((), (), replace=True)
        if change is not None:
            # First, because streams of evaluated flags ask for them at once.
            self.programs.update(self.payload)
            self.hub.publish(self.payload, change, since)
        return change

    def _confirm(self, change: Change | None = None, *, full: bool = False) -> None:
        """Upstream is healthy, and the payload is what it has."""
        if not self.connection.has_data or self.payload is None:
            return
        now = time.monotonic()
        news = self.connection.enter(ConnectionState.VALID)
        self.connection.last_confirmed = now
        self.init_done.set()
        if news:
            self._log.info("Upstream is connected, data are current (%d items)", len(self.payload))
        if news or full or change is not None or now - self._mirrors_updated_at >= CONFIRM_EVERY:
            self._mirrors_updated_at = now
            for copy in self.mirrors:
                copy.update(self.payload, change, full=full, unusable=self.invalid)

    def _interrupt(self, outage: Interrupted) -> None:
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
        first = connection.last_error is None
        connection.last_error = (outage.kind, time.time())
        # Of unusable data each is told, not each time they come: a file may be mended by and by.
        other = outage.kind is ErrorKind.INVALID_DATA and outage.reason != self._last_warning
        if connection.enter(state) or first or other:
            self._log.warning("%s", outage.reason)
            self._last_warning = outage.reason
        for copy in self.mirrors:
            copy.suspend()

    def _note_invalid(self, changes: ChangeSet) -> None:
        """Keep account of items that cannot be used; log each when it appears."""
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


def _before_now(age: float | None) -> float | None:
    """Return the monotonic clock so many seconds ago."""
    return None if age is None else time.monotonic() - age
