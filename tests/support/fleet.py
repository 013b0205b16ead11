"""Relays of one fleet: real processes with a real Redis, and how they stand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

WITHIN = 5.0
"""Seconds after any loss within which the next change is everywhere."""

PATIENCE = 15.0


T = TypeVar("T", bound="Fleet")


class Fleet:
    """Relays of one fleet.

    Args:
        relays: that run, or were killed.
        upstream: of all of them.
        session: to ask them.
    """

    streams = SDK_KEY
    """Name of the streams that they have upstream."""

    def __init__(
        self,
        relays: Sequence[RelayProcess],
        upstream: ScriptedUpstream,
        session: aiohttp.ClientSession,
    ) -> None:
        self.relays = list(relays)
        self._upstream = upstream
        self._session = session
        self._version = 1
        self.others: tuple[dict[str, Any], ...] = ()
        """Flags and segments that LaunchDarkly has beside the flag."""

    async def get(self, relay: RelayProcess, path: str) -> Any:
        try:
            headers = {"Authorization": SDK_KEY}
            async with self._session.get(relay.url + path, headers=headers) as response:
                return json.loads(await response.read()) if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def version(self, relay: RelayProcess) -> int:
        """Return the version of the flag that a relay serves; 0 if it does not answer."""
        found = await self.get(relay, "/sdk/latest-all")
        return found["flags"]["lamp"]["version"] if found else 0

    async def role(self, relay: RelayProcess) -> dict[str, Any]:
        status = await self.get(relay, "/status")
        return status["environments"]["main"].get("fleet", {}) if status else {}

    async def leader(self) -> RelayProcess:
        """Wait until one leads; return it."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for relay in self.relays:
                    if (await self.role(relay)).get("role") == "leader":
                        return relay
                await asyncio.sleep(0.02)

    async def settled(self, relays: Sequence[RelayProcess] | None = None) -> RelayProcess:
        """Wait until one leads, alone with a stream, and all others follow; return it."""
        relays = self.relays if relays is None else relays
        async with asyncio.timeout(PATIENCE):
            while True:
                roles = [(await self.role(relay)).get("role") for relay in relays]
                one = roles.count("leader") == 1 and roles.count("follower") == len(roles) - 1
                if one and self._upstream.open_streams(self.streams) == 1:
                    return relays[roles.index("leader")]
                await asyncio.sleep(0.02)

    async def change(self) -> int:
        """Change the flag at LaunchDarkly; return its new version."""
        self._version += 1
        changed = flag(version=self._version)
        self._upstream.serve(SDK_KEY, all_data(changed, *self.others))
        await self._upstream.patch(SDK_KEY, changed)
        return self._version

    async def everywhere(
        self, version: int, within: float, relays: Sequence[RelayProcess] | None = None
    ) -> None:
        """Wait until these relays, or all, serve a version; none may go back meanwhile."""
        seen: dict[RelayProcess, int] = {}
        async with asyncio.timeout(within):
            for relay in self.relays if relays is None else relays:
                while (found := await self.version(relay)) < version:
                    assert found >= seen.get(relay, 0) or not found
                    seen[relay] = max(found, seen.get(relay, 0))
                    await asyncio.sleep(0.02)


def variables(upstream: ScriptedUpstream, url: str, **more: str) -> dict[str, str]:
    return {
        "LD_ENV_main": SDK_KEY,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_REDIS": "true",
        "REDIS_URL": url,
        "FLEET": "true",
        "INIT_TIMEOUT": "10s",
        **more,
    }


@asynccontextmanager
async def fleet_of(
    count: int,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    url: str,
    make: Callable[..., T] = Fleet,  # type: ignore[assignment]
    **more: str,
) -> AsyncIterator[T]:
    async with AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=1.0)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        relays = [RelayProcess(tmp_path, **variables(upstream, url, **more)) for _ in range(count)]
        await asyncio.gather(*map(stack.enter_async_context, relays))
        yield make(relays, upstream, session)


async def eventually(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def stored(redis: RedisServer) -> int:
    """The version of the flag in Redis; 0 without one."""
    json_ = redis.hash("launchdarkly:features").get("lamp")
    return json.loads(json_)["version"] if json_ else 0
