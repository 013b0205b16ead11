"""The relay: which environments exist, and which credential opens which of them.

This is the only place that chooses implementations: which source, which stores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from relay.environment import ConnectionState, Environment

RESTART_DELAY = 10.0
"""Seconds before an environment that failed by a defect of ours is run again."""


class Relay:
    """All environments of this process.

    Args:
        environments: what it serves.
        init_timeout: seconds to wait for upstream before serving without it counts as started.
    """

    def __init__(self, environments: Sequence[Environment], init_timeout: float) -> None:
        self.environments = {environment.spec.name: environment for environment in environments}
        self.by_sdk_key = {e.spec.sdk_key.value: e for e in environments}
        self.by_mobile_key = {e.spec.mobile_key.value: e for e in environments if e.spec.mobile_key}
        self.by_environment_id = {
            e.spec.environment_id.value: e for e in environments if e.spec.environment_id
        }
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

    async def _keep_running(self, environment: Environment) -> None:
        """One environment cannot hurt another: the only broad `except` of the program."""
        while True:
            try:
                await environment.run()
            except Exception:  # noqa: BLE001 - the one boundary between environments
                environment.fail()
            await asyncio.sleep(RESTART_DELAY)

    async def until_decided(self) -> bool:
        """Wait until upstream has answered for each environment, or the time is over.

        Returns:
            Whether each environment has data from upstream.
        """
        decided = (environment.decided.wait() for environment in self.environments.values())
        remaining = max(0.0, self._init_deadline - time.monotonic())
        try:
            async with asyncio.timeout(remaining):
                await asyncio.gather(*decided)
        except TimeoutError:
            return False
        states = (e.connection.state for e in self.environments.values())
        return all(state is ConnectionState.VALID for state in states)
