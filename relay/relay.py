"""The relay: which environments exist, which credential opens which of them, and that each runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from relay.environment import ConnectionState, Environment
from relay.model.reply import Fetch

if TYPE_CHECKING:
    # Brings SQLite and compression, for which the opening of the port need not wait.
    from relay.events.forwarder import Forwarder

RESTART_DELAY = 10.0
"""Seconds before an environment that failed by a defect of ours is run again."""

_log = logging.getLogger("relay")


class Relay:
    """All environments of this process.

    Args:
        environments: what it serves; of two with the same credential the later one counts.
        init_timeout: seconds to wait for upstream before serving without it counts as started.
        upstream: the session that sources and events share; whoever runs the relay opens it.
        fetch: asks LaunchDarkly for what needs no key; None where there is no network.
        events: sees to the delivery of events; None where there is nobody to deliver them to.
        ignore_connection_errors: an environment without upstream at the end of that time is worth
            a warning, not an error.
        disconnected_after: seconds of interruption after which `/status` says `disconnected`.
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
    ) -> None:
        self.environments = {environment.spec.name: environment for environment in environments}
        self.by_sdk_key = {e.spec.sdk_key.value: e for e in environments}
        self.by_mobile_key = {e.spec.mobile_key.value: e for e in environments if e.spec.mobile_key}
        self.by_environment_id = {
            e.spec.environment_id.value: e for e in environments if e.spec.environment_id
        }
        self.disconnected_after = disconnected_after
        self.upstream = upstream or nullcontext()
        self.fetch = fetch
        self.events = events
        self._late = logging.WARNING if ignore_connection_errors else logging.ERROR
        self._init_deadline = time.monotonic() + init_timeout
        self.stopping = False
        """Set at the beginning of the shutdown: from then on the relay is not ready."""

    @property
    def starting(self) -> bool:
        """Whether the time that upstream has for its first answer is still running."""
        return time.monotonic() < self._init_deadline

    async def run(self) -> None:
        """Keep all environments current until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for environment in self.environments.values():
                tasks.create_task(self._keep_running(environment))
                tasks.create_task(self._report_start(environment))

    async def _keep_running(self, environment: Environment) -> None:
        """One environment cannot hurt another: the only broad `except` of the program."""
        while True:
            try:
                await environment.run()
            except Exception:  # noqa: BLE001 - the one boundary between environments
                environment.fail()
            await asyncio.sleep(RESTART_DELAY)

    async def _report_start(self, environment: Environment) -> None:
        """Say once how the start of an environment went, in the reference's words (status 8.3)."""
        name, key = environment.spec.name, environment.spec.sdk_key.masked
        if await self._initialized(environment):
            _log.info('Initialized LaunchDarkly client for "%s" (SDK key %s)', name, key)
            return
        decided = environment.init_done.is_set()
        reason = "the SDK key is refused" if decided else "no data from upstream within initTimeout"
        still = "no data" if environment.payload is None else "stored data"
        text = 'Error initializing LaunchDarkly client for "%s": %s; serving %s, still trying'
        _log.log(self._late, text, name, reason, still)

    async def _initialized(self, environment: Environment) -> bool:
        """Wait until upstream has answered, or the time is over; return whether it gave data."""
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - time.monotonic())):
                await environment.init_done.wait()
        except TimeoutError:
            return False
        return environment.connection.state is ConnectionState.VALID

    async def wait_until_synced(self, *, fail_fast: bool = False) -> bool:
        """Wait until each environment has data from upstream and its database has them, too.

        Args:
            fail_fast: return at the first environment that fails.

        Returns:
            Whether all environments got there before the time was over.
        """
        waits = [asyncio.create_task(self._is_synced(e)) for e in self.environments.values()]
        complete = True
        try:
            for settled in asyncio.as_completed(waits):
                complete = await settled and complete
                if fail_fast and not complete:
                    break
        finally:
            for wait in waits:
                wait.cancel()
        return complete

    async def _is_synced(self, environment: Environment) -> bool:
        if not await self._initialized(environment):
            return False
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - time.monotonic())):
                for copy in environment.mirrors:
                    await copy.flushed()
        except TimeoutError:
            _log.error('The data of "%s" could not be stored in time', environment.spec.name)
            return False
        return True
