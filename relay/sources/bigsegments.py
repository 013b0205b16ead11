"""LaunchDarkly's patches of big segments: polls, and the stream (datastore 4.9)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import chain

from relay.errors import ErrorKind, UpstreamUnavailable
from relay.model.credential import SDKKey
from relay.protocol.bigsegments import Patch, PatchReader, revisions_url
from relay.protocol.sse import Decoder
from relay.protocol.urls import join
from relay.upstream import Response, Upstream

READ_TIMEOUT = 300.0
"""Seconds of silence after which the stream counts as dead, as for flags (streams 2.4)."""

POLL_TIMEOUT = 60.0
"""Seconds without a byte after which a poll has failed. An answer as a whole may take any time, as
the first one may hold millions of members."""


class BigSegmentSource:
    """Patches of one environment.

    Args:
        upstream: the HTTP session.
        base_uri: base URI of polls.
        stream_uri: base URI of streams.
        key: returns the SDK key to use for the next request.
    """

    def __init__(
        self, upstream: Upstream, base_uri: str, stream_uri: str, key: Callable[[], SDKKey]
    ) -> None:
        self._upstream = upstream
        self._base_uri = base_uri
        self._stream_url = join(stream_uri, "/big-segments")
        self._key = key

    def __repr__(self) -> str:
        return f"<BigSegmentSource {self._key().masked}>"

    async def poll(self, after: str | None) -> AsyncGenerator[Patch, None]:
        """Yield the patches that one answer holds, as they arrive.

        Args:
            after: version after which to begin; None or empty for all patches.

        Raises:
            UpstreamUnavailable: there is no answer, or it is cut off.
            InvalidData: it is no array of patches.
        """
        url, reader = revisions_url(self._base_uri, after), PatchReader()
        async with self._upstream.get(
            url, self._key(), accept="application/json", read_timeout=POLL_TIMEOUT
        ) as response:
            async for chunk in response.content.iter_any():
                async for patch in _unhurried(reader.feed(chunk)):
                    yield patch
            async for patch in _unhurried(reader.finish()):
                yield patch

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[AsyncGenerator[tuple[Patch, ...], None]]:
        """Open the stream, and yield an iterator over its events.

        Raises:
            UpstreamUnavailable: the stream cannot be opened, or ends.
            InvalidData: an event holds no array of patches.
        """
        async with self._upstream.get(
            self._stream_url, self._key(), accept="text/event-stream", read_timeout=READ_TIMEOUT
        ) as response:
            yield _events(response)


async def _events(response: Response) -> AsyncGenerator[tuple[Patch, ...], None]:
    decoder = Decoder()
    async for chunk in response.content.iter_any():
        for event in decoder.feed(chunk):
            reader = PatchReader()
            patches = chain(reader.feed(event.data), reader.finish())
            yield tuple([patch async for patch in _unhurried(patches)])
    raise UpstreamUnavailable(ErrorKind.NETWORK_ERROR, "the server closed the stream")


async def _unhurried(patches: Iterator[Patch | None]) -> AsyncGenerator[Patch, None]:
    """Yield patches; let other tasks run where their reader pauses."""
    for patch in patches:
        if patch is None:
            await asyncio.sleep(0)
        else:
            yield patch
