"""LaunchDarkly's `/sdk/latest-all`, asked again and again (sdk-behaviour 11.2)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator

from relay.errors import InvalidData, UpstreamRefused, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.protocol import fdv1
from relay.sources import Current, Update
from relay.sources.retry import Schedule, Times
from relay.sources.sse import interruption
from relay.sources.waiting import pause
from relay.upstream import Upstream, read_body

_STATUSES = frozenset({200, 304})
_NOT_MODIFIED = 304


class Polling:
    """One environment's data by polling.

    Args:
        upstream: the session.
        base_uri: the base, such as `https://sdk.launchdarkly.com`.
        key: the environment's.
        times: waiting times; after a failure the next poll comes no later than the interval.
    """

    def __init__(
        self,
        upstream: Upstream,
        base_uri: str,
        key: SDKKey,
        times: Times = Times(),  # noqa: B008 - frozen
    ) -> None:
        self._upstream = upstream
        self._url = f"{base_uri.rstrip('/')}/sdk/latest-all"
        self._key = key
        self._times = times
        self._again = asyncio.Event()
        self._etag = ""

    def refresh(self) -> None:
        """Ask for everything now."""
        self._etag = ""
        self._again.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield all data when they changed, and how it stands, until cancelled."""
        schedule = Schedule(self._times)
        self._etag = ""
        while True:
            self._again.clear()
            delay = self._times.poll_interval
            try:
                update = await self._poll()
                schedule.succeeded(time.monotonic())
            except (UpstreamUnavailable, InvalidData) as e:
                refused = isinstance(e, UpstreamRefused)
                wait = schedule.failed(time.monotonic(), random.random(), refused=refused)  # noqa: S311 - jitter
                delay = wait if refused else min(wait, delay)
                update = interruption("poll", e, delay)
            yield update
            await pause(self._again, delay)

    async def _poll(self) -> Update:
        asked_with = self._etag
        async with self._upstream.get(
            self._url,
            self._key,
            accept="application/json",
            read_timeout=self._times.poll_timeout,
            headers={"If-None-Match": asked_with} if asked_with else None,
            statuses=_STATUSES if asked_with else frozenset({200}),
        ) as response:
            if response.status == _NOT_MODIFIED:
                return Current()
            async with asyncio.timeout(self._times.poll_timeout):
                body = await read_body(response)
            changes = fdv1.parse_all(body)
            if self._etag == asked_with and not self._again.is_set():
                self._etag = response.headers.get("ETag", "")
            return changes
