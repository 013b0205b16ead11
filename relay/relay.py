"""The relay: runs its environments, which may come, change and go."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from enum import Enum
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from relay import clock
from relay.environment import ConnectionState, Environment, UpstreamConnection
from relay.fleet import FleetMember
from relay.model.credential import CredentialKind
from relay.model.environment import EnvironmentSpec
from relay.model.reply import Fetch
from relay.registry import Registry, RegistryChange
from relay.sources import DataSource
from relay.stores import Mirror
from relay.streams.admission import Admission
from relay.telemetry.log import mask_keys
from relay.telemetry.reloads import Reloads
from relay.telemetry.workers import WorkerStatus

if TYPE_CHECKING:
    # This imports SQLite and compression; the port need not wait for them.
    from relay.events.forwarder import Forwarder

RESTART_DELAY = 10.0
"""Seconds before what failed with an unexpected error is restarted: an environment, or the
directory."""

ENDED_WITHIN = 1.0
"""Seconds within which the streams of a removed environment or a revoked credential are over."""

_log = logging.getLogger("relay")


class DirectoryChange(Enum):
    """Kind of a change that a directory makes."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    ROTATED = "rotated"


class Directory(Protocol):
    """Contract of what says at run time which environments exist."""

    connection: UpstreamConnection
    """State of the connection by which it knows that."""
    known: asyncio.Event
    """Set once it knows the environments: until then no credential can be called unknown. Those of
    a stored list may be served before."""
    changes: Counter[DirectoryChange]
    """Number of changes since the start; those that bring a new SDK key count as both."""

    is_upstream: bool
    """True if it is LaunchDarkly's list, so that `/status` and metrics report on it."""

    @property
    def invalid_entries(self) -> Mapping[tuple[str, str], str]:
        """Entries of LaunchDarkly's list that cannot be used, with the reason.

        They are named by `environment` or `filter`, and ID.
        """

    async def run(self, relay: Relay) -> None:
        """Put, change and remove environments until cancelled."""


class Relay:
    """All environments of this process.

    Args:
        environments: the first environments; of two with the same credential, the later wins.
        init_timeout: seconds to wait for upstream before the relay counts as started without it.
        upstream: session shared by sources and events; the caller of `run` opens it.
        fetch: requests LaunchDarkly's keyless resources; None without a network.
        events: forwarder of events; None if there is no service to deliver to.
        ignore_connection_errors: log an environment without upstream after `init_timeout` as a
            warning instead of an error.
        disconnected_after: seconds of interruption after which `/status` reports `disconnected`.
        registry: empty; a new one if omitted.
        directory: says at run time which environments exist; None if the first are all.
        stale_big_segments_degrade: report `degraded` while big segments are out of date.
        reports_starts: log whether environments were initialised; a worker leaves that to its
            feeder.
        member: this relay in a fleet; None without one.
        admission: of the streams of all environments; a new one if omitted.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        init_timeout: float,
        *,
        upstream: AbstractAsyncContextManager[object] | None = None,
        fetch: Fetch | None = None,
        events: Forwarder | None = None,
        ignore_connection_errors: bool = False,
        disconnected_after: float = 60.0,
        registry: Registry[Environment] | None = None,
        directory: Directory | None = None,
        stale_big_segments_degrade: bool = False,
        reports_starts: bool = True,
        fdv1_fallback: bool = False,
        member: FleetMember | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.admission = admission or Admission()
        self.fdv1_fallback = fdv1_fallback
        """True if SDKs that speak FDv2 are led back to FDv1."""
        self.stale_big_segments_degrade = stale_big_segments_degrade
        """True if `/status` reports `degraded` while big segments are out of date."""
        self.registry: Registry[Environment] = registry or Registry()
        self.disconnected_after = disconnected_after
        self.upstream = upstream or nullcontext()
        self.fetch = fetch
        self.events = events
        self.directory = directory
        self._member = member
        self._init_failure_level = logging.WARNING if ignore_connection_errors else logging.ERROR
        self.init_timeout = init_timeout
        self._reports_starts = reports_starts
        self._init_deadline = clock.monotonic() + init_timeout
        self.stopping = False
        """True once the shutdown begins: from then on the relay is not ready."""
        self.unusable: dict[str, str] = {}
        """Environments that do not exist because their description is unusable or they cannot be
        made, with the reason; `/status` names them."""
        self.unusable_archive: tuple[str, float] | None = None
        """Reason and Unix time of the last read of an archive, if that changed nothing because the
        archive is unusable."""
        self.reloads = Reloads()
        self.workers: dict[int, WorkerStatus] = {}
        """The workers by number, if this is a feeder."""
        self._tasks: asyncio.TaskGroup | None = None
        """Tasks of the environments, while the relay runs."""
        self._running: dict[Environment, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """Tasks of removed environments that write their last changes."""
        self._ended: asyncio.Task[object] | None = None
        """Waits for all of them, for any number of new environments."""
        self._reported: WeakSet[Environment] = WeakSet()
        """Environments whose start has been logged."""
        self._expiry_timer: asyncio.TimerHandle | None = None
        for environment in environments:
            self.put(environment)

    @property
    def environments(self) -> Mapping[str, Environment]:
        """The environments by name."""
        return self.registry.environments

    def put(self, environment: Environment) -> None:
        """Add an environment, and run it as long as the relay runs.

        Raises:
            ValueError: another environment has the name.
        """
        self._carry_out(self.registry.put(environment, environment.spec))

    def change(
        self,
        environment: Environment,
        spec: EnvironmentSpec,
        source: DataSource | None = None,
        mirrors: Sequence[Mirror] | None = None,
    ) -> None:
        """Replace the spec of an environment while it serves; see `Environment.change`.

        Raises:
            ValueError: another environment has the name; nothing has changed.
        """
        change = self.registry.put(environment, spec)
        environment.change(spec, source, mirrors)
        self._carry_out(change)

    def remove(self, environment: Environment) -> None:
        """Remove an environment for good: its credentials open nothing, and its streams end.

        To bring it back, make and put another one.
        """
        self._carry_out(self.registry.remove(environment))

    def expire(self) -> None:
        """End what was opened with credentials that have expired; a timer calls this in time."""
        change = self.registry.expire()
        for credential in (grant.credential for grant in change.closed):
            text = "Deprecated %s %s has expired and is no longer valid for authentication"
            _log.info(text, credential.kind.value, credential.masked)
        self._carry_out(change)

    @property
    def auto_configuration(self) -> Directory | None:
        """The directory, if it is LaunchDarkly's list."""
        return self.directory if self.directory and self.directory.is_upstream else None

    @property
    def knows_environments(self) -> bool:
        """True unless the list of environments is still to come."""
        return self.directory is None or self.directory.known.is_set()

    @property
    def lacks_environments(self) -> bool:
        """True while there is no environment to serve, because the list is still to come."""
        return not self.environments and not self.knows_environments

    @property
    def starting(self) -> bool:
        """True until `init_timeout` is over."""
        return clock.monotonic() < self._init_deadline

    def __repr__(self) -> str:
        stopping = ", stopping" if self.stopping else ""
        return f"<Relay: {len(self.environments)} environments{stopping}>"

    async def run(self) -> None:
        """Keep all environments up to date until cancelled."""
        member = asyncio.create_task(self._take_part(self._member)) if self._member else None
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for environment in self.environments.values():
                    self._start(environment, self._init_deadline)
                self._schedule_expiry()
                if self.directory is not None:
                    self._tasks.create_task(self._follow(self.directory))
                try:
                    await asyncio.Event().wait()
                finally:
                    self._running.clear()
        finally:
            self._tasks = None
            if self._expiry_timer is not None:
                self._expiry_timer.cancel()
            if member is not None:  # until now, environments have had to give up their leases
                member.cancel()
                with suppress(asyncio.CancelledError):
                    await member

    async def _take_part(self, member: FleetMember) -> None:
        """Take part in the fleet, and begin again after any exception."""
        while True:
            try:
                await member.run()
            except Exception:  # noqa: BLE001 - environments listen to upstream meanwhile
                _log.exception("The fleet cannot be followed; trying again")
            await asyncio.sleep(RESTART_DELAY)

    async def _follow(self, directory: Directory) -> None:
        """Let the environments be what a directory says, and restart it after any exception."""
        while True:
            try:
                await directory.run(self)
            except Exception:  # noqa: BLE001 - environments go on without it
                _log.exception("The list of environments cannot be followed; trying again")
            await asyncio.sleep(RESTART_DELAY)

    def _carry_out(self, change: RegistryChange[Environment]) -> None:
        """Carry out the consequences of a change; before `run` there is nothing to end."""
        mask_keys(
            grant.credential.value
            for grant in change.opened
            if grant.credential.kind is not CredentialKind.ENVIRONMENT_ID  # which is public
        )
        if self._tasks is None:
            return
        for environment in change.stopped:
            self._stop(environment)
        for grant in change.closed:
            if grant.environment not in change.stopped:
                self._tasks.create_task(grant.environment.hub.end_streams(grant, ENDED_WITHIN))
        for environment in change.started:
            self._start(environment, clock.monotonic() + self.init_timeout)
        self._schedule_expiry()

    def _schedule_expiry(self) -> None:
        """Set the one timer to the next expiry."""
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        delay = self.registry.next_expiry_in
        if delay is not None:
            self._expiry_timer = asyncio.get_running_loop().call_later(delay, self.expire)

    def _start(self, environment: Environment, init_deadline: float) -> None:
        if self._tasks is not None:
            running = self._run_environment(environment, init_deadline)
            self._running[environment] = self._tasks.create_task(running)

    def _stop(self, environment: Environment) -> None:
        if self._tasks is not None:
            task = self._running.pop(environment)
            task.cancel()
            self._ending.add(task)
            self._ended = None
            task.add_done_callback(self._ending.discard)
            self._tasks.create_task(environment.hub.close(ENDED_WITHIN))

    async def _run_environment(self, environment: Environment, init_deadline: float) -> None:
        if self._ending and self._tasks is not None:  # they may have the same snapshot or prefix
            if self._ended is None:
                self._ended = self._tasks.create_task(asyncio.wait(frozenset(self._ending)))
            await asyncio.shield(self._ended)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_running(environment))
            tasks.create_task(self._wait_started(environment, init_deadline))

    async def _keep_running(self, environment: Environment) -> None:
        """Run an environment, and restart it after any exception, which affects no other one."""
        while True:
            try:
                await environment.run()
            except Exception:  # noqa: BLE001 - the one boundary between environments
                environment.fail()
            if environment not in self._running:
                return  # it failed while it was being cancelled
            await asyncio.sleep(RESTART_DELAY)

    async def _wait_started(self, environment: Environment, deadline: float) -> bool:
        """Wait until initialization ends or times out; return whether upstream delivered data.

        Whoever waits first logs the outcome, so that it is logged even if that ends the process.
        """
        started = False
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline - clock.monotonic())):
                await environment.init_done.wait()
            started = environment.connection.state is ConnectionState.VALID
        if self._reports_starts and environment not in self._reported:
            self._reported.add(environment)
            self._report_start(environment, started=started)
        return started

    def _report_start(self, environment: Environment, *, started: bool) -> None:
        """Log whether an environment was initialized, in ld-relay's words (status 8.3)."""
        name, key = environment.spec.title, environment.spec.sdk_key.masked
        if started:
            _log.info('Initialized LaunchDarkly client for "%s" (SDK key %s)', name, key)
            return
        refused = environment.init_done.is_set()
        reason = "the SDK key is refused" if refused else "no data from upstream within initTimeout"
        serving = "no data" if environment.payload is None else "stored data"
        text = 'Error initializing LaunchDarkly client for "%s": %s; serving %s, still trying'
        _log.log(self._init_failure_level, text, name, reason, serving)

    async def wait_until_started(self) -> None:
        """Wait until every environment has data or a refused key; at most `init_timeout`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._init_deadline - clock.monotonic())):
                if self.directory is not None:
                    await self.directory.known.wait()
                for environment in tuple(self.environments.values()):
                    await environment.init_done.wait()

    async def wait_until_synced(self, *, fail_fast: bool = False) -> bool:
        """Wait until every environment has data from upstream, and its mirrors have stored it.

        Args:
            fail_fast: return at the first environment that fails.

        Returns:
            True if all environments were synced within `init_timeout`.
        """
        if not await self._await_environments():
            return False
        tasks = [asyncio.create_task(self._wait_synced(e)) for e in self.environments.values()]
        complete = not self.unusable
        try:
            for synced in asyncio.as_completed(tasks):
                complete = await synced and complete
                if fail_fast and not complete:
                    break
        finally:
            for task in tasks:
                task.cancel()
        return complete

    async def _await_environments(self) -> bool:
        """Wait until the environments are known; return False after `init_timeout`."""
        if self.directory is None:
            return True
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - clock.monotonic())):
                await self.directory.known.wait()
        except TimeoutError:
            _log.error("The list of environments did not come in time")
            return False
        return True

    async def _wait_synced(self, environment: Environment) -> bool:
        if not await self._wait_started(environment, self._init_deadline):
            return False
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - clock.monotonic())):
                for mirror in environment.mirrors:
                    await mirror.flushed()
        except TimeoutError:
            _log.error('The data of "%s" could not be stored in time', environment.spec.name)
            return False
        return True
