"""LaunchDarkly's `/sdk/latest-all`, asked again and again (sdk-behaviour 11.2)."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator

from relay.aio import run_in_slices, wait_for
from relay.backoff import Backoff, SourceTimings
from relay.errors import InvalidData, UpstreamRefused, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.model.item import Kind
from relay.model.payload import ChangeSet
from relay.protocol import fdv1
from relay.protocol.urls import join
from relay.sources import Update, UpToDate
from relay.sources.event_stream import interruption
from relay.upstream import Upstream, read_body

_STATUSES = frozenset({200, 304})
_NOT_MODIFIED = 304

PAST = 32
"""ETags of earlier data that are remembered: what lags behind by more is told by its versions."""


class PollingSource:
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
        times: SourceTimings = SourceTimings(),  # noqa: B008 - frozen
    ) -> None:
        self._upstream = upstream
        self._url = join(base_uri, "/sdk/latest-all")
        self._key = key
        self._times = times
        self._again = asyncio.Event()
        self._etag = ""
        self._hinted = False
        """Whether the next poll is for a hint, and may meet a cache that lags behind."""
        self._past: deque[str] = deque(maxlen=PAST)
        """ETags of the data before."""
        self._versions: dict[tuple[Kind, str], int] = {}
        """Of the data that were delivered last."""

    def resync(self) -> None:
        """Ask for everything now."""
        self._etag = ""
        self._again.set()

    def check(self, *, reconnect: bool = False) -> None:
        """Poll now, and take an answer only if it is no older than the one before.

        The regular poll takes whatever upstream has: there may be reasons to go back.
        """
        del reconnect  # asking again is all that can be done
        self._hinted = True
        self._again.set()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield all data when they changed, and how it stands, until cancelled."""
        schedule = Backoff(self._times)
        self._etag = ""
        while True:
            self._again.clear()
            delay = self._times.poll_interval
            try:
                hinted, self._hinted = self._hinted, False
                update = await self._poll(hinted=hinted)
                schedule.succeeded(time.monotonic())
            except (UpstreamUnavailable, InvalidData) as e:
                refused = isinstance(e, UpstreamRefused)
                wait = schedule.failed(time.monotonic(), random.random(), refused=refused)  # noqa: S311 - jitter
                delay = wait if refused else min(wait, delay)
                update = interruption("poll", e, delay)
            yield update
            await wait_for(self._again, delay)

    async def _poll(self, *, hinted: bool) -> Update:
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
                return UpToDate()
            async with asyncio.timeout(self._times.poll_timeout):
                body = await read_body(response)
            changes = await run_in_slices(fdv1.all_in_steps(body))
            etag = response.headers.get("ETag", "")
            if hinted and self._is_older(changes, etag):
                return UpToDate()  # what was delivered is newer than this
            if asked_with and asked_with != etag:
                self._past.append(asked_with)
            if etag in self._past:  # upstream has gone back
                self._past.remove(etag)
            self._versions = {(item.kind, item.key): item.version for item in changes.items}
            if self._etag == asked_with and not self._again.is_set():
                self._etag = etag
            return changes

    def _is_older(self, changes: ChangeSet, etag: str) -> bool:
        if etag and etag in self._past:
            return True
        return any(
            item.version < self._versions.get((item.kind, item.key), item.version)
            for item in changes.items
        )
