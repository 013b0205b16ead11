"""Data source that polls LaunchDarkly's `/sdk/latest-all` (sdk-behaviour 11.2)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from relay import clock, randomness
from relay.aio import run_in_slices, wait_for
from relay.errors import InvalidData, UpstreamRefused, UpstreamUnavailable
from relay.model.credential import SDKKey, masked_url
from relay.model.item import Kind
from relay.model.payload import ChangeSet
from relay.protocol import fdv1
from relay.protocol.urls import data_url
from relay.sources import Update, UpToDate
from relay.sources.event_stream import interruption
from relay.sources.timings import SourceBackoff, SourceTimings
from relay.upstream import Upstream, read_body

_STATUSES = frozenset({200, 304})
_NOT_MODIFIED = 304

MAX_PAST_ETAGS = 32
"""Number of earlier ETags remembered. Older data is recognised by its item versions instead."""


class PollingSource:
    """Data source that polls one environment.

    Args:
        upstream: the HTTP session.
        base_uri: base URI, such as `https://sdk.launchdarkly.com`.
        key: the environment's SDK key.
        timings: delays and timeouts; after a failure the next poll comes no later than the
            interval, unless the key was refused.
        payload_filter: key of the payload filter whose part of the data is wanted; empty for all.
    """

    protocol = "fdv1"

    def __init__(
        self,
        upstream: Upstream,
        base_uri: str,
        key: SDKKey,
        timings: SourceTimings = SourceTimings(),
        *,
        payload_filter: str = "",
    ) -> None:
        self._upstream = upstream
        self._url = data_url(base_uri, "/sdk/latest-all", payload_filter)
        self._key = key
        self._timings = timings
        self._poll_now = asyncio.Event()
        self._etag = ""
        self._check_requested = False
        """True if `check` asked for the next poll, which may hit a cache that lags behind."""
        self._past_etags: deque[str] = deque(maxlen=MAX_PAST_ETAGS)
        """ETags of earlier data."""
        self._versions: dict[tuple[Kind, str], int] = {}
        """Item versions of the data delivered last."""

    def __repr__(self) -> str:
        return f"<PollingSource {masked_url(self._url, 'xxxxx')} etag={self._etag!r}>"

    def resync(self) -> None:
        """Poll now, without an ETag."""
        self._etag = ""
        self._poll_now.set()

    def check(self, *, reconnect: bool = False) -> None:
        """Poll now, and ignore a response that is older than the data delivered before.

        Regular polls accept older data: upstream may have gone back on purpose.
        """
        del reconnect  # there is no connection to replace
        self._check_requested = True
        self._poll_now.set()

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield all data on each change, and confirmations, until cancelled."""
        del basis  # only that of FDv2 could be named
        backoff = SourceBackoff(self._timings)
        self._etag = ""
        while True:
            self._poll_now.clear()
            delay = self._timings.poll_interval
            try:
                is_check, self._check_requested = self._check_requested, False
                update = await self._poll(is_check=is_check)
                backoff.succeeded(clock.monotonic())
            except (UpstreamUnavailable, InvalidData) as e:
                refused = isinstance(e, UpstreamRefused)
                wait = backoff.failed(clock.monotonic(), randomness.fraction(), refused=refused)
                delay = wait if refused else min(wait, delay)
                update = interruption("poll", e, delay)
            yield update
            await wait_for(self._poll_now, delay)

    async def _poll(self, *, is_check: bool) -> Update:
        sent_etag = self._etag
        async with self._upstream.get(
            self._url,
            self._key,
            accept="application/json",
            read_timeout=self._timings.poll_timeout,
            headers={"If-None-Match": sent_etag} if sent_etag else None,
            statuses=_STATUSES if sent_etag else frozenset({200}),
        ) as response:
            if response.status == _NOT_MODIFIED:
                return UpToDate()
            async with asyncio.timeout(self._timings.poll_timeout):
                body = await read_body(response)
            changes = await run_in_slices(fdv1.all_in_steps(body))
            etag = response.headers.get("ETag", "")
            if is_check and self._is_older(changes, etag):
                return UpToDate()  # the data delivered before is newer
            if sent_etag and sent_etag != etag:
                self._past_etags.append(sent_etag)
            if etag in self._past_etags:  # upstream has gone back
                self._past_etags.remove(etag)
            self._versions = {(item.kind, item.key): item.version for item in changes.items}
            if self._etag == sent_etag and not self._poll_now.is_set():
                self._etag = etag
            return changes

    def _is_older(self, changes: ChangeSet, etag: str) -> bool:
        if etag and etag in self._past_etags:
            return True
        return any(
            item.version < self._versions.get((item.kind, item.key), item.version)
            for item in changes.items
        )
