"""An event stream that reconnects forever, independent of the protocol of its messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from relay import clock, randomness
from relay.aio import run_in_slices, wait_for
from relay.errors import (
    ErrorKind,
    InvalidData,
    RelayError,
    UpstreamRefused,
    UpstreamUnavailable,
)
from relay.model.credential import Credential, masked_url
from relay.protocol.sse import Decoder, Event
from relay.sources import Interrupted, UpToDate
from relay.sources.timings import SourceBackoff, SourceTimings
from relay.steps import Steps
from relay.upstream import Response, Upstream


class Delivery(Protocol):
    """Content of a message."""

    @property
    def full(self) -> bool:
        """True if it is complete, so that nothing before it matters."""


DeliveryT = TypeVar("DeliveryT", bound=Delivery)

Interpret = Callable[[Event], Steps[DeliveryT | None]]
"""Converts a message into what it means, such as a change set, in steps; None if it changes
nothing. Raises `InvalidData` if the message is broken, `Reconnect` if it asks for that."""


class Reconnect(RelayError):
    """Upstream asks for a new connection, after the usual delay."""


class EventStream(Generic[DeliveryT]):
    """Follows one upstream event stream, and reopens it whenever it ends.

    Args:
        upstream: the HTTP session.
        url: URL of the stream.
        key: the key to authenticate with.
        interpret: converts messages, into change sets as a rule.
        timings: delays and timeouts.
    """

    def __init__(
        self,
        upstream: Upstream,
        url: str,
        key: Credential,
        interpret: Interpret[DeliveryT],
        timings: SourceTimings,
    ) -> None:
        self._upstream = upstream
        self._url = url
        self._key = key
        self._interpret = interpret
        self._timings = timings
        self._retry_now = asyncio.Event()
        self._response: Response | None = None
        self._last_id = ""

    def __repr__(self) -> str:
        state = "disconnected" if self._response is None else "connected"
        return f"<{type(self).__name__} {self.shown_url} {state}>"

    @property
    def shown_url(self) -> str:
        """URL of the stream for people, without passwords."""
        base, mark, query = self._url.partition("?")
        return masked_url(base, "xxxxx") + mark + query

    def resync(self) -> None:
        """Reconnect now: a new stream begins with all data."""
        self._retry_now.set()
        if self._response is not None:
            self._response.close()

    def check(self, *, reconnect: bool = False) -> None:
        """Connect now if disconnected; a healthy stream is replaced only if `reconnect`."""
        if self._response is None:
            self._retry_now.set()
        elif reconnect:
            self.resync()

    async def updates(
        self, basis: str = ""
    ) -> AsyncGenerator[DeliveryT | UpToDate | Interrupted, None]:
        """Yield changes, confirmations and interruptions until cancelled."""
        del basis  # each stream begins with everything
        backoff = SourceBackoff(self._timings)
        error: UpstreamUnavailable | InvalidData | Reconnect
        while True:
            self._retry_now.clear()
            try:
                async with aclosing(self._connection(backoff)) as updates:
                    async for update in updates:
                        yield update
            except (UpstreamUnavailable, InvalidData, Reconnect) as e:
                error = e
            if self._retry_now.is_set():
                continue
            refused = self._refuses(error)
            delay = backoff.failed(clock.monotonic(), randomness.fraction(), refused=refused)
            if not isinstance(error, Reconnect):
                yield self._interruption(error, delay)
            await wait_for(self._retry_now, delay)

    def _refuses(self, error: RelayError) -> bool:
        """Return whether upstream refuses the key, which is tried again less and less often."""
        return isinstance(error, UpstreamRefused)

    def _interruption(self, error: UpstreamUnavailable | InvalidData, delay: float) -> Interrupted:
        return interruption("stream connection", error, delay)

    async def _connection(
        self, backoff: SourceBackoff
    ) -> AsyncGenerator[DeliveryT | UpToDate, None]:
        """Yield the updates of one connection, which always ends by raising."""
        async with self._upstream.get(
            self._url,
            self._key,
            accept="text/event-stream",
            read_timeout=self._timings.read_timeout,
            headers={"Last-Event-Id": self._last_id} if self._last_id else None,
        ) as response:
            require_event_stream(response)
            self._response = response
            try:
                async with aclosing(self._messages(response, backoff)) as updates:
                    async for update in updates:
                        yield update
            finally:
                self._response = None
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "the server closed the stream")

    async def _messages(
        self, response: Response, backoff: SourceBackoff
    ) -> AsyncGenerator[DeliveryT | UpToDate, None]:
        decoder = Decoder()
        last_yield = None  # monotonic; None until this connection has delivered
        async for chunk in response.content.iter_any():
            for event in decoder.feed(chunk):
                changes = await run_in_slices(self._interpret(event))
                self._last_id = event.id
                if changes is not None:
                    last_yield = clock.monotonic()
                    if changes.full:
                        backoff.succeeded(last_yield)
                    yield changes
            backoff.set_first_delay(decoder.retry)
            # Heartbeats confirm the data, too, once there is some.
            if (
                last_yield is not None
                and clock.monotonic() - last_yield >= self._timings.confirm_every
            ):
                last_yield = clock.monotonic()
                yield UpToDate()


def require_event_stream(response: Response) -> None:
    """Check the content type of a response.

    Raises:
        UpstreamUnavailable: it is something else than an event stream.
    """
    if response.content_type != "text/event-stream":
        reason = "the answer is not an event stream"
        raise UpstreamUnavailable(ErrorKind.ERROR_RESPONSE, reason, response.status)


def interruption(what: str, error: UpstreamUnavailable | InvalidData, delay: float) -> Interrupted:
    """Return the update for an error after which the source retries in `delay` seconds."""
    if isinstance(error, InvalidData):
        return Interrupted(ErrorKind.INVALID_DATA, f"Error in {what} (will retry): {error}")
    if isinstance(error, UpstreamRefused):
        reason = f"Upstream refuses the key: {error.reason}; next attempt in {delay:.0f} s"
        return Interrupted(error.kind, reason, error.status, refused=True)
    reason = f"Error in {what} (will retry): {error.reason}"
    return Interrupted(error.kind, reason, error.status)
