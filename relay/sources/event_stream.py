"""An event stream that reconnects for ever, whatever its messages mean."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing

import aiohttp

from relay.aio import run_in_slices, wait_for
from relay.backoff import Backoff, SourceTimings
from relay.errors import ErrorKind, InvalidData, UpstreamRefused, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.model.payload import ChangeSet
from relay.protocol.sse import Decoder, Event
from relay.sources import Interrupted, Update, UpToDate
from relay.upstream import Upstream

Understand = Callable[[Event], Generator[None, None, ChangeSet | None]]
"""Finds out in steps what a message changes, or None; raises `InvalidData` if the message is
broken."""


class EventStream:
    """A data source: one stream of upstream, opened again whenever it ends.

    Args:
        upstream: the session.
        url: of the stream.
        key: what opens it.
        understand: gives messages their meaning.
        times: waiting times.
    """

    def __init__(
        self,
        upstream: Upstream,
        url: str,
        key: SDKKey,
        understand: Understand,
        times: SourceTimings,
    ) -> None:
        self._upstream = upstream
        self._url = url
        self._key = key
        self._understand = understand
        self._times = times
        self._again = asyncio.Event()
        self._response: aiohttp.ClientResponse | None = None
        self._last_id = ""

    def resync(self) -> None:
        """Connect anew now: a stream begins with all data."""
        self._again.set()
        if self._response is not None:
            self._response.close()

    def check(self, *, reconnect: bool = False) -> None:
        """Connect now if there is no connection; else news come by themselves, unless in doubt."""
        if self._response is None:
            self._again.set()
        elif reconnect:
            self.resync()

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Yield what the stream brings, and how it stands, until cancelled."""
        schedule = Backoff(self._times)
        while True:
            self._again.clear()
            try:
                async with aclosing(self._connection(schedule)) as updates:
                    async for update in updates:
                        yield update
            except (UpstreamUnavailable, InvalidData) as e:
                error = e
            if self._again.is_set():
                continue
            refused = isinstance(error, UpstreamRefused)
            delay = schedule.failed(time.monotonic(), random.random(), refused=refused)  # noqa: S311 - jitter
            yield interruption("stream connection", error, delay)
            await wait_for(self._again, delay)

    async def _connection(self, schedule: Backoff) -> AsyncGenerator[Update, None]:
        """Yield what one connection brings; it ends by raising."""
        async with self._upstream.get(
            self._url,
            self._key,
            accept="text/event-stream",
            read_timeout=self._times.read_timeout,
            headers={"Last-Event-Id": self._last_id} if self._last_id else None,
        ) as response:
            _demand_event_stream(response)
            self._response = response
            try:
                async with aclosing(self._messages(response, schedule)) as updates:
                    async for update in updates:
                        yield update
            finally:
                self._response = None
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "the server closed the stream")

    async def _messages(
        self, response: aiohttp.ClientResponse, schedule: Backoff
    ) -> AsyncGenerator[Update, None]:
        decoder = Decoder()
        told = None  # when we last yielded; None until this connection has delivered
        async for chunk in response.content.iter_any():
            for event in decoder.feed(chunk):
                changes = await run_in_slices(self._understand(event))
                self._last_id = event.id
                if changes is not None:
                    told = time.monotonic()
                    if changes.full:
                        schedule.succeeded(told)
                    yield changes
            schedule.asked_for(decoder.retry)
            # Heartbeats, too, show that the data are current, once there are some.
            if told is not None and time.monotonic() - told >= self._times.confirm_every:
                told = time.monotonic()
                yield UpToDate()


def _demand_event_stream(response: aiohttp.ClientResponse) -> None:
    if response.content_type != "text/event-stream":
        reason = "the answer is not an event stream"
        raise UpstreamUnavailable(ErrorKind.ERROR_RESPONSE, reason, response.status)


def interruption(what: str, error: UpstreamUnavailable | InvalidData, delay: float) -> Interrupted:
    """Return what a source yields for an error after which it tries again in `delay` seconds."""
    if isinstance(error, InvalidData):
        return Interrupted(ErrorKind.INVALID_DATA, f"Error in {what} (will retry): {error}")
    if isinstance(error, UpstreamRefused):
        reason = f"Upstream refuses the key: {error.reason}; next attempt in {delay:.0f} s"
        return Interrupted(error.kind, reason, error.status, refused=True)
    reason = f"Error in {what} (will retry): {error.reason}"
    return Interrupted(error.kind, reason, error.status)
