"""The relay: its environments, the credentials that open them, and their supervision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING

from relay import clock
from relay.environment import ConnectionState, Environment
from relay.model.reply import Fetch

if TYPE_CHECKING:
    # This imports SQLite and compression; the port need not wait for them.
    from relay.events.forwarder import Forwarder

RESTART_DELAY = 10.0
"""Seconds before an environment that failed with an unexpected error is restarted."""

_log = logging.getLogger("relay")


class Relay:
    """All environments of this process.

    Args:
        environments: environments to serve; of two with the same credential, the later wins.
        init_timeout: seconds to wait for upstream before the relay counts as started without it.
        upstream: session shared by sources and events; the caller of `run` opens it.
        fetch: requests LaunchDarkly's keyless resources; None without a network.
        events: forwarder of events; None if there is no service to deliver to.
        ignore_connection_errors: log an environment without upstream after `init_timeout` as a
            warning instead of an error.
        disconnected_after: seconds of interruption after which `/status` reports `disconnected`.
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
        self._init_failure_level = logging.WARNING if ignore_connection_errors else logging.ERROR
        self._init_deadline = clock.monotonic() + init_timeout
        self.stopping = False
        """True once the shutdown begins: from then on the relay is not ready."""

    @property
    def starting(self) -> bool:
        """True until `init_timeout` is over."""
        return clock.monotonic() < self._init_deadline

    def __repr__(self) -> str:
        stopping = ", stopping" if self.stopping else ""
        return f"<Relay: {len(self.environments)} environments{stopping}>"

    async def run(self) -> None:
        """Keep all environments up to date until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for environment in self.environments.values():
                tasks.create_task(self._keep_running(environment))
                tasks.create_task(self._report_start(environment))

    async def _keep_running(self, environment: Environment) -> None:
        """Run an environment, and restart it after any exception, which affects no other one."""
        while True:
            try:
                await environment.run()
            except Exception:  # noqa: BLE001 - the one boundary between environments
                environment.fail()
            await asyncio.sleep(RESTART_DELAY)

    async def _report_start(self, environment: Environment) -> None:
        """Log once whether an environment was initialized, in ld-relay's words (status 8.3)."""
        name, key = environment.spec.name, environment.spec.sdk_key.masked
        if await self._initialized(environment):
            _log.info('Initialized LaunchDarkly client for "%s" (SDK key %s)', name, key)
            return
        refused = environment.init_done.is_set()
        reason = "the SDK key is refused" if refused else "no data from upstream within initTimeout"
        serving = "no data" if environment.payload is None else "stored data"
        text = 'Error initializing LaunchDarkly client for "%s": %s; serving %s, still trying'
        _log.log(self._init_failure_level, text, name, reason, serving)

    async def _initialized(self, environment: Environment) -> bool:
        """Wait until initialization ends or times out; return whether upstream delivered data."""
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - clock.monotonic())):
                await environment.init_done.wait()
        except TimeoutError:
            return False
        return environment.connection.state is ConnectionState.VALID

    async def wait_until_synced(self, *, fail_fast: bool = False) -> bool:
        """Wait until every environment has data from upstream, and its mirrors have stored it.

        Args:
            fail_fast: return at the first environment that fails.

        Returns:
            True if all environments were synced within `init_timeout`.
        """
        tasks = [asyncio.create_task(self._wait_synced(e)) for e in self.environments.values()]
        complete = True
        try:
            for synced in asyncio.as_completed(tasks):
                complete = await synced and complete
                if fail_fast and not complete:
                    break
        finally:
            for task in tasks:
                task.cancel()
        return complete

    async def _wait_synced(self, environment: Environment) -> bool:
        if not await self._initialized(environment):
            return False
        try:
            async with asyncio.timeout(max(0.0, self._init_deadline - clock.monotonic())):
                for mirror in environment.mirrors:
                    await mirror.flushed()
        except TimeoutError:
            _log.error('The data of "%s" could not be stored in time', environment.spec.name)
            return False
        return True
