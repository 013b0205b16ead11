"""Data source for FDv2: polls, streams that continue, and the way back to FDv1 (fdv2 13.7.1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from relay import clock, randomness
from relay.aio import SLICE, run_in_slices, wait_for
from relay.errors import (
    ErrorKind,
    InvalidData,
    RelayError,
    UpstreamRefused,
    UpstreamUnavailable,
)
from relay.model.credential import SDKKey, masked_url
from relay.model.payload import ChangeSet, Selector, distance
from relay.protocol import fdv2
from relay.protocol.fdv2 import Fallback, Goodbye, Reader, Told
from relay.protocol.sse import Decoder
from relay.protocol.urls import join, transfer_url
from relay.sources import DataSource, Interrupted, Update, UpToDate
from relay.sources.event_stream import Reconnect, interruption, require_event_stream
from relay.sources.timings import SourceBackoff, SourceTimings
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog
from relay.upstream import Response, Upstream, first_headers, read_body

STREAM, POLL = "/sdk/stream", "/sdk/poll"

_NOT_THERE = frozenset({404, 405})
"""Statuses of an upstream that does not know FDv2, such as an older relay."""

Success = ChangeSet | UpToDate
Failure = UpstreamUnavailable | InvalidData


class _FallBack(RelayError):
    """Upstream is to be followed by FDv1.

    Args:
        fallback: what upstream says about it.
        reason: a sentence for the log.
        update: came with it, and is to be applied first.
    """

    def __init__(self, fallback: Fallback, reason: str, update: Success | None = None) -> None:
        super().__init__(reason)
        self.fallback = fallback
        self.update = update


class FDv2Source:
    """Data source that follows one environment by FDv2.

    Everything is polled, then a stream continues from there; while streams fail, polls do. Each
    request names the data that are there already, so it costs upstream what has changed since.

    Args:
        upstream: the HTTP session.
        base_uri: base URI of polls, such as `https://sdk.launchdarkly.com`.
        stream_uri: base URI of streams; None to poll only.
        key: the environment's SDK key.
        make_fdv1: makes the source that is used while upstream wants FDv1, or knows nothing else.
        log: a logger that names the environment.
        timings: delays and timeouts.
        payload_filter: key of the payload filter whose part of the data is wanted; empty for all.
            It is followed by FDv1 if upstream does not filter by FDv2, as LaunchDarkly.
    """

    def __init__(
        self,
        upstream: Upstream,
        base_uri: str,
        stream_uri: str | None,
        key: SDKKey,
        *,
        make_fdv1: Callable[[], DataSource],
        log: Log,
        timings: SourceTimings = SourceTimings(),
        payload_filter: str = "",
    ) -> None:
        self._upstream = upstream
        self._base_uri = base_uri
        self._stream_uri = stream_uri
        self._key = key
        self._make_fdv1 = make_fdv1
        self._log = log
        self._timings = timings
        self._filter = payload_filter
        self._filtered_id: str | None = None
        """ID of the payload that upstream is known to have filtered."""
        self._unfiltered = ""
        """Upstream's name of data that it has not filtered; empty if it does, as far as known."""
        self._basis = ""
        """Upstream's name of the data that are there already."""
        self._selector: Selector | None = None
        """The same, if they came in this run."""
        self._begins_anew = True
        """True if everything is wanted: by a poll, which then comes before the stream."""
        self._check_requested = False
        """True if `check` asked for the next poll, which may hit a cache that lags behind."""
        self._retry_now = asyncio.Event()
        self._response: Response | None = None
        """Response of the stream."""
        self._fdv1: DataSource | None = None
        self._works_since = 0.0
        """Monotonic time at which the stream last delivered, or began to be tried."""
        self._stream_outage = OutageLog(log)

    def __repr__(self) -> str:
        if self._fdv1 is not None:
            return f"<FDv2Source [by {self._fdv1!r}]>"
        state = "disconnected" if self._response is None else "connected"
        url = join(self._stream_uri, STREAM) if self._stream_uri else join(self._base_uri, POLL)
        return f"<FDv2Source {masked_url(url, 'xxxxx')} {state} basis={self._basis!r}>"

    @property
    def protocol(self) -> str:
        """Protocol by which upstream is followed at present."""
        return "fdv2" if self._fdv1 is None else self._fdv1.protocol

    def resync(self) -> None:
        """Request everything now."""
        if self._fdv1 is not None:
            self._fdv1.resync()
        else:
            self._begins_anew = True
            self._hurry()

    def check(self, *, reconnect: bool = False) -> None:
        """Poll or connect now; a healthy stream is replaced only if `reconnect`."""
        if self._fdv1 is not None:
            self._fdv1.check(reconnect=reconnect)
        elif self._response is None or reconnect:
            self._check_requested = True
            self._hurry()

    def _hurry(self) -> None:
        self._retry_now.set()
        if self._response is not None:
            self._response.close()

    async def updates(self, basis: str = "") -> AsyncGenerator[Update, None]:
        """Yield what upstream has beyond `basis`, then changes, until cancelled."""
        self._basis, self._begins_anew, self._selector = basis, not basis, None
        self._filtered_id, self._unfiltered = None, ""
        while True:
            try:
                follow = self._polls() if self._stream_uri is None else self._streams()
                async with aclosing(follow) as updates:
                    async for update in updates:
                        yield update
            except _FallBack as e:
                if e.update is not None:
                    yield e.update
                period = e.fallback.period(randomness.fraction())
                self._log.info("%s; it is followed by FDv1 for %.0f s", e, period)
            async with aclosing(self._by_fdv1(period)) as updates:
                async for update in updates:
                    yield update
            self._log.info("Upstream is followed by FDv2 again")

    async def _polls(self) -> AsyncGenerator[Update, None]:
        """Yield the updates of polls only; raise `_FallBack` if it has to be FDv1."""
        backoff = SourceBackoff(self._timings)
        while True:
            self._retry_now.clear()
            delay = self._timings.poll_interval
            polled = await self._try_poll()
            if isinstance(polled, RelayError):
                if _is_not_there(polled):
                    raise _unknown_to_upstream(polled) from polled
                refused = isinstance(polled, UpstreamRefused)
                wait = backoff.failed(clock.monotonic(), randomness.fraction(), refused=refused)
                delay = wait if refused else min(wait, delay)
                yield interruption("poll", polled, delay)
            else:
                backoff.succeeded(clock.monotonic())
                yield polled
            await wait_for(self._retry_now, delay)

    async def _streams(self) -> AsyncGenerator[Update, None]:
        """Yield the updates of streams, and of polls while these fail; raise as `_polls` does."""
        backoff = SourceBackoff(self._timings)
        self._works_since = clock.monotonic()
        while True:
            self._retry_now.clear()
            polled = await self._try_poll() if self._begins_anew else None
            if isinstance(polled, Success):
                yield polled
            error: Failure | Reconnect
            try:
                async with aclosing(self._stream(backoff)) as updates:
                    async for update in updates:
                        yield update
            except (UpstreamUnavailable, InvalidData, Reconnect) as e:
                error = e
            if self._retry_now.is_set():
                continue
            if polled is None and self._needs_poll(error):
                polled = await self._try_poll()
                if isinstance(polled, Success):
                    yield polled
            delay, outage = self._next_attempt(error, polled, backoff)
            if outage is not None:
                yield outage
            await wait_for(self._retry_now, delay)

    def _needs_poll(self, error: Failure | Reconnect) -> bool:
        """Return whether a poll takes the place of a stream that has failed."""
        is_late = clock.monotonic() - self._works_since >= self._timings.polls_after
        return is_late or _is_not_there(error)

    def _next_attempt(
        self, error: Failure | Reconnect, polled: Success | Failure | None, backoff: SourceBackoff
    ) -> tuple[float, Interrupted | None]:
        """Return the seconds until the next stream, and an interruption if data may be missing.

        Args:
            error: how the last one ended.
            polled: result of a poll before or after it; None if there was none.
            backoff: for streams.

        Raises:
            _FallBack: upstream knows neither streams nor polls.
        """
        if isinstance(error, Reconnect):
            return backoff.failed(clock.monotonic(), randomness.fraction()), None
        if isinstance(polled, Success) and self._needs_poll(error):
            text, delay = "Polling every %g s, as the stream fails: %s", self._timings.poll_interval
            self._stream_outage.begin(str(error), text, delay, error)
            return delay, None
        if _is_not_there(error) and polled is not None and _is_not_there(polled):
            raise _unknown_to_upstream(error) from error
        refused = isinstance(error, UpstreamRefused)
        delay = backoff.failed(clock.monotonic(), randomness.fraction(), refused=refused)
        return delay, interruption("stream connection", error, delay)

    async def _try_poll(self) -> Success | Failure:
        try:
            return await self._poll()
        except (UpstreamUnavailable, InvalidData) as e:
            return e

    async def _poll(self) -> Success:
        """Return what upstream has beyond the data that are there.

        Raises:
            UpstreamUnavailable: upstream cannot be reached, or refuses.
            InvalidData: the answer is broken.
            _FallBack: upstream is to be followed by FDv1.
        """
        is_check, self._check_requested = self._check_requested, False
        basis = self._take_basis()
        try:
            told, directive = await self._ask(basis, self._filter)
            if isinstance(told, Goodbye):
                raise _goodbye(told, UpstreamUnavailable(ErrorKind.ERROR_RESPONSE, "goodbye"))
            await self._require_filter(told)
            older = is_check and isinstance(told, ChangeSet) and self._is_older(told)
            update = UpToDate() if older else self._delivered(told)
        except (InvalidData, UpstreamUnavailable) as e:
            self._begins_anew |= not basis or isinstance(e, InvalidData)
            raise
        if directive is not None:
            raise _FallBack(directive, _WANTED, update)
        return update

    async def _ask(self, basis: str, payload_filter: str) -> tuple[Told, Fallback | None]:
        """Return what a poll tells, and what it says about FDv1."""
        limit = self._timings.poll_timeout
        url = transfer_url(self._base_uri, POLL, basis, payload_filter)
        async with self._get(url, "application/json", limit) as response:
            directive = fdv2.fallback(first_headers(response))
            async with asyncio.timeout(limit):
                body = await read_body(response)
        return await run_in_slices(fdv2.read_poll(body, basis)), directive

    async def _require_filter(self, told: Told) -> None:
        """Ensure that upstream has filtered what it tells.

        LaunchDarkly takes no notice of filters by FDv2 (fdv2 13.7.1). Then all data are of the same
        payload as those with the filter. So all are asked for once, with the filtered ones as
        basis: that costs much only where the filter works.

        Raises:
            _FallBack: it has not.
        """
        is_full = isinstance(told, ChangeSet) and told.full
        if self._unfiltered and not is_full:
            if isinstance(told, ChangeSet) and told.selector:
                self._unfiltered = told.selector.state
            raise _FallBack(Fallback(), _NOT_FILTERED)
        if not self._filter or not isinstance(told, ChangeSet) or not told.full:
            return
        selector = told.selector or Selector()
        if selector.id == self._filtered_id:
            return
        others, _ = await self._ask(selector.state, "")
        if isinstance(others, Goodbye):
            raise UpstreamUnavailable(ErrorKind.ERROR_RESPONSE, "goodbye")
        other = others.selector if isinstance(others, ChangeSet) and others.full else selector
        if other is None or _is_one_payload(other, selector):
            self._unfiltered = selector.state
            raise _FallBack(Fallback(), _NOT_FILTERED)
        self._filtered_id, self._unfiltered = selector.id, ""

    async def _stream(self, backoff: SourceBackoff) -> AsyncGenerator[Success, None]:
        """Yield the updates of one stream, which always ends by raising; see `_poll`."""
        basis = self._take_basis()
        directive: Fallback | None = None
        delivered = False
        try:
            url = transfer_url(self._stream_uri or "", STREAM, basis, self._filter)
            async with self._get(url, "text/event-stream", self._timings.read_timeout) as response:
                directive = fdv2.fallback(first_headers(response))
                require_event_stream(response)
                self._response = response
                async with aclosing(self._told(response, Reader(basis))) as told:
                    async for each in told:
                        if each is not None:
                            await self._require_filter(each)
                        update = UpToDate() if each is None else self._delivered(each)
                        if directive is not None:
                            raise _FallBack(directive, _WANTED, update)
                        delivered, self._works_since = True, clock.monotonic()
                        backoff.succeeded(self._works_since)
                        self._stream_outage.end("The stream works again")
                        yield update
        except (InvalidData, UpstreamUnavailable) as e:
            if directive is not None:
                raise _FallBack(directive, _WANTED) from e
            self._begins_anew |= not delivered and isinstance(e, InvalidData)
            raise
        finally:
            self._response = None
            self._begins_anew |= not delivered and not basis

    async def _told(self, response: Response, reader: Reader) -> AsyncGenerator[Told | None, None]:
        """Yield what a stream tells; None if it only shows that it is alive."""
        decoder = Decoder()
        silent_until: float | None = clock.monotonic() + self._timings.first_event
        last_yield: float | None = None  # monotonic; None until it has told something
        paused = clock.monotonic()
        while chunk := await _next_chunk(response, silent_until):
            for event in decoder.feed(chunk):
                silent_until = None
                told = reader.read(event.name, event.data)
                if isinstance(told, Goodbye):
                    raise _goodbye(told, Reconnect())
                if told is not None:
                    last_yield = clock.monotonic()
                    yield told
                if clock.monotonic() - paused > SLICE:
                    await asyncio.sleep(0)
                    paused = clock.monotonic()
            # Heartbeats confirm the data, too, once there is some.
            now = clock.monotonic()
            if last_yield is not None and now - last_yield >= self._timings.confirm_every:
                last_yield = now
                yield None
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "the server closed the stream")

    @asynccontextmanager
    async def _get(self, url: str, accept: str, read_timeout: float) -> AsyncIterator[Response]:
        try:
            async with self._upstream.get(
                url, self._key, accept=accept, read_timeout=read_timeout
            ) as response:
                yield response
        except UpstreamUnavailable as e:
            directive = fdv2.fallback(e.headers)
            if directive is not None:
                raise _FallBack(directive, _WANTED) from e
            raise

    def _take_basis(self) -> str:
        """Return the name of the data to continue from; empty if everything is wanted."""
        anew, self._begins_anew = self._begins_anew, False
        return "" if anew else self._basis

    def _delivered(self, told: Told) -> Success:
        """Return the update for what upstream has told, and continue from there."""
        if isinstance(told, ChangeSet):
            self._selector = told.selector
            self._basis = told.selector.state if told.selector else ""
            return told
        return UpToDate(self._basis)

    def _is_older(self, changes: ChangeSet) -> bool:
        """Return whether data are older than those delivered before."""
        before, after = self._selector, changes.selector
        if before is None or after is None or not changes.full:
            return False
        return before.id == after.id and after.version < before.version

    async def _by_fdv1(self, period: float) -> AsyncGenerator[Update, None]:
        """Yield the updates of FDv1, until FDv2 delivers again after a period."""
        source = self._fdv1 = self._make_fdv1()
        try:
            async with aclosing(source.updates()) as updates:
                coming = asyncio.ensure_future(anext(updates))
                returning = asyncio.create_task(self._return_after(period))
                try:
                    while not returning.done():
                        tasks = {coming, returning}
                        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                        if coming.done():
                            yield coming.result()
                            coming = asyncio.ensure_future(anext(updates))
                finally:
                    await _cancel(coming, returning)
        finally:
            self._fdv1 = None
        yield returning.result()

    async def _return_after(self, period: float) -> Success:
        """Return everything by FDv2, once upstream has it after a period."""
        while True:
            await asyncio.sleep(period)
            self._begins_anew = not self._unfiltered
            self._basis = (
                self._unfiltered or self._basis
            )  # so that it costs little to see that again
            try:
                return await self._poll()
            except _FallBack as e:
                period = e.fallback.period(randomness.fraction())
            except (UpstreamUnavailable, InvalidData) as e:
                period = self._timings.polls_after
                if _is_not_there(e):
                    period = Fallback().period(randomness.fraction())


_WANTED = "Upstream asks for FDv1"
_NOT_FILTERED = "Upstream does not filter by FDv2"


async def _next_chunk(response: Response, until: float | None) -> bytes:
    """Return the next bytes of a response; none at its end.

    Args:
        response: the response.
        until: monotonic time at which they have to be there; None for no limit of its own.

    Raises:
        UpstreamUnavailable: there were none in time.
    """
    try:
        async with asyncio.timeout(None if until is None else max(0.0, until - clock.monotonic())):
            return await response.content.readany()
    except TimeoutError as e:
        raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "no answer in time") from e


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _goodbye(goodbye: Goodbye, error: RelayError) -> RelayError:
    """Return the error for a connection that upstream is going to close.

    Args:
        goodbye: the last that upstream has said.
        error: if that says nothing about FDv1.
    """
    return error if goodbye.fallback is None else _FallBack(goodbye.fallback, _WANTED)


def _is_one_payload(one: Selector, other: Selector) -> bool:
    """Return whether names are of one payload; some give each state an ID of its own."""
    return one.id == other.id or distance(one.state, other.state) is not None


def _is_not_there(error: object) -> bool:
    """Return whether upstream does not know a path of FDv2."""
    return isinstance(error, UpstreamUnavailable) and error.status in _NOT_THERE


def _unknown_to_upstream(error: RelayError) -> _FallBack:
    return _FallBack(Fallback(), f"Upstream does not know FDv2 ({error})")
